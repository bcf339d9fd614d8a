import pytest
import torch

from distiller.errors import UsageError
from distiller.sensitivity.sweep_data import TensorBlocks, block_count, random_order

IMAGES, LABELS = torch.arange(7.0).view(7, 1), torch.arange(7)


def test_blocks_are_handed_out_in_the_order_asked_for():
    data = TensorBlocks(IMAGES, LABELS, 3, "seven")
    assert (data.num_samples, data.batch_size, data.identity, block_count(data)) == (7, 3, "seven", 3)
    found = [(images.flatten().tolist(), labels.tolist()) for images, labels in data.blocks([2, 0])]
    assert found == [([6.0], [6]), ([0.0, 1.0, 2.0], [0, 1, 2])]


def test_blocks_of_another_order():
    order = random_order(7)
    data = TensorBlocks(IMAGES, LABELS, 4, "", order)
    assert torch.cat([labels for _, labels in data.blocks(range(2))]).equal(order)


def test_the_random_order_is_one_and_the_same():
    assert random_order(1000).equal(random_order(1000))
    assert random_order(1000).sort().values.equal(torch.arange(1000))
    assert not random_order(1000).equal(torch.arange(1000))


@pytest.mark.parametrize(
    "images, labels, size, message",
    [
        (
            IMAGES[:0],
            LABELS[:0],
            3,
            "a label for each of one or more images is needed, got 0 images and 0 labels",
        ),
        (
            IMAGES,
            LABELS[:6],
            3,
            "a label for each of one or more images is needed, got 7 images and 6 labels",
        ),
        (IMAGES, LABELS, 0, "the batch size must be at least 1, got 0"),
    ],
)
def test_what_is_no_data_is_refused(images, labels, size, message):
    with pytest.raises(UsageError) as raised:
        TensorBlocks(images, labels, size, "")
    assert str(raised.value) == f"sensitivity: {message}"
