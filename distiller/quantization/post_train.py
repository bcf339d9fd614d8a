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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from distiller.atomic_file import write_whole
from distiller.data_loggers.quant_stats import check_stats, load_stats
from distiller.errors import QuantizationError, require
from distiller.graph import SummaryGraph
from distiller.model_transforms import fold_batch_norms
from distiller.names import named_modules, strip_wrappers, unwrap
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.clipping import ClipMode, check_n_stds
from distiller.quantization.dataflow import LayerUse, trace_dataflow
from distiller.quantization.ptq_build import PASSED_OVER, build_layer, kind_of, why_in_float, why_left_alone
from distiller.quantization.ptq_layers import RangeLinearQuantParamLayerWrapper, RangeLinearQuantWrapper
from distiller.quantization.ptq_prepare import (
    LayerStats,
    check_input_overrides,
    connect_inputs,
    relu_fusions,
    warn_of_narrow_accumulators,
)
from distiller.quantization.ptq_settings import (
    LayerSettings,
    check_keys,
    parse_accumulator_bits,
    parse_clip,
    parse_flag,
    parse_mode,
    parse_multiplier_bits,
    with_overrides,
)
from distiller.quantization.quantizer import QBits, Quantizer, leaf_modules
from distiller.quantization.stats_propagation import fold_stats, propagate_stats, sole_readers
from distiller.registry import QUANTIZERS

_ARGUMENT_MODES: dict[str, Any] = {
    "sym": "SYMMETRIC",
    "sym_restr": "SYMMETRIC_RESTRICTED",
    "asym_u": "ASYMMETRIC_UNSIGNED",
    "asym_s": "ASYMMETRIC_SIGNED",
}


@QUANTIZERS.register
class PostTrainLinearQuantizer(Quantizer):
    """Quantizes weights from their values and activations from calibration statistics.

    Convolutions, linear layers, additions, multiplications, concatenations and matrix products are
    computed as integer hardware would; any other layer in floating point, its output quantized.

    Args:
        model: in floating point; changed in place by `prepare_model`.
        bits_activations: 2 to 16; 0 or None: weights only.
        bits_parameters: 2 to 16; 0 or None: activations only.
        bits_accum: width of accumulators and, by default, of biases; 2 to 64. An accumulator that can
            overflow saturates, and is warned of: products of 16 by 16 bits need more than 32.
        overrides: settings of single layers by name or pattern (see `Quantizer`): the bits, and the
            arguments below from `mode` to `inputs_quant_auto_fallback` but the statistics, `input_overrides`
            (by index of the input: `{from_output: True}` or bits_activations, mode, clip_acts,
            clip_n_stds), and of other layers `quantize_inputs` and `make_identity`.
        mode: for activations and weights alike, or `{activations: mode, weights: mode}`.
        clip_acts: how ranges of activations are clipped.
        per_channel_wts: a scale for each output channel of a weight.
        model_activation_stats: YAML file, or its content; None: dynamic, ranges from each batch.
        clip_n_stds: for `clip_acts` N_STD, > 0.
        clip_half_range: treat outputs as if a ReLU followed.
        scale_approx_mult_bits: approximate rescaling by an integer of that many bits and a shift.
        inputs_quant_auto_fallback: quantize an input that comes from no quantized layer by its own
            statistics; otherwise that is an error.
        save_fp_weights: keep full-precision weights, for `quantize_params`.
        also_clip_weights: clip weights as activations (AVG: over the filters' extremes; per channel
            that is no clipping).

    Attributes:
        model_activation_stats: the statistics; after `prepare_model` as they were used.
        linear_quant_params: after `prepare_model`, `<layer>.<output_scale, ...>` in Distiller's convention.

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
        save_fp_weights: bool = False,
        also_clip_weights: bool = False,
    ) -> None:
        require(model, nn.Module, "PostTrainLinearQuantizer: model", "a torch.nn.Module")
        self.bits_accum = parse_accumulator_bits(bits_accum, "bits_accum")
        super().__init__(
            model,
            bits_activations=bits_activations,
            bits_weights=bits_parameters,
            bits_bias=self.bits_accum,
            overrides=overrides,
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
        )
        check_n_stds(self.default_settings.clip_acts, clip_n_stds, "clip_n_stds")
        self._stats_source = "activation statistics"
        self.model_activation_stats: dict[str, Any] | None = None
        if model_activation_stats is not None:
            if not isinstance(model_activation_stats, Mapping):
                self._stats_source = str(model_activation_stats)
            self.model_activation_stats = load_stats(model_activation_stats)
            names = [name for name, _ in named_modules(unwrap(model))]
            check_stats(self.model_activation_stats, names, self._stats_source)
        elif scale_approx_mult_bits is not None:
            raise QuantizationError(
                "scale_approx_mult_bits: needs model_activation_stats, "
                "dynamic scales are not known beforehand"
            )
        self._check_overrides()
        self._given_stats = copy.deepcopy(self.model_activation_stats)
        self.default_replacement_fn = self._quantized_layer
        self.replacement_blacklist = PASSED_OVER
        self.linear_quant_params: OrderedDict[str, Tensor] = OrderedDict()
        self._uses: dict[str, LayerUse] = {}
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
        if parse_multiplier_bits(args.qe_scale_approx_bits, "--qe-scale-approx-bits") is not None:
            other = "--qe-dynamic" if args.qe_dynamic else None if args.qe_bits_acts else "--qe-bits-acts 0"
            if other is not None:
                raise QuantizationError(
                    f"--qe-scale-approx-bits: with {other} there is no change of scale that is known "
                    "beforehand; leave one of them out"
                )
        if args.qe_stats_file is None and not args.qe_dynamic and args.qe_bits_acts:
            raise QuantizationError(
                "post-training quantization: activations need statistics; give --qe-stats-file, "
                "--qe-calibration or --qe-dynamic, or --qe-bits-acts 0 for weights only"
            )
        overrides: dict[str, Any] = {
            strip_wrappers(name): {"clip_acts": "NONE"} for name in args.qe_no_clip_layers
        }
        for name in args.qe_no_quant_layers:
            overrides[strip_wrappers(name)] = {"bits_activations": None, "bits_weights": None}
        modes: dict[str, Any] = {
            "activations": args.qe_mode_acts or args.qe_mode,
            "weights": args.qe_mode_wts or args.qe_mode,
        }
        return cls(
            model,
            args.qe_bits_acts,
            args.qe_bits_wts,
            args.qe_bits_accum,
            overrides,
            {key: _ARGUMENT_MODES.get(value, value) for key, value in modes.items()},
            args.qe_clip_acts,
            args.qe_per_channel,
            None if args.qe_dynamic else args.qe_stats_file,
            clip_n_stds=args.qe_clip_n_stds,
            scale_approx_mult_bits=args.qe_scale_approx_bits,
            save_fp_weights=args.qe_save_fp_weights,
        )

    def quantize_params(self) -> None:
        """Quantize the weights again from their full-precision copies, `float_weight`, where kept."""
        for wrapper in self._wrappers().values():
            if isinstance(wrapper, RangeLinearQuantParamLayerWrapper) and hasattr(
                wrapper.wrapped_module, "float_weight"
            ):
                wrapper.quantize_weight()

    def named_linear_quant_params(self) -> Iterator[tuple[str, Tensor]]:
        """`<layer>.output_scale`, `output_zero_point`, `w_scale`, `w_zero_point`: Distiller's convention."""
        for name, wrapper in self._wrappers().items():
            for key, value in wrapper.named_linear_quant_params():
                yield f"{name}.{key}", value

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
        stats = self.model_activation_stats
        contents: dict[str, Any] = {}
        for name in self._wrappers():
            contents[name] = self._layer_settings[name].as_parameters()
            if stats is not None:
                contents[name]["model_activation_stats"] = stats.get(name)
        contents["linear_quant_params"] = {k: v.tolist() for k, v in self.named_linear_quant_params()}
        files = {"layer_quant_params.yaml": contents}
        if stats is not None:
            files["quant_stats_after_prepare_model.yaml"] = stats
        try:
            for file, content in files.items():
                write_whole(Path(save_dir) / file, yaml.dump(content, Dumper=_NoAliasDumper, sort_keys=False))
        except OSError as error:
            raise QuantizationError(f"{save_dir}: cannot be written, {error.strerror or error}") from error
        return [Path(save_dir) / file for file in files]

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments except the model, as plain data."""
        default = self.default_settings
        return {
            "bits_activations": default.bits.acts,
            "bits_parameters": default.bits.wts,
            "bits_accum": self.bits_accum,
            "overrides": _plain(self.overrides),
            "mode": {"activations": default.mode.activations.name, "weights": default.mode.weights.name},
            "clip_acts": default.clip_acts.name,
            "per_channel_wts": default.per_channel_wts,
            "model_activation_stats": copy.deepcopy(self._given_stats),
            "clip_n_stds": default.clip_n_stds,
            "clip_half_range": default.clip_half_range,
            "scale_approx_mult_bits": default.scale_approx_mult_bits,
            "inputs_quant_auto_fallback": default.inputs_quant_auto_fallback,
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
        graph = SummaryGraph(self.model, dummy_input, purpose="post-training quantization")
        adjacency = graph.adjacency_map()
        fold_batch_norms(self.model, adjacency_map=adjacency)
        layers = leaf_modules(self.model)
        folded: dict[str, Any] = {
            name: layer.fused_modules for name, layer in layers.items() if hasattr(layer, "fused_modules")
        }
        is_dynamic = self.model_activation_stats is None
        readers = {
            name: reader
            for name, reader in sole_readers(adjacency, folded).items()
            if name in layers
            and self.module_qbits_map[name].acts
            and not why_in_float(layers[name], is_dynamic)
        }
        if self.model_activation_stats is not None:
            stats = fold_stats(self.model_activation_stats, folded)
            self.model_activation_stats = propagate_stats(stats, readers, layers)
        for name, relu in relu_fusions(readers, layers, self._may_fuse_relu).items():
            self.module_overrides_map[name]["clip_half_range"] = True
            self.module_overrides_map[relu]["make_identity"] = True
        self._drop_layers()
        self._trace(dummy_input)

    def _trace(self, dummy_input: Any) -> None:
        """See how the model runs its layers, and which of them can be quantized."""
        stats = LayerStats(self.model_activation_stats, self._stats_source)
        layers = {
            n: layer for n, layer in leaf_modules(self.model).items() if not isinstance(layer, PASSED_OVER)
        }
        self._uses = trace_dataflow(self.model, layers, dummy_input)
        check_input_overrides(self.overrides, self.override_keys, self._uses)
        self._layer_stats = stats
        self._left_alone = {
            name: reason
            for name, layer in layers.items()
            if self._wants_quantization(name, layer)
            and (reason := why_left_alone(layer, self._uses.get(name), stats.is_dynamic)) is not None
        }
        stats.check([n for n in layers if self.module_qbits_map[n].acts and n not in self._left_alone])
        by_reason: dict[str, list[str]] = {}
        for name, reason in self._left_alone.items():
            if name in self._uses or kind_of(layers[name]) == "param":  # nothing of the others is lost
                by_reason.setdefault(reason, []).append(f"'{name}'")
        for reason, names in by_reason.items():
            warnings.warn(f"not quantized, since {reason}: {', '.join(names)}", stacklevel=4)

    def _after_replacement(self, dummy_input: Any) -> None:
        connect_inputs(self._wrappers(), self._uses, self._layer_settings, self._layer_stats)
        self.linear_quant_params = OrderedDict(self.named_linear_quant_params())
        warn_of_narrow_accumulators(self._wrappers(), self._uses, self.bits_accum)

    def _quantized_layer(
        self, layer: nn.Module, name: str, bits: QBits, **overrides: Any
    ) -> nn.Module | None:
        if name in self._left_alone:
            return None
        settings = with_overrides(self.default_settings, bits, overrides, kind_of(layer), name)
        self._layer_settings[name] = settings
        return build_layer(layer, name, settings, self._layer_stats, self.bits_accum, self.save_fp_weights)

    def _wants_quantization(self, name: str, layer: nn.Module) -> bool:
        bits = self.module_qbits_map[name]
        return bits.acts is not None or (bits.wts is not None and kind_of(layer) == "param")

    def _may_fuse_relu(self, layer: str, relu: str) -> bool:
        """A ReLU with settings of its own stays, so that they are not passed over in silence."""
        same_bits = self.module_qbits_map[relu].acts == self.module_qbits_map[layer].acts
        same_overrides = self.module_overrides_map[relu] == self.module_overrides_map[layer]
        return relu not in self.override_keys or (same_bits and same_overrides)

    def _drop_layers(self) -> None:
        dropped = [name for name, given in self.module_overrides_map.items() if given.get("make_identity")]
        self._put(
            {self.layers[name]: nn.Identity() for name in dropped if kind_of(self.layers[name]) == "other"}
        )

    def _wrappers(self) -> dict[str, RangeLinearQuantWrapper]:
        return {
            name: wrapper
            for name, wrapper in self.modules_processed.values()
            if isinstance(wrapper, RangeLinearQuantWrapper)
        }

    def _check_overrides(self) -> None:
        kinds: dict[str, set[str]] = {key: set() for key in self.overrides}
        for name, layer in self.layers.items():
            if name in self.override_keys:
                kinds[self.override_keys[name]].add(kind_of(layer))
        check_keys(self.overrides, kinds)
        for name, layer in self.layers.items():
            bits, given = self.module_qbits_map[name], self.module_overrides_map[name]
            settings = with_overrides(self.default_settings, bits, given, kind_of(layer), name)
            if settings.scale_approx_mult_bits is not None and self.model_activation_stats is None:
                raise QuantizationError(
                    f"{name}: scale_approx_mult_bits: needs model_activation_stats, dynamic scales are not "
                    "known beforehand"
                )


class _NoAliasDumper(yaml.SafeDumper):
    """Writes equal parts out again: a file for people, not a graph."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _plain(value: Any) -> Any:
    """Overrides with members of enumerations by their names."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.name if isinstance(value, LinearQuantMode | ClipMode) else value
