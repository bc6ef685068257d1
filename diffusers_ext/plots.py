"""Plots of recorded results: error against calls of the denoiser, and quality against cost. They are drawn with matplotlib.

A plot is drawn from the tables of records alone, wherever these have numbers for one.
"""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import proofs
from .cards import name_of
from .registry import Method, get_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CALLS = re.compile(r"(\d+) calls")
_FEWER = re.compile(r"\d+ steps")  # rows of a plain run with fewer steps
_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8)  # of an axis of costs, times powers of ten
_MACS, _PSNR = "GMACs a picture", "PSNR to the full run (dB)"
_COLUMNS = 2
_IN_A_CARD = 4  # panels

Records = Sequence[tuple[Method, Mapping[str, Any]]]
Panels = Mapping[str, Mapping[str, Any]]


def drawings(found: Records) -> Iterator[tuple[str, str, Panels]]:
    """Kind, title, and lines by panel, of the plots that the tables of some records have numbers for."""
    kinds = (
        ("calls", "error against calls of the denoiser", _error_by_calls),
        ("macs", "PSNR to the full run against cost", _quality_by_macs),
    )
    for kind, title, read in kinds:
        panels = read(found)
        if panels:
            yield kind, title, panels


def of_method(key: str, result: Mapping[str, Any] | None) -> Iterator[tuple[str, str, Panels]]:
    """File name, title and panels of the plots of one method, as its card names them; none where nothing was measured.

    They have the first grounds of its record, in the order of its benchmark; the comparison of all methods has every one.
    """
    if result is None or not result["claims"]:
        return
    row = get_method(key)
    for kind, title, panels in drawings([(row, result)]):
        yield f"{key}-{kind}.png", f"{name_of(row)}: {title}", dict(itertools.islice(panels.items(), _IN_A_CARD))


def files(key: str) -> dict[str, bytes]:
    """The plots of one method as PNG, by file name; none where its record has no numbers for one.

    Raises:
        ValueError: there is no method `key`, or its recorded result was edited.
        ImportError: matplotlib is missing.
    """
    get_method(key)
    found = {}
    for name, title, panels in of_method(key, proofs.read_result(key)):
        with io.BytesIO() as file:
            draw(name.removesuffix(".png"), title, panels).savefig(file, format="png")
            found[name] = file.getvalue()
    return found


def _error_by_calls(found: Records) -> dict[str, dict[str, Any]]:
    """Ground -> sampler -> (key of the method, or None for what diffusers has; calls; mean errors)."""
    panels: dict[str, dict[str, Any]] = {}
    for row, result in found:
        for name, content in result["tables"].items():
            ground, is_errors, _ = name.partition(": error by calls")
            if not is_errors:
                continue
            peers = {line[1] for line in result["tables"][f"{ground}: against each peer"]["rows"]}
            columns = {i: int(match[1]) for i, title in enumerate(content["columns"]) if (match := _CALLS.match(title))}
            panel = panels.setdefault(ground, {})
            for line in content["rows"]:
                points = [(calls, line[i]) for i, calls in columns.items() if _is_positive(line[i])]
                if line[2] != "mean" or not points:
                    continue
                label, key = (line[0], None) if line[0] in peers else (_of_method(row, line[0]), row.key)
                if label not in panel or len(panel[label][1]) < len(points):  # several ran it, at more calls or fewer
                    panel[label] = (key, *zip(*points, strict=True))
    return panels


def _of_method(row: Method, label: str) -> str:
    """The label of a setting, with its method's name."""
    name = name_of(row)
    return label if name.lower() in label.lower() else f"{name}: {label}"


def _quality_by_macs(found: Records) -> dict[str, dict[str, Any]]:
    """Model and steps -> method -> (its key, or None for fewer steps; GMACs; PSNRs)."""
    panels: dict[str, dict[str, Any]] = {}
    for row, result in found:
        for name, content in result["tables"].items():
            against = result["tables"].get(name.replace("quality", "at equal cost"))  # names ours
            if against is None or not {_MACS, _PSNR} <= set(content["columns"]):
                continue
            heading = name.rpartition(": ")[0]
            settings = result["settings"].get(heading, result["settings"]) if heading else result["settings"]
            macs, psnr = content["columns"].index(_MACS), content["columns"].index(_PSNR)
            panel = panels.setdefault(f"{settings['model']}, {settings['steps']} steps", {})
            # Two studies of a method on one model, of settings that make no curve together, are two lines.
            own = name_of(row)
            if own in panel:
                own += ", " + " ".join(word for word in heading.split("_") if word not in settings["model"])
            compared = {line[0] for line in against["rows"]}
            series: dict[str, list[tuple[float, float]]] = {}
            for line in content["rows"]:
                ours = line[0] in compared
                if _is_positive(line[psnr]) and (ours or _FEWER.fullmatch(line[0])):
                    series.setdefault(own if ours else "fewer steps", []).append((line[macs], line[psnr]))
            for label, points in series.items():
                theirs = list(zip(*panel[label][1:], strict=True)) if label in panel else []
                points = sorted({*points, *theirs})
                panel[label] = (None if label == "fewer steps" else row.key, *zip(*points, strict=True))
    return dict(sorted(panels.items(), key=lambda item: (item[0].split(",")[0], len(item[0]), item[0])))


def _is_positive(value: Any) -> bool:
    """Whether a cell is a finite number above zero; records write infinity as a text."""
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def draw(name: str, title: str, panels: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Panels in rows of two; a method has one colour in all of them, and what diffusers has is gray.

    Args:
        name: of the kind, or a longer one that ends with it.
        title: over all panels.
        panels: as `drawings` gives them.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, columns = -(-len(panels) // _COLUMNS), min(len(panels), _COLUMNS)
    figure = Figure(figsize=(7.2 * columns, 4.2 * rows), dpi=90, layout="constrained")
    figure.suptitle(title)
    keys = dict.fromkeys(key for series in panels.values() for key, *_ in series.values() if key is not None)
    # The strong colours of tab20, then the pale ones; gray is what diffusers has.
    palette = [colormaps["tab20"](i) for first in (0, 1) for i in range(first, 20, 2) if i not in (14, 15)]
    colors = {key: palette[i % len(palette)] for i, key in enumerate(keys)}
    places: list[Any] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (heading, series) in zip(places, panels.items(), strict=False):
        _draw_panel(axes, heading, series, colors, by_calls=name.endswith("calls"))
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    return figure


def _draw_panel(axes: Axes, heading: str, series: Mapping[str, Any], colors: Mapping[str, Any], by_calls: bool) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    drawn = Counter[str | None]()
    for label, (key, cost, value) in series.items():
        number = drawn[key]
        drawn[key] += 1
        style: dict[str, Any] = {
            "marker": "osD^vP*X"[number % 8],
            "markersize": 3.5,
            "linestyle": ("-", "--", ":", "-.")[number % 4],
        }
        if key is None:
            style |= {"color": "gray", "alpha": 0.7, "linewidth": 1, "zorder": 1}
        else:
            style |= {"color": colors[key], "linewidth": 1.5, "zorder": 2}
        axes.plot(cost, value, label=label, **style)
    axes.set_xscale("log")
    if by_calls:
        axes.set_yscale("log")
    axes.set_title(heading, fontsize=9)
    axes.set_xlabel("calls of the denoiser" if by_calls else _MACS)
    axes.set_ylabel("mean error" if by_calls else _PSNR)
    costs = sorted({x for _, cost, _ in series.values() for x in cost})
    if by_calls:
        axes.set_xticks(costs)
    elif costs:
        ticks = [digit * 10.0**power for power in range(-3, 6) for digit in _TICKS]
        low, high = costs[0] / 1.1, costs[-1] * 1.1
        axes.set_xlim(low, high)
        inside = [tick for tick in ticks if low <= tick <= high]
        axes.set_xticks(
            inside if len(inside) > 1 else [float(f"{low * (high / low) ** share:.3g}") for share in (0.25, 0.75)]
        )
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
