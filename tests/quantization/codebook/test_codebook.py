"""Weights of few values against an explicit table, and their gradients against autograd of one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.quantization.codebook.codebook import CodebookWeights, look_up
from distiller.quantization.codebook.kmeans_1d import kmeans_1d
from distiller.quantization.codebook.packing import codebook_bytes, unpack_codes
from distiller.quantization.training.weight_quantizers import OutputChannels

TRANSPOSED = OutputChannels(1, 2)
CHANNELS = [None, OutputChannels(), TRANSPOSED]


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6)) * 0.3


def pruned_weights(*shape: int) -> Tensor:
    weight = weights(*shape)
    return weight * (weight.abs() > 0.2)


def books_of(weight: Tensor, channels: OutputChannels | None) -> list[Tensor]:
    """The elements that share a codebook, as views; written out for two groups of a transposed convolution."""
    if channels is None:
        return [weight]
    if channels.dim == 0:
        return list(weight)
    half = len(weight) // 2
    return [*weight[:half].unbind(1), *weight[half:].unbind(1)]


def decoded(codebook: CodebookWeights, weight: Tensor) -> Tensor:
    """Element by element."""
    result = torch.empty_like(weight)
    parts = [books_of(x, codebook.channels) for x in (result, weight, codebook.assignments.to(torch.int64))]
    for row, (out, original, codes) in enumerate(zip(*parts, strict=True)):
        table = [0.0] * codebook.keep_zero + codebook.centroids[row].tolist()
        values = torch.tensor([table[code] for code in codes.flatten()]).view(codes.shape)
        out.copy_(torch.where(original == 0, 0, values))
    return result


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("keep_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_each_element_is_the_nearest_centroid_of_k_means(channels, keep_zero, bits):
    weight = pruned_weights(4, 6, 3, 3)
    codebook = CodebookWeights(weight, bits, channels, keep_zero=keep_zero)
    found = codebook(weight)
    assert torch.equal(found, decoded(codebook, weight))
    for row, (values, part) in enumerate(
        zip(books_of(found.detach(), channels), books_of(weight, channels), strict=True)
    ):
        expected = kmeans_1d(
            part.double().numpy().reshape(1, -1), codebook.centroids.shape[1], "exact", keep_zero
        )
        assert codebook.centroids[row].detach().numpy() == pytest.approx(expected[0], rel=1e-6)
        levels = np.append(codebook.centroids[row].detach().numpy(), [0.0] * keep_zero)
        distance = np.abs(part.numpy()[..., None] - levels).min(-1)
        is_kept = part.numpy() != 0
        assert (part - values).abs().numpy()[is_kept] == pytest.approx(distance[is_kept], abs=1e-7)
        assert not values[part == 0].any()
        assert values[part != 0].unique().numel() <= 2**bits


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("keep_zero", [False, True])
def test_gradients_are_those_of_an_explicit_gather(channels, keep_zero):
    weight = pruned_weights(4, 6, 3).requires_grad_()
    upstream = weights(3, 6, 4).permute(2, 1, 0) + 0.1
    codebook = CodebookWeights(weight, 2, channels, keep_zero=keep_zero)
    (codebook(weight) * upstream).sum().backward()

    table = codebook.centroids.detach().double().clone().requires_grad_()
    zeros = torch.zeros(len(table), 1, dtype=torch.float64)
    full = torch.cat([zeros, table], dim=1) if keep_zero else table
    parts = [books_of(x, channels) for x in (weight.detach(), upstream.double(), codebook.assignments.long())]
    for row, (original, grad, codes) in enumerate(zip(*parts, strict=True)):
        (full[row][codes] * (original != 0) * grad).sum().backward(retain_graph=True)
    assert table.grad is not None
    assert codebook.centroids.grad is not None
    assert codebook.centroids.grad.numpy() == pytest.approx(table.grad.numpy(), rel=1e-5, abs=1e-6)
    assert weight.grad is None


def test_gradients_by_hand():
    weight = torch.tensor([1.0, 0.0, -1.0, 1.1]).requires_grad_()
    table = torch.tensor([-1.0, 1.0]).requires_grad_()
    codes = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    found = look_up(weight, table, codes, passes_gradient=True)
    assert found.tolist() == [1.0, 0.0, -1.0, 1.0]
    found.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert table.grad is not None
    assert weight.grad is not None
    assert table.grad.tolist() == [100.0, 1001.0]
    assert weight.grad.tolist() == [1.0, 10.0, 100.0, 1000.0]


def test_zero_centroid_is_none_of_the_parameters():
    weight = weights(10, 10)
    codebook = CodebookWeights(weight, 2, keep_zero=True)
    assert codebook.centroids.shape == (1, 3)
    assert codebook.codebook_size == 4
    assert (codebook(weight) == 0).sum() > 10  # what is nearest to it
    with torch.no_grad():
        codebook.centroids.add_(5)
    assert (codebook(weight) == 0).sum() > 10


def test_what_is_pruned_later_is_zero_and_has_the_code_of_zero():
    weight = weights(10, 10)
    for keep_zero in (False, True):
        codebook = CodebookWeights(weight, 3, keep_zero=keep_zero)
        mask = torch.rand(10, 10, generator=torch.Generator().manual_seed(2)) > 0.5
        assert not codebook(weight * mask)[~mask].any()
        assert torch.equal(codebook(weight * mask)[mask], codebook(weight)[mask])
        if keep_zero:
            assert not codebook.codes(weight * mask)[~mask].any()


@pytest.mark.parametrize("method", ["linear", "linear_interior"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_linear_values_are_those_of_linspace(method, channels):
    weight = weights(4, 6, 3)
    codebook = CodebookWeights(weight, 3, channels, method=method, is_learned=False)
    for row, part in enumerate(books_of(weight, channels)):
        low, high = part.min().item(), part.max().item()
        levels = np.linspace(low, high, 8) if method == "linear" else np.linspace(low, high, 10)[1:-1]
        assert codebook.centroids[row].numpy() == pytest.approx(levels, rel=1e-5, abs=1e-7)
    assert not list(codebook.parameters())


def test_range_of_linear_values_is_that_of_what_is_not_pruned():
    weight = torch.tensor([0.0, 2.0, 3.0, 5.0, 0.0])
    codebook = CodebookWeights(weight, 2, method="linear", is_learned=False)
    assert codebook.centroids.tolist() == [[2.0, 3.0, 4.0, 5.0]]
    assert codebook(weight).tolist() == weight.tolist()
    empty = CodebookWeights(torch.zeros(3), 1, method="linear")
    assert empty(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_a_weight_of_few_elements_has_a_small_codebook():
    weight = weights(3, 5)
    codebook = CodebookWeights(weight, 8, OutputChannels())
    assert (codebook.codebook_size, codebook.code_bits) == (5, 3)
    assert torch.equal(codebook(weight), weight)
    single = CodebookWeights(weights(3, 1), 8, OutputChannels())
    assert (single.codebook_size, single.code_bits) == (1, 1)


def test_codes_follow_the_weight_in_the_batch_after_so_many_steps():
    weight = weights(20, 8)
    codebook = CodebookWeights(weight, 3, reassign_every=2)
    before = codebook.assignments.clone()
    moved = weight.roll(1, 0)
    codebook.count_step()
    codebook(moved)
    assert torch.equal(codebook.assignments, before)
    codebook.count_step()
    codebook.eval()(moved)
    assert torch.equal(codebook.assignments, before)
    codebook.train()(moved)
    assert torch.equal(codebook.assignments, before.roll(1, 0))
    codebook.count_step()
    codebook(weight)
    assert torch.equal(codebook.assignments, before.roll(1, 0))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("keep_zero", [False, True])
def test_reassigned_centroids_that_are_not_learned_are_the_means_of_their_elements(channels, keep_zero):
    weight = pruned_weights(4, 6, 3, 3)
    codebook = CodebookWeights(weight, 2, channels, keep_zero=keep_zero, is_learned=False, reassign_every=1)
    before, codes = codebook.centroids.clone(), codebook.assignments.clone()
    moved = weight * 1.3 + 0.05 * (weight != 0)
    codebook.reassign(moved)
    for row, (part, old) in enumerate(zip(books_of(moved, channels), books_of(codes, channels), strict=True)):
        for index in range(codebook.centroids.shape[1]):
            members = part[(old == index + keep_zero) & (part != 0)]
            expected = members.mean().item() if members.numel() else before[row, index].item()
            assert codebook.centroids[row, index].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(codebook(moved), decoded(codebook, moved))


def test_reassigned_learned_centroids_stay_and_may_be_in_any_order():
    weight = torch.tensor([-1.0, -0.9, 1.0, 2.0])
    codebook = CodebookWeights(weight, 2, reassign_every=1)
    with torch.no_grad():
        codebook.centroids.copy_(torch.tensor([[2.0, -1.0, 1.0, -0.9]]))
    codebook.reassign(weight)
    assert torch.equal(codebook(weight), weight)


def test_reassigned_linear_levels_lie_over_the_new_range():
    codebook = CodebookWeights(weights(8, 8), 2, method="linear", is_learned=False, reassign_every=1)
    codebook.reassign(torch.tensor([[0.0, 6.0]]).repeat(1, 4) + torch.arange(8.0)[:, None])
    assert codebook.centroids.tolist() == [[1.0, 5.0, 9.0, 13.0]]


def test_straight_through_gradient_is_that_of_the_result():
    weight = pruned_weights(5, 6).requires_grad_()
    upstream = weights(5, 6) * 3
    codebook = CodebookWeights(weight, 2, reassign_every=5)
    (codebook(weight) * upstream).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


def test_count_of_steps_is_in_the_state():
    weight = weights(20, 8)
    codebook = CodebookWeights(weight, 3, reassign_every=2)
    codebook.count_step()
    twin = CodebookWeights(torch.zeros(20, 8), 3, reassign_every=2)
    twin.load_state_dict(codebook.state_dict())
    for one in (codebook, twin, copy.deepcopy(codebook)):
        one.count_step()
        one(weight.roll(1, 0))
        assert int(one.steps) == 0
    assert torch.equal(twin.assignments, codebook.assignments)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-4, 4, width=32) | st.just(0.0), min_size=8, max_size=24),
    bits=st.integers(1, 8),
    keep_zero=st.booleans(),
    per_channel=st.booleans(),
)
def test_what_is_stored_gives_the_weight_back(values, bits, keep_zero, per_channel):
    weight = torch.tensor(values[: len(values) // 2 * 2]).view(2, -1)
    codebook = CodebookWeights(weight, bits, OutputChannels() if per_channel else None, keep_zero=keep_zero)
    stored = codebook.stored(weight)
    codes = unpack_codes(stored.codes, stored.bits, weight.numel()).view(weight.shape).long()
    table = torch.cat([torch.zeros(len(stored.values), int(keep_zero)), stored.values], dim=1)
    rows = torch.arange(len(weight))[:, None] if per_channel else 0
    decoded_weight = table[rows, codes]
    if stored.pruned is not None:
        decoded_weight[unpack_codes(stored.pruned, 1, weight.numel()).view(weight.shape) == 1] = 0
    assert torch.equal(decoded_weight, codebook(weight).detach())
    assert stored.num_bytes == codebook_bytes(
        weight.numel(), stored.bits, stored.values.numel(), has_pruned=stored.pruned is not None
    )
    assert stored.bits <= bits
    assert stored.pruned is None or not keep_zero


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", CHANNELS)
def test_types_and_memory_formats_are_kept(dtype, channels):
    weight = pruned_weights(4, 4, 3, 3).to(dtype, memory_format=torch.channels_last).requires_grad_()
    codebook = CodebookWeights(weight, 4, channels, keep_zero=True, reassign_every=1)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            found = codebook(weight)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
    codebook(weight).sum().backward()
    codebook.reassign(weight)
    assert codebook.centroids.dtype == dtype
    assert isinstance(codebook.centroids, nn.Parameter)


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(
        QuantizationError, match=r"^conv1: its weight must be finite to be clustered, and is not$"
    ):
        CodebookWeights(torch.tensor([1.0, float("inf")]), 2, where="conv1")


def test_a_weight_without_values_is_not_clustered():
    codebook = CodebookWeights(torch.empty(4, 5, device="meta"), 2, OutputChannels())
    assert codebook.centroids.shape == (4, 4)


def test_settings_are_printed():
    codebook = CodebookWeights(weights(4, 5), 2, OutputChannels(), keep_zero=True, reassign_every=3)
    assert codebook.extra_repr() == (
        "2 bits, kmeans, per channel, zero kept, learned, codes anew every 3 steps"
    )
