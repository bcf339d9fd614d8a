import operator

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from distiller.functional_modules.operation_names import MOVEMENT, operation_name, plain_name


@pytest.mark.parametrize(
    "name, expected",
    [
        ("add", ("add", False)),
        ("__radd__", ("add", False)),
        ("__rsub__", ("sub", False)),
        ("add_", ("add", True)),
        ("iadd", ("add", True)),
        ("itruediv", ("div", True)),
        ("truediv", ("div", False)),
        ("relu_", ("relu", True)),
        ("concat", ("cat", False)),
        ("mm", ("matmul", False)),
        ("clip", ("clamp", False)),
        ("index_select", ("index_select", False)),
        ("__getitem__", ("getitem", False)),
    ],
)
def test_every_way_to_write_an_operation_has_one_plain_name(name, expected):
    assert plain_name(name) == expected


def test_an_operation_is_called_as_it_was_written():
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert operation_name(graph.call_function(operator.iadd, (x, 1))) == "iadd"
    assert operation_name(graph.call_function(F.max_pool2d, (x, 2))) == "max_pool2d"
    assert operation_name(graph.call_function(torch.cat, ([x],))) == "cat"
    assert operation_name(graph.call_method("softmax", (x, 1))) == "softmax"
    assert operation_name(graph.call_function(getattr, (x, "mT"))) == "mT"


def test_names_of_movements_are_plain():
    assert {plain_name(name) for name in MOVEMENT} == {(name, False) for name in MOVEMENT}
