import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distiller.macs import count_macs


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        # output volume * channels in / groups * kernel volume
        (nn.Conv2d(3, 6, 5), (1, 3, 32, 32), 6 * 28 * 28 * 3 * 25),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False), (1, 4, 8, 8), 8 * 4 * 4 * 2 * 9),
        (nn.Conv2d(6, 6, 3, groups=6), (1, 6, 5, 5), 6 * 3 * 3 * 9),
        (nn.Conv1d(4, 6, 3), (2, 4, 9), 2 * 6 * 7 * 4 * 3),
        (nn.Conv3d(2, 4, 3), (1, 2, 5, 5, 5), 4 * 27 * 2 * 27),
        # input volume * channels out / groups * kernel volume
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 9),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), 4 * 25 * 3 * 9),
        (nn.ConvTranspose1d(4, 6, 3), (1, 4, 5), 4 * 5 * 6 * 3),
        # rows * inputs * outputs
        (nn.Linear(5, 7), (1, 5), 35),
        (nn.Linear(5, 7, bias=False), (2, 3, 5), 2 * 3 * 35),
        # per step and layer: four gates, each from the input and from the hidden state
        (nn.LSTM(5, 7, num_layers=2), (4, 1, 5), 4 * 4 * (7 * (5 + 7) + 7 * (7 + 7))),
    ],
    ids=str,
)
def test_one_layer_agrees_with_its_closed_form(module, shape, macs):
    [cost] = count_macs(module, torch.zeros(shape))
    assert cost.macs == macs
    assert cost.input_shape == shape


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.attention(x, x, x, need_weights=False)[0])


def test_attention_is_counted_with_its_projections_and_products():
    model = Attention()
    x = torch.randn(2, 5, 8)
    [cost] = count_macs(model, x)
    projections = 4 * 5 * 8 * 8
    products = 2 * 5 * 5 * 8
    assert cost.name == "attention"
    assert cost.macs == 2 * (projections + products)
    # The output projection is a submodule that attention uses without calling it.
    assert cost.weights == 3 * 8 * 8 + 8 * 8


def test_an_encoder_layer_that_would_be_fused_agrees_with_torchs_counter():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(1, 5, 8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer(x)  # in training mode nothing is fused
    assert sum(cost.macs for cost in count_macs(layer, x)) == counter.get_total_flops() / 2
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


def test_products_outside_of_layers_are_booked_on_the_module_around_them():
    class Product(nn.Module):
        def forward(self, a, b):
            return a @ b

    [cost] = count_macs(Product(), (torch.zeros(3, 4), torch.zeros(4, 5)))
    assert (cost.name, cost.macs, cost.weights) == ("", 60, 0)
    assert (cost.input_shape, cost.output_shape) == ((3, 4), (3, 5))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.again = self.first
        self.last = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.last(self.again(self.first(x)))


def test_a_shared_module_is_counted_per_call_and_its_weights_once():
    shared, last = count_macs(Shared(), torch.zeros(1, 2, 4, 4))
    assert (shared.name, shared.macs, shared.weights) == ("first", 2 * (2 * 16 * 18), 36)
    assert (last.name, last.macs, last.weights) == ("last", 3 * 16 * 2, 6)


def count_call(module, inputs):
    module.calls.add_(1)


def test_mode_and_buffers_are_left_alone(tiny_cnn):
    tiny_cnn.train()
    tiny_cnn.bn1.eval()
    tiny_cnn.register_buffer("calls", torch.zeros(()))
    tiny_cnn.register_forward_pre_hook(count_call)
    before = {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    modes = {name: module.training for name, module in tiny_cnn.named_modules()}

    count_macs(tiny_cnn, torch.randn(4, 1, 8, 8))

    assert {name: module.training for name, module in tiny_cnn.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in tiny_cnn.state_dict().items())


def test_hooks_and_mode_go_even_when_the_model_fails(tiny_cnn):
    with pytest.raises(RuntimeError, match="channels"):
        count_macs(tiny_cnn, torch.zeros(1, 3, 8, 8))
    assert tiny_cnn.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_cnn.modules())


def test_wrapped_models_have_canonical_names(tiny_cnn):
    wrapped = nn.DataParallel(tiny_cnn)
    assert [cost.name for cost in count_macs(wrapped, torch.zeros(1, 1, 8, 8))] == ["conv1", "conv2", "fc"]


def test_a_parametrized_weight_is_counted_with_its_layer(tiny_cnn):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    plain = [(cost.name, cost.macs, cost.weights) for cost in count_macs(tiny_cnn, torch.zeros(1, 1, 8, 8))]
    nn.utils.parametrize.register_parametrization(tiny_cnn.conv2, "weight", Halved())
    assert plain == [
        (cost.name, cost.macs, cost.weights) for cost in count_macs(tiny_cnn, torch.zeros(1, 1, 8, 8))
    ]
