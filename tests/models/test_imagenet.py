from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision.models
import yaml
from torch import nn

from distiller.errors import UsageError
from distiller.models import create_model, find_spec
from distiller.models.imagenet import torchvision_names

STATS = Path(__file__).resolve().parents[2] / "../shared/compat/stats/resnet18_quant_stats.yaml"


def randomised(model: nn.Module) -> nn.Module:
    """With batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenet_v2"])
def test_results_and_weight_names_are_torchvisions(arch):
    theirs = randomised(torchvision.models.get_model(arch, num_classes=10))
    ours = create_model(False, "cifar10", arch).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "squeezenet1_1"])
def test_nothing_works_in_place(arch):
    model = create_model(False, None, arch)
    assert not [name for name, module in model.named_modules() if getattr(module, "inplace", False)]


def test_each_operation_of_a_bottleneck_has_a_name():
    block = create_model(False, None, "resnet50").layer1[1]
    assert [name for name, _ in block.named_children()] == [
        "conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3", "bn3", "relu3", "add",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "blocks"),
    [("resnext50_32x4d", 16), ("resnext101_32x8d", 33), ("wide_resnet50_2", 16), ("wide_resnet101_2", 33)],
)
def test_additions_of_the_wider_residual_networks_have_names(arch, blocks):
    with torch.device("meta"):
        model = create_model(False, None, arch)
    assert len([name for name, _ in model.named_modules() if name.endswith(".add")]) == blocks


@pytest.mark.skipif(not STATS.exists(), reason="shared/compat/stats/resnet18_quant_stats.yaml is not there")
def test_layers_of_resnet18_are_those_of_distillers_statistics():
    model = create_model(False, None, "resnet18")
    layers = [name for name, module in model.named_modules() if next(module.children(), None) is None]
    stats = yaml.safe_load(STATS.read_text())
    assert layers == list(stats)

    # The branch is the first input of the addition, the shortcut the second.
    block = model.layer2[0]
    seen: list[tuple[torch.Tensor, ...]] = []
    block.add.register_forward_hook(lambda _, inputs, output: seen.append(inputs))
    outputs: dict[str, torch.Tensor] = {}
    for name in ("bn2", "downsample"):
        getattr(block, name).register_forward_hook(lambda *call, name=name: outputs.update({name: call[2]}))
    model.eval()(torch.randn(1, 3, 32, 32))
    assert [x is outputs[name] for x, name in zip(seen[0], ("bn2", "downsample"), strict=True)] == [
        True,
        True,
    ]
    inputs = stats["layer2.0.add"]["inputs"]
    assert inputs[0]["max"] == stats["layer2.0.bn2"]["output"]["max"]
    assert inputs[1]["max"] == stats["layer2.0.downsample.1"]["output"]["max"]


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("resnet50", 224),
        ("inception_v3", 299),
        ("efficientnet_b1", 240),
        ("swin_v2_t", 256),
        ("vit_h_14", 518),
    ],
)
def test_native_size_is_that_of_the_weights(arch, size):
    assert find_spec(arch).native_shape == (3, size, size)


def test_every_model_of_torchvision_is_known():
    assert len(torchvision_names()) >= 80
    for name in torchvision_names():
        spec = find_spec(name)
        assert spec.dataset == "imagenet"
        assert spec.smallest_size is None or spec.smallest_size <= spec.native_shape[1]


@pytest.mark.parametrize(
    "arch",
    [
        *("alexnet", "convnext_tiny", "densenet121", "googlenet", "inception_v3", "mnasnet0_5", "resnet18"),
        *("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "swin_t", "vgg11"),
        "vit_b_32",
    ],
)
def test_models_can_be_trained_on_their_smallest_size(arch):
    spec = find_spec(arch)
    size = spec.smallest_size or spec.native_shape[1]
    with torch.device("meta"), torch.no_grad():
        output = spec(10, 3).train()(torch.empty(2, 3, size, size))
    logits = output if isinstance(output, torch.Tensor) else output.logits
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("arch", ["alexnet", "convnext_tiny", "densenet121", "squeezenet1_0", "vgg11"])
def test_models_fail_below_the_sizes_of_their_own(arch):
    spec = find_spec(arch)
    with torch.device("meta"), torch.no_grad():
        model = spec(10, 3)
        with pytest.raises(RuntimeError, match="size|big"):
            model(torch.empty(2, 3, spec.smallest_size - 1, spec.smallest_size - 1))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_pretrained_loads_torchvisions_first_weights(hub):
    theirs = torchvision.models.squeezenet1_1().state_dict()
    weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    torch.save(theirs, hub / weights.url.rpartition("/")[2])
    ours = create_model(True, "imagenet", "squeezenet1_1").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_failed_download_says_where_the_file_may_be_put(hub, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(UsageError) as caught:
        create_model(True, "imagenet", "squeezenet1_1")
    message = str(caught.value)
    assert message.startswith("pretrained: the weights of 'squeezenet1_1' cannot be had from http")
    assert message.endswith(f"no route to host>; download them elsewhere and put the file into {hub}")
    assert not list(hub.iterdir())


def test_pretrained_is_refused_for_other_classes():
    with pytest.raises(UsageError) as caught:
        create_model(True, "cifar10", "resnet18")
    assert str(caught.value) == (
        "pretrained: the weights of 'resnet18' are for the 1000 classes of ImageNet, "
        "got data of 10 classes; leave it out to train from scratch"
    )
