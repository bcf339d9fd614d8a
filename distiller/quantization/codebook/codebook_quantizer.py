"""Weights of few values, in training and after it: each layer, or output channel, has a codebook of its own.

Knows nothing about data or training loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from torch import nn
from torch.optim import Optimizer

from distiller.errors import QuantizationError, did_you_mean, require
from distiller.names import named_modules, unwrap
from distiller.quantization.codebook.codebook import CodebookWeights, Method
from distiller.quantization.codebook.kmeans_1d import Start
from distiller.quantization.quantizer import QBits
from distiller.quantization.training.qat_quantizer import QatQuantizer
from distiller.quantization.training.weight_quantizers import OutputChannels
from distiller.registry import QUANTIZERS

__all__ = ["CodebookQuantizer", "codebooks_of", "quantize_with_codebook"]

LARGEST_WIDTH = 8


@QUANTIZERS.register
class CodebookQuantizer(QatQuantizer):
    """Gives the weights of convolutions, linear layers and embeddings few values; not activations.

    By default as in Deep Compression: a weight is clustered by k-means when the model is prepared (so the
    model should be a trained one, and pruned where it is to be pruned), then the centroids are trained, and
    the codes stay. The weight itself then stays in the optimizer and has no gradient. With `reassign_every`
    it is the weight that is trained (straight through), and codes follow it; see `codebook`.

    The gradient of a centroid is a sum over all weights that share it, too large for the learning rate of
    weights; hence `centroid_lr_factor`. Centroids are in a group of their own, without weight decay.
    Distiller had no such quantizer.

    Args:
        model: changed in place by `prepare_model`.
        optimizer: of the model; learned centroids are added to it, and its steps are counted for
            `reassign_every`.
        bits_weights: 1 to 8; 0, None or 32: full precision, the default.
        bits_bias: 2 to 23, symmetric over the range of the bias; 0, None, 24 and more: full precision.
        overrides: by layer name or pattern, the bits, `method`, `per_channel_wts`, `keep_zero`, `init`,
            `train_centroids` and `reassign_every`.
        method: "kmeans", the default; "linear": values equally far apart from the least to the largest
            weight; "linear_interior": alike, strictly between these two.
        per_channel_wts: a codebook of each output channel, rather than one of the layer.
        keep_zero: one of the values is 0, for pruned weights, which then need nothing but their code. Without
            it they are 0 as well, and all values are for the others; a file has to say which are pruned.
        init: "exact", the default: the k-means of least error, for layers that are small enough
            (`EXACT_WORK`), for others as "quantile"; else where k-means begins: "linear", "quantile" or
            "random".
        train_centroids: the values are learned; None, the default: those of k-means are, others are not.
        reassign_every: steps of the optimizer after which codes are looked for again, in the next batch of
            training; 0, the default: never. Without an optimizer nothing is counted.
        centroid_lr_factor: the learning rate of learned centroids, as a multiple of the optimizer's first
            group's; from 0, default 0.01.

    Raises:
        QuantizationError: a setting is wrong.
        UnknownNameError: an override matches no layer.
    """

    override_names: ClassVar[frozenset[str]] = frozenset(
        {"method", "per_channel_wts", "keep_zero", "init", "train_centroids", "reassign_every"}
    )
    smallest_bits: ClassVar[QBits] = QBits(2, 1, 2)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        bits_weights: int | None = None,
        bits_bias: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        method: Method = "kmeans",
        per_channel_wts: bool = False,
        keep_zero: bool = False,
        init: Start = "exact",
        train_centroids: bool | None = None,
        reassign_every: int = 0,
        centroid_lr_factor: float = 0.01,
    ) -> None:
        super().__init__(
            model, optimizer, bits_weights=bits_weights, bits_bias=bits_bias, overrides=overrides
        )
        self.defaults = {
            "method": method,
            "per_channel_wts": per_channel_wts,
            "keep_zero": keep_zero,
            "init": init,
            "train_centroids": train_centroids,
            "reassign_every": reassign_every,
        }
        _check_settings(self.defaults, "CodebookQuantizer: ")
        for key, given in self.overrides.items():
            _check_settings(given, f"CodebookQuantizer: overrides['{key}'].")
        self.centroid_lr_factor = _checked_factor(centroid_lr_factor)
        self._check_widths()

    def weight_quantizer(self, layer: nn.Module, name: str, bits: int, **overrides: Any) -> nn.Module:
        """The codebook of the weight as it is."""
        given = {**self.defaults, **overrides}
        is_learned = given["train_centroids"]
        return CodebookWeights(
            layer.weight,  # type: ignore[arg-type]
            bits,
            OutputChannels.of(layer) if given["per_channel_wts"] else None,
            method=given["method"],
            start=given["init"],
            keep_zero=given["keep_zero"],
            is_learned=given["method"] == "kmeans" if is_learned is None else is_learned,
            reassign_every=given["reassign_every"],
            where=name,
        )

    def prepare_model(self, dummy_input: Any = None) -> None:
        """Cluster the weights, or take over a model that an equal quantizer has prepared.

        Raises:
            QuantizationError: called a second time, the model is prepared otherwise, or a weight is not
                finite.
        """
        super().prepare_model(dummy_input)
        moving = [book for _, book in codebooks_of(self.model).values() if book.reassign_every]
        if self.optimizer is not None and moving:
            self.optimizer.register_step_post_hook(_StepCounter(moving))

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """One group of all learned centroids, without weight decay."""
        groups = super().optimizer_groups()
        for group in groups:
            if self.optimizer is not None:
                group["lr"] = self.optimizer.param_groups[0]["lr"] * self.centroid_lr_factor
                if "weight_decay" in self.optimizer.defaults:
                    group["weight_decay"] = 0.0
        return groups

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except model and optimizer, as plain data."""
        inherited = {key: value for key, value in super().settings().items() if key != "bits_activations"}
        return {**inherited, **self.defaults, "centroid_lr_factor": self.centroid_lr_factor}

    def _check_widths(self) -> None:
        for name, bits in {"": self.default_qbits, **self.module_qbits_map}.items():
            where = f"{name}: " if name else ""
            if bits.acts is not None:
                raise QuantizationError(
                    f"{where}bits_activations: must be 0, 32 or null for full precision with "
                    f"CodebookQuantizer, got {bits.acts}"
                )
            if bits.wts is not None and bits.wts > LARGEST_WIDTH:
                raise QuantizationError(
                    f"{where}bits_weights: must be 1 to {LARGEST_WIDTH} bits, or 0, 32 or null for full "
                    f"precision with CodebookQuantizer, got {bits.wts}"
                )


def quantize_with_codebook(model: nn.Module, bits_weights: int = 4, **settings: Any) -> CodebookQuantizer:
    """Give the weights of a trained model few values, without training.

    Args:
        model: changed in place; its parameters keep their full-precision values, and its layers compute with
            the values of the codebooks.
        bits_weights: 1 to 8, default 4.
        settings: others of `CodebookQuantizer`; nothing is learned unless `train_centroids` says so.

    Returns:
        The quantizer, whose `quantizer_metadata` describes what was done.

    Raises:
        QuantizationError: a setting is wrong, or the model is prepared otherwise.
        UnknownNameError: an override matches no layer.
    """
    quantizer = CodebookQuantizer(model, None, bits_weights, **{"train_centroids": False, **settings})
    quantizer.prepare_model()
    return quantizer


def codebooks_of(model: nn.Module) -> dict[str, tuple[nn.Parameter, CodebookWeights]]:
    """The full-precision weight and the codebook of each layer that has one, by its canonical name."""
    found: dict[str, tuple[nn.Parameter, CodebookWeights]] = {}
    for name, layer in named_modules(unwrap(model)):
        chain: Any = getattr(getattr(layer, "parametrizations", None), "weight", None)
        if chain is not None and isinstance(chain[-1], CodebookWeights):
            found[name] = (chain.original, chain[-1])
    return found


class _StepCounter:
    """Tells codebooks of each step of an optimizer."""

    def __init__(self, codebooks: list[CodebookWeights]) -> None:
        self.codebooks = codebooks

    def __call__(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for codebook in self.codebooks:
            codebook.count_step()


def _check_settings(given: Mapping[str, Any], where: str) -> None:
    for key, choices in (("method", get_args(Method)), ("init", get_args(Start))):
        value = given.get(key, choices[0])
        if value not in choices:
            hint = did_you_mean(str(value), choices)
            raise QuantizationError(f"{where}{key}: must be {', '.join(choices)}, got {value!r}{hint}")
    for key in ("per_channel_wts", "keep_zero"):
        require(given.get(key, False), bool, f"{where}{key}", "true or false")
    require(
        given.get("train_centroids"), (bool, type(None)), f"{where}train_centroids", "true, false or null"
    )
    every = given.get("reassign_every", 0)
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise QuantizationError(f"{where}reassign_every: must be a number of steps from 0, got {every!r}")


def _checked_factor(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise QuantizationError(f"centroid_lr_factor: must be a number from 0, got {value!r}")
    return float(value)
