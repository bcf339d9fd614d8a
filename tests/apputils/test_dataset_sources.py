import numpy as np
import pytest
import torch
from PIL import Image

from distiller.apputils.dataset_sources import ImageFiles, LabelledImages, check_labels
from distiller.errors import DatasetError


def part(images, labels):
    return LabelledImages(torch.zeros(images, 1, 2, 2, dtype=torch.uint8), torch.tensor(labels))


def test_sound_part_is_passed_on():
    sound = part(3, [0, 2, 1])
    assert check_labels(sound, 3, "here") is sound
    assert check_labels(sound, None, "here") is sound
    assert len(sound) == 3


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "complaint"),
    [
        (3, [0, 1], 2, "here: 3 images but 2 labels"),
        (0, [], 2, "here: holds no images"),
        (2, [0, 2], 2, "here: labels must lie in 0..1, got 2"),
        (2, [-1, 5], 2, "here: labels must lie in 0..1, got -1"),
        (2, [-1, 5], None, "here: labels must not be negative, got -1"),
    ],
)
def test_unsound_part_is_refused(images, labels, num_classes, complaint):
    with pytest.raises(DatasetError) as caught:
        check_labels(part(images, labels), num_classes, "here")
    assert str(caught.value) == complaint


def test_image_file_is_loaded_in_the_mode_asked_for(tmp_path):
    pixels = np.full((4, 5, 3), (10, 20, 30), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    files = ImageFiles((str(tmp_path / "a.png"),), torch.tensor([0]), ("one",))
    np.testing.assert_array_equal(np.asarray(files.load(0, "RGB")), pixels)
    assert files.load(0, "L").getpixel((0, 0)) == round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)


@pytest.mark.parametrize("kept_bytes", [0, 5, 60, 400])
def test_damaged_image_file_is_named(tmp_path, kept_bytes):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    files = ImageFiles((str(path),), torch.tensor([0]), ("one",))
    with pytest.raises(DatasetError) as caught:
        files.load(0, "RGB")
    assert str(caught.value).startswith(f"{path}: cannot be read as an image: ")
