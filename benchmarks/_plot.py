"""Pictures of quality against cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple", "tab:brown")
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Point:
    """One way to make pictures: its cost, its quality with an interval, and what to write beside it."""

    cost: float
    value: float
    interval: tuple[float, float]
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One measure of quality.

    Attributes:
        measure: label of the axis, with its unit.
        series: name -> points, joined by a line in order of cost. The same names in every panel.
        lines: name -> value of a horizontal line, such as what is best.
    """

    measure: str
    series: Mapping[str, Sequence[Point]]
    lines: Mapping[str, float] = field(default_factory=dict)


def quality_against_cost(title: str, cost: str, panels: Sequence[Panel]) -> Figure:
    """Panels side by side, one a measure, over the same logarithmic axis of cost.

    Points are labelled in the first panel; in the others they stand at the same costs. Series are set apart by a
    hundredth of the cost, so that the intervals of equal costs stand side by side.

    Args:
        title: of the whole figure.
        cost: label of the axis of cost, with its unit.
        panels: at least one.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(6 * len(panels), 4.8), dpi=120, layout="constrained")
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (name, points) in enumerate(panel.series.items()):
            shift = 1.01 ** (i - (len(panel.series) - 1) / 2)
            points = sorted((replace(point, cost=point.cost * shift) for point in points), key=lambda point: point.cost)
            color = _COLORS[i % len(_COLORS)]
            axes.errorbar(
                [point.cost for point in points], [point.value for point in points],
                yerr=[[abs(point.value - end) for point, end in zip(points, ends, strict=True)]
                      for ends in zip(*(point.interval for point in points), strict=True)],
                color=color, marker=_MARKERS[i % len(_MARKERS)], markersize=5, linewidth=1.2, capsize=3, label=name,
            )  # fmt: skip
            if axes is figure.axes[0]:
                _label(axes, points, color, above=i % 2 == 0)
        for (name, value), style in zip(panel.lines.items(), itertools.cycle(("--", ":", "-."))):
            axes.axhline(value, color="gray", linewidth=1.2, linestyle=style, label=name)
        axes.set(xlabel=cost, ylabel=panel.measure, xscale="log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        costs = [point.cost for points in panel.series.values() for point in points]
        axes.set_xlim(min(costs) / 1.25, max(costs) * 1.25)
        axes.set_xticks(_ticks(min(costs), max(costs)))
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return figure


def save(figure: Figure, file: Path) -> Path:
    """Write a figure as PNG, making the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return file


def _label(axes: Axes, points: Sequence[Point], color: str, above: bool) -> None:
    """Write the labels of a series on one side of its line: those of the next series go to the other side."""
    for point in points:
        axes.annotate(
            point.label, (point.cost, point.value), color=color, fontsize=8, textcoords="offset points",
            xytext=(-5, 5) if above else (5, -5), ha="right" if above else "left", va="bottom" if above else "top",
        )  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers about `low` to `high`, or these two where there are not two such numbers."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low / 1.25 <= tick <= high * 1.25]
        if len(ticks) > 1:
            return ticks
    return sorted({float(f"{low:.3g}"), float(f"{high:.3g}")})
