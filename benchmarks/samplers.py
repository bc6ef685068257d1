"""All samplers on one plot: error against calls of the denoiser, on exact scores and on each model of the zoo.

    python -m benchmarks.samplers                       # everything
    python -m benchmarks.samplers --part oracles        # exact scores, a few minutes
    python -m benchmarks.samplers --part pictures --model avatars-sd
    python -m benchmarks.samplers --part step           # time of `step` itself

It takes what the benchmarks of the methods in area `samplers` declare, with the settings that they declare, and runs it
side by side with diffusers' samplers. Nothing is claimed here: claims are those benchmarks'. Runs of schedulers on pictures
that they made are taken from the cache. Tables go to `outputs/bench/samplers.json`, drawings beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console

from benchmarks import _plot
from benchmarks._bench import OUTPUT
from benchmarks._grounds import PROBLEMS
from benchmarks._quality import Variant
from benchmarks._record import machine, print_table, versions
from benchmarks._sampler_peers import Sampler, variant_of
from benchmarks._samplers import OracleStudy, TrajectoryStudy, error_against_calls
from benchmarks._step_overhead import StepOverhead
from diffusers_ext import registry
from diffusers_ext.bench import keys as measured_methods
from diffusers_ext.cards import name_of

PARTS = ("oracles", "pictures", "step")
_Study = TypeVar("_Study")


class Tables:
    """Takes tables as a `Recorder` does, of many studies; claims are not kept."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, Any]] = {}

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables[name] = {"columns": list(columns), "rows": [list(row) for row in rows]}

    def paired(self, *args: Any, **kwargs: Any) -> None:
        pass

    claim = paired


def declared(kind: type[_Study]) -> list[tuple[str, _Study]]:
    """`(key, part)` for all parts of a kind in the benchmarks of area `samplers`."""
    keys = [key for key in measured_methods() if registry.get_method(key).area == "samplers"]
    benchmarks = {key: importlib.import_module(f"benchmarks.{key}").BENCHMARK for key in keys}
    return [(key, part) for key, made in benchmarks.items() for part in made.parts if isinstance(part, kind)]


def together(studies: Sequence[tuple[str, Any]]) -> dict[str, Sampler]:
    """The samplers of several studies, by a name that tells whose they are."""
    return {
        f"{key}_{label}": _named(key, sampler) for key, study in studies for label, sampler in study.variants.items()
    }


def _named(key: str, sampler: Sampler) -> Sampler:
    """The sampler with a title that begins with the method's name, where it does not say it."""

    def titled(variant: Variant) -> Variant:
        name = name_of(registry.get_method(key))
        if name.lower() in variant.title.lower():
            return variant
        return dataclasses.replace(variant, title=f"{name}, {variant.title}" if variant.title else name)

    return titled(sampler) if isinstance(sampler, Variant) else lambda calls: titled(variant_of(sampler, calls))


def _common(studies: Sequence[Any]) -> dict[str, Any]:
    """Budgets that all studies have, since a searched plan knows no others, and no claims."""
    return {
        "calls": [calls for calls in studies[0].calls if all(calls in study.calls for study in studies)],
        "claim_calls": (),
    }


def oracles(tables: Tables) -> None:
    """Every problem with all the samplers that are measured on it."""
    studies, panels, most = declared(OracleStudy), {}, 0
    for problem, about in PROBLEMS.items():
        here = [(key, study) for key, study in studies if problem in study.grounds]
        if here:
            samplers = together(here)
            units = min(study.units for _, study in here)
            study = OracleStudy(samplers, problems=[problem], samples=units, **_common([study for _, study in here]))
            study.measure(tables, None)  # type: ignore[arg-type]
            panels[about.title], most = study._drawn[problem], max(most, len(samplers))
    _draw("oracles", panels, most)


def pictures(tables: Tables, models: Sequence[str]) -> None:
    """Every model and guidance with all the samplers that are measured on it."""
    studies = [(key, study) for key, study in declared(TrajectoryStudy) if not models or study.model in models]
    for name in dict.fromkeys(study.name for _, study in studies):
        here = [(key, study) for key, study in studies if study.name == name]
        samplers, first = together(here), here[0][1]
        study = TrajectoryStudy(
            first.model, first.guidance_scale, samplers, pictures=first.units, minutes=first.minutes, name=name,
            reference_steps=first.reference_steps, zoo=first.zoo, cache=first.cache,
            **_common([study for _, study in here]),
        )  # fmt: skip
        study.measure(tables, None)  # type: ignore[arg-type]
        _draw(name, {study._title(name): study._drawn[name]}, len(samplers))


def step(tables: Tables) -> None:
    """Time of `step` itself of all schedulers that are measured on exact scores of diffusion."""
    samplers = together([(key, study) for key, study in declared(OracleStudy) if "mixture" in study.grounds])
    StepOverhead(samplers).measure(tables, None)  # type: ignore[arg-type]


def _draw(name: str, panels: Mapping[str, _plot.Panel], ours: int) -> None:
    if panels:
        figure = error_against_calls("Samplers by calls of the denoiser", panels, bold=ours)
        _plot.save(figure, OUTPUT / f"samplers-{name}.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a program.

    Args:
        argv: without the program's name; None takes them from the command line.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.samplers", description="All samplers side by side.")
    parser.add_argument("--part", action="append", choices=PARTS, help="What to measure; all parts unless given.")
    parser.add_argument("--model", action="append", default=[], help="Of the zoo; all that samplers are measured on.")
    parser.add_argument("--threads", type=int, default=2, help="Of torch.")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tables, console = Tables(), Console()
    for part in args.part or PARTS:
        if part == "pictures":
            pictures(tables, args.model)
        else:
            {"oracles": oracles, "step": step}[part](tables)
    for name, table in tables.tables.items():
        print_table(console, name, table["columns"], table["rows"])
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / "samplers.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["tables"] if file.is_file() else {}
    found = {"machine": machine(), "versions": versions(), "tables": kept | tables.tables}
    file.write_text(json.dumps(found, indent=1, default=float), encoding="utf-8")
    console.print(f"Written to {file}, drawings beside it.", soft_wrap=True)


if __name__ == "__main__":
    main()
