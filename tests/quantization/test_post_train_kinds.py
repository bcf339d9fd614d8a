"""Whole models of every kind of layer: what is quantized, in which type, and that it reloads bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distiller.modules import (
    BatchMatmul,
    Chunk,
    Concat,
    EltwiseDiv,
    EltwiseMult,
    EltwiseSub,
    Matmul,
    Mean,
    Split,
    Stack,
)
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.ptq_precision import FPWrapper
from distiller.quantization.quantizer import rebuild_quantized
from tests.quantization.networks import ASYMMETRIC, WordModel, quantized, signal_to_noise

WORDS = torch.randint(0, 20, (2, 3), generator=torch.Generator().manual_seed(8))
X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))


def kinds(model: Any) -> dict[str, str]:
    processed = model.quantizer.modules_processed.values()
    return {name: type(wrapper).__name__ for name, wrapper in processed if wrapper is not None}


class EveryKind(nn.Module):
    """For 4x8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.line, self.volume = nn.Conv1d(4, 4, 3, padding=1, bias=False), nn.Conv3d(1, 2, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.pool, self.flatten, self.mean = nn.MaxPool2d(2), nn.Flatten(2), Mean(dim=3)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.split, self.chunk, self.stack, self.join = Split(4, dim=1), Chunk(2, dim=1), Stack(1), Concat()
        self.sub, self.mult, self.div = EltwiseSub(), EltwiseMult(), EltwiseDiv()
        self.matmul, self.bmm, self.head = Matmul(), BatchMatmul(), nn.Linear(8, 5)
        self.positive = nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.line(self.flatten(self.pool(self.depthwise(x))))  # (n, 4, 16)
        volume = self.mean(self.pool(self.volume(x.unsqueeze(1)).flatten(1, 2)))  # (n, 8, 4)
        up = self.split(self.up(x).flatten(2)[..., :8])[0]  # (n, 4, 8)
        a, b = self.chunk(self.stack(self.left(up), self.right(up)).flatten(1, 2))  # (n, 4, 8) each
        c = self.mult(self.sub(a, b), self.div(a, self.positive(b)))
        d = self.matmul(rows.reshape(-1, 4, 4, 4)[:, 0], self.bmm(volume.transpose(1, 2), volume))
        return self.head(self.join(c, torch.cat([d, d], 2)))


@pytest.fixture
def every_kind() -> nn.Module:
    return EveryKind().eval()


def test_every_kind_of_layer_has_its_wrapper(every_kind, stats_of) -> None:
    model = quantized(every_kind, stats_of(every_kind, X), X[:1], mode=ASYMMETRIC, per_channel_wts=True)
    found = kinds(model)
    assert {name for name, kind in found.items() if kind == "RangeLinearQuantParamLayerWrapper"} == {
        "depthwise", "line", "volume", "up", "left", "right", "head",
    }  # fmt: skip
    others = {name: kind for name, kind in found.items() if not kind.startswith("RangeLinearQuantParam")}
    assert others == {
        "pool": "RangeLinearFakeQuantWrapper",
        "flatten": "RangeLinearFakeQuantWrapper",
        "mean": "RangeLinearFakeQuantWrapper",
        "stack": "RangeLinearQuantStackWrapper",
        "join": "RangeLinearQuantConcatWrapper",
        "sub": "RangeLinearQuantEltwiseSubWrapper",
        "mult": "RangeLinearQuantEltwiseMultWrapper",
        "div": "RangeLinearFakeQuantWrapper",
        "positive": "RangeLinearFakeQuantWrapper",
        "matmul": "RangeLinearQuantMatmulWrapper",
        "bmm": "RangeLinearQuantMatmulWrapper",
    }
    assert model.depthwise.weight_scale.shape == (4,)
    assert model.up.weight_scale.shape == (6,)
    assert signal_to_noise(every_kind, model, X) > 15
    # both operands of a matrix product on grids of their own
    assert model.matmul.input_grids == {0: model.line.output_quant, 1: model.bmm.output_quant}
    assert model.bmm.input_grids == {0: model.mean.output_quant, 1: model.mean.output_quant}
    # what is split or cut in chunks stays what it was
    assert model.left.input_grids[0] is model.up.output_quant
    assert model.sub.input_grids == {0: model.stack.output_quant, 1: model.stack.output_quant}


def test_every_kind_comes_close_at_16_bits(every_kind, stats_of) -> None:
    bits: dict[str, Any] = {"bits_activations": 16, "bits_parameters": 16, "bits_accum": 48}
    for mode in ("SYMMETRIC_RESTRICTED", ASYMMETRIC):
        model = quantized(every_kind, stats_of(every_kind, X), X[:1], mode=mode, per_channel_wts=True, **bits)
        assert signal_to_noise(every_kind, model, X) > 60


SETTINGS: dict[str, dict[str, Any]] = {
    "static": {},
    "4 bits, per channel": {"bits_parameters": 4, "per_channel_wts": True, "mode": "ASYMMETRIC_SIGNED"},
    "clipped": {"clip_acts": "GAUSS", "also_clip_weights": True},
    "approximated": {"scale_approx_mult_bits": 12},
    "kept weights": {"save_fp_weights": True},
    "weights only": {"bits_activations": None, "model_activation_stats": None},
    "activations only": {"bits_parameters": None},
    "dynamic": {"model_activation_stats": None},
    "fp16": {"fpq_module": 16, "model_activation_stats": None},
    "bf16": {"fpq_module": "bf16", "model_activation_stats": None},
    "fp64": {"fpq_module": 64, "model_activation_stats": None},
    "mixed": {"overrides": {"left|head": {"fpq_module": "bf16"}}},
    "faked": {"overrides": {".*": {"fake": True, "fpq_module": 16}}},
}


def assert_rebuilt_alike(make: Any, x: Tensor, settings: dict[str, Any], stats_of: Any) -> None:
    plain, settings = make().eval(), dict(settings)
    stats = stats_of(plain, x) if settings.pop("model_activation_stats", "some") is not None else None
    model = quantized(plain, stats, x, **settings)
    other = make()
    rebuild_quantized(other, model.quantizer_metadata)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert signal_to_noise(plain, model, x) > 5


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.filterwarnings("ignore:not quantized")
def test_a_rebuilt_model_computes_the_same_bit_for_bit(settings, stats_of) -> None:
    assert_rebuilt_alike(EveryKind, X, settings, stats_of)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": ASYMMETRIC},
        {"model_activation_stats": None},
        {"bits_activations": None, "model_activation_stats": None, "bits_parameters": 3},
        {"overrides": {"encoder|rnn.cells.1.*": {"fpq_module": "bf16"}}},
    ],
    ids=["static", "dynamic", "weights only", "mixed"],
)
@pytest.mark.filterwarnings("ignore:not quantized")
def test_a_rebuilt_loop_computes_the_same_bit_for_bit(settings, stats_of) -> None:
    assert_rebuilt_alike(WordModel, WORDS, settings, stats_of)


def test_an_embeddings_output_is_quantized_by_its_weight(stats_of) -> None:
    plain = WordModel().eval()
    stats = stats_of(plain, WORDS)
    del stats["encoder"]
    model = quantized(plain, stats, WORDS, mode=ASYMMETRIC)
    assert type(model.encoder).__name__ == "RangeLinearEmbeddingWrapper"
    assert model.rnn.cells[0].fc_gate_x.input_grids == {0: model.encoder.output_quant}
    assert torch.equal(model.encoder.output_quant.scale, model.encoder.weight_scale)
    narrow = quantized(plain, stats, WORDS, mode=ASYMMETRIC, overrides={"encoder": {"bits_weights": 4}})
    assert narrow.rnn.cells[0].fc_gate_x.input_grids[0].settings.num_bits == 4


def test_an_embedding_whose_weight_stays_is_quantized_at_its_output(stats_of) -> None:
    plain = WordModel().eval()
    model = quantized(plain, stats_of(plain, WORDS), WORDS, overrides={"encoder": {"bits_weights": None}})
    assert type(model.encoder).__name__ == "RangeLinearFakeQuantWrapper"
    assert torch.equal(model.encoder.wrapped_module.weight, plain.encoder.weight)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:not quantized, since the model does not call")
def test_weights_of_embedding_bags_and_renormalised_embeddings_stay_with_the_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.words = nn.EmbeddingBag(5, 4), nn.Embedding(5, 4, max_norm=1.0)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.bag(x) + self.words(x).mean(1))

    x = torch.tensor([[0, 2], [1, 4]])
    with pytest.warns(UserWarning, match="not quantized, since") as warned:
        model = quantized(Net(), None, x, bits_activations=None)
    assert [str(warning.message) for warning in warned] == [
        "not quantized, since sums and means of a weight's rows are not on the weight's grid: 'bag'",
        "not quantized, since their max_norm changes the weight while they run: 'words'",
    ]
    assert list(kinds(model)) == ["fc"]


def test_modules_of_a_loop_have_one_grid_and_what_passed_it_is_not_rounded_twice(stats_of) -> None:
    plain = WordModel(is_bidirectional=True).eval()
    model = quantized(plain, stats_of(plain, WORDS), WORDS, mode=ASYMMETRIC)
    for cell in (*model.rnn.cells, *model.rnn.cells_reverse):
        gates = cell.fc_gate_x.output_quant, cell.fc_gate_h.output_quant
        assert cell.eltwiseadd_gate.input_grids == dict(enumerate(gates))
        # the hidden and the cell state: zeros from outside first, then of the step before
        assert cell.fc_gate_h.inputs_quant["0"] is cell.eltwisemult_hidden.output_quant
        assert cell.eltwisemult_cell_forget.inputs_quant["1"] is cell.eltwiseadd_cell.output_quant
        for wrapper in (cell.fc_gate_x, cell.eltwisemult_hidden, cell.eltwiseadd_cell, cell.act_h):
            assert not wrapper.inputs_quant
    # steps of one cell that are joined are its outputs still
    hidden = model.rnn.cells[0].eltwisemult_hidden, model.rnn.cells_reverse[0].eltwisemult_hidden
    assert model.rnn.concats[0].input_grids == {0: hidden[0].output_quant, 1: hidden[1].output_quant}
    assert model.decoder.input_grids == {0: model.rnn.concats[1].output_quant}
    assert signal_to_noise(plain, model, WORDS) > 20


def test_a_state_beyond_the_range_of_the_steps_has_a_grid_of_its_own(stats_of) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.tanh = nn.Linear(4, 4), nn.Tanh()

        def forward(self, state: Tensor) -> Tensor:
            for _ in range(3):
                state = self.tanh(self.fc(state))
            return state

    plain = Steps().eval()
    for state, is_own in ((torch.randn(5, 4) * 9, True), (torch.zeros(5, 4), False)):
        model = quantized(plain, stats_of(plain, state), state, mode=ASYMMETRIC)
        assert (model.fc.inputs_quant["0"] is not model.tanh.output_quant) is is_own
        assert signal_to_noise(plain, model, state) > 25


def test_gates_are_narrowed_to_what_sigmoid_and_tanh_tell_apart(stats_of) -> None:
    plain = WordModel().eval()
    with torch.no_grad():
        plain.rnn.cells[0].fc_gate_x.weight.mul_(30)  # type: ignore[operator, union-attr]
    stats = stats_of(plain, WORDS)
    model = quantized(plain, stats, WORDS, mode=ASYMMETRIC)
    name, narrowed = "rnn.cells.0.eltwiseadd_gate", model.quantizer.model_activation_stats
    assert stats[name]["output"]["max"] > 6
    assert (narrowed[name]["output"]["min"], narrowed[name]["output"]["max"]) == (-6, 6)
    assert narrowed["rnn.cells.0.act_g"]["inputs"][0]["max"] <= 6


def test_a_dynamic_loop_quantizes_what_needs_no_statistics() -> None:
    plain = WordModel().eval()
    with pytest.warns(UserWarning, match="^not quantized, since without statistics"):
        model = quantized(plain, None, WORDS, mode=ASYMMETRIC)
    found = kinds(model)
    assert found["rnn.cells.0.fc_gate_x"] == "RangeLinearQuantParamLayerWrapper"
    assert found["rnn.cells.0.act_f"] == "RangeLinearFakeQuantWrapper"
    assert "rnn.cells.0.eltwiseadd_gate" not in found
    assert signal_to_noise(plain, model, WORDS) > 20


def test_a_dynamic_grid_of_a_layer_that_is_called_twice_is_not_taken_for_that_of_its_first_result() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            small, large = self.first(x), self.first(100 * x)
            return self.second(small) + 0 * large

    plain, x = Twice().eval(), torch.randn(6, 4)
    with pytest.warns(UserWarning, match="not quantized, since without statistics"):
        model = quantized(plain, None, x, mode=ASYMMETRIC)
    assert list(model.second.inputs_quant) == ["0"]
    assert signal_to_noise(plain, model, x) > 25


def test_average_pooling_stays_inside_the_range_of_its_input(stats_of) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)).eval()
    model = quantized(plain, stats_of(plain, 4 * X), 4 * X[:1], mode=ASYMMETRIC)
    assert all(0 <= end <= 6.03 for end in model[0].output_quant.ends)
    before, after = (torch.stack(model[i].output_quant.ends) for i in (1, 2))
    assert before[0] <= after[0] <= after[1] <= before[1]


def test_a_whole_model_in_half_precision(every_kind) -> None:
    model = quantized(every_kind, None, X[:1], fpq_module=16)
    assert set(kinds(model).values()) == {"FPWrapper"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    with torch.no_grad():
        assert model(X).dtype is torch.float32
    assert 40 < signal_to_noise(every_kind, model, X) < 80


def test_single_layers_in_another_type_among_quantized_ones_and_the_other_way_round(
    every_kind, stats_of
) -> None:
    stats = stats_of(every_kind, X)
    model = quantized(every_kind, stats, X[:1], mode=ASYMMETRIC, overrides={"left": {"fpq_module": 64}})
    assert isinstance(model.left, FPWrapper)
    assert list(model.stack.inputs_quant) == ["0"]  # comes unquantized from there
    model = quantized(every_kind, stats, X[:1], fpq_module="bf16", overrides={"head": {"fpq_module": None}})
    assert [name for name, kind in kinds(model).items() if kind != "FPWrapper"] == ["head"]
    assert list(model.head.inputs_quant) == ["0"]


def test_fp16_is_told_to_be_deprecated_and_stored_by_its_new_name(every_kind) -> None:
    with pytest.warns(DeprecationWarning, match="^fp16 is deprecated: set fpq_module to 16$"):
        whole = PostTrainLinearQuantizer(every_kind, fp16=True)
    with pytest.warns(DeprecationWarning, match="^fp16 is deprecated"):
        single = PostTrainLinearQuantizer(
            every_kind, overrides={"head": {"fp16": True}, "left": {"fp16": False}}
        )
    assert whole.settings()["fpq_module"] == 16
    assert "fp16" not in whole.settings()
    assert single.settings()["overrides"] == {"head": {"fpq_module": 16}, "left": {}}
    assert single.settings()["fpq_module"] is None


def test_max_pooling_stays_on_the_grid_of_its_input_whatever_its_own_statistics(every_kind, stats_of) -> None:
    stats = stats_of(every_kind, X)
    stats["flatten"]["output"]["max"] = 1000.0
    model = quantized(every_kind, stats, X[:1], mode="SYMMETRIC", clip_acts="AVG")
    assert (
        model.flatten.output_quant is model.depthwise.output_quant
        or model.flatten.output_quant is model.pool.output_quant
    )
    params = model.quantizer.linear_quant_params
    assert torch.equal(params["flatten.output_scale"], params["pool.output_scale"])


def test_modules_that_are_used_in_several_places_are_replaced_once(stats_of) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 1)
            self.again, self.relu = self.first, nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.relu(self.first(x)))

    plain = Net().eval()
    with pytest.warns(UserWarning, match="^Module 'again' references to same module as 'first'.$"):
        model = quantized(plain, stats_of(plain, X), X[:1], mode=ASYMMETRIC)
    assert model.first is model.again
    assert list(model.first.inputs_quant) == ["0"]
    assert signal_to_noise(plain, model, X) > 25


def test_files_tell_all_kinds(every_kind, stats_of, tmp_path) -> None:
    import yaml

    overrides = {"left": {"fpq_module": "bf16"}, "depthwise": {"bits_activations": 5}, "head": {"fake": True}}
    model = quantized(every_kind, stats_of(every_kind, X), X[:1], mode=ASYMMETRIC, overrides=overrides)
    written = yaml.safe_load(model.quantizer.save_per_layer_parameters(tmp_path)[0].read_text())
    assert set(written) == {*kinds(model), "linear_quant_params"}
    assert written["left"]["fpq_module"] == "bf16"
    assert written["head"]["fake"] is True
    assert "left.output_scale" not in written["linear_quant_params"]
