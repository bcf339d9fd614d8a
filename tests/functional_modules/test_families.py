import copy

import pytest
import torch
import torchvision

from distiller.functional_modules import LeftOperations, to_modules
from distiller.graph import SummaryGraph
from distiller.models import create_model

# Smallest input, new modules, and the kinds of them.
QUICK = {
    "resnet18": (32, 8, {"add"}),
    "squeezenet1_1": (32, 8, {"cat"}),
    "mobilenet_v3_small": (32, 15, {"add", "mul"}),
    "shufflenet_v2_x0_5": (32, 17, {"cat", "mean"}),
}
SLOW = {
    "alexnet": (63, 0, set()),
    "convnext_tiny": (32, 36, {"add", "mul"}),
    "densenet121": (32, 64, {"adaptive_avg_pool2d", "cat", "relu"}),
    "efficientnet_b0": (32, 25, {"add", "mul"}),
    "efficientnet_v2_s": (32, 65, {"add", "mul"}),
    "googlenet": (96, 66, {"cat", "relu"}),
    "inception_v3": (299, 120, {"avg_pool2d", "cat", "max_pool2d", "relu"}),
    "maxvit_t": (224, 176, {"add", "matmul", "mul", "softmax"}),
    "mnasnet0_5": (32, 11, {"add", "mean"}),
    "mobilenet_v2": (32, 11, {"adaptive_avg_pool2d", "add"}),
    "regnet_x_400mf": (32, 22, {"add"}),
    "regnet_y_400mf": (32, 32, {"add", "mul"}),
    "resnet50": (32, 16, {"add"}),
    "resnext50_32x4d": (32, 16, {"add"}),
    "swin_t": (32, 112, {"add", "cat", "matmul", "mul", "proj", "qkv", "softmax"}),
    "swin_v2_t": (32, 99, {"add", "cat", "matmul", "mul", "proj", "softmax"}),
    "vgg11": (32, 0, set()),
    "wide_resnet50_2": (32, 16, {"add"}),
}
COMPUTED_BIAS = "its weights are not those of a linear layer among the children"


def built(name):
    settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(torchvision.models, name)(weights=None, **settings)


def losses_and_gradients(model, x):
    torch.manual_seed(1)
    outputs = model.train()(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(output.square().mean() for output in outputs if output is not None)
    loss.backward()
    grads = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {"loss": loss, **grads, **dict(model.named_buffers())}


def kinds(names):
    return {name.rpartition(".")[2].rstrip("_0123456789") if "2d" not in name else "_".join(
        part for part in name.rpartition(".")[2].split("_") if not part.isdigit()) for name in names}  # fmt: skip


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_families_of_torchvision_give_equal_outputs_losses_and_gradients(name):
    size, count, expected_kinds = {**QUICK, **SLOW}[name]
    model, x = built(name), torch.randn(2, 3, size, size)
    before, keys = copy.deepcopy(model), list(model.state_dict())
    report = to_modules(model, x[:1])
    assert len(report.modules) == count
    assert kinds(report.modules.values()) == expected_kinds
    assert list(model.state_dict()) == keys
    assert type(model).__name__ == type(before).__name__
    assert not [name for name, m in model.named_modules() if name.endswith("add") and m.inplace]
    if name != "swin_v2_t":
        assert report.left == ()
    with torch.no_grad():
        assert torch.equal(before.eval()(x), model.eval()(x))
    expected, got = losses_and_gradients(before, x), losses_and_gradients(model, x)
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


@pytest.mark.parametrize("name", ["mobilenet_v3_small", pytest.param("swin_t", marks=pytest.mark.slow)])
def test_sites_are_called_as_in_the_graph_before(name):
    model, x = built(name).eval(), torch.randn(1, 3, 32, 32)
    before = SummaryGraph(copy.deepcopy(model), x)
    report = to_modules(model, x)
    assert set(report.modules) <= {op.name for op in before.ops.values() if op.is_functional}
    after = SummaryGraph(model, x)
    assert set(report.modules.values()) <= {op.module_name for op in after.ops.values()}
    moved = {"Flatten", "Gather", "Pad", "Reshape", "Roll", "Slice", "Transpose"}
    assert {op.type for op in after.ops.values() if op.is_functional} <= moved


@pytest.mark.slow
def test_what_is_left_of_swin_v2_is_told():
    report = to_modules(built("swin_v2_t"), torch.randn(1, 3, 32, 32))
    assert report.left[:2] == (
        LeftOperations("features.1.0.attn", ("linear",), COMPUTED_BIAS),
        LeftOperations("features.1.0.attn", ("normalize",), "no module stands for it"),
    )
    assert len(report.left) == 24


@pytest.mark.slow
def test_vit_gives_the_same_within_the_rounding_of_attention():
    model = torchvision.models.vit_b_32(weights=None, image_size=64).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    before, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    report = to_modules(model, x[:1])
    assert len(report.modules) == 26
    assert len(report.attentions) == 12
    assert report.left == ()
    with torch.no_grad():
        expected, got = before(x), model(x)
    assert (expected - got).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "name, count", [("resnet20_cifar", 0), ("vgg11_cifar", 1), ("preact_resnet20_cifar", 0)]
)
def test_networks_of_this_project_are_made_of_modules_already(name, count):
    model = create_model(False, "cifar10", name, parallel=False).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    report = to_modules(model, x[:1])
    assert (len(report.modules), report.left) == (count, ())
    assert torch.equal(model(x), expected)
