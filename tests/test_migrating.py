"""What docs/migrating.md says is here is here, what it says is not is not, and nothing of Distiller is left out."""

from __future__ import annotations

import dataclasses
import re
from functools import reduce
from pathlib import Path

import pytest

import compress_classifier
import distiller
import distiller.config
from distiller.models import ALL_MODEL_NAMES
from distiller.policy import PruningArgs, RegularizationArgs
from distiller.registry import DISTILLERS_ALONE, EXTENSIONS, LR_SCHEDULERS, PRUNERS, QUANTIZERS, REGULARIZERS

ROOT = Path(__file__).resolve().parents[1]
COMPAT = ROOT / "../shared/compat"
TEXT = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")

AVAILABLE, MISSING = "available", "not in this version"
REGISTRIES = {
    "Pruners": PRUNERS,
    "Regularizers": REGULARIZERS,
    "Quantizers": QUANTIZERS,
    "Learning-rate schedulers": LR_SCHEDULERS,
    "Extensions": EXTENSIONS,
}
SECTIONS = dict(
    zip(REGISTRIES, ("pruners", "regularizers", "quantizers", "lr_schedulers", "extensions"), strict=True)
)

# What a schedule of Distiller can name, from its description; its LR schedulers are those of PyTorch 1.3.
DISTILLERS_CLASSES = {
    "Pruners": """MagnitudeParameterPruner SensitivityPruner SparsityLevelParameterPruner
        AutomatedGradualPruner BaiduRNNPruner SplicingPruner StructureParameterPruner
        L1RankedStructureParameterPruner L1RankedStructureParameterPruner_AGP
        L2RankedStructureParameterPruner L2RankedStructureParameterPruner_AGP
        RandomLevelStructureParameterPruner
        ActivationAPoZRankedFilterPruner ActivationAPoZRankedFilterPruner_AGP
        ActivationMeanRankedFilterPruner ActivationMeanRankedFilterPruner_AGP
        GradientRankedFilterPruner GradientRankedFilterPruner_AGP
        RandomRankedFilterPruner RandomRankedFilterPruner_AGP
        BernoulliFilterPruner BernoulliFilterPruner_AGP FMReconstructionChannelPruner""".split(),
    "Regularizers": "L1Regularizer GroupLassoRegularizer GroupVarianceRegularizer".split(),
    "Quantizers": """PostTrainLinearQuantizer QuantAwareTrainRangeLinearQuantizer
        NCFQuantAwareTrainQuantizer DorefaQuantizer PACTQuantizer WRPNQuantizer""".split(),
    "Learning-rate schedulers": """StepLR MultiStepLR ExponentialLR CosineAnnealingLR
        CosineAnnealingWarmRestarts ReduceLROnPlateau CyclicLR OneCycleLR LambdaLR
        PolynomialLR MultiStepMultiGammaLR""".split(),
    "Extensions": "FilterRemover ChannelRemover StructureRemover".split(),
}
DISTILLERS_ARGS = """levels keep_mask mini_batch_pruning_frequency mask_on_forward_only mask_gradients
    use_double_copies discard_masks_at_minibatch_end skip_first_minibatch fold_batchnorm""".split()
DISTILLERS_MODELS = [
    *"plain20_cifar plain20_cifar_nobn simplenet_cifar simplenet_mnist simplenet_v2_mnist".split(),
    *"mobilenet mobilenet_025 mobilenet_050 mobilenet_075 mobilenet_v1_dropout alexnet_bn".split(),
    *"resnext50_32x4d resnext101_32x8d wide_resnet50_2 wide_resnet101_2 resnet50_earlyexit".split(),
    *(f"resnet{depth}_cifar" for depth in (20, 32, 44, 56)),
    *(f"resnet{depth}_cifar_earlyexit" for depth in (20, 32, 44, 56, 110, 1202)),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"preact_resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"preact_resnet{depth}_cifar{end}" for depth in (20, 32, 44, 56, 110) for end in ("", "_conv_ds")),
    *(f"vgg{depth}{end}_cifar" for depth in (11, 13, 16, 19) for end in ("", "_bn")),
]
# What its tests, notebooks and examples call; names that are here and tested as such are in test_public_api.py.
DISTILLERS_NAMES = """CompressionScheduler ParameterMasker create_model_masks_dict PruningPolicy
    ScheduledTrainingPolicy SummaryGraph onnx_name_2_pytorch_name normalize_module_name
    activation_channels_l1 activation_channels_apoz activation_channels_means assign_layer_fq_names
    remove_filters remove_channels draw_img_classifier_to_file export_img_classifier_to_onnx
    model_summaries.connectivity_summary model_summaries.connectivity_summary_verbose
    models.create_model models.register_user_model modules.DistillerLSTM modules.DistillerLSTMCell
    quantization.distiller_qparams_to_pytorch quantization.distiller_quantized_tensor_to_pytorch
    quantization.range_linear.TensorQuantMetadata quantization.sim_bn_fold.SimulatedFoldedBatchNorm
    data_loggers.collect_quant_stats data_loggers.collect_histograms data_loggers.collect_raw_outputs
    log_training_progress log_weights_sparsity log_activation_statistics log_model_buffers
    model_params_stats model_params_size model_numel perform_sensitivity_analysis
    KnowledgeDistillationPolicy DistillationLossWeights EarlyExitMgr file_config
    config_component_from_file_by_class find_module_by_fq_name make_non_parallel_copy MutableNamedTuple
    directives.freeze_training directives.freeze_all directives.adjust_dropout
    utils.yaml_ordered_load utils.optimizer_device_name yaml_ordered_save weights_sparsity_summary""".split()


def part(heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of all tables in a text, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {index - 1 for index, line in enumerate(lines) if line.startswith("|---")}
    body = [line for index, line in enumerate(lines) if index not in heads and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def states(text: str, what: str) -> dict[str, str]:
    """The state of each name in the tables of a text whose first column is headed `what`."""
    found: dict[str, str] = {}
    for table in re.findall(r"(?:^\|[^\n]*\n)+", text, re.MULTILINE):
        if table.startswith(f"| {what} |"):
            for first, state, _ in rows(table):
                assert state in (AVAILABLE, MISSING), state
                for name in names(first):
                    assert name not in found, f"{name} is listed twice"
                    found[name] = state
    return found


def by_state(listed: dict[str, str], state: str) -> set[str]:
    return {name for name, given in listed.items() if given == state}


@pytest.mark.parametrize("heading", REGISTRIES)
def test_every_class_of_distiller_is_listed_with_its_state(heading):
    listed = states(part(heading), "class")
    assert set(listed) == set(DISTILLERS_CLASSES[heading])
    assert by_state(listed, AVAILABLE) == set(DISTILLERS_CLASSES[heading]) & set(REGISTRIES[heading])


def test_a_schedule_that_names_a_missing_class_is_told_that_it_is_distillers():
    missing = {name for h in REGISTRIES for name in by_state(states(part(h), "class"), MISSING)}
    assert missing == DISTILLERS_ALONE


def test_what_is_new_is_every_class_that_distiller_did_not_have():
    new = {(names(first)[0], section) for first, section in rows(part("New here"))}
    assert new == {
        (name, SECTIONS[heading])
        for heading, registry in REGISTRIES.items()
        for name in set(registry) - set(DISTILLERS_CLASSES[heading])
    }


def test_every_class_in_distillers_schedules_at_hand_is_listed():
    if not COMPAT.is_dir():
        pytest.skip("the folder shared/compat with other projects' files is not beside the project")
    listed = {name for heading in REGISTRIES for name in states(part(heading), "class")}
    for file in sorted(COMPAT.glob("schedules/**/*.yaml")):
        named = re.findall(r"^[^#\n]*\bclass: *['\"]?(\w+)", file.read_text(), re.MULTILINE)
        assert set(named) <= listed, file.name


def test_the_arguments_of_a_pruning_policy_are_listed_with_their_state():
    listed = states(part("Pruners"), "argument")
    here = {field.name for field in dataclasses.fields(PruningArgs)}
    assert set(listed) == set(DISTILLERS_ARGS)
    assert by_state(listed, AVAILABLE) == here & set(DISTILLERS_ARGS)
    assert [field.name for field in dataclasses.fields(RegularizationArgs)] == ["keep_mask"]


def test_every_flag_is_listed_with_its_state():
    """Which flags Distiller has, `tests/test_compress_classifier.py` says; the parser has them all."""
    listed = states(part("Command line"), "flag")
    (new,) = re.findall(r"^New flags: ([^\n]*)", TEXT, re.MULTILINE)
    known = set(compress_classifier.make_parser()._option_string_actions) - {"-h", "--help"}
    assert by_state(listed, MISSING) == set()
    assert by_state(listed, AVAILABLE) - {"DATASET_DIR"} == known - set(names(new))
    assert set(names(new)) <= known


def test_a_flag_stands_in_one_row_with_its_other_spellings():
    parser = compress_classifier.make_parser()
    for first, _, _ in rows(part("Command line")):
        if names(first) != ["DATASET_DIR"]:
            (action,) = {parser._option_string_actions[flag] for flag in names(first)}
            assert action.option_strings == names(first)


def test_the_summaries_are_those_of_the_program():
    (row,) = [row for row in rows(part("Command line")) if names(row[0]) == ["--summary"]]
    here = names(row[2].split(";", 1)[0])
    assert here == list(distiller.model_summaries.SUMMARIES)
    parser = compress_classifier.make_parser()
    for what in here:
        assert parser.parse_args(["--summary", what]).summary == [what]


def test_the_models_that_are_missing_are_named():
    missing = {name for name in DISTILLERS_MODELS if name not in ALL_MODEL_NAMES}
    assert set(names(part("Models"))) == missing


def test_the_python_names_that_are_missing_are_named():
    def is_here(name: str) -> bool:
        try:
            reduce(getattr, name.split("."), distiller)
        except AttributeError:
            return False
        return True

    listed = {name for line in part("Python names").split("\n\n")[1].splitlines() for name in names(line)}
    assert listed == {name for name in DISTILLERS_NAMES if not is_here(name)}
