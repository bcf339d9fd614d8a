"""Post-training linear quantization of a whole model, simulated.

    quantizer = PostTrainLinearQuantizer(model, 8, 8, model_activation_stats="acts_quantization_stats.yaml")
    quantizer.prepare_model(torch.randn(1, 3, 224, 224))
    accuracy = evaluate(model)

prepare_model: fold batch norms -> narrow statistics to what the next layer reads -> fuse ReLUs ->
see where every layer's inputs come from -> replace the layers -> connect them.
Knows nothing about data or accuracy.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from distiller.data_loggers.quant_stats import check_stats, load_stats
from distiller.errors import QuantizationError, require
from distiller.functional_modules import to_modules
from distiller.graph import AdjacencyMap, SummaryGraph
from distiller.model_transforms import fold_batch_norms
from distiller.names import named_modules, unwrap
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.clipping import ClipMode, check_n_stds
from distiller.quantization.dataflow import LayerUse, trace_dataflow
from distiller.quantization.functional_operations import (
    awaited_layers,
    warn_of_operations_in_float,
    without_statistics,
)
from distiller.quantization.ptq_adjustable import AdjustableQuantizer
from distiller.quantization.ptq_args import quantizer_arguments
from distiller.quantization.ptq_build import (
    PASSED_OVER,
    build_layer,
    is_on_weights_grid,
    kind_of,
    why_left_alone,
    why_not_supported,
)
from distiller.quantization.ptq_files import plain_overrides, write_parameters
from distiller.quantization.ptq_prepare import (
    LayerStats,
    check_input_overrides,
    connect_inputs,
    kept_grids,
    relu_fusions,
    warn_of_left_alone,
    warn_of_narrow_accumulators,
)
from distiller.quantization.ptq_settings import (
    LayerSettings,
    check_conflicts,
    check_keys,
    check_no_rescaling,
    parse_accumulator_bits,
    parse_clip,
    parse_flag,
    parse_mode,
    parse_multiplier_bits,
    parse_precision,
    with_fp16,
    with_overrides,
)
from distiller.quantization.quantizer import QBits, leaf_modules
from distiller.quantization.stats_propagation import fold_stats, propagate_stats, read_ranges, sole_readers
from distiller.registry import QUANTIZERS

_FP16 = "fp16 is deprecated: set fpq_module to 16"


@QUANTIZERS.register
class PostTrainLinearQuantizer(AdjustableQuantizer):
    """Quantizes weights from their values and activations from calibration statistics.

    Convolutions, linear layers, embeddings, additions, multiplications, concatenations and matrix
    products are computed as integer hardware would; any other layer in floating point, its output
    quantized. What only selects values, as max pooling, stays on the grid of its input.

    Args:
        model: in floating point; changed in place by `prepare_model`.
        bits_activations: 2 to 16; 0 or None: weights only.
        bits_parameters: 2 to 16; 0 or None: activations only.
        bits_accum: width of accumulators and, by default, of biases; 2 to 64. An accumulator that can
            overflow saturates, and is warned of: products of 16 by 16 bits need more than 32.
        overrides: settings of single layers by name or pattern (see `Quantizer`): the bits, and the
            arguments below from `mode` to `fpq_module` but the statistics, `input_overrides`
            (by index of the input: `{from_output: True}` or bits_activations, mode, clip_acts,
            clip_n_stds), `fake` (computed in floating point between its quantizers, in `fpq_module` where
            that is given), and of other layers `quantize_inputs` and `make_identity`.
        mode: for activations and weights alike, or `{activations: mode, weights: mode}`.
        clip_acts: how ranges of activations are clipped.
        per_channel_wts: a scale for each output channel of a weight.
        model_activation_stats: YAML file, or its content; None: dynamic, ranges from each batch.
        clip_n_stds: for `clip_acts` N_STD, > 0.
        clip_half_range: treat outputs as if a ReLU followed.
        scale_approx_mult_bits: approximate rescaling by an integer of that many bits and a shift.
        inputs_quant_auto_fallback: quantize an input that comes from no quantized layer by its own
            statistics; otherwise that is an error.
        fpq_module: 16, "bf16", 32 or 64: compute the layers in that floating-point type and quantize
            nothing; of single layers in `overrides`, where null takes a layer out of it.
        fp16: deprecated, `fpq_module` 16.
        save_fp_weights: keep full-precision weights, for `quantize_params`.
        also_clip_weights: clip weights as activations (AVG: over the filters' extremes; per channel
            that is no clipping).

    Attributes:
        model_activation_stats: the statistics; after `prepare_model` as they were used.
        linear_quant_params: as in the base class.

    Raises:
        QuantizationError: a setting is wrong.
        UnknownNameError: an override matches no layer.
        StatsError: the statistics cannot be read, or are of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        bits_activations: int | None = 8,
        bits_parameters: int | None = 8,
        bits_accum: int = 32,
        overrides: Mapping[str, Any] | None = None,
        mode: str | LinearQuantMode | Mapping[str, str | LinearQuantMode] = LinearQuantMode.SYMMETRIC,
        clip_acts: str | ClipMode = ClipMode.NONE,
        per_channel_wts: bool = False,
        model_activation_stats: str | Path | Mapping[str, Any] | None = None,
        *,
        clip_n_stds: float | None = None,
        clip_half_range: bool = False,
        scale_approx_mult_bits: int | None = None,
        inputs_quant_auto_fallback: bool = True,
        fpq_module: Literal[16, 32, 64, "bf16"] | None = None,
        fp16: bool = False,
        save_fp_weights: bool = False,
        also_clip_weights: bool = False,
    ) -> None:
        require(model, nn.Module, "PostTrainLinearQuantizer: model", "a torch.nn.Module")
        self.bits_accum = parse_accumulator_bits(bits_accum, "bits_accum")
        self._stats_source = "activation statistics"
        self.model_activation_stats: dict[str, Any] | None = None
        if model_activation_stats is not None:
            if not isinstance(model_activation_stats, Mapping):
                self._stats_source = str(model_activation_stats)
            self.model_activation_stats = load_stats(model_activation_stats)
        super().__init__(
            model,
            bits_activations=bits_activations,
            bits_weights=bits_parameters,
            bits_bias=self.bits_accum,
            overrides=overrides,
            awaited_layers=awaited_layers(model, self.model_activation_stats, self._stats_source),
        )
        self.save_fp_weights = parse_flag(save_fp_weights, "save_fp_weights")
        self.default_settings = LayerSettings(
            bits=self.default_qbits,
            mode=parse_mode(mode, "mode"),
            clip_acts=parse_clip(clip_acts, "clip_acts"),
            clip_n_stds=clip_n_stds,
            clip_half_range=parse_flag(clip_half_range, "clip_half_range"),
            per_channel_wts=parse_flag(per_channel_wts, "per_channel_wts"),
            scale_approx_mult_bits=parse_multiplier_bits(scale_approx_mult_bits, "scale_approx_mult_bits"),
            inputs_quant_auto_fallback=parse_flag(inputs_quant_auto_fallback, "inputs_quant_auto_fallback"),
            also_clip_weights=parse_flag(also_clip_weights, "also_clip_weights"),
            fpq_module=with_fp16(
                parse_precision(fpq_module, "fpq_module"), parse_flag(fp16, "fp16"), "fpq_module"
            ),
        )
        check_n_stds(self.default_settings.clip_acts, clip_n_stds, "clip_n_stds")
        if fp16 or any(given.get("fp16") for given in self.overrides.values()):
            warnings.warn(_FP16, DeprecationWarning, stacklevel=2)
        if self.model_activation_stats is None and scale_approx_mult_bits is not None:
            raise QuantizationError(
                "scale_approx_mult_bits: needs model_activation_stats, "
                "dynamic scales are not known beforehand"
            )
        self._check_overrides()
        self._given_stats = copy.deepcopy(self.model_activation_stats)
        self.default_replacement_fn = self._quantized_layer
        self.replacement_blacklist = PASSED_OVER
        self.linear_quant_params = OrderedDict()
        self._uses: dict[str, LayerUse] = {}
        self._in_float: set[str] = set()
        self._left_alone: dict[str, str] = {}
        self._kept_grids: dict[str, str] = {}
        self._layer_settings: dict[str, LayerSettings] = {}

    @classmethod
    def from_args(cls, model: nn.Module, args: Any) -> PostTrainLinearQuantizer:
        """The quantizer that the program's `--qe-*` flags ask for.

        Args:
            model: the model.
            args: a namespace with the flags' destinations, `qe_mode`, `qe_bits_acts`, ...; `qe_stats_file`
                may also be statistics at hand.

        Raises:
            QuantizationError: activations are to be quantized and there are neither statistics nor
                `qe_dynamic`, or a setting is wrong.
        """
        return cls(model, **quantizer_arguments(args))

    def save_per_layer_parameters(self, save_dir: str | Path) -> list[Path]:
        """Write `layer_quant_params.yaml` and, with statistics, `quant_stats_after_prepare_model.yaml`.

        Args:
            save_dir: an existing folder.

        Returns:
            The files.

        Raises:
            QuantizationError: the model is not prepared, or the folder cannot be written.
        """
        if not self.is_prepared:
            raise QuantizationError("save_per_layer_parameters: call prepare_model first")
        replaced = [name for name, wrapper in self.modules_processed.values() if wrapper is not None]
        return write_parameters(
            save_dir,
            {name: self._layer_settings[name] for name in replaced},
            dict(self.named_linear_quant_params()),
            self.model_activation_stats,
        )

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except the model, as plain data."""
        default = self.default_settings
        return {
            "bits_activations": default.bits.acts,
            "bits_parameters": default.bits.wts,
            "bits_accum": self.bits_accum,
            "overrides": plain_overrides(self.overrides),
            "mode": {"activations": default.mode.activations.name, "weights": default.mode.weights.name},
            "clip_acts": default.clip_acts.name,
            "per_channel_wts": default.per_channel_wts,
            "model_activation_stats": copy.deepcopy(self._given_stats),
            "clip_n_stds": default.clip_n_stds,
            "clip_half_range": default.clip_half_range,
            "scale_approx_mult_bits": default.scale_approx_mult_bits,
            "inputs_quant_auto_fallback": default.inputs_quant_auto_fallback,
            "fpq_module": default.fpq_module,
            "save_fp_weights": self.save_fp_weights,
            "also_clip_weights": default.also_clip_weights,
        }

    def _before_replacement(self, dummy_input: Any) -> None:
        if dummy_input is None:
            raise QuantizationError(
                "prepare_model: an input is needed to trace the model with; "
                "pass distiller.get_dummy_input(input_shape=model.input_shape)"
            )
        self.model.eval()
        self._make_modules(dummy_input)
        self._put(self._identities(name for name in self.layers if self._settings_of(name).make_identity))
        graph = SummaryGraph(self.model, dummy_input, purpose="post-training quantization")
        adjacency = graph.adjacency_map()
        fold_batch_norms(self.model, adjacency_map=adjacency)
        if self.model_activation_stats is not None:
            self._in_float = without_statistics(self.model, self.model_activation_stats)
        if self._quantizes_activations:
            warn_of_operations_in_float(graph, self._in_float, self.model)
        layers = {
            name: layer
            for name, layer in leaf_modules(self.model).items()
            if not isinstance(layer, PASSED_OVER) and name not in self._in_float
        }
        self._find_left_alone(layers, trace_dataflow(self.model, layers, dummy_input))
        fused = self._narrow_and_fuse(layers, adjacency)
        left = {name: layer for name, layer in layers.items() if name not in fused}
        self._uses = trace_dataflow(self.model, left, dummy_input)
        self._kept_grids = kept_grids(left, self._uses, self._is_quantized, self._may_keep_grid)
        check_input_overrides(self.overrides, self.override_keys, self._uses)
        self._layer_stats = LayerStats(self.model_activation_stats, self._stats_source)
        self._layer_stats.check(
            [name for name in left if self._has_own_grid(name) and name not in self._kept_grids]
        )

    def _find_left_alone(self, layers: Mapping[str, nn.Module], uses: Mapping[str, LayerUse]) -> None:
        """Take note of the layers that were to be quantized and cannot be, and warn of them."""
        self._left_alone = {
            name: reason
            for name, layer in layers.items()
            if self._wants_quantization(name, layer)
            and (reason := why_left_alone(layer, uses.get(name), self.model_activation_stats is None))
        }
        warn_of_left_alone(self._left_alone, layers, uses)

    def _narrow_and_fuse(self, layers: Mapping[str, nn.Module], adjacency: AdjacencyMap) -> set[str]:
        """Narrow the statistics to what is read, and let layers do the work of ReLUs, which are returned."""
        folded: dict[str, Any] = {
            name: layer.fused_modules
            for name, layer in leaf_modules(self.model).items()
            if hasattr(layer, "fused_modules")
        }
        if self.model_activation_stats is not None:
            ranges = read_ranges(adjacency, folded, layers)
            self.model_activation_stats = propagate_stats(
                fold_stats(self.model_activation_stats, folded),
                {name: read for name, read in ranges.items() if self._has_own_grid(name)},
            )
        fused = relu_fusions(sole_readers(adjacency, folded), layers, self._may_fuse_relu)
        for name in fused:
            self.module_overrides_map[name]["clip_half_range"] = True
        self._put(self._identities(fused.values()))
        return set(fused.values())

    def _make_modules(self, dummy_input: Any) -> None:
        """Make modules of functional operations where the statistics name them, or none are needed."""
        stats, source = self.model_activation_stats, self._stats_source
        if awaited_layers(self.model, stats, source) or (stats is None and self._quantizes_activations):
            to_modules(self.model, dummy_input)
            check_stats(stats or {}, [name for name, _ in named_modules(unwrap(self.model))], source)
            self._read_layers()
            self._check_overrides()

    @property
    def _quantizes_activations(self) -> bool:
        return self.default_settings.bits.acts is not None and not self.default_settings.is_float

    def _after_replacement(self, dummy_input: Any) -> None:
        wrappers = self._wrappers()
        connect_inputs(wrappers, self._uses, self._layer_settings, self._layer_stats)
        for name in self._kept_grids:
            grid = wrappers[name].output_quant_settings
            assert grid is not None
            self._layer_settings[name] = self._layer_settings[name].with_output(grid)
        self.linear_quant_params = OrderedDict(self.named_linear_quant_params())
        warn_of_narrow_accumulators(wrappers, self._uses, self.bits_accum)

    def _quantized_layer(
        self, layer: nn.Module, name: str, bits: QBits, **overrides: Any
    ) -> nn.Module | None:
        if name in self._left_alone or name in self._in_float:
            return None
        settings, keeps_grid = self._settings_of(name), name in self._kept_grids
        self._layer_settings[name] = settings
        return build_layer(
            layer, name, settings, self._layer_stats, self.bits_accum, self.save_fp_weights, keeps_grid
        )

    def _settings_of(self, name: str) -> LayerSettings:
        bits, overrides = self.module_qbits_map[name], self.module_overrides_map[name]
        return with_overrides(self.default_settings, bits, overrides, kind_of(self.layers[name]), name)

    def _wants_quantization(self, name: str, layer: nn.Module) -> bool:
        settings = self._settings_of(name)
        has_weight = kind_of(layer) in ("param", "embedding")
        # Of layers that are not supported the weight is meant, too.
        wts = self.default_qbits.wts if why_not_supported(layer) and not has_weight else settings.bits.wts
        return not settings.is_float and (settings.bits.acts is not None or wts is not None)

    def _is_quantized(self, name: str) -> bool:
        """Whether the layer's output is."""
        if name in self._left_alone or name in self._in_float:
            return False
        if name not in self.layers or isinstance(self.layers[name], PASSED_OVER):
            return False
        settings = self._settings_of(name)
        return settings.bits.acts is not None and not settings.is_float

    def _has_own_grid(self, name: str) -> bool:
        """Whether the layer's output is quantized by statistics of its own."""
        return self._is_quantized(name) and not is_on_weights_grid(self.layers[name], self._settings_of(name))

    def _may_fuse_relu(self, layer: str, relu: str) -> bool:
        """A ReLU with settings of its own stays, so that they are not passed over in silence."""
        same_bits = self.module_qbits_map[relu].acts == self.module_qbits_map[layer].acts
        same_overrides = self.module_overrides_map[relu] == self.module_overrides_map[layer]
        is_alike = relu not in self.override_keys or (same_bits and same_overrides)
        return self._has_own_grid(layer) and is_alike

    def _may_keep_grid(self, layer: str, source: str) -> bool:
        """A module with settings of its own, or with a ReLU of its own, has a grid of its own."""
        settings, others = self._settings_of(layer), self._settings_of(source)
        has_relu = settings.clip_half_range and not others.clip_half_range
        is_alike = layer not in self.override_keys or settings.output() == others.output()
        return is_alike and not has_relu and not settings.quantize_inputs

    def _identities(self, names: Iterable[str]) -> dict[nn.Module, nn.Module]:
        """Layers that are to go, with what takes their place."""
        return {self.layers[name]: nn.Identity().train(self.layers[name].training) for name in names}

    def _check_overrides(self) -> None:
        kinds: dict[str, set[str]] = {key: set() for key in self.overrides}
        for name, layer in self.layers.items():
            if name in self.override_keys:
                kinds[self.override_keys[name]].add(kind_of(layer))
        check_keys(self.overrides, kinds)
        check_conflicts(self.overrides)
        if self.model_activation_stats is None:
            check_no_rescaling({name: self._settings_of(name) for name in self.layers})
