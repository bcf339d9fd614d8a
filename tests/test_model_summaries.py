import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from distiller.errors import UsageError
from distiller.graph import SummaryGraph
from distiller.model_summaries import (
    PICTURES,
    SUMMARIES,
    attributes_summary,
    attributes_summary_tbl,
    connectivity_summary,
    connectivity_summary_verbose,
    connectivity_tbl_summary,
    masks_sparsity_summary,
    masks_sparsity_tbl_summary,
    model_params_stats,
    model_performance_summary,
    model_performance_tbl_summary,
    model_sparsity,
    model_summary,
    modules_summary,
    total_macs,
    weights_sparsity_levels,
    weights_sparsity_summary,
    weights_sparsity_tbl_summary,
)
from distiller.models import RNNModel, create_model
from distiller.scheduler import CompressionScheduler
from tests.test_graph_picture import needs_dot


@pytest.fixture
def pruned() -> nn.Module:
    """A convolution (4, 2, 3, 3) without filter 0 and channel 1, a linear layer (3, 4) without row 2."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[0].weight[0] = 0
        model[0].weight[:, 1] = 0
        model[3].weight[2] = 0
        model[3].weight[0, 0] = -2
    return model


def test_sparsity_table_has_the_columns_and_values_of_distiller(pruned):
    table = weights_sparsity_summary(pruned)
    assert list(table.columns) == [
        "Name", "Shape", "NNZ (dense)", "NNZ (sparse)", "Cols (%)", "Rows (%)", "Ch (%)", "2D (%)", "3D (%)",
        "Fine (%)", "Std", "Mean", "Abs-Mean",
    ]  # fmt: skip
    conv, linear, total = table.to_dict("records")
    assert (conv["Name"], conv["Shape"], conv["NNZ (dense)"]) == ("0.weight", "(4, 2, 3, 3)", 72)
    assert conv["NNZ (sparse)"] == 3 * 1 * 9
    assert [conv[c] for c in ("Cols (%)", "Rows (%)", "Ch (%)", "2D (%)", "3D (%)", "Fine (%)")] == [
        0, 0, 50, 62.5, 25, 62.5,
    ]  # fmt: skip
    # Linear weights (out, in) are stored transposed: a column is an output.
    assert linear["Cols (%)"] == pytest.approx(100 / 3)
    assert linear["Rows (%)"] == 0
    assert [linear[c] for c in ("Ch (%)", "3D (%)")] == [0, 0]
    values = np.array([-2, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    assert linear["Std"] == pytest.approx(values.std(ddof=1))
    assert linear["Mean"] == pytest.approx(values.mean())
    assert linear["Abs-Mean"] == pytest.approx(np.abs(values).mean())
    assert (total["Name"], total["NNZ (dense)"], total["NNZ (sparse)"]) == ("Total sparsity:", 84, 27 + 8)
    assert total["Fine (%)"] == pytest.approx(100 * (1 - 35 / 84))


def test_only_weights_of_two_and_more_dimensions_are_listed(pruned):
    assert list(weights_sparsity_summary(pruned)["Name"]) == ["0.weight", "3.weight", "Total sparsity:"]


def test_names_in_the_tables_are_canonical(tiny_cnn):
    tables = weights_sparsity_summary(nn.DataParallel(tiny_cnn)), weights_sparsity_summary(tiny_cnn)
    pd.testing.assert_frame_equal(*tables)


def test_sparsity_csv_has_the_columns_of_distiller(pruned):
    table = weights_sparsity_levels(pruned)
    assert table.to_csv(index=False).splitlines()[:2] == [
        "parameter,shape,volume,sparse volume,sparsity level",
        '0.weight,"(4, 2, 3, 3)",72,27,62.5',
    ]


def test_model_sparsity_is_a_fraction_where_distiller_returned_percent(pruned):
    """DEFECT of Distiller: model_params_stats returned percent although its docstring said fraction."""
    assert model_params_stats(pruned) == (pytest.approx(1 - 35 / 84), 84, 35)
    assert model_sparsity(pruned) == pytest.approx(1 - 35 / 84)


def test_a_model_without_weights_is_not_sparse():
    assert model_params_stats(nn.ReLU()) == (0.0, 0, 0)
    assert weights_sparsity_summary(nn.ReLU())["NNZ (dense)"].tolist() == [0]


def test_compute_table_agrees_with_distillers_numbers():
    model = create_model(False, "cifar10", "simplenet_cifar")
    table = model_performance_summary(model, torch.zeros(1, 3, 32, 32))
    assert list(table.columns) == [
        "Name", "Type", "Attrs", "IFM", "IFM volume", "OFM", "OFM volume", "Weights volume", "MACs",
    ]  # fmt: skip
    assert table["Name"].tolist() == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert table["MACs"].tolist() == [352800, 240000, 48000, 10080, 840]
    first, *_, last = table.to_dict("records")
    assert first == {
        "Name": "conv1",
        "Type": "Conv2d",
        "Attrs": "k=(5, 5), s=(1, 1), g=1",
        "IFM": "(1, 3, 32, 32)",
        "IFM volume": 3 * 32 * 32,
        "OFM": "(1, 6, 28, 28)",
        "OFM volume": 6 * 28 * 28,
        "Weights volume": 450,
        "MACs": 352800,
    }
    assert (last["Type"], last["Attrs"], last["IFM"], last["OFM"]) == ("Linear", "", "(1, 84)", "(1, 10)")


@pytest.mark.parametrize(
    ("arch", "macs"),
    [("resnet20_cifar", 40_813_184), ("resnet56_cifar", 125_747_840), ("resnet50", 4_089_184_256)],
)
def test_total_macs_agree_with_distillers(arch, macs):
    model = create_model(False, None, arch)
    assert total_macs(model, model.input_shape) == macs


def test_compute_of_the_language_model_agrees_with_its_closed_form():
    """An LSTM has four gates of 8 units, each fed by 6 inputs (by 8 in the second layer) and 8 hidden units."""
    model = RNNModel(50, emsize=6, nhid=8, nlayers=2)
    table = model_performance_summary(model, (torch.zeros(5, 3, dtype=torch.long), model.init_hidden(3)))
    assert table[["Name", "Type", "IFM", "OFM", "MACs"]].to_numpy().tolist() == [
        ["rnn", "LSTM", "(5, 3, 6)", "(5, 3, 8)", 5 * 3 * 4 * 8 * ((6 + 8) + (8 + 8))],
        ["decoder", "Linear", "(5, 3, 8)", "(5, 3, 50)", 5 * 3 * 8 * 50],
    ]


def test_figures_are_per_sample(tiny_cnn):
    single = model_performance_summary(tiny_cnn, torch.zeros(1, 1, 8, 8))
    batch = model_performance_summary(tiny_cnn, torch.zeros(4, 1, 8, 8), batch_size=4)
    columns = ["IFM volume", "OFM volume", "Weights volume", "MACs"]
    pd.testing.assert_frame_equal(single[columns], batch[columns])
    assert total_macs(tiny_cnn, (4, 1, 8, 8)) == single["MACs"].sum()


def test_compute_runs_the_model_in_evaluation_mode_where_distiller_moved_batch_norms(tiny_cnn):
    """Distiller ran the model in its current mode: a summary of a model in training changed its statistics."""
    before = tiny_cnn.bn1.running_mean.clone()
    model_performance_summary(tiny_cnn.train(), torch.randn(2, 1, 8, 8))
    assert torch.equal(tiny_cnn.bn1.running_mean, before)


def test_total_macs_does_not_move_the_random_state(tiny_cnn):
    before = torch.get_rng_state()
    total_macs(tiny_cnn, (1, 1, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_table_lists_what_has_no_children(tiny_cnn):
    table = modules_summary(nn.DataParallel(nn.Sequential(tiny_cnn, nn.ReLU())))
    assert table.to_dict("list") == {
        "Name": ["0.conv1", "0.bn1", "0.relu1", "0.conv2", "0.relu2", "0.pool", "0.fc", "1"],
        "Type": ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "ReLU", "AdaptiveAvgPool2d", "Linear", "ReLU"],
    }


@pytest.mark.parametrize("what", [what for what in SUMMARIES if what not in PICTURES])
def test_summaries_are_texts_and_print_nothing(what, tiny_cnn, capsys):
    text = model_summary(tiny_cnn, what)
    assert "conv1" in text
    assert capsys.readouterr() == ("", "")


def test_texts_end_with_the_totals(pruned, tiny_cnn):
    macs = 4 * 64 * 9 + 6 * 64 * 4 * 9 + 6 * 4
    text = model_performance_tbl_summary(tiny_cnn, torch.zeros(1, 1, 8, 8))
    assert text.splitlines()[-1] == f"Total MACs: {macs:,}"
    total = weights_sparsity_tbl_summary(pruned).splitlines()[-2]
    assert [cell.strip() for cell in total.split("|")[1:5]] == ["Total sparsity:", "-", "84", "35"]
    assert "58.33" in total


def test_compute_takes_the_shape_of_a_data_set():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    assert model_summary(model, "compute", "mnist").endswith("Total MACs: 7,840")
    with pytest.raises(UsageError, match="neither data set nor input_shape given"):
        model_summary(model, "compute")


def test_sparsity_writes_the_csv_only_where_asked(pruned, tmp_path):
    model_summary(pruned, "sparsity", logdir=tmp_path)
    written = pd.read_csv(tmp_path / "weights_sparsity.csv")
    pd.testing.assert_frame_equal(written, weights_sparsity_levels(pruned))


@needs_dot
@pytest.mark.parametrize(
    "arch, what, name",
    [
        (None, "png", "TinyCnn.png"),
        ("tiny", "png_w_params", "tiny_w_params.png"),
        ("my.nets:Tiny", "png", "my.nets_Tiny.png"),
    ],
)
def test_a_picture_has_the_name_of_the_architecture(arch, what, name, tiny_cnn, tmp_path):
    if arch is not None:
        tiny_cnn.arch = arch
    text = model_summary(nn.DataParallel(tiny_cnn), what, logdir=tmp_path / "made")
    assert text == f"Saved the picture of the graph to: {tmp_path / 'made' / name}"
    assert (tmp_path / "made" / name).is_file()


@pytest.fixture
def branched() -> SummaryGraph:
    """fc - (tanh, Add) - Add: the input of tanh is added to its output."""

    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.tanh = nn.Linear(3, 2), nn.Tanh()

        def forward(self, x):
            x = self.fc(x)
            return self.tanh(x) + x

    return SummaryGraph(Branched(), torch.zeros(1, 3))


def test_connectivity_names_the_neighbours_of_each_operation(branched):
    assert connectivity_summary(branched).to_dict("split")["data"] == [
        ["fc", "Gemm", [], ["tanh", "Add"]],
        ["tanh", "Tanh", ["fc"], ["Add"]],
        ["Add", "Add", ["tanh", "fc"], []],
    ]


def test_verbose_connectivity_names_every_tensor_with_its_shape(branched):
    table = connectivity_summary_verbose(branched)
    assert list(table.columns) == ["Name", "Type", "Inputs", "Outputs"]
    assert table.iloc[0].tolist() == [
        "fc",
        "Gemm",
        ["x (1, 3)", "fc.weight (2, 3)", "fc.bias (2,)"],
        ["(1, 2)"],
    ]
    assert table["Inputs"][2] == ["tanh (1, 2)", "fc (1, 2)"]


def test_attributes_are_a_line_each_and_may_be_left_out(branched):
    table = attributes_summary(branched, ignore_attrs=["ai", "n_ifm", "n_ofm", "fm_vol"])
    assert table.to_dict("split")["data"] == [
        ["fc", "Gemm", "MACs: 6\nfootprint: 11\nweights_vol: 6"],
        ["tanh", "Tanh", "MACs: 0\nfootprint: 4\nweights_vol: 0"],
        ["Add", "Add", "MACs: 0\nfootprint: 6\nweights_vol: 0"],
    ]
    assert "ai: 0.545" in attributes_summary(branched)["Attributes"][0]


def test_the_tables_of_the_graph_as_texts(branched):
    lines = connectivity_tbl_summary(branched).splitlines()
    assert [line.split("|")[3].strip() for line in lines[3:-1]] == ["", "", "fc", "tanh", "fc"]
    assert "fc.weight (2, 3)" in connectivity_tbl_summary(branched, verbose=True)
    assert "MACs: 6 " in attributes_summary_tbl(branched)


def test_an_unknown_summary_is_refused(tiny_cnn):
    with pytest.raises(UsageError) as caught:
        model_summary(tiny_cnn, "sparse")
    message = (
        "model_summary: unknown summary 'sparse'; there are sparsity, compute, model, modules, low-rank, png, "
        "png_w_params"
    )
    assert str(caught.value) == message


def test_a_model_without_layers_that_compute_has_an_empty_table():
    model = nn.Sequential(nn.Flatten())
    model.input_shape = (1, 1, 2, 2)
    assert "Total MACs: 0" in model_summary(model, "compute")


@pytest.fixture
def masked() -> CompressionScheduler:
    """Of a model as `pruned`, dense, with masks: of filter 0, and (as slimming does) of one batch-norm scale."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    scheduler = CompressionScheduler(model)
    mask = torch.ones(4, 2, 3, 3)
    mask[0] = 0
    scheduler.masks.put("0.weight", mask)
    scheduler.masks.put("1.weight", torch.tensor([0.0, 1.0, 1.0, 1.0]))
    return scheduler


def test_the_table_of_masks_is_of_the_masks_and_not_of_the_weights(masked):
    table = masks_sparsity_summary(masked.model, masked)
    assert list(table.columns) == [
        "Name", "Shape", "NNZ (dense)", "NNZ (sparse)", "Cols (%)", "Rows (%)", "Ch (%)", "2D (%)", "3D (%)",
        "Fine (%)",
    ]  # fmt: skip
    assert table.to_numpy().tolist() == [
        ["0.weight", "(4, 2, 3, 3)", 72, 54, 0.0, 0.0, 0.0, 25.0, 25.0, 25.0],
        ["1.weight", "(4,)", 4, 3, 0.0, 0.0, 0.0, 0.0, 0.0, 25.0],
        ["3.weight", "(3, 4)", 12, 12, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ["Total sparsity:", "-", 88, 69, 0.0, 0.0, 0.0, 0.0, 0.0, pytest.approx(100 * 19 / 88)],
    ]


def test_a_mask_of_gates_prunes_what_is_zero_in_it(masked):
    masked.masks.put("3.weight", torch.tensor([[0.0], [0.5], [1.0]]).expand(3, 4))
    (linear,) = [
        row
        for row in masks_sparsity_summary(masked.model, masked).to_dict("records")
        if row["Name"] == "3.weight"
    ]
    assert (linear["NNZ (sparse)"], linear["Cols (%)"]) == (8, pytest.approx(100 / 3))


def test_without_masks_nothing_is_pruned(pruned):
    total = masks_sparsity_summary(pruned, CompressionScheduler(pruned)).iloc[-1]
    assert (total["NNZ (dense)"], total["NNZ (sparse)"], total["Fine (%)"]) == (84, 84, 0)


def test_the_masks_of_a_model_without_parameters_are_a_row_of_zeros():
    table = masks_sparsity_summary(nn.ReLU(), CompressionScheduler(nn.ReLU()))
    assert table["Name"].tolist() == ["Total sparsity:"]


def test_the_table_of_masks_as_a_text(masked):
    lines = masks_sparsity_tbl_summary(masked.model, masked).splitlines()
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        "0.weight", "(4, 2, 3, 3)", "72", "54", "0.00", "0.00", "0.00", "25.00", "25.00", "25.00",
    ]  # fmt: skip
