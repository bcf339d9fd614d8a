import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import MinMaxObserver
from torch.nn.utils import parametrizations

from distiller.errors import DistillerError, UsageError
from distiller.quantization import PostTrainLinearQuantizer
from distiller.replay import applied
from distiller.sensitivity.axes import AXES, AxisContext, input_ranges
from distiller.sensitivity.axes.bit_axes import quantized_input, quantized_weight


class Layers(nn.Module):
    """A layer of every kind; no batch norm that quantization would fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.line = nn.Conv1d(6, 4, 2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 1, 8, 8)
        x = self.up(self.depthwise(self.conv(x)).relu()).relu()
        return self.fc(self.line(x.mean(3)).relu().mean(2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_a_weight_is_bit_for_bit_that_of_the_post_training_quantizer(bits):
    model = Layers()
    units = AXES["weight-bits"].units(model, ["*"], [bits], AxisContext())
    quantized = copy.deepcopy(model)
    PostTrainLinearQuantizer(
        quantized, bits_activations=None, bits_parameters=bits, per_channel_wts=True
    ).prepare_model(torch.zeros(1, 1, 8, 8))

    assert len(units) == 5
    for unit in units:
        layer = unit.parameter.removesuffix(".weight")
        value = unit.make(float(bits)).tensors[unit.parameter]
        assert torch.equal(value, quantized.get_submodule(layer).wrapped_module.weight)


@given(st.integers(0, 1000), st.integers(2, 8))
def test_a_weight_is_numpys_rounding_to_the_steps_of_each_filter(seed, bits):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    rows = weight.numpy()
    scale = np.abs(rows).max(1, keepdims=True) / np.float32((2**bits - 1) / 2)
    steps = np.clip(np.round(rows * (1 / scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    value = quantized_weight(weight, bits, nn.Linear(4, 3))

    np.testing.assert_array_equal(value.numpy(), (steps * scale).astype(np.float32))


def test_a_weight_that_two_layers_share_is_one_unit_and_both_inputs_are_rounded():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    context = AxisContext(activation_ranges={"0": (-1.0, 1.0), "2": (0.0, 2.0)})

    weights = AXES["weight-bits"].units(model, ["*"], [4], context)
    (activations,) = AXES["activation-bits"].units(model, ["*"], [4], context)

    assert [unit.tensors for unit in weights] == [("0.weight",)]
    assert activations.inputs == ("0", "2")


def test_a_weight_that_is_computed_of_others_is_left_out():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    context = AxisContext(activation_ranges={"0": (0.0, 1.0), "1": (0.0, 1.0)})

    for axis in ("weight-bits", "activation-bits", "rank"):
        assert [unit.parameter for unit in AXES[axis].units(model, ["*"], [], context)] == ["1.weight"]


@given(
    lo=st.floats(-8, 0, width=32, allow_subnormal=False),
    width=st.floats(0.125, 16, width=32),
    bits=st.integers(2, 8),
)
def test_an_input_is_rounded_as_by_torchs_own_operator(lo, width, bits):
    hi = lo + width
    observer = MinMaxObserver(dtype=torch.quint8, quant_min=0, quant_max=2**bits - 1)
    observer(torch.tensor([lo, hi]))
    scale, zero_point = observer.calculate_qparams()
    x = torch.linspace(lo - 1, hi + 1, 101)

    value = quantized_input(lo, hi, bits)(x)

    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), 0, 2**bits - 1)
    torch.testing.assert_close(value, expected.reshape(value.shape), rtol=1e-6, atol=1e-6)
    assert len(value.unique()) <= 2**bits


def test_rounded_inputs_are_within_half_a_step_and_clipped_outside():
    rounding = quantized_input(-1.0, 3.0, 4)
    step = 4.0 / 15
    inside = torch.linspace(-1, 3, 57)

    # the integer zero point moves the range by up to half a step
    assert float((rounding(inside) - inside).abs().max()) <= step + 1e-6
    assert rounding(torch.tensor([100.0])).item() == pytest.approx(3.0, abs=step / 2 + 1e-6)
    assert rounding(torch.tensor([0.0])).item() == 0.0
    assert rounding(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_keep_their_type_and_layout(dtype):
    x = torch.randn(2, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)

    value = quantized_input(-2.0, 2.0, 6)(x)

    assert value.dtype == dtype
    assert value.is_contiguous(memory_format=torch.channels_last)


def test_a_layer_reads_rounded_values_while_the_variant_is_applied():
    model = Layers().eval()
    x = torch.randn(4, 1, 8, 8)
    context = AxisContext(activation_ranges=input_ranges(model, [x]))
    (unit,) = AXES["activation-bits"].units(model, ["fc.weight"], [3], context)
    seen: list[torch.Tensor] = []

    with torch.no_grad(), applied(model, unit.make(3.0)):
        handle = model.fc.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(x)
        handle.remove()
        read = seen[-1].unique()

    steps = read.diff() / read.diff().min()
    assert 1 < len(read) <= 8
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_layers_that_were_not_reached_are_left_out():
    model = Layers()
    units = AXES["activation-bits"].units(
        model, ["*"], [8], AxisContext(activation_ranges={"fc": (0.0, 1.0), "conv": (0.0, 1.0)})
    )

    assert [unit.parameter for unit in units] == ["conv.weight", "fc.weight"]


def test_ranges_are_asked_for():
    with pytest.raises(UsageError) as error:
        AXES["activation-bits"].units(Layers(), ["*"], [8], AxisContext())

    assert str(error.value) == (
        "sensitivity: axis 'activation-bits' needs the ranges of the layers' inputs, got none; measure them "
        "with input_ranges(model, batches) and give them as activation_ranges"
    )


def test_a_range_that_is_none_is_refused_by_name():
    (unit,) = AXES["activation-bits"].units(
        Layers(), ["fc.weight"], [8], AxisContext(activation_ranges={"fc": (1.0, -1.0)})
    )

    with pytest.raises(DistillerError) as error:
        unit.make(8.0)

    assert str(error.value) == (
        "sensitivity of 'fc.weight': quantization range: must be finite with min <= max, got [1, -1]"
    )
