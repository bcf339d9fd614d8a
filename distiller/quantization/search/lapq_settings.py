"""Settings of the loss-aware search of scales, and what is wrong with them.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distiller.errors import QuantizationError, did_you_mean
from distiller.quantization.clipping import ClipMode
from distiller.quantization.search.lp_ranges import InitMode, init_name, parse_init

WHERE = "ptq_coordinate_search"
QUADRATIC = "quadratic"
METHODS = (
    "Powell", "Nelder-Mead", "COBYLA", "COBYQA", "CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP", "trust-constr",
)  # fmt: skip
"""Of scipy.optimize.minimize; those behind COBYQA need gradients, which rounding has not."""

_MINIMIZER_KWARGS = ("options", "tol", "bounds", "constraints", "jac", "hess", "hessp")


@dataclass(frozen=True, slots=True)
class LapqSettings:
    """How the scales are searched.

    Attributes:
        method: of scipy.optimize.minimize.
        maxiter: iterations of the method, in each minimisation of basin hopping; None: as the method has it.
        maxfev: points evaluated in all, beside those that find the start; None: no limit.
        basinhopping: minimise again and again, from a point nearby.
        basinhopping_niter: how often.
        init_mode: where to start: a clip mode; a norm as `L2`: ranges of least error of the layer's values; a
            function (values, quantized values) -> error; or one of these by layer, NONE for those not named.
        init_method: how a norm's range is found: None, exhaustively, each channel by itself; or a method of
            scipy.optimize.minimize; or "quadratic": the p of the norm is chosen as well, by a parabola
            through the losses at several.
        search_clipping: vary the ends of the ranges, which of asymmetric ranges are two, not the scales.
        minimizer_kwargs: further arguments of scipy.optimize.minimize: `options`, `tol`, ...

    Raises:
        QuantizationError: a value is wrong.
    """

    method: str = "Powell"
    maxiter: int | None = None
    maxfev: int | None = None
    basinhopping: bool = False
    basinhopping_niter: int = 100
    init_mode: Any = ClipMode.NONE
    init_method: str | None = None
    search_clipping: bool = False
    minimizer_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", _method(self.method, "method", ()))
        if self.init_method is not None:
            object.__setattr__(self, "init_method", _method(self.init_method, "init_method", (QUADRATIC,)))
        modes = self.modes(())
        _count(self.maxiter, "maxiter", optional=True)
        _count(self.maxfev, "maxfev", optional=True)
        _count(self.basinhopping_niter, "basinhopping_niter")
        for name in ("basinhopping", "search_clipping"):
            if not isinstance(getattr(self, name), bool):
                raise QuantizationError(
                    f"{WHERE}: {name}: must be true or false, got {getattr(self, name)!r}"
                )
        if not isinstance(self.minimizer_kwargs, Mapping):
            raise QuantizationError(
                f"{WHERE}: minimizer_kwargs: must be a mapping, got {self.minimizer_kwargs!r}"
            )
        for name in self.minimizer_kwargs:
            if name not in _MINIMIZER_KWARGS:
                hint = did_you_mean(str(name), _MINIMIZER_KWARGS) or f"; give {', '.join(_MINIMIZER_KWARGS)}"
                raise QuantizationError(f"{WHERE}: minimizer_kwargs: '{name}' cannot be given{hint}")
        if self.init_method == QUADRATIC and modes != {"": ClipMode.NONE}:
            raise QuantizationError(
                f"{WHERE}: init_method 'quadratic' chooses the norm, init_mode {self.init_mode!r} gives it; "
                "leave one of them out"
            )

    def modes(self, layers: tuple[str, ...]) -> dict[str, InitMode]:
        """The init mode of each layer, and under "" of those that are not named.

        Args:
            layers: names that `init_mode` may have; empty: any.
        """
        where = f"{WHERE}: init_mode"
        if not isinstance(self.init_mode, Mapping):
            return {"": parse_init(self.init_mode, where)}
        modes: dict[str, InitMode] = {"": ClipMode.NONE}
        for name, value in self.init_mode.items():
            if layers and name not in layers:
                hint = did_you_mean(str(name), layers) or f"; there are {', '.join(layers)}"
                raise QuantizationError(f"{where}: no quantized layer '{name}'{hint}")
            modes[str(name)] = parse_init(value, f"{where}['{name}']")
        return modes

    def identity(self) -> dict[str, Any]:
        """What gives a search's points their meaning, as plain data: on resuming, limits may be others."""
        return {
            "method": self.method,
            "basinhopping": self.basinhopping,
            "init_mode": {name: init_name(mode) for name, mode in self.modes(()).items()},
            "init_method": self.init_method,
            "search_clipping": self.search_clipping,
        }


def _method(value: Any, where: str, others: tuple[str, ...]) -> str:
    known = {name.lower(): name for name in (*METHODS, *others)}
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    hint = did_you_mean(value, known.values()) if isinstance(value, str) else ""
    raise QuantizationError(
        f"{WHERE}: {where}: must be one of {', '.join(known.values())}, got {value!r}{hint}"
    )


def _count(value: Any, name: str, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise QuantizationError(f"{WHERE}: {name}: must be a whole number from 1 on, got {value!r}")
