import pytest
import torch

from distiller.models import create_model
from distiller.models.haiku_cifar import WidthChannelPool


@pytest.mark.parametrize(
    ("arch", "count"), [("haiku_teacher_cifar", 30_462_226), ("haiku_student_cifar", 73_666)]
)
def test_networks_have_the_published_sizes(arch, count):
    model = create_model(False, "cifar10", arch)
    assert sum(p.numel() for p in model.parameters()) == count


def test_teacher_has_the_four_hidden_layers_of_the_source():
    model = create_model(False, "cifar10", "haiku_teacher_cifar")
    sizes = [module.out_features for module in model.linears if hasattr(module, "out_features")]
    assert sizes == [3000, 2000, 2000, 1000, 10]


def test_grey_images_of_28_pixels_have_networks_of_the_same_layers():
    model = create_model(False, "fashion-mnist", "haiku_student_mnist").eval()
    assert model.linears[0].in_features == 28 * 7 * 24
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_pooling_is_over_width_and_channels_as_the_sources_window_on_channels_last():
    x = torch.arange(2 * 4 * 3 * 4.0).view(2, 4, 3, 4)
    last = x.permute(0, 2, 3, 1)  # (batch, height, width, channel): the window of the source
    expected = last.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(WidthChannelPool()(x), expected)
