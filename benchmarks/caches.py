"""All caches on one plot: how near to the plain run, against time and against multiply-accumulates, a model of the zoo each.

    python -m benchmarks.caches                           # measures; writes data/caches.json, a page and drawings
    python -m benchmarks.caches --model avatars-flow      # measures one again, and keeps what the record has of others,
                                                          # by the same machine, versions and settings
    python -m benchmarks.caches --part quality            # what is not measured again is that of the record
    python -m benchmarks.caches --render                  # writes the page and the drawings from the record alone

It takes what the benchmarks of the caches declare at 20 steps, with the settings that they declare, and puts it beside the
caches of other people and beside fewer steps. Nothing is claimed here: claims are those benchmarks'. Runs are taken from the
cache of runs where they are there. Time is that of whole runs of one batch, all settings in turn in one process, over that of
the plain run. Methods whose trained parts are missing are left out, and it says so. Fréchet distances to real pictures are of
the plain run, and of the nearest to it, ours and other people's, by at most half of its multiply-accumulates.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks import _plot
from benchmarks._cache_peers import peers
from benchmarks._feature_nets import nets
from benchmarks._frontier import COST, Frontier, Made, Runs, curves_against_cost
from benchmarks._quality import QualityCost, Variant
from benchmarks._record import machine, print_table, versions
from benchmarks._zoo import BATCH
from diffusers_ext import proofs, registry
from diffusers_ext.bench import keys as measured_methods
from diffusers_ext.cards import name_of, table
from diffusers_ext.metrics import bootstrap_interval, distance_difference, frechet_distance, time_ratio

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = Path(__file__).parent / "data" / "caches.json", ROOT / "docs" / "caches_measured.md"
STEPS, PICTURES, ROUNDS = 20, 32, 3
MODELS = {"avatars-sd": 3.0, "avatars-flow": 3.0, "fashion-dit": 4.0}  # with the guidance scale
PARTS = ("quality", "time", "distance")
DRAWN, FIRST_SEED = 256, 10**6  # pictures of Fréchet distances; their seeds are others
MOST = 0.5  # of the multiply-accumulates of the plain run, for these
_TIME, _PLAIN = "time over that of the plain run", "the plain run"
_COLUMNS = [
    "cache", "setting", "MACs over the plain run", "time over the plain run", "time low", "time high",
    "PSNR to the plain run (dB)", "PSNR low", "PSNR high",
]  # fmt: skip
Times = dict[str, dict[str, tuple[float, float, float]]]


def cache_keys() -> list[str]:
    """Keys of the measured methods that are caches."""
    found = []
    for key in measured_methods():
        entry = registry.get_method(key).entry
        names = [entry] if isinstance(entry, str) else list(entry or ())
        if any(getattr(getattr(dx, name), "family", None) == "cache" for name in names if name in registry.LAZY_NAMES):
            found.append(key)
    return found


def declared(model: str) -> dict[str, dict[str, Variant]]:
    """Key of a method -> title -> setting: those that its benchmark measures on this model at these steps."""
    found: dict[str, dict[str, Variant]] = {}
    for key in cache_keys():
        for part in importlib.import_module(f"benchmarks.{key}").BENCHMARK.parts:
            if not isinstance(part, Frontier | QualityCost):
                continue
            if (part.model, part.steps, part.guidance_scale) == (model, STEPS, MODELS[model]):
                found.setdefault(key, {}).update({variant.title: variant for variant in part.variants.values()})
    return found


def available(
    found: Mapping[str, Mapping[str, Variant]], runs: Runs, console: Console
) -> dict[str, dict[str, Variant]]:
    """Those that can be put on; prints why others cannot."""
    kept: dict[str, dict[str, Variant]] = {}
    for key, variants in found.items():
        for title, variant in variants.items():
            try:
                with variant.on(runs.zoo.pipe):
                    kept.setdefault(key, {})[title] = variant
            except FileNotFoundError as missing:
                console.print(f"{key}, {title}: left out. {missing}", soft_wrap=True, markup=False)
    return kept


def quality(
    runs: Runs, ours: Mapping[str, Mapping[str, Variant]]
) -> tuple[dict[str, dict[str, Made]], dict[str, dict[str, Made]]]:
    """What our caches made, by the name of the method, and what those of other people made."""
    mine: dict[str, dict[str, Made]] = {}
    with tqdm(total=sum(map(len, ours.values())), desc=runs.model, unit="run", leave=False) as bar:
        for key, variants in ours.items():
            module = registry.get_method(key).module
            assert module is not None  # it is measured
            for title, variant in variants.items():
                # Trained parts may be others the next time.
                made = (
                    runs.make(variant)
                    if variant.prepare is not None
                    else runs.kept(variant, {"settings": variant.settings(), "source": proofs.source_hash(module)})
                )
                mine.setdefault(_name(key), {})[title] = made
                bar.update()
    return mine, runs.of_peers()


def times(runs: Runs, variants: Mapping[str, Mapping[str, Variant]]) -> Times:
    """Median and interval of the time over that of the plain run, all settings in turn."""
    with contextlib.ExitStack() as stack:

        def run(variant: Variant) -> Any:
            pipe = stack.enter_context(variant.on(copy.deepcopy(runs.zoo.pipe)))
            count = min(BATCH, runs.pictures)
            return functools.partial(
                runs.zoo.generate, pipe, runs.conditions[:count], range(count), variant.steps or runs.steps,
                runs.guidance_scale, **variant.options,
            )  # fmt: skip

        made = {(name, title): run(each) for name, curve in variants.items() for title, each in curve.items()}
        labels = {f"{i}": label for i, label in enumerate(made)}
        functions = {"plain": run(Variant())} | {i: made[label] for i, label in labels.items()}
        ratios = time_ratio(functions, baseline="plain", repeats=ROUNDS)
    found: Times = {}
    for i, (name, title) in labels.items():
        found.setdefault(name, {})[title] = (ratios[i].median, *ratios[i].interval)
    return found


def nearest(curves: Mapping[str, Mapping[str, Made]], most: float) -> tuple[str, str] | None:
    """Name and setting of the curves that is nearest to the plain run by PSNR, of those that cost at most `most`."""
    found = [
        (_psnr(made)[0], name, title)
        for name, curve in curves.items()
        for title, made in curve.items()
        if made.macs <= most
    ]
    return max(found)[1:] if found else None


def distances(runs: Runs, variants: Mapping[str, Variant]) -> list[list[Any]]:
    """Name, net, Fréchet distance to real pictures, and how much more than that of the plain run, with its interval."""
    conditions, seeds = runs.zoo.conditions(DRAWN), range(FIRST_SEED, FIRST_SEED + DRAWN)
    pictures = {}
    for name, variant in tqdm({_PLAIN: Variant(), **variants}.items(), desc="Pictures for distances", unit="run"):
        with variant.on(runs.zoo.pipe) as pipe:
            steps = variant.steps or runs.steps
            pictures[name] = runs.zoo.generate(pipe, conditions, seeds, steps, runs.guidance_scale, **variant.options)
    rows: list[list[Any]] = []
    for net, (features, real) in nets(runs.model).items():
        made = {name: features(of) for name, of in pictures.items()}
        for name, own in made.items():
            more: list[Any] = [None, None, None]
            if name != _PLAIN:
                difference = distance_difference(own, made[_PLAIN], real, "frechet")
                more = [difference.value, *difference.interval]
            rows.append([name, net, frechet_distance(own, real, resamples=2).value, *more])
    return rows


def rows_of(
    curves: Mapping[str, Mapping[str, Made]], full: float, timed: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[list[Any]]:
    """A row a setting."""
    rows = []
    for name, curve in curves.items():
        for title, made in curve.items():
            time = list(timed.get(name, {}).get(title, (None, None, None)))
            rows.append([name, title, made.macs / full, *time, *_psnr(made)])
    return rows


def points_of(rows: Sequence[Sequence[Any]], column: int) -> dict[str, list[_plot.Point]]:
    """Curves of PSNR against a column; settings that have no such number, or equal the plain run, are left out."""
    curves: dict[str, list[_plot.Point]] = {}
    for row in rows:
        name, title, value, low, high = row[0], row[1], *row[6:9]
        if row[column] is not None and low is not None:
            curves.setdefault(name, []).append(_plot.Point(row[column], value, (low, high), title))
    return curves


def _psnr(made: Made) -> tuple[float, float | None, float | None]:
    if not made.errors.all():
        return float("inf"), None, None
    values = -20 * np.log10(made.errors)
    return float(values.mean()), *bootstrap_interval(values, np.mean)


def _name(key: str) -> str:
    return name_of(registry.get_method(key))


def overview(model: str, parts: Sequence[str], console: Console, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one model.

    Args:
        model: of the zoo.
        parts: of `PARTS`; times and distances that are not measured are those of `kept`.
        console: prints the table.
        kept: what was returned the last time.

    Returns:
        Rows, the number of ours among the caches, times by name and setting, and the rows of distances.
    """
    runs = Runs(model, STEPS, MODELS[model], PICTURES)
    ours = available(declared(model), runs, console)
    mine, theirs = quality(runs, ours)
    variants = {_name(key): found for key, found in ours.items()} | peers(model, STEPS, MODELS[model])
    timed: Any = times(runs, variants) if "time" in parts else kept.get("times", {})
    apart = kept.get("distances", [])
    if "distance" in parts:
        chosen = [
            best for best in (nearest(group, MOST * runs.full_macs) for group in (mine, theirs)) if best is not None
        ]
        apart = distances(runs, {f"{name}, {title}": variants[name][title] for name, title in chosen})
    rows = rows_of(mine | theirs, runs.full_macs, timed)
    print_table(console, f"{model}, {STEPS} steps, {PICTURES} pictures", _COLUMNS, rows)
    return {"rows": rows, "ours": len(mine), "times": timed, "distances": apart}


# --- the page --------------------------------------------------------------------------------------------------------


def draw(model: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    """Draw the record of one model beside the page."""
    panels = {COST: points_of(found["rows"], 2), _TIME: points_of(found["rows"], 3)}
    figure = curves_against_cost(
        f"Caches on {model}, {settings['steps']} steps: means over {settings['pictures']} pictures, 95% intervals; solid lines "
        "are ours",
        {name: panel for name, panel in panels.items() if panel}, "PSNR to the plain run (dB)", found["ours"], log=False,
    )  # fmt: skip
    return _plot.save(figure, PAGE.with_name(f"{PAGE.stem}-{model}.png"))


def page(record: Mapping[str, Any]) -> str:
    """The whole file."""
    machine, versions = record["machine"], record["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        "# Caches side by side",
        "How near to the plain run each cache stays, against what it costs: with the settings that its benchmark fixed before "
        f"measuring, {record['steps']} steps, the same {record['pictures']} pictures for all, peers of other people and fewer "
        "steps beside it. A curve is better where it is higher and further to the left. Claims, with their intervals over paired "
        "pictures, are in the [comparison](comparison.md). Written by `python -m benchmarks.caches`.",
        f"{machine['cpu']}, {machine['threads']} thread(s); {packages}. Times are those of whole runs of one batch, over that of "
        "the plain run, all settings in turn; where their intervals are wide, other work ran on the machine.",
    ]
    for model, found in record["models"].items():
        lines = [
            [
                name, setting, f"{macs:.2f}", "" if time is None else f"{time:.2f}, {low:.2f} to {high:.2f}",
                "equal" if worst is None else f"{psnr:.1f}, {worst:.1f} to {best:.1f}",
            ]
            for name, setting, macs, time, low, high, psnr, worst, best in found["rows"]
        ]  # fmt: skip
        head = ["cache", "setting", "MACs over the plain run", _TIME, "PSNR to the plain run (dB)"]
        picture = f"![Caches on {model}]({PAGE.stem}-{model}.png)"
        parts += [f"## {model}", picture, table(head, lines)]
        if found["distances"]:
            parts += [
                f"Fréchet distance of {record['drawn']} pictures to real ones, of the nearest to the plain run by at most {MOST:g} of "
                "its multiply-accumulates, ours and other people's:",
                table(
                    ["cache", "features of", "distance", "more than that of the plain run"],
                    _distance_lines(found["distances"]),
                ),
            ]
    return "\n\n".join(parts) + "\n"


def _distance_lines(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [
        [name, net, f"{value:.4g}", "" if more is None else f"{more:+.3g}, {low:+.3g} to {high:+.3g}"]
        for name, net, value, more, low, high in rows
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a program.

    Args:
        argv: without the program's name; None takes them from the command line.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.caches", description="All caches side by side.")
    parser.add_argument("--part", action="append", choices=PARTS, help="What to measure; all unless given.")
    parser.add_argument("--model", action="append", choices=MODELS, help="Of the zoo; all three unless given.")
    parser.add_argument("--render", action="store_true", help="Measure nothing.")
    parser.add_argument("--threads", type=int, default=2, help="Of torch.")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    about = {"machine": machine(), "versions": versions(), "steps": STEPS, "pictures": PICTURES, "drawn": DRAWN}
    for model in () if args.render else args.model or MODELS:
        old = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {"models": {}}
        there = old["models"] if {**old, **about} == old else {}
        found = {**there, model: overview(model, args.part or PARTS, console, there.get(model, {}))}
        content = {**about, "models": {name: found[name] for name in MODELS if name in found}}
        RECORD.write_text(json.dumps(content, indent=1, default=float) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    PAGE.write_text(page(record), encoding="utf-8")
    for model, found in record["models"].items():
        draw(model, found, record)
    console.print(f"Written to {PAGE}", soft_wrap=True)


if __name__ == "__main__":
    main()
