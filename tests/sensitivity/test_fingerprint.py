import pytest
import torch
from torch import nn

from distiller.sensitivity.fingerprint import images_fingerprint, weights_fingerprint


def test_fingerprint_is_that_of_the_weights_not_of_the_wrapper():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    fingerprint = weights_fingerprint(model)

    assert weights_fingerprint(nn.DataParallel(model)) == fingerprint
    assert weights_fingerprint(model.to(memory_format=torch.channels_last)) == fingerprint


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "1.num_batches_tracked"])
def test_fingerprint_changes_with_a_single_bit(name):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    fingerprint = weights_fingerprint(model)

    flat = model.state_dict()[name].view(-1).view(torch.uint8)
    flat[0] ^= 1

    assert weights_fingerprint(model) != fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fingerprint_takes_every_dtype(dtype):
    assert weights_fingerprint(nn.Linear(2, 2).to(dtype)) != weights_fingerprint(nn.Linear(2, 2))


def test_images_are_told_from_others_by_a_bit_a_label_or_a_type():
    images, labels = torch.rand(4, 1, 2, 2), torch.arange(4)
    fingerprint = images_fingerprint(images, labels)
    assert len(fingerprint) == 16
    assert images_fingerprint(images.clone(), labels) == fingerprint
    other = images.clone()
    other.view(-1).view(torch.uint8)[0] ^= 1
    assert images_fingerprint(other, labels) != fingerprint
    assert images_fingerprint(images, labels.flip(0)) != fingerprint
    assert images_fingerprint(images.double(), labels) != fingerprint
