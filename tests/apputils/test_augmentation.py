import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as per_image

from distiller.apputils.augmentation import (
    crop,
    crop_and_flip,
    evaluation_transform,
    fit_images,
    flip,
    normalize,
    random_flip,
    training_transform,
)
from distiller.apputils.sampling import isolated_random_state, seeded
from distiller.errors import DatasetError


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=seeded(seed, "test"), dtype=torch.uint8)


@given(seed=st.integers(0, 99), padding=st.integers(0, 5), height=st.integers(1, 9), width=st.integers(1, 9))
def test_crop_equals_padding_and_cropping_image_by_image(seed, padding, height, width):
    images = noise(4, 3, height, width, seed=seed)
    top, left = torch.randint(0, 2 * padding + 1, (2, 4), generator=seeded(seed, "offsets"))
    expected = [
        per_image.crop(per_image.pad(image, [padding]), int(y), int(x), height, width)
        for image, y, x in zip(images, top, left, strict=True)
    ]
    assert torch.equal(crop(images, padding, top, left), torch.stack(expected))


def test_flip_mirrors_only_the_chosen_images():
    images = noise(3, 1, 4, 5)
    flipped = flip(images, torch.tensor([True, False, True]))
    assert torch.equal(
        flipped, torch.stack([per_image.hflip(images[0]), images[1], per_image.hflip(images[2])])
    )


def test_random_flip_mirrors_half_of_the_images():
    images = torch.tensor([[0, 1]], dtype=torch.uint8).expand(4000, 1, 1, 2)
    mirrored = random_flip(images, seeded(0, "flip"))[:, 0, 0, 0].float().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.03)


def test_crop_and_flip_uses_every_offset_and_nothing_but_its_generator():
    images = torch.zeros(3000, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 1  # the mark moves by the crop's offset, 4 pixels at most
    state = torch.get_rng_state()
    moved = crop_and_flip(images, seeded(0, "crop"))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(3000, dtype=torch.int64))
    assert (moved.sum((0, 1)) > 0).all()
    assert torch.equal(moved, crop_and_flip(images, seeded(0, "crop")))
    assert not torch.equal(moved, crop_and_flip(images, seeded(1, "crop")))


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_equals_torchvision(channels):
    images = noise(2, channels, 4, 4)
    mean, std = [0.2, 0.5, 0.7][:channels], [0.3, 0.25, 0.9][:channels]
    expected = per_image.normalize(per_image.convert_image_dtype(images), mean, std)
    torch.testing.assert_close(normalize(images, mean, std), expected)


def test_normalize_takes_floats_as_they_are_and_leaves_its_input_alone():
    images = torch.tensor([-1.0, 4.0]).view(1, 1, 1, 2)
    assert normalize(images, [1.0], [2.0]).flatten().tolist() == [-1.0, 1.5]
    assert images.flatten().tolist() == [-1.0, 4.0]


def test_normalize_repeats_or_averages_the_numbers_of_other_channels():
    grey, colour = torch.ones(1, 1, 1, 1), torch.ones(1, 3, 1, 1)
    assert normalize(colour, [0.5], [2.0]).flatten().tolist() == [0.25] * 3
    assert normalize(grey, [0.0, 0.5, 1.0], [0.25, 0.5, 0.75]).item() == pytest.approx((1 - 0.5) / 0.5)


def test_fitting_images_that_fit_changes_nothing():
    images = noise(2, 3, 5, 5)
    assert torch.equal(fit_images(images, (3, 5, 5)), images)


@pytest.mark.parametrize("size", [(28, 28), (8, 12), (5, 4)])
def test_fitted_images_equal_pils_bilinear_scaling(size):
    images = noise(3, 1, 8, 8)
    height, width = size
    fitted = fit_images(images, (1, height, width))
    assert fitted.dtype == torch.uint8
    for image, result in zip(images, fitted, strict=True):
        scaled = Image.fromarray(image[0].numpy()).resize((width, height), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(scaled).astype(int) - result[0].numpy()).max() <= 1  # PIL rounds twice


def test_grey_images_are_repeated_and_colour_is_averaged():
    grey, colour = noise(2, 1, 3, 3), noise(2, 3, 3, 3)
    assert torch.equal(fit_images(grey, (3, 3, 3)), grey.repeat(1, 3, 1, 1))
    average = colour.double().mean(1, keepdim=True)
    assert (fit_images(colour, (1, 3, 3)).double() - average).abs().max() <= 0.5


def test_float_images_stay_floats():
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(fit_images(images, (1, 4, 4)), images.mean(1, keepdim=True))


def test_channels_that_cannot_be_made_are_refused():
    with pytest.raises(DatasetError) as caught:
        fit_images(noise(1, 4, 2, 2), (3, 2, 2))
    assert str(caught.value) == (
        "images have 4 channels and the model takes 3; only grey can be made of colour, or colour of grey"
    )


@pytest.mark.parametrize(("crop_side", "resize_side"), [(224, 256), (299, 336), (28, 32)])
def test_evaluation_takes_the_centre_of_the_scaled_image(crop_side, resize_side):
    image = Image.fromarray(noise(60, 90, 3).numpy())
    reference = transforms.Compose(
        [transforms.Resize(resize_side), transforms.CenterCrop(crop_side), transforms.PILToTensor()]
    )
    result = evaluation_transform((3, crop_side, crop_side))(image)
    assert result.dtype == torch.uint8
    assert torch.equal(result, reference(image))


def test_training_takes_random_areas_of_the_input_size():
    image = Image.fromarray(noise(60, 90, 3).numpy())
    with isolated_random_state(0):
        first, second = (training_transform((3, 24, 20))(image) for _ in range(2))
    assert first.shape == second.shape == (3, 24, 20)
    assert not torch.equal(first, second)
