import numpy as np
import pytest
import torch

from distiller.errors import DistillerError
from distiller.norms import l1_norm, l2_norm
from distiller.pruning.blocks import block_count, block_magnitudes, expand_blocks, read_block_shape
from distiller.pruning.ranking import ranked_structure_mask


def blocks_of(weight: np.ndarray, size: int):
    """(index of each element) of each block, in order: by loops over runs of kernels and positions."""
    out_channels, in_channels, *kernel = weight.shape
    kernels = [(o, i) for o in range(out_channels) for i in range(in_channels)]
    positions = list(np.ndindex(*kernel))
    for start in range(0, len(kernels), size):
        for position in positions:
            yield [(*pair, *position) for pair in kernels[start : start + size]]


@pytest.mark.parametrize("shape", [(4, 8, 3, 3), (6, 4, 1, 2), (3, 8), (2, 8, 5)])
@pytest.mark.parametrize("block_shape", [(1, 4), (2, 4), (1, 1)])
@pytest.mark.parametrize(("norm", "order"), [(l1_norm, 1), (l2_norm, 2)])
def test_magnitudes_and_masks_by_loops(shape, block_shape, norm, order):
    weight = torch.randn(shape)
    size = block_shape[0] * block_shape[1]
    blocks = list(blocks_of(weight.numpy(), size))
    expected = [np.linalg.norm([float(weight[index]) for index in block], order) / size for block in blocks]
    assert block_count(weight, block_shape) == len(blocks)
    np.testing.assert_allclose(block_magnitudes(weight, block_shape, norm), expected, rtol=1e-5)

    stay = torch.rand(len(blocks)) > 0.5
    mask = expand_blocks(stay, weight, block_shape)
    for block, kept in zip(blocks, stay.tolist(), strict=True):
        assert {float(mask[index]) for index in block} == {float(kept)}


def test_the_blocks_of_least_magnitude_go():
    weight = torch.randn(8, 8, 3, 3)
    blocks = list(blocks_of(weight.numpy(), 8))
    means = np.array([np.mean([abs(float(weight[index])) for index in block]) for block in blocks])
    gone = np.argsort(means)[: int(0.7 * len(blocks))]
    expected = np.ones(weight.shape)
    for block in gone:
        for index in blocks[block]:
            expected[index] = 0
    mask = ranked_structure_mask(weight, "Blocks", 0.7, block_shape=(1, 8))
    assert np.array_equal(mask.numpy(), expected)


def test_the_memory_format_does_not_matter():
    weight = torch.randn(4, 8, 3, 3)
    mask = ranked_structure_mask(weight, "Blocks", 0.5, block_shape=(1, 8))
    in_other_format = weight.to(memory_format=torch.channels_last)
    assert torch.equal(ranked_structure_mask(in_other_format, "Blocks", 0.5, block_shape=(1, 8)), mask)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (None, "group_type 'Blocks' needs kwargs: {block_shape: [repetitions, depth, 1, 1]}"),
        (
            {"block_shap": [1, 8, 1, 1]},
            "kwargs: unknown 'block_shap'; did you mean 'block_shape'?; group_type 'Blocks' takes block_shape",
        ),
        *(
            (
                {"block_shape": shape},
                "kwargs: block_shape must be [repetitions, depth, 1, 1] with whole numbers from 1, "
                f"got {shape}",
            )
            for shape in ([1, 8, 2, 1], [8], [0, 8, 1, 1])
        ),
    ],
)
def test_the_shape_is_checked(kwargs, text):
    with pytest.raises(DistillerError) as error:
        read_block_shape(kwargs)
    assert str(error.value) == text


def test_a_tensor_that_does_not_divide_is_refused():
    with pytest.raises(DistillerError) as error:
        block_magnitudes(torch.randn(3, 5, 3, 3), (2, 4))
    assert str(error.value) == "block_shape must divide the 15 kernels of shape (3, 5, 3, 3), got 2 * 4 = 8"
    with pytest.raises(DistillerError, match="'Blocks' wants a tensor of 2 dimensions or more"):
        block_count(torch.randn(8), (1, 8))
    with pytest.raises(DistillerError, match="^group_type 'Blocks' needs block_shape$"):
        ranked_structure_mask(torch.randn(8, 8), "Blocks", 0.5)
