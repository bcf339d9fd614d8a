"""A quantized model that computes in floating point for a while, all of it or all but some layers.

Knows nothing about what is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distiller.observation import watch_inputs
from distiller.quantization.activation_quant import ActivationQuantizer
from distiller.quantization.ptq_weights import QuantizedWeightWrapper
from distiller.quantization.search.grids import Layers

_SAMPLE = 2**16


@contextmanager
def in_float(layers: Layers, quantized: Collection[ActivationQuantizer] = ()) -> Iterator[None]:
    """Within the block weights and biases are in full precision, and no quantizer rounds activations.

    A ReLU that a quantizer does the work of is still done.

    Args:
        layers: the quantized layers; of those with weights the full-precision ones were kept.
        quantized: quantizers of activations that do round.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    handles = [
        quantizer.register_forward_hook(_unrounded)
        for quantizer in _quantizers(layers)
        if not any(quantizer is other for other in quantized)
    ]
    try:
        for layer in layers.values():
            if isinstance(layer, QuantizedWeightWrapper):
                inner = layer.wrapped_module
                for key, rounded in list(inner.named_parameters(recurse=False)):
                    kept.append((inner, key, rounded))
                    setattr(inner, key, nn.Parameter(getattr(inner, f"float_{key}"), requires_grad=False))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for inner, key, rounded in kept:
            setattr(inner, key, rounded)


@contextmanager
def with_weight(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """Within the block a layer computes with another weight."""
    before = layer.weight
    try:
        layer.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        layer.weight = before


def sampled_inputs(
    quantizers: Mapping[str, ActivationQuantizer], run: Callable[[], Any]
) -> dict[str, Tensor]:
    """Values that quantizers are given while `run` runs the model.

    Args:
        quantizers: by any name.
        run: runs the model.

    Returns:
        By name, a uniform random sample, (values,), the same in each process; behind the ReLU where the
        quantizer is one as well. Empty where nothing passed.
    """
    samples = {name: ValueSample(_SAMPLE) for name in quantizers}

    def see(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _module, inputs: samples[name].add(inputs[0])

    handles = [watch_inputs(quantizer, see(name)) for name, quantizer in quantizers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: sample.values.relu() if quantizers[name].settings.clip_half_range else sample.values
        for name, sample in samples.items()
    }


class ValueSample:
    """A uniform random sample of the values of a stream of tensors, of bounded size.

    Args:
        limit: the most values that are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rate = 1.0
        self._values = torch.empty(0)
        self._random = torch.Generator().manual_seed(0)

    @property
    def values(self) -> Tensor:
        """Those kept so far, (values,), in no order; on the CPU."""
        return self._values

    def add(self, x: Tensor) -> None:
        """Take in a tensor."""
        x = x.detach().flatten()
        if not x.numel():
            return
        while self._rate * x.numel() + self._values.numel() > self._limit:
            self._rate /= 2
            keep = torch.randperm(self._values.numel(), generator=self._random)[: self._values.numel() // 2]
            self._values = self._values[keep]
        if self._rate < 1:
            count = round(self._rate * x.numel())
            x = x[torch.randint(x.numel(), (count,), generator=self._random).to(x.device)]
        self._values = torch.cat([self._values, x.float().cpu()])


def _quantizers(layers: Layers) -> Iterable[ActivationQuantizer]:
    """Every quantizer of activations, once."""
    found: dict[int, ActivationQuantizer] = {}
    for layer in layers.values():
        for module in layer.modules():
            if isinstance(module, ActivationQuantizer):
                found[id(module)] = module
    return found.values()


def _unrounded(quantizer: ActivationQuantizer, inputs: tuple[Any, ...], _rounded: Any) -> Tensor:
    return torch.relu(inputs[0]) if quantizer.settings.clip_half_range else inputs[0]
