"""The names that users of Distiller call, and the snippets they have."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import yaml

import distiller
import distiller.quantization as quant


def test_every_public_name_is_there_and_listed_once():
    assert sorted(set(distiller.__all__)) == sorted(distiller.__all__)
    assert [name for name in distiller.__all__ if not hasattr(distiller, name)] == []


@pytest.mark.parametrize(
    "name",
    """CompressionScheduler ParameterMasker create_model_masks_dict PruningPolicy ScheduledTrainingPolicy
    policy.PolicyLoss policy.LossComponent scheduler.ParameterMasker SummaryGraph normalize_module_name
    denormalize_module_name sparsity density sparsity_3D density_3D sparsity_ch density_ch sparsity_cols
    density_cols sparsity_rows non_zero_channels volume to_np create_mask_threshold_criterion
    create_mask_level_criterion create_mask_sensitivity_criterion group_threshold_mask mask_tensor norms.l1_norm
    norms.l2_norm norms.max_norm model_find_param model_find_module_name has_children model_device
    get_dummy_input set_deterministic pruning.L1RankedStructureParameterPruner pruning.MagnitudeParameterPruner
    model_summary export_img_classifier_to_onnx model_performance_summary model_transforms.fuse_modules model_transforms.fold_batch_norms
    models.create_model models.ALL_MODEL_NAMES apputils.save_checkpoint apputils.load_checkpoint
    apputils.load_lean_checkpoint data_loggers.QuantCalibrationStatsCollector data_loggers.collector_context
    learning_rate.MultiStepMultiGammaLR modules.Concat modules.EltwiseAdd modules.EltwiseMult modules.Split
    quantization.Quantizer quantization.LinearQuantMode quantization.ClipMode
    quantization.PostTrainLinearQuantizer quantization.RangeLinearQuantParamLayerWrapper
    quantization.RangeLinearQuantConcatWrapper quantization.RangeLinearQuantEltwiseAddWrapper
    quantization.RangeLinearQuantEltwiseMultWrapper quantization.get_quantized_range
    quantization.is_linear_quant_mode_symmetric quantization.linear_quantize_clamp
    quantization.linear_dequantize quantization.quantizer.QBits model_sparsity model_params_stats
    perform_sensitivity_analysis sensitivities_to_png sensitivities_to_csv weights_sparsity_summary
    file_config config_component_from_file_by_class data_loggers.PythonLogger data_loggers.TensorBoardLogger
    data_loggers.CsvLogger data_loggers.NullLogger activation_channels_l1 activation_channels_apoz
    activation_channels_means masks_sparsity_tbl_summary data_loggers.SummaryActivationStatsCollector
    data_loggers.RecordsActivationStatsCollector draw_img_classifier_to_file draw_model_to_file create_png
    attributes_summary connectivity_summary model_summaries.connectivity_summary
    model_summaries.connectivity_summary_verbose data_loggers.collect_histograms data_loggers.collect_raw_outputs
    data_loggers.ActivationHistogramsCollector data_loggers.RawActivationsCollector quantization.WRPNQuantizer
    quantization.DorefaQuantizer quantization.PACTQuantizer quantization.QuantAwareTrainRangeLinearQuantizer
    quantization.NCFQuantAwareTrainQuantizer quantization.ptq_greedy_search quantization.ptq_coordinate_search
    functional_modules.DistillerLSTM functional_modules.DistillerLSTMCell
    functional_modules.convert_model_to_distiller_lstm quantization.SimulatedFoldedBatchNorm
    export.distiller_qparams_to_pytorch export.distiller_quantized_tensor_to_pytorch
    export.convert_distiller_ptq_model_to_pytorch""".split(),
)
def test_distillers_name_is_there(name):
    found = distiller
    for part in name.split("."):
        found = getattr(found, part)
    assert found is not None


def test_the_snippet_of_the_deck_runs_as_it_stands(tmp_path):
    model = distiller.models.create_model(False, "mnist", "lenet5", parallel=False)
    images = torch.rand(16, *model.input_shape[1:])
    distiller.data_loggers.collect_quant_stats(model, lambda model: model(images), save_dir=tmp_path)
    model_quant_stats_file = str(tmp_path / "acts_quantization_stats.yaml")

    quant_mode = {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"}
    dummy_input = distiller.get_dummy_input(input_shape=model.input_shape)
    quantizer = quant.PostTrainLinearQuantizer(
        deepcopy(model),
        bits_activations=8,
        bits_parameters=8,
        mode=quant_mode,
        model_activation_stats=model_quant_stats_file,
        overrides=None,
    )
    quantizer.prepare_model(dummy_input)

    model.eval()
    with torch.no_grad():
        dense, quantized = model(images), quantizer.model.eval()(images)
    assert not torch.equal(dense, quantized)
    assert (dense - quantized).abs().max() < 0.05 * dense.abs().max()


def test_the_golden_scale_of_resnet18_in_distillers_convention(compat):
    path = compat / "stats/resnet18_quant_stats.yaml"
    stats = yaml.safe_load(path.read_text())
    model = distiller.models.create_model(False, "imagenet", "resnet18", parallel=False)
    quantizer = quant.PostTrainLinearQuantizer(
        model,
        mode={"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"},
        model_activation_stats=str(path),
    )
    quantizer.prepare_model(distiller.get_dummy_input(input_shape=model.input_shape))
    conv1 = dict(quantizer.model.named_modules())["conv1"]
    # 255 steps over [0, bn1.output.max]: batch norm folded, ReLU fused
    assert float(conv1.output_scale) == pytest.approx(255 / stats["bn1"]["output"]["max"], rel=1e-6)
    assert float(conv1.output_scale) == pytest.approx(34.65918, abs=1e-5)


def test_a_ten_line_loop_of_ones_own(tiny_cnn, tiny_loader):
    """The loop of interfaces.py, on a user's model and data."""
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.01)
    scheduler = distiller.CompressionScheduler(tiny_cnn)
    pruner = distiller.pruning.SparsityLevelParameterPruner("half", {"conv2.weight": 0.5})
    scheduler.add_policy(distiller.PruningPolicy(pruner, None), starting_epoch=0, ending_epoch=1)
    scheduler.on_epoch_begin(0)  # as Distiller's users call it
    for step, (images, labels) in enumerate(tiny_loader):
        scheduler.on_minibatch_begin(0, step, 3, optimizer)
        loss = torch.nn.functional.cross_entropy(tiny_cnn(images), labels)
        loss = scheduler.before_backward_pass(0, step, 3, loss, optimizer)
        optimizer.zero_grad()
        loss.backward()
        scheduler.before_parameter_optimization(0, step, 3, optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(0, step, 3, optimizer)
    scheduler.on_epoch_end(0, optimizer)
    assert distiller.sparsity(tiny_cnn.conv2.weight) == 0.5


def test_set_param_mask_takes_distillers_meta_and_says_what_it_lacks(tiny_cnn):
    masks = distiller.create_model_masks_dict(tiny_cnn)
    pruner = distiller.pruning.AutomatedGradualPruner("agp", 0.1, 0.5, ["fc.weight"])
    meta = {"starting_epoch": 0, "ending_epoch": 5, "frequency": 1, "current_epoch": 4, "model": tiny_cnn}
    pruner.set_param_mask(tiny_cnn.fc.weight, "fc.weight", masks, meta)
    mask = masks["fc.weight"].mask
    assert mask is not None
    assert (mask == 0).float().mean() == pytest.approx(0.5, abs=1 / mask.numel())
    with pytest.raises(distiller.errors.DistillerError) as caught:
        pruner.set_param_mask(tiny_cnn.fc.weight, "fc.weight", masks, None)
    assert str(caught.value) == (
        "set_param_mask: this pruner's masks depend on 'starting_epoch', which 'meta' does not say; "
        "give a StepContext, or a dict with starting_epoch, ending_epoch, current_epoch and model"
    )


def test_set_param_mask_is_called_as_in_distiller(tiny_cnn):
    masks = distiller.create_model_masks_dict(tiny_cnn)
    pruner = distiller.pruning.MagnitudeParameterPruner("test", {"*": 0.1})
    pruner.set_param_mask(tiny_cnn.conv2.weight, "conv2.weight", masks, None)
    expected = (tiny_cnn.conv2.weight.abs() > 0.1).float()
    assert torch.equal(masks["conv2.weight"].mask, expected)
    masks["conv2.weight"].apply_mask(tiny_cnn.conv2.weight)
    assert torch.equal(tiny_cnn.conv2.weight != 0, expected != 0)
