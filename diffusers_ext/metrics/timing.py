"""Wall time of alternatives as ratios to a baseline, with the spread of the baseline against itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .intervals import bootstrap_interval


@dataclass(frozen=True)
class RatioEstimate:
    """Time of one function divided by that of the baseline in the same round; below 1 is faster.

    Attributes:
        rounds: the ratio of each round.
        median: their median.
        interval: 2.5 and 97.5 percent ends of the bootstrapped median.
    """

    rounds: tuple[float, ...]
    median: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, seconds: list[float], baseline: list[float]) -> RatioEstimate:
        rounds = tuple(a / b for a, b in zip(seconds, baseline, strict=True))
        return cls(rounds, statistics.median(rounds), bootstrap_interval(rounds))

    def to_dict(self) -> dict[str, Any]:
        return {"rounds": list(self.rounds), "median": self.median, "interval": list(self.interval)}


@dataclass(frozen=True)
class TimeRatios:
    """Result of `time_ratio`.

    Attributes:
        baseline: name of the baseline.
        seconds: median seconds of one call by name, the baseline included.
        ratios: by name, the baseline left out.
        noise: the baseline against itself. A ratio whose interval lies inside this one tells nothing.
    """

    baseline: str
    seconds: dict[str, float]
    ratios: dict[str, RatioEstimate]
    noise: RatioEstimate

    def __getitem__(self, name: str) -> RatioEstimate:
        return self.ratios[name]

    def to_dict(self) -> dict[str, Any]:
        """As dicts, lists, strings and floats, for JSON."""
        return {
            "baseline": self.baseline,
            "seconds": dict(self.seconds),
            "ratios": {name: ratio.to_dict() for name, ratio in self.ratios.items()},
            "noise": self.noise.to_dict(),
        }


def time_ratio(
    fns: Mapping[str, Callable[[], Any]],
    baseline: str,
    repeats: int = 9,
    warmup: int = 1,
    synchronize: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TimeRatios:
    """Time functions against a baseline, so that a machine that speeds up or slows down does not decide.

    In each round every function runs once and the baseline twice; the order moves on by one from round to round, so
    that none always runs right after the same load. Ratios are taken inside a round. The second run of the baseline,
    against the first, shows how far a ratio strays where nothing differs. A progress bar appears after two seconds.

    Args:
        fns: functions without arguments by name, at least one beside the baseline.
        baseline: name of the one that all are compared with.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        synchronize: waits for the device, called before each reading of the clock. Default: `torch.cuda.synchronize`
            where there is a CUDA device, else nothing.
        clock: gives seconds.

    Raises:
        ValueError: `baseline` is not in `fns`, `fns` holds nothing else, `repeats` is below 1 or `warmup` below 0.
    """
    if baseline not in fns:
        raise ValueError(f"`baseline` is {baseline!r}; allowed are the names in `fns`: {', '.join(map(repr, fns))}.")
    if len(fns) < 2:
        raise ValueError(f"`fns` holds only the baseline {baseline!r}; give at least one function to compare with it.")
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")
    if synchronize is None:
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else _nothing

    others = [name for name in fns if name != baseline]
    slots = [(baseline, 0), *((name, 0) for name in others), (baseline, 1)]
    seconds: dict[tuple[str, int], list[float]] = {slot: [] for slot in slots}
    with tqdm(total=(warmup + repeats) * len(slots), desc="Timing", unit="call", delay=2.0, leave=False) as bar:
        for round_number in range(warmup + repeats):
            start = round_number % len(slots)
            for slot in slots[start:] + slots[:start]:
                synchronize()
                began = clock()
                fns[slot[0]]()
                synchronize()
                ended = clock()
                if round_number >= warmup:
                    seconds[slot].append(ended - began)
                bar.update()

    first = seconds[baseline, 0]
    return TimeRatios(
        baseline=baseline,
        seconds={name: statistics.median(seconds[name, 0]) for name in fns},
        ratios={name: RatioEstimate.of(seconds[name, 0], first) for name in others},
        noise=RatioEstimate.of(seconds[baseline, 1], first),
    )


def _nothing() -> None:
    pass
