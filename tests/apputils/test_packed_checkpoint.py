from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import distiller
from distiller.apputils.checkpoint import (
    load_lean_checkpoint,
    load_state,
    read_checkpoint,
    restore_quantizer,
    save_checkpoint,
    write_document,
)
from distiller.apputils.inference_state import inference_state
from distiller.apputils.packed_checkpoint import contents_of, pack
from distiller.errors import CheckpointError, UsageError
from distiller.models import create_model
from distiller.packing import pack_tensors
from distiller.quantization import (
    BinaryQuantizer,
    CodebookQuantizer,
    DorefaQuantizer,
    LSQQuantizer,
    PACTQuantizer,
    PostTrainLinearQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
    TernaryQuantizer,
    WRPNQuantizer,
)
from distiller.thinning import remove_filters


def lenet() -> torch.nn.Module:
    torch.manual_seed(3)
    return create_model(False, "digits", "lenet5", parallel=False).eval()


def with_norms() -> torch.nn.Module:
    torch.manual_seed(3)
    model = create_model(False, "digits", "vgg11_bn_025_cifar", parallel=False).eval()
    return model


def images(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randn(4, *model.input_shape[1:])  # type: ignore[index]


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images(model))


def test_a_model_is_created_from_a_packed_file(tmp_path):
    model = lenet()
    report = pack(model, tmp_path / "m.dsz")
    assert report.bytes == (tmp_path / "m.dsz").stat().st_size
    again = load_lean_checkpoint(None, tmp_path / "m.dsz").eval()
    assert torch.equal(outputs(again), outputs(model))


def test_a_checkpoint_is_packed_without_what_training_needs(tmp_path):
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    extras = {"tracker": {"scores": []}, "seed": 5, "mine": (1, float("inf"))}
    path = save_checkpoint(7, "lenet5", model, optimizer, extras=extras, dir=tmp_path)
    before = read_checkpoint(path)
    pack(before, tmp_path / "m.dsz")
    found = read_checkpoint(tmp_path / "m.dsz")
    assert (found.epoch, found.arch, found.dataset) == (7, "lenet5", "digits")
    assert found.input_shape == before.input_shape
    assert found.extras == {"seed": 5, "mine": (1, float("inf"))}
    assert (found.optimizer, found.scheduler, found.rng, found.masks) == (None, None, None, {})
    assert list(found.state_dict) == list(before.state_dict)
    assert all(torch.equal(found.state_dict[name], value) for name, value in before.state_dict.items())


def test_what_was_unpacked_is_a_checkpoint_again(tmp_path):
    pack(lenet(), tmp_path / "m.dsz")
    write_document(contents_of(read_checkpoint(tmp_path / "m.dsz")), tmp_path / "m.pth.tar")
    found = read_checkpoint(tmp_path / "m.pth.tar")
    model = lenet()
    assert torch.equal(outputs(load_lean_checkpoint(None, tmp_path / "m.pth.tar")), outputs(model))
    pack(found, tmp_path / "again.dsz")
    assert (tmp_path / "again.dsz").read_bytes() == (tmp_path / "m.dsz").read_bytes()


def test_a_file_of_weights_only_is_packed(tmp_path):
    torch.save(lenet().state_dict(), tmp_path / "w.pth")
    pack(read_checkpoint(tmp_path / "w.pth"), tmp_path / "w.dsz")
    found = read_checkpoint(tmp_path / "w.dsz")
    assert found.arch is None
    model = lenet()
    torch.nn.init.zeros_(model.fc2.weight)  # type: ignore[arg-type]
    load_state(model, found)
    assert torch.equal(outputs(model), outputs(lenet()))


def test_a_thinned_model_comes_back_as_thin(tmp_path):
    model = lenet()
    with torch.no_grad():
        model.conv1.weight[::2] = 0  # type: ignore[index]
        model.conv1.bias[::2] = 0  # type: ignore[index]
    remove_filters(model, None, None, None, None)
    pack(model, tmp_path / "m.dsz")
    again = load_lean_checkpoint(None, tmp_path / "m.dsz")
    assert tuple(again.conv1.weight.shape) == tuple(model.conv1.weight.shape)  # type: ignore[union-attr]
    assert torch.equal(outputs(again), outputs(model))


QUANTIZERS = {
    "codebook": (CodebookQuantizer, {"bits_weights": 4, "keep_zero": True}, 4),
    "codebook of each channel": (CodebookQuantizer, {"bits_weights": 2, "per_channel_wts": True}, 2),
    "range-linear": (QuantAwareTrainRangeLinearQuantizer, {"bits_weights": 8, "bits_activations": 8}, 8),
    "range-linear, unsigned": (
        QuantAwareTrainRangeLinearQuantizer, {"bits_weights": 8, "mode": "ASYMMETRIC_UNSIGNED"}, 8,
    ),
    "range-linear of each channel": (
        QuantAwareTrainRangeLinearQuantizer, {"bits_weights": 4, "per_channel_wts": True}, 4,
    ),
    "folded": (QuantAwareTrainRangeLinearQuantizer, {"bits_weights": 4, "simulate_bn_folding": True}, 4),
    "folded, of each channel": (
        QuantAwareTrainRangeLinearQuantizer,
        {"bits_weights": 4, "simulate_bn_folding": True, "per_channel_wts": True}, 4,
    ),
    "lsq": (LSQQuantizer, {"bits_weights": 4}, 4),
    "dorefa": (DorefaQuantizer, {"bits_weights": 3}, 3),
    "pact": (PACTQuantizer, {"bits_weights": 4, "bits_activations": 4}, 4),
    "wrpn": (WRPNQuantizer, {"bits_weights": 4}, 4),
    "binary": (BinaryQuantizer, {"bits_weights": 1}, 1),
    "ternary": (TernaryQuantizer, {"bits_weights": 2}, 2),
    "ternary of each channel": (TernaryQuantizer, {"bits_weights": 2, "per_channel_wts": True}, 2),
    "ternary, learned scales": (TernaryQuantizer, {"bits_weights": 2, "learned_scales": True}, 2),
    "binary of each channel": (BinaryQuantizer, {"bits_weights": 1, "per_channel_wts": True}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("pruned", [0.0, 0.9])
def test_a_model_trained_with_quantization_is_stored_at_its_bits_and_computes_the_same(
    name, pruned, tmp_path
):
    kind, settings, bits = QUANTIZERS[name]
    torch.manual_seed(len(name))
    model = with_norms() if "folded" in name else lenet()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and pruned:
                weight[torch.rand_like(weight) < pruned] = 0
    quantizer = kind(model, torch.optim.SGD(model.parameters(), 0.01), **settings)
    quantizer.prepare_model(images(model))
    for _ in range(3):
        model.train()(images(model)).sum().backward()  # ranges and steps are set by training
    expected = outputs(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = inference_state(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not [note for note in state.notes if "full precision" in note]
    report = pack(model, tmp_path / "m.dsz", state.tensors)
    checkpoint = read_checkpoint(tmp_path / "m.dsz")
    again = with_norms() if "folded" in name else lenet()
    assert restore_quantizer(again, checkpoint) is not None
    load_state(again, checkpoint)
    assert torch.equal(outputs(again), expected)
    large = [t for t in report.tensors if t.elements > 10_000]
    assert large
    # codes, and of each channel its scale, or its values, and its extremes
    assert 8 * sum(t.bytes for t in large) <= (bits + 1.1) * sum(t.elements for t in large)


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_quantized_after_training_are_packed_as_codes(per_channel, tmp_path):
    model = lenet()
    quantizer = PostTrainLinearQuantizer(
        model, bits_activations=None, bits_parameters=4, per_channel_wts=per_channel, save_fp_weights=True
    )
    quantizer.prepare_model(images(model))
    expected = outputs(model)
    state = inference_state(model)
    assert state.notes[0] == "full-precision copies beside quantized weights are left out: 8"
    assert not any("float_weight" in name for name in state.tensors)
    model.quantizer_metadata = state.quantizer  # type: ignore[assignment]
    report = pack(model, tmp_path / "m.dsz", state.tensors)
    large = {t.name: t for t in report.tensors if t.elements > 1000}
    assert {t.encoding.partition("/")[2] for t in large.values()} == {"rowgrid" if per_channel else "grid"}
    assert sum(t.bytes for t in large.values()) * 8 <= 4.1 * sum(t.elements for t in large.values())
    checkpoint = read_checkpoint(tmp_path / "m.dsz")
    again = lenet()
    restore_quantizer(again, checkpoint)
    load_state(again, checkpoint)
    assert torch.equal(outputs(again), expected)


def test_signs_of_zeros_are_told_and_dropped():
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-0.0, 1.0, 0.0], [-0.0, -2.0, float("inf")]]))
    state = inference_state(model)
    assert state.notes == ("zeros with a negative sign, stored as 0: 2",)
    assert not torch.signbit(state.tensors["weight"])[:, 0].any()
    assert torch.equal(state.tensors["weight"], model.weight)
    assert torch.signbit(model.weight)[:, 0].all()


def test_tensors_that_are_no_checkpoint_are_refused(tmp_path):
    pack_tensors({"a": torch.ones(2)}, tmp_path / "x.dsz", {"b": 1})
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "x.dsz")
    assert str(error.value) == (
        f"{tmp_path / 'x.dsz'}: holds tensors that are no checkpoint; read it with unpack_tensors"
    )
    structure = {"epoch": 0, "arch": 5, "dataset": None, "input_shape": None, "quantizer": None, "extras": {}}
    pack_tensors({"a": torch.ones(2)}, tmp_path / "x.dsz", {**structure, "thinning_recipes": []})
    with pytest.raises(CheckpointError, match=r"x\.dsz: 'arch' must be text, got int 5$"):
        read_checkpoint(tmp_path / "x.dsz")


def test_what_is_neither_model_nor_checkpoint_is_refused(tmp_path):
    with pytest.raises(
        UsageError, match="^pack: source: must be a torch.nn.Module or a Checkpoint, got dict$"
    ):
        pack({}, tmp_path / "x.dsz")  # type: ignore[arg-type]


def test_the_guides_python_runs(tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[2] / "docs/packed_files.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"distiller": distiller, "model": lenet(), "tensor": torch.ones(3), "print": lambda text: None}
    exec(code, names)
    assert torch.equal(outputs(names["model"]), outputs(lenet()))
    assert {path.name for path in tmp_path.iterdir()} == {"model.dsz", "tensors.dsz"}
