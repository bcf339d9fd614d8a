import numpy as np
import pytest
import torch

from distiller.norms import l1_norm, l2_norm, max_norm


@pytest.mark.parametrize(("norm", "order"), [(l1_norm, 1), (l2_norm, 2), (max_norm, np.inf)])
@pytest.mark.parametrize("dim", [0, 1])
def test_norms_agree_with_numpy(norm, order, dim):
    t = torch.randn(5, 7)
    expected = np.linalg.norm(t.numpy(), ord=order, axis=dim)
    np.testing.assert_allclose(norm(t, dim).numpy(), expected, rtol=1e-6)


def test_vectors_lie_along_dim_1_by_default():
    assert l1_norm(torch.tensor([[1.0, -2.0], [3.0, 4.0]])).tolist() == [3.0, 7.0]


def test_norms_have_distillers_names():
    assert [str(norm) for norm in (l1_norm, l2_norm, max_norm)] == ["L1", "L2", "Max"]
