"""Points of sweeps that never ran."""

from __future__ import annotations

from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.plot_labels import level_scale

SPARSITIES = (0.0, 0.5, 0.9)
BITS = (32.0, 8.0, 4.0, 2.0)


def points_of(count, levels=SPARSITIES, axis="element", interval=None, name="layer{}.weight"):
    """Curves that fall from 90 % by (number + 1) for all of the way from the mildest to the strongest level."""
    dense = level_scale(axis).dense_level
    return [
        SensitivityPoint(
            axis,
            name.replace("{}", str(index)),
            level,
            Score(top1 := 90 - (index + 1) * way, 99 - way, 0.3 + way),
            **({"top1_low": top1 - interval, "top1_high": top1 + interval} if interval else {}),
        )
        for index in range(count)
        for level in levels
        for way in [level if dense == 0 else 0.0 if level == dense else 1 - level / 10]
    ]


def legend_labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def tick_labels(ticks):
    return [text.get_text() for text in ticks]
