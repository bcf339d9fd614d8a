"""What the gate of a filter is made of: the parameters through which the loss depends on it.

A gate is a factor, 1, on what comes of a filter of a convolution or linear layer: on its output or, where a
batch norm alone follows, on that of the batch norm. What is gated is linear in a weight and a bias, so

    dL/dgate = sum(weight * dL/dweight) + bias * dL/dbias        over what belongs to the filter

of the layer's own weight and bias, or the batch norm's gamma and beta. With a batch norm behind it the loss
does not depend on the scale of a filter: there the sum over the layer's own parameters is zero.
Knows nothing about gradients, pruning or training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distiller.errors import DistillerError
from distiller.graph import Op, SummaryGraph, batch_norm_behind, model_graph

__all__ = ["gate_parameters", "graph_of_norms"]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_PASSED = ("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "ReduceMean", "Flatten")
"""What keeps a positive factor of a channel as it is, so that a batch norm behind it takes it away."""


def graph_of_norms(model: nn.Module, purpose: str) -> SummaryGraph | None:
    """The graph to find batch norms in; None for a model without any, which then need not be traceable.

    Raises:
        DistillerError: there are batch norms, but no graph, as `graph.model_graph` says.
    """
    has_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    return model_graph(model, purpose) if has_norms else None


def gate_parameters(
    param_name: str,
    param_names: Collection[str],
    graph: SummaryGraph | None,
    modules: Mapping[str, nn.Module],
) -> tuple[str, ...]:
    """The names of the parameters whose sum(p * dL/dp) for each filter is the gradient of its gate.

    Args:
        param_name: canonical name of the parameter whose filters they are.
        param_names: all of the model's.
        graph: the model's; None if it has no batch norms.
        modules: the model's by canonical name.

    Returns:
        gamma and beta of the batch norm; or weight and bias of the convolution or linear layer. Of a
        parameter of another kind, whose filters have no output of their own, only that parameter. The first
        dimension of each is the filters'.

    Raises:
        DistillerError: the batch norm has no gamma, or normalizes something else too.
    """
    layer_name, _, kind = param_name.rpartition(".")
    if kind != "weight" or not isinstance(modules.get(layer_name), _LAYERS):
        return (param_name,)
    norm = None if graph is None else _batch_norm(graph, layer_name)
    if norm is None:
        return _weight_and_bias(layer_name, param_names)
    gate = _weight_and_bias(norm.module_name, param_names)
    if not isinstance(modules[norm.module_name], _BatchNorm) or f"{norm.module_name}.weight" not in gate:
        raise DistillerError(
            f"the batch norm '{norm.name}' behind it has no gamma of its own to rank by; make it a module "
            "with affine=True, or take a pruner that does not look at gradients"
        )
    return gate


def _batch_norm(graph: SummaryGraph, layer_name: str) -> Op | None:
    """A call of the batch norm that is behind every call of a layer, and nowhere else."""
    norms = [batch_norm_behind(graph, call, _PASSED) for call in _calls(graph, layer_name)]
    norm = next((norm for norm in norms if norm is not None), None)
    if norm is not None and not norm.is_functional and set(norms) != set(_calls(graph, norm.module_name)):
        raise DistillerError(
            f"the batch norm '{norm.module_name}' must be behind every call of '{layer_name}', and behind "
            "nothing else, for its gamma to tell about the filters; give each layer one of its own, or take "
            "a pruner that does not look at gradients"
        )
    return norm


def _calls(graph: SummaryGraph, module_name: str) -> list[Op]:
    return [op for op in graph.ops.values() if not op.is_functional and op.module_name == module_name]


def _weight_and_bias(module_name: str, param_names: Collection[str]) -> tuple[str, ...]:
    both = (f"{module_name}.weight", f"{module_name}.bias")
    return tuple(name for name in both if name in param_names)
