import numpy as np
import pytest
import torch
from torch import nn

from distiller import modules
from distiller.modules import (
    BatchMatmul,
    Chunk,
    Concat,
    EltwiseAdd,
    EltwiseDiv,
    EltwiseMult,
    EltwiseSub,
    Matmul,
    Mean,
    Norm,
    Split,
    Stack,
)

ELTWISE = [
    (EltwiseAdd, np.add),
    (EltwiseSub, np.subtract),
    (EltwiseMult, np.multiply),
    (EltwiseDiv, np.divide),
]


@pytest.fixture
def tensors():
    return [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.mark.parametrize(("module", "operation"), ELTWISE)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_eltwise_takes_any_number_of_inputs_from_left_to_right(module, operation, count, tensors):
    expected = tensors[0].numpy()
    for other in tensors[1:count]:
        expected = operation(expected, other.numpy())
    np.testing.assert_array_equal(module()(*tensors[:count]).numpy(), expected)


@pytest.mark.parametrize(("module", "operation"), ELTWISE)
def test_eltwise_leaves_its_inputs_alone_unless_in_place(module, operation, tensors):
    first = tensors[0].clone()
    out = module()(*tensors)
    assert torch.equal(tensors[0], first)
    assert out.data_ptr() != tensors[0].data_ptr()

    in_place = module(inplace=True)(*tensors)
    assert in_place.data_ptr() == tensors[0].data_ptr()
    assert torch.equal(in_place, out)


def test_eltwise_broadcasts_and_is_differentiable():
    a = torch.ones(2, 3, requires_grad=True)
    EltwiseMult()(a, torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == [[1, 2, 3], [1, 2, 3]]


def test_concat_joins_channels_by_default(tensors):
    assert Concat()(*tensors).shape == (2, 9, 4)
    assert torch.equal(Concat(dim=-1)(*tensors), torch.cat(tensors, -1))


def test_stack_chunk_and_split_do_as_torch(tensors):
    x = tensors[0]
    assert torch.equal(Stack(dim=1)(*tensors), torch.stack(tensors, 1))
    for module, expected in (
        (Chunk(2, dim=2), torch.chunk(x, 2, 2)),
        (Split(2, dim=1), torch.split(x, 2, 1)),
        (Split([1, 3], dim=2), torch.split(x, [1, 3], 2)),
    ):
        assert [part.tolist() for part in module(x)] == [part.tolist() for part in expected]


def test_matmul_and_batch_matmul_agree_with_numpy(tensors):
    a, b = tensors[0], tensors[1].transpose(1, 2)
    for module in (Matmul(), BatchMatmul()):
        np.testing.assert_allclose(module(a, b).numpy(), a.numpy() @ b.numpy(), rtol=1e-5)


def test_mean_and_norm_agree_with_numpy(tensors):
    x = tensors[0]
    np.testing.assert_allclose(Mean()(x), x.numpy().mean(), rtol=1e-5)
    np.testing.assert_allclose(
        Mean(dim=(1, 2), keepdim=True)(x), x.numpy().mean((1, 2), keepdims=True), rtol=1e-5
    )
    np.testing.assert_allclose(Norm()(x), np.linalg.norm(x.numpy().ravel()), rtol=1e-5)
    np.testing.assert_allclose(Norm(p=1, dim=2)(x), np.abs(x.numpy()).sum(2), rtol=1e-5)
    np.testing.assert_allclose(Norm(p=float("inf"), dim=1)(x), np.abs(x.numpy()).max(1), rtol=1e-5)


def test_no_operation_has_state():
    made = [
        Chunk(2),
        Split(2),
        *(getattr(modules, name)() for name in modules.__all__ if name not in ("Chunk", "Split")),
    ]
    for module in made:
        assert isinstance(module, nn.Module)
        assert not module.state_dict()


def test_settings_are_shown():
    assert repr(EltwiseAdd()) == "EltwiseAdd()"
    assert repr(EltwiseAdd(inplace=True)) == "EltwiseAdd(inplace=True)"
    assert repr(Concat()) == "Concat(dim=1)"
    assert repr(Split([1, 2], dim=1)) == "Split(split_size_or_sections=[1, 2], dim=1)"


def test_an_exported_graph_names_the_operation():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.add = EltwiseAdd()

        def forward(self, x):
            return self.add(x, self.conv(x))

    graph = torch.export.export(Residual().eval(), (torch.zeros(1, 2, 4, 4),), strict=False).graph
    add = next(node for node in graph.nodes if node.target is torch.ops.aten.add.Tensor)
    assert [path for path, _ in add.meta["nn_module_stack"].values()][-1] == "add"
