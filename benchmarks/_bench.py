"""What all benchmarks share: claims declared before they are measured, a budget, a record, and a second look at it.

    BENCHMARK = Benchmark("deepcache", peers=["DeepCache"])
    BENCHMARK.add(QualityCost("avatars-sd", steps=50, minutes=4, variants={"N3": Variant("interval 3", [config])}))

    @BENCHMARK.part("time_over_package", minutes=2)
    def time(recorder):
        recorder.claim("time_over_package", "time over that of the package", 0.98, "x", (0.95, 1.02))

    if __name__ == "__main__":
        BENCHMARK.main()

**The full run** (`diffusers-ext bench KEY`) measures every declared claim, and records nothing unless each was.

**The quick run** (`--quick`) measures again what is cheap and does not hang on the speed of the machine, on a few of the
same pictures, and compares it with the record. What contradicts a record:

- It is not consistent: value, interval or verdict do not follow from the numbers that it holds of each picture.
- A setting is another than the benchmark's.
- A count, such as multiply-accumulates, differs by more than one in a million.
- A number of a picture that was measured again differs from the same picture's recorded one by more than the tolerance
  of the benchmark. The same seed gives the same picture on another machine up to rounding, and the tolerance is about
  that. For root mean square errors of float32 pictures on CPUs it is 1e-5: across batch sizes and instruction sets we
  saw at most 7e-7, at errors of 2e-3 to 1e-2.
- Where the record holds no numbers of each picture: the interval over the few pictures does not meet the recorded one.
  Both are 95% intervals, so two honest ones miss each other about once in a hundred times, a little more for few.

Times are not measured again: a quick run on a busy machine would say nothing about them.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from tqdm.auto import tqdm

from benchmarks._record import Recorder, Samples, print_table
from diffusers_ext import proofs
from diffusers_ext.cards import name_of

OUTPUT = Path(__file__).resolve().parents[1] / "outputs" / "bench"
QUICK_PICTURES = 8
_SAME_COUNT = 1e-6


@dataclass(frozen=True)
class Selection:
    """What a quick run measures.

    Attributes:
        claims: names of the claims; None for all that can be.
        pictures: how many pictures, or other units.
        draw: decides which ones.
    """

    claims: frozenset[str] | None = None
    pictures: int = QUICK_PICTURES
    draw: str = ""

    def units(self, total: int) -> list[int]:
        """Numbers of the pictures to measure, of `total`, in order."""
        return sorted(random.Random(self.draw).sample(range(total), min(self.pictures, total)))

    def wants(self, claims: Iterable[str]) -> bool:
        """Whether one of these claims is to be measured."""
        return self.claims is None or not self.claims.isdisjoint(claims)


class Part(Protocol):
    """A part of a benchmark.

    Attributes:
        claims: names of the claims that it measures, all of them each time.
        minutes: that it takes on two idle cores.
        quick: whether quick runs measure it.
        settings: what its numbers depend on besides the seeds.
        seeds: name -> seeds.
    """

    minutes: float
    quick: bool

    @property
    def claims(self) -> Sequence[str]: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def seeds(self) -> Mapping[str, Any]: ...

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        """Measure the claims into `recorder`: all, or those of `selection` on some of the pictures."""

    def draw(self, title: str, stem: Path) -> list[Path]:
        """Draw what was measured last to files whose path begins with `stem`; returns them."""


@dataclass(frozen=True)
class _Function:
    """A part that is one function."""

    function: Callable[[Recorder], None]
    claims: tuple[str, ...]
    minutes: float
    quick: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, Any] = field(default_factory=dict)

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        self.function(recorder)

    def draw(self, title: str, stem: Path) -> list[Path]:
        return []


class Benchmark:
    """The measurement of one method's claims.

    Args:
        key: the method.
        settings: what the numbers depend on besides what the parts say themselves.
        peers: packages that the full run compares with.
        threads: of the full run.
    """

    def __init__(
        self, key: str, *, settings: Mapping[str, Any] | None = None, peers: Sequence[str] = (), threads: int = 2
    ) -> None:
        self.key, self.peers, self.threads = key, tuple(peers), threads
        self._settings = dict(settings or {})
        self.parts: list[Part] = []

    def add(self, part: Part) -> Part:
        """Add a part, such as a `QualityCost`.

        Raises:
            ValueError: another part has a claim or a setting of the same name.
        """
        for what, theirs, ours in (
            ("claim", part.claims, self.claims), ("setting", part.settings, self.settings), ("seeds", part.seeds, self.seeds),
        ):  # fmt: skip
            twice = set(theirs) & set(ours)
            if twice or len(set(theirs)) < len(theirs):
                raise ValueError(f"Benchmark {self.key!r} has {what} {sorted(twice or theirs)} twice; allowed is once.")
        self.parts.append(part)
        return part

    def part(self, *claims: str, minutes: float, quick: bool = False) -> Callable:
        """Decorator of a function that measures `claims` into the recorder that it is given.

        Args:
            claims: their names.
            minutes: that it takes on two idle cores.
            quick: whether quick runs measure it as well, all of it: it takes seconds and no clock.
        """

        def add(function: Callable[[Recorder], None]) -> Callable[[Recorder], None]:
            self.add(_Function(function, claims, minutes, quick))
            return function

        return add

    @property
    def claims(self) -> list[str]:
        """Names of all claims."""
        return [name for part in self.parts for name in part.claims]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings."""
        settings = dict(self._settings)
        for part in self.parts:
            settings.update(part.settings)
        return settings

    @property
    def seeds(self) -> dict[str, Any]:
        """All seeds."""
        return {name: seeds for part in self.parts for name, seeds in part.seeds.items()}

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Run as a program. Leaves with code 1 where a quick run contradicts the record.

        Args:
            argv: without the program's name; None takes them from the command line.
        """
        parser = argparse.ArgumentParser(prog=f"benchmarks.{self.key}", description=f"Measure {self.key!r}.")
        parser.add_argument("--quick", action="store_true", help="A few pictures, compared with the record.")
        parser.add_argument("--claim", action="append", help="With --quick: only this claim. May be given again.")
        parser.add_argument("--draw", default="", help="With --quick: any text; it decides which pictures.")
        args = parser.parse_args(argv)
        if not args.quick and (args.claim or args.draw):
            parser.error("--claim and --draw go with --quick")
        console = Console()
        if not args.quick:
            self.run(console)
            return
        quick = [name for part in self.parts if part.quick for name in part.claims]
        for name in args.claim or []:
            if name not in quick:
                parser.error(f"--claim is {name!r}; allowed are {', '.join(quick) or 'none'}")
        if not self.check(console, Selection(frozenset(args.claim) if args.claim else None, draw=args.draw)):
            sys.exit(1)

    def run(self, console: Console) -> Path:
        """Measure everything, print it, draw it, and record it.

        Returns:
            The file of the record.

        Raises:
            ValueError: a part measured other claims than it declares, or the sources changed meanwhile. Nothing is
                recorded then.
        """
        import torch

        minutes = sum(part.minutes for part in self.parts)
        console.print(f"Measuring {self.key}: about {minutes:g} minutes on two idle cores.")
        torch.set_num_threads(self.threads)
        recorder = Recorder(self.key, self.settings, self.seeds, self.peers)
        began = time.perf_counter()
        self._measure(recorder, self.parts, None)
        recorder.print_tables(console)
        recorder.print_claims(console)
        for part in self.parts:
            for file in part.draw(name_of(recorder.row), OUTPUT / self.key):
                console.print(f"Drawn in {file}", soft_wrap=True)
        spent = (time.perf_counter() - began) / 60
        console.print(f"It took {spent:.1f} of {minutes:g} minutes.")
        file = recorder.write()
        console.print(
            f"Recorded in {file}. Its proofs are void: diffusers-ext verify {self.key} --record", soft_wrap=True
        )
        return file

    def check(self, console: Console, selection: Selection) -> bool:
        """Measure some of it again, and print it beside the record.

        Returns:
            Whether nothing contradicts the record.

        Raises:
            ValueError: the record was edited.
        """
        parts = [part for part in self.parts if part.quick and selection.wants(part.claims)]
        console.print(f"Measuring {self.key} again on {selection.pictures} pictures: about a minute on one core.")
        result = proofs.read_result(self.key)
        recorder = Recorder(self.key, self.settings, self.seeds)
        self._measure(recorder, parts, selection)
        if result is None or not result["claims"]:
            recorder.print_claims(console)
            console.print("There is no record to compare with.")
            return True
        for reason in proofs.staleness(recorder.row, result, ["measured"]):
            console.print(f"The record is stale: {reason}.", style="yellow")
        rows, wrong = [], [f"Setting {reason}" for reason in _other_settings(result["settings"], recorder.settings)]
        recorded = {entry["name"]: entry for entry in result["claims"]}
        for entry in recorder.claims:
            name = entry["name"]
            if name not in recorded:
                rows.append([name, None, None, entry["value"], "not recorded"])
                continue
            samples = recorder.samples.get(name)
            reasons = contradictions(recorded[name], entry, samples)
            wrong += [f"{name}: {reason}" for reason in reasons]
            rows.append([name, _with_interval(recorded[name]), _over_units(recorded[name], samples),
                         _with_interval(entry), "contradicts" if reasons else "agrees"])  # fmt: skip
        for name in recorded:
            if name not in self.claims:
                wrong.append(f"{name}: the benchmark measures no such claim")
        columns = ["claim", f"recorded {result['recorded']}", "of it, the same pictures", "now", "verdict"]
        print_table(console, "Measured again", columns, rows)
        left = [name for name in recorded if name in self.claims and name not in {row[0] for row in rows}]
        if left:
            why = "they take long, or are times" if selection.claims is None else "another claim was chosen"
            console.print(f"Not measured again ({why}): {', '.join(left)}", style="dim", highlight=False)
        for line in wrong:
            console.print(f"Contradicts the record: {line}", style="red", markup=False, highlight=False)
        return not wrong

    def _measure(self, recorder: Recorder, parts: Sequence[Part], selection: Selection | None) -> None:
        total = sum(part.minutes for part in parts)
        with tqdm(
            total=total, desc=self.key, unit="min", bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
        ) as bar:
            for part in parts:
                recorder.quick = part.quick
                before = len(recorder.claims)
                part.measure(recorder, selection)
                found = [entry["name"] for entry in recorder.claims[before:]]
                declared = [name for name in part.claims if selection is None or selection.wants([name])]
                if not set(declared) <= set(found) <= set(part.claims):
                    raise ValueError(
                        f"A part of benchmark {self.key!r} measured {found}; allowed is just what it declares, {declared}."
                    )
                bar.update(part.minutes)


def contradictions(recorded: Mapping[str, Any], measured: Mapping[str, Any], samples: Samples | None) -> list[str]:
    """Why a claim, measured again, contradicts the record, by the rule of this module; empty where it does not.

    Args:
        recorded: the claim as the result holds it.
        measured: the claim as it was measured again.
        samples: the numbers that `measured` follows from, where it does.
    """
    reasons = _inconsistencies(recorded)
    if "samples" not in recorded or samples is None:
        (low, high), (low_now, high_now) = recorded["interval"], measured["interval"]
        if low == high and low_now == high_now:
            if not _same(low, low_now):
                reasons.append(f"it is {low_now:.10g}, recorded {low:.10g}")
        elif low > high_now or low_now > high:
            reasons.append(f"its interval [{low_now:.4g}, {high_now:.4g}] misses the recorded [{low:.4g}, {high:.4g}]")
        return reasons
    there, units = len(recorded["samples"]["ours"]), samples.units or range(len(samples.columns["ours"]))
    if recorded["samples"]["formula"] != samples.formula or max(units) >= there:
        return [*reasons, f"{there} units by the formula {recorded['samples']['formula']!r} are recorded, and measured "
                f"is unit {max(units)} by {samples.formula!r}"]  # fmt: skip
    then = Samples.from_dict(recorded["samples"], units)
    for name in sorted({*then.counts, *samples.counts}):
        old, new = then.counts.get(name), samples.counts.get(name)
        if old is None or new is None or not _same(old, new):
            reasons.append(f"count {name!r} is {new}, recorded {old}")
    for name, column in samples.columns.items():
        now, old = np.asarray(column), np.asarray(then.columns[name])
        if samples.each:
            worst = int(np.abs(now - old).argmax())
            what, now, old = f"{name} of unit {units[worst]}", now[worst], old[worst]
        else:
            what, now, old = f"the mean of {name}", now.mean(), old.mean()
        if abs(now - old) > samples.tolerance:
            reasons.append(f"{what} is {now:.7g}, recorded {old:.7g}; at most {samples.tolerance:g} apart is rounding")
    return reasons


def _inconsistencies(recorded: Mapping[str, Any]) -> list[str]:
    """Where a recorded claim does not follow from what is recorded with it."""
    reasons = []
    value, interval = recorded["value"], recorded["interval"]
    if "samples" in recorded:
        found, ends = Samples.from_dict(recorded["samples"]).claim()
        # numpy may draw other resamples in another version
        slack = 1e-9 + 0.05 * (ends[1] - ends[0])
        if not _same(value, found) or any(abs(a - b) > slack for a, b in zip(interval, ends, strict=True)):
            reasons.append(
                f"its recorded numbers give {found:.6g} [{ends[0]:.6g}, {ends[1]:.6g}], recorded is {value:.6g} "
                f"[{interval[0]:.6g}, {interval[1]:.6g}]"
            )
    goal = recorded["goal"] and (recorded["goal"]["op"], recorded["goal"]["value"])
    holds = proofs.claim(recorded["name"], "", value, "", interval, goal)["holds"]
    if holds != recorded["holds"]:
        reasons.append(f"recorded is that it {'holds' if recorded['holds'] else 'does not hold'}, which is not so")
    return reasons


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= _SAME_COUNT * max(abs(a), abs(b)) + 1e-12


def _other_settings(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Recorded settings that are others now. What is set now and was not then shows in the numbers, if it matters."""
    return [
        f"{name!r} is {now.get(name)!r}, recorded {value!r}"
        for name, value in recorded.items()
        if now.get(name) != value
    ]


def _with_interval(entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{entry['value']:.4g}" + (f" [{low:.4g}, {high:.4g}]" if low < high else "") + f" {entry['unit']}"


def _over_units(recorded: Mapping[str, Any], samples: Samples | None) -> float | None:
    """What the record says of the units of `samples`, or None where it holds no numbers of them."""
    if "samples" not in recorded or samples is None:
        return None
    try:
        return Samples.from_dict(recorded["samples"], samples.units).claim()[0]
    except IndexError:
        return None
