"""Our samplers with their defaults on all image models of the zoo, against the best that diffusers has at equal calls.

    python -m benchmarks.sampler_defaults              # measures; writes data/sampler_defaults.json, a page and a drawing
    python -m benchmarks.sampler_defaults --model fashion-dit      # measures one again, and keeps what the record has of others
    python -m benchmarks.sampler_defaults --errors     # without Fréchet distances, of which it keeps what the record has
    python -m benchmarks.sampler_defaults --unguided   # the guided models again without guidance, errors alone
    python -m benchmarks.sampler_defaults --step       # the time of a step itself, on an idle machine, and nothing else
    python -m benchmarks.sampler_defaults --render     # writes the page and the drawing from the record alone

One default a method, fixed before: what is searched or trained for a number of calls (DC-Solver, AutoDiffusion), and what
leaves the path of the equation (Gaussian teleport), has its own benchmark. A sampler is below the best of diffusers' at a
number of calls where the whole 95 % interval of the mean difference, by a bootstrap over pictures of the same seeds, is below
zero by more than rounding. The best is chosen for each model and number of calls by the same pictures, which favours it. The
best of ours is compared with the best of diffusers' as well: there both are chosen, for each half of the pictures, by the other
half. Fréchet distances to real pictures are of the best three of ours, by errors at 5 and 8 calls, and of the best of diffusers'.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks import _plot, dpm_solver_v3
from benchmarks._feature_nets import nets
from benchmarks._grounds import CACHE, PictureGround
from benchmarks._quality import RMSE_TOLERANCE, Variant
from benchmarks._record import machine, versions
from benchmarks._sampler_peers import Sampler, is_flow, peers_of, variant_of
from benchmarks._samplers import error_against_calls
from benchmarks._step_overhead import StepOverhead
from benchmarks._zoo import ZooModel
from benchmarks.samplers import Tables
from diffusers_ext.cards import table
from diffusers_ext.metrics import bootstrap_interval, distance_difference, frechet_distance

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = Path(__file__).parent / "data" / "sampler_defaults.json", Path("docs") / "sampler_defaults.md"
DRAWING = PAGE.with_suffix(".png")
MODELS: dict[str, float | None] = {"avatars-sd": 3.0, "avatars-flow": 3.0, "fashion-ddpm": None, "fashion-dit": 4.0}
_OTHERS = ("unguided", "step")  # parts of the record that are measured by themselves
UNGUIDED = 1.0  # guidance scale of the three that have guidance
CALLS, FEW, PICTURES, REFERENCE_STEPS = (5, 8, 12, 20), (5, 8), 64, 200
DRAWN = 256  # pictures of Fréchet distances
OURS: dict[str, Variant] = {
    "UnifiedSolverScheduler": Variant("USF, Taylor 3, corrected", scheduler=dx.UnifiedSolverScheduler),
    "EVODiffScheduler": Variant("EVODiff", scheduler=dx.EVODiffScheduler),
    "GHVBScheduler": Variant("GHVB", scheduler=dx.GHVBScheduler),
}
# Order -> what is compared in the time of a step with diffusers' DPM-Solver++ of that order: no correctors, as that has none.
STEPPED: dict[int, dict[str, Variant]] = {
    2: {
        "USF, Taylor 2": Variant("USF", scheduler=dx.UnifiedSolverScheduler, scheduler_options={"solver_schedule": "taylor2"}),
        "GHVB 1.8": Variant("GHVB", scheduler=dx.GHVBScheduler),
        "DPM-Solver-v3, order 2": dpm_solver_v3.variant_of_order(2),
    },
    3: {
        "USF, Taylor 3": Variant("USF", scheduler=dx.UnifiedSolverScheduler, scheduler_options={"solver_schedule": "taylor3"}),
        "DPM-Solver-v3, order 3": dpm_solver_v3.variant_of_order(3),
    },
}  # fmt: skip
FLOW = {"FlowMatchPseudoCorrectorScheduler": Variant("FlowTurbo", scheduler=dx.FlowMatchPseudoCorrectorScheduler)}


def of_model(name: str, scale: float | None, flow: bool) -> dict[str, Sampler]:
    """Class of the scheduler -> sampler, of those that fit."""
    statistics = functools.partial(dpm_solver_v3.of_the_zoo, name, scale)
    v3 = {"DPMSolverV3Scheduler": dpm_solver_v3.variants(statistics)["v3"]}
    return OURS | v3 | (FLOW if flow else {})


class _Pictures(PictureGround):
    def draw(self, sampler: Sampler, calls: int) -> np.ndarray:
        """The pictures of a run of as many steps as `run` would make."""
        variant = variant_of(sampler, calls)
        return self._generate(variant, variant.steps or self.steps[id(sampler), calls], self.units)[0]

    steps: dict[tuple[int, int], int]


def best_against_best(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, list[list[str]]]:
    """Error of the best of ours less that of the best of theirs, each chosen for half of the pictures by the other half.

    Args:
        ours, theirs: label -> error of each picture, `(n,)`.

    Returns:
        The differences, `(n,)`, and for pictures of even and of odd number which two were compared.
    """
    count = len(next(iter(ours.values())))
    differences, chosen = np.empty(count), []
    for half in (0, 1):
        there, here = np.arange(1 - half, count, 2), np.arange(half, count, 2)
        pair = [min(group, key=lambda label: float(group[label][there].mean())) for group in (ours, theirs)]
        differences[here] = ours[pair[0]][here] - theirs[pair[1]][here]
        chosen.append(pair)
    return differences, chosen


def measure_model(
    name: str, scale: float | None, distances: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Errors of all samplers by calls, differences to the best of diffusers', and Fréchet distances of the best.

    Args:
        name: checkpoint of the zoo.
        scale: of guidance.
        distances: those that were measured before, or an empty list for none; None measures them.
    """
    zoo = ZooModel(name)
    ground = _Pictures(zoo, scale, PICTURES, reference_steps=REFERENCE_STEPS, cache=CACHE)
    flow = is_flow(zoo.pipe.scheduler)
    ours, peers = of_model(name, scale, flow), peers_of(type(zoo.pipe).__name__, flow)
    runs, steps = {}, {}
    with tqdm(total=len(CALLS) * len({**ours, **peers}), desc=name, unit="run") as bar:
        for label, sampler in {**ours, **peers}.items():
            for calls in CALLS:
                runs[label, calls] = ground.run(label, sampler, calls)
                steps[id(sampler), calls] = runs[label, calls].steps
                bar.update()
    errors = {label: {calls: runs[label, calls].errors for calls in CALLS} for label in {**ours, **peers}}
    best = {calls: min(peers, key=lambda peer: float(errors[peer][calls].mean())) for calls in CALLS}
    rows = []
    for label in errors:
        for calls in CALLS:
            low, high = bootstrap_interval(errors[label][calls], np.median)
            row: dict[str, Any] = {
                "sampler": label, "ours": label in ours, "calls": calls, "made": runs[label, calls].calls,
                "mean": float(errors[label][calls].mean()), "median": float(np.median(errors[label][calls])),
                "interval": [low, high],
            }  # fmt: skip
            if label in ours:
                difference = errors[label][calls] - errors[best[calls]][calls]
                row |= {"over": best[calls], "difference": float(difference.mean()),
                        "difference_interval": list(bootstrap_interval(difference, np.mean))}  # fmt: skip
            rows.append(row)
    bests = []
    for calls in CALLS:
        difference, pairs = best_against_best(*({label: errors[label][calls] for label in of} for of in (ours, peers)))
        bests.append({
            "calls": calls, "compared": pairs, "difference": float(difference.mean()),
            "difference_interval": list(bootstrap_interval(difference, np.mean)),
        })  # fmt: skip
    found = {"guidance_scale": scale, "errors": rows, "best": bests}
    if distances is not None:
        return {**found, "distances": list(distances)}

    def few(label: str) -> float:
        """Geometric mean of the mean errors at few calls."""
        return float(np.exp(np.mean([np.log(errors[label][calls].mean()) for calls in FEW])))

    chosen = [*sorted(ours, key=few)[:3], min(peers, key=few)]
    many = _Pictures(zoo, scale, DRAWN, reference_steps=REFERENCE_STEPS, cache=CACHE)
    many.steps = steps
    everyone = {**ours, **peers}
    return {**found, "distances": _distances(name, {label: everyone[label] for label in chosen}, many)}


def measure_step() -> list[dict[str, Any]]:
    """Time of a step itself over that of DPM-Solver++ of the same order, of a state of 65,536 numbers."""
    rows = []
    for order, variants in STEPPED.items():
        tables, name = Tables(), f"DPM-Solver++, order {order}"
        upstream = Variant(name, scheduler=DPMSolverMultistepScheduler, scheduler_options={"solver_order": order})
        titled = {label: dataclasses.replace(variant, title=label) for label, variant in variants.items()}
        StepOverhead(titled, peer=upstream).measure(tables, None)  # type: ignore[arg-type]
        for sampler, microseconds, ratio, low, high, again_low, again_high in tables.tables["step: time"]["rows"]:
            rows.append({
                "sampler": sampler, "microseconds": microseconds, "over": name, "ratio": ratio, "interval": [low, high],
                "again": [again_low, again_high],
            })  # fmt: skip
    return rows


def _distances(name: str, samplers: Mapping[str, Sampler], ground: _Pictures) -> list[dict[str, Any]]:
    """Fréchet distances, and how much less than that of the last sampler, by net and calls."""
    found = []
    for calls in FEW:
        pictures = {
            label: ground.draw(sampler, calls)
            for label, sampler in tqdm(samplers.items(), desc=f"{name}, {calls} calls")
        }
        for net, (features, real) in nets(name).items():
            made = {label: features(of) for label, of in pictures.items()}
            peer = list(made)[-1]
            for label, own in made.items():
                row: dict[str, Any] = {
                    "sampler": label, "calls": calls, "net": net,
                    "distance": frechet_distance(own, real, resamples=2).value,
                }  # fmt: skip
                if label != peer:
                    difference = distance_difference(own, made[peer], real, "frechet")
                    row |= {
                        "over": peer,
                        "difference": difference.value,
                        "difference_interval": list(difference.interval),
                    }
                found.append(row)
    return found


# --- the page --------------------------------------------------------------------------------------------------------


def page(record: Mapping[str, Any]) -> str:
    """The record as markdown."""
    where = record["machine"]
    parts = [
        "# Samplers with their defaults",
        "Written by `python -m benchmarks.sampler_defaults`. Root mean square error of pictures to those of the same seeds and "
        f"{record['reference_steps']} steps, {record['pictures']} seeds a model, at equal calls of the denoiser. A sampler is "
        "below the best of diffusers' (chosen for each model and number of calls, by the same pictures) where the whole 95 % "
        "interval of the paired difference is below zero by more than rounding. Samplers that are searched or trained for a number of calls have "
        "their own benchmarks: see the [comparison](comparison.md).",
        f"Recorded on {where['cpu']}, {where['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        *_missing(record),
        _verdicts(record),
        "The best of ours less the best of diffusers', both chosen for each half of the pictures by the other half, with its "
        "interval, and which were compared:",
        _bests(record["models"]),
        f"![Error against calls of the denoiser]({DRAWING.name})",
    ]  # fmt: skip
    if "step" in record:
        parts += ["## Time of a step", _step(record["step"])]
    for name, model in record["models"].items():
        scale = model["guidance_scale"]
        parts += [f"## {name}" + ("" if scale is None else f", guidance {scale:g}"), _errors(model), _frechet(model)]
    if "unguided" in record:
        parts += ["## Without guidance", _bests(record["unguided"])]
        for name, model in record["unguided"].items():
            parts += [f"### {name}, without guidance", _errors(model)]
    return "\n\n".join(parts) + "\n"


def _missing(record: Mapping[str, Any]) -> list[str]:
    names = [f"`{name}`" for name in MODELS if name not in record["models"]]
    return [f"**Not measured yet**: {', '.join(names)}."] if names else []


def below(record: Mapping[str, Any], sampler: str, calls: int) -> dict[str, bool]:
    """Model -> whether the sampler is below the best of diffusers' there."""
    return {
        name: row["difference_interval"][1] <= -RMSE_TOLERANCE  # some samplers are the same at some numbers of calls
        for name, model in record["models"].items()
        for row in model["errors"]
        if row["ours"] and row["sampler"] == sampler and row["calls"] == calls
    }


def _verdicts(record: Mapping[str, Any]) -> str:
    samplers = dict.fromkeys(
        row["sampler"] for model in record["models"].values() for row in model["errors"] if row["ours"]
    )
    lines = []
    for sampler in samplers:
        found = [below(record, sampler, calls) for calls in CALLS]
        lines.append([
            f"`{sampler}`", *(f"{sum(each.values())} of {len(each)}" for each in found),
            ", ".join(name for name in found[0] if all(each[name] for each in found[: len(FEW)])) or "none",
        ])  # fmt: skip
    head = [
        "sampler",
        *(f"below at {calls} calls" for calls in CALLS),
        f"models with all of {' and '.join(map(str, FEW))}",
    ]
    return table(head, lines)


def _step(step: Mapping[str, Any]) -> str:
    lines = [
        [
            row["sampler"], f"{row['microseconds']:.0f}", row["over"],
            f"{row['ratio']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})",
            f"{row['again'][0]:.2f} to {row['again'][1]:.2f}",
        ]
        for row in step["rows"]
    ]  # fmt: skip
    text = (
        f"Of `step` itself, without a model, on a state of 65,536 numbers; {step['machine']['threads']} threads. Each scheduler has "
        "made a run of as many steps before; DPM-Solver-v3 computes its coefficients in the first, which takes longer. The last "
        "column is diffusers' own scheduler timed against itself in the same rounds."
    )
    head = ["sampler", "a step (microseconds)", "compared with", "time over its", "that over itself"]
    return f"{text}\n\n{table(head, lines)}"


def _bests(models: Mapping[str, Any]) -> str:
    lines = []
    for name, model in models.items():
        cells = []
        for row in model["best"]:
            low, high = row["difference_interval"]
            pairs = " or ".join(dict.fromkeys(f"{a.removesuffix('Scheduler')} on {b}" for a, b in row["compared"]))
            text = f"{row['difference']:+.4f}, {low:+.4f} to {high:+.4f} ({pairs})"
            cells.append(f"**{text}**" if high <= -RMSE_TOLERANCE else text)
        lines.append([name, *cells])
    return table(["model", *(f"{calls} calls" for calls in CALLS)], lines)


def _errors(model: Mapping[str, Any]) -> str:
    lines: dict[str, list[str]] = {}
    for row in model["errors"]:
        text = f"{row['mean']:.4f}"
        if row["made"] != row["calls"]:
            text += f" ({row['made']:g} calls)"
        if row["ours"]:
            low, high = row["difference_interval"]
            text += f" ({row['difference']:+.4f}, {low:+.4f} to {high:+.4f}, on {row['over']})"
        name = f"`{row['sampler']}`" if row["ours"] else f"diffusers: {row['sampler']}"
        lines.setdefault(name, []).append(text)
    return table(["sampler", *(f"{calls} calls" for calls in CALLS)], [[name, *cells] for name, cells in lines.items()])


def _frechet(model: Mapping[str, Any]) -> str:
    lines = []
    for row in model["distances"]:
        less = ["", ""]
        if "over" in row:
            low, high = row["difference_interval"]
            less = [f"{row['difference']:+.3g}", f"{low:+.3g} to {high:+.3g}"]
        lines.append([row["calls"], row["net"], row["sampler"], f"{row['distance']:.4g}", *less])
    return table(["calls", "features of", "sampler", "Fréchet distance", "less that of diffusers'", "interval"], lines)


def draw(record: Mapping[str, Any], file: Path) -> None:
    panels, ours = {}, {}
    for name, model in record["models"].items():
        series: dict[str, list[_plot.Point]] = {}
        for row in model["errors"]:
            label = row["sampler"].removesuffix("Scheduler")
            series.setdefault(label, []).append(_plot.Point(row["made"], row["median"], tuple(row["interval"])))
        ours[name] = len({row["sampler"] for row in model["errors"] if row["ours"]})
        panels[name] = _plot.Panel("median error", series)
    _plot.save(error_against_calls("Samplers with their defaults by calls of the denoiser", panels, bold=ours), file)


def _kept(about: Mapping[str, Any]) -> dict[str, Any]:
    """Models that the record has by the same machine, versions and settings."""
    old = _old()
    same = {part: value for part, value in old.items() if part not in ("models", *_OTHERS)} == about
    return old["models"] if same else {}


def _old() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a program.

    Args:
        argv: without the program's name; None takes them from the command line.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.sampler_defaults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="What to measure; all models unless given.")
    parser.add_argument("--errors", action="store_true", help="Keep the recorded Fréchet distances.")
    parser.add_argument("--unguided", action="store_true", help="Errors without guidance, of models that have it.")
    parser.add_argument("--step", action="store_true", help="Measure the time of a step alone.")
    parser.add_argument("--render", action="store_true", help="Measure nothing.")
    parser.add_argument("--threads", type=int, default=2, help="Of torch.")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.step:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        record["step"] = {"machine": machine(), "versions": versions(), "rows": measure_step()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    elif args.unguided:
        for name in args.model or [name for name, scale in MODELS.items() if scale is not None]:
            found = measure_model(name, UNGUIDED, [])
            record = _old()
            record["unguided"] = {**record.get("unguided", {}), name: {"versions": versions(), **found}}
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    elif not args.render:
        about = {
            "machine": machine(), "versions": versions(), "pictures": PICTURES, "reference_steps": REFERENCE_STEPS,
            "distance_pictures": DRAWN,
        }  # fmt: skip
        for name in args.model or MODELS:
            kept = _kept(about)
            if args.errors and name not in kept:
                parser.error(
                    f"`--errors` needs recorded Fréchet distances of {name!r}; there are none by these versions."
                )
            found = measure_model(name, MODELS[name], kept[name]["distances"] if args.errors else None)
            kept = _kept(about)  # another model may have been measured meanwhile
            models = {other: {**kept, name: found}[other] for other in MODELS if other in {**kept, name: found}}
            others = {part: value for part, value in _old().items() if part in _OTHERS}
            RECORD.write_text(json.dumps({**about, "models": models, **others}, indent=1) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    (ROOT / PAGE).write_text(page(record), encoding="utf-8")
    draw(record, ROOT / DRAWING)
    print(page(record))


if __name__ == "__main__":
    main()
