"""Quality against cost: what a method makes of the same seeds, beside what fewer steps make of them at equal cost.

    QualityCost(
        "avatars-sd", steps=50, guidance_scale=3.0, pictures=64, minutes=4,
        variants={f"N{n}": Variant(f"interval {n}", [dx.DeepCacheConfig(interval=n)]) for n in (2, 3, 5)},
    )

makes picture i from held-out caption i and seed i: by the reference run, by each variant, and by each baseline with as
many steps as cost the same multiply-accumulates of the denoiser. Every claim is the difference between a variant and a
baseline on the same pictures, with a bootstrap over the pictures, and its numbers of each picture are recorded.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks import _plot
from benchmarks._bench import Selection
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import BATCH, ZooModel, scheduler_name, weights
from diffusers_ext.cards import name_of
from diffusers_ext.enabling import HookConfig
from diffusers_ext.metrics import bootstrap_interval, count_macs, psnr, rmse

# By measure: how a claim begins, its unit, its goal.
_WORDS = {
    "psnr": "PSNR to {reference} above that of",
    "rmse": "RMSE to {reference} less that of",
    "accuracy": "attribute accuracy above that of",
}
_UNITS = {"psnr": "dB", "rmse": "", "accuracy": ""}
_GOALS = {"psnr": (">=", 0.0), "rmse": ("<=", 0.0), "accuracy": (">=", 0.0)}
# Rounding moves root mean square errors by less; see `benchmarks._bench`.
RMSE_TOLERANCE = 1e-5
# Verdicts of a judge jump: of 8 pictures, rounding may turn the verdict on one attribute of one picture.
ACCURACY_TOLERANCE = 0.05
_PROBES = (2, 4)  # steps at which the cost of a baseline is measured, to know it at every other number


@dataclass(frozen=True)
class Variant:
    """One way to make pictures with a pipeline. What is not given is as the pipeline has it.

    Args:
        title: what is special about it, for tables.
        configs: settings of methods that are enabled meanwhile.
        scheduler: class of the scheduler, made from the configuration of the pipeline's own.
        scheduler_options: what its configuration has of its own.
        options: more arguments of the call.
        prepare: changes a copy of the pipeline and returns it, for what the others cannot say.
        steps: denoising steps; None for those of the study, or, for a baseline, as many as cost the same.
    """

    title: str = ""
    configs: Sequence[HookConfig] = ()
    scheduler: type | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[DiffusionPipeline], DiffusionPipeline] | None = None
    steps: int | None = None

    def settings(self) -> dict[str, Any]:
        """All of it that is given, as plain values."""
        given: dict[str, Any] = {"title": self.title, "steps": self.steps, "options": dict(self.options)}
        given["configs"] = [{"method": config.key, **dataclasses.asdict(config)} for config in self.configs]
        given["scheduler"] = self.scheduler and {"class": self.scheduler.__name__, **self.scheduler_options}
        given["prepare"] = self.prepare and self.prepare.__qualname__
        return {name: value for name, value in given.items() if value}

    @contextlib.contextmanager
    def on(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """The pipeline as this variant has it; `pipe` is as before afterwards."""
        target = pipe if self.prepare is None else self.prepare(copy.deepcopy(pipe))
        before = target.scheduler
        if self.scheduler is not None:
            target.scheduler = self.scheduler.from_config(before.config, **self.scheduler_options)
        try:
            with dx.enabled(target, *self.configs) if self.configs else contextlib.nullcontext():
                yield target
        finally:
            target.scheduler = before


@dataclass(frozen=True)
class Cost:
    """Work of the denoiser for one picture: its calls, and multiply-accumulates in them."""

    calls: float
    macs: float


@contextlib.contextmanager
def called_by(denoiser: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Inside, `denoiser(...)` is `call(forward, ...)`."""
    forward, own = denoiser.forward, "forward" in vars(denoiser)
    denoiser.forward = functools.wraps(forward)(functools.partial(call, forward))
    try:
        yield
    finally:
        if own:
            denoiser.forward = forward
        else:
            del denoiser.forward


def denoiser_cost(denoiser: nn.Module, run: Callable[[], Any]) -> Cost:
    """Calls and multiply-accumulates of `denoiser` in `run()`, which is really run."""
    macs: list[int] = []

    def counted(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs: list[Any] = []
        macs.append(count_macs(lambda: outputs.append(forward(*args, **kwargs))))
        return outputs[0]

    with called_by(denoiser, counted):
        run()
    return Cost(len(macs), sum(macs))


def equal_cost_steps(cost: float, measured: Mapping[int, float]) -> int:
    """How many steps of a sampler cost nearest to `cost`.

    The cost of a sampler grows by the same for each step after the first few, whatever its order.

    Args:
        cost: to be reached, in any unit.
        measured: what two numbers of steps cost, in that unit.

    Returns:
        At least 1. Of two numbers equally near, the larger, which is in favour of the sampler.

    Raises:
        ValueError: `measured` are not two, or more steps cost no more.
    """
    if len(measured) != 2:
        raise ValueError(f"`measured` is {dict(measured)}; the cost of two numbers of steps is needed.")
    (few, cost_few), (many, cost_many) = sorted(measured.items())
    if not cost_many > cost_few:
        raise ValueError(f"`measured` is {dict(measured)}; more steps have to cost more.")
    steps = few + (cost - cost_few) * (many - few) / (cost_many - cost_few)
    return max(1, math.floor(steps + 0.5))


@dataclass(frozen=True)
class _Run:
    """Pictures made in one way, and what was measured of them.

    Attributes:
        title: for tables.
        cost: of one picture.
        pictures: `(n, height, width, channels)` in [0, 1].
        rmse: to the reference run, of each picture.
        psnr: to the reference run in dB, of each picture; infinite where they are equal.
        accuracy: shares of the pictures in the judge's balanced accuracy, or None without a judge.
    """

    title: str
    cost: Cost
    pictures: np.ndarray
    rmse: np.ndarray
    psnr: np.ndarray
    accuracy: np.ndarray | None

    def row(self, full: Cost) -> list[Any]:
        numbers = [*_mean(self.psnr), float(self.rmse.mean()), *_mean(self.accuracy)]
        return [self.title, self.cost.calls, self.cost.macs / 1e9, full.macs / self.cost.macs, *numbers]


_COLUMNS = [
    "run", "denoiser calls", "GMACs a picture", "times fewer MACs", "PSNR to {reference} (dB)", "PSNR low", "PSNR high",
    "RMSE", "attribute accuracy", "accuracy low", "accuracy high",
]  # fmt: skip
_GAIN_COLUMNS = [
    "run", "against", "its cost / theirs", "PSNR gain (dB)", "PSNR low", "PSNR high", "accuracy gain", "accuracy low",
    "accuracy high",
]  # fmt: skip


def _mean(values: np.ndarray | None) -> tuple[float | None, float | None, float | None]:
    """Mean and its bootstrap interval; no interval where a value is infinite, nothing where there are no values."""
    if values is None:
        return None, None, None
    if not np.isfinite(values).all():
        return float(values.mean()), None, None
    return float(values.mean()), *bootstrap_interval(values, np.mean)


class QualityCost:
    """A part of a benchmark; see the module.

    Args:
        model: checkpoint of the zoo.
        steps: of the reference run and of the variants.
        variants: label -> variant. A claim is named `equal_macs_MEASURE_LABEL`.
        pictures: how many.
        minutes: that the full run takes on two idle cores.
        guidance_scale: of classifier-free guidance; None for an unconditional model.
        baselines: what variants are compared with, each with the steps that cost the same; fewer steps of the pipeline
            as it is, unless given. With more than one, claims are named `equal_macs_MEASURE_LABEL_over_BASELINE`.
        cost_pictures: over how many pictures the cost is averaged, each made alone; more than one for methods that
            decide by the picture how much to compute.
        reference: what pictures are compared with.
        reference_title: its name in sentences.
        measures: what is claimed: `psnr` and `rmse` to the reference, `accuracy` by the judge. PSNR is infinite where a
            picture equals the reference, so that nothing can be said of its mean; RMSE is for variants that reach that.
        name: begins the names of claims, settings, tables and drawings, for a benchmark with several such parts.
        zoo: gives the checkpoint by name.

    Raises:
        ValueError: there is no variant or baseline, or a measure is unknown.
    """

    quick = True

    def __init__(
        self,
        model: str,
        steps: int,
        variants: Mapping[str, Variant],
        *,
        pictures: int = 64,
        minutes: float,
        guidance_scale: float | None = None,
        baselines: Mapping[str, Variant] | None = None,
        cost_pictures: int = 1,
        reference: Variant | None = None,
        reference_title: str = "the full run",
        measures: Sequence[str] = ("psnr",),
        name: str = "",
        zoo: Callable[[str], ZooModel] = ZooModel,
    ) -> None:
        self.baselines = {"fewer_steps": Variant()} if baselines is None else dict(baselines)
        if not variants or not self.baselines:
            raise ValueError("`variants` or `baselines` is empty; there is nothing to compare.")
        for measure in measures:
            if measure not in _GOALS:
                raise ValueError(f"`measures` has {measure!r}; allowed are {', '.join(_GOALS)}.")
        self.model, self.steps, self.variants, self.pictures = model, steps, dict(variants), pictures
        self.minutes, self.guidance_scale, self.measures, self.name = minutes, guidance_scale, tuple(measures), name
        self.reference, self.reference_title = reference or Variant(), reference_title
        self.cost_pictures, self.zoo = cost_pictures, zoo
        self._panels: list[_plot.Panel] = []

    def _claim(self, measure: str, label: str, baseline: str) -> str:
        name = f"{self._prefix}equal_macs_{measure}_{label}"
        return name if len(self.baselines) == 1 else f"{name}_over_{baseline}"

    @property
    def _prefix(self) -> str:
        return self.name and f"{self.name}_"

    def _claims_of(self, label: str) -> list[str]:
        return [self._claim(measure, label, baseline) for measure in self.measures for baseline in self.baselines]

    @property
    def claims(self) -> list[str]:
        return [name for label in self.variants for name in self._claims_of(label)]

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "model": self.model,
            "weights": weights(self.model),
            "scheduler": scheduler_name(self.model),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "pictures": self.pictures,
            "cost_pictures": self.cost_pictures,
            "measures": list(self.measures),
            "variants": {label: variant.settings() for label, variant in self.variants.items()},
            "baselines": {label: variant.settings() for label, variant in self.baselines.items()},
            "reference": self.reference.settings(),
        }
        return {self.name: found} if self.name else found

    @property
    def seeds(self) -> dict[str, Any]:
        return {f"{self._prefix}pictures": list(range(self.pictures))}

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        """Make the pictures and add claims, and tables `quality` and `at equal cost`.

        Raises:
            ValueError: a number of a claim is not finite; see `measures`.
        """
        labels = [label for label in self.variants if selection is None or selection.wants(self._claims_of(label))]
        units = list(range(self.pictures)) if selection is None else selection.units(self.pictures)
        gains: list[list[Any]] = []
        with tqdm(total=1 + len(labels) * (1 + len(self.baselines)), desc="Pictures", unit="run", leave=False) as bar:
            runs = _Runs(self, units, bar)
            everything, ours_made = [runs.full], []
            theirs_made: dict[str, list[_Run]] = {name: [] for name in self.baselines}
            for label in labels:
                variant = self.variants[label]
                title = f"{name_of(recorder.row)}, {variant.title}"
                ours = runs.of(variant, variant.steps or self.steps, title)
                ours_made.append(ours)
                everything.append(ours)
                for name, baseline in self.baselines.items():
                    theirs = runs.at_cost(name, baseline, ours.cost)
                    theirs_made[name].append(theirs)
                    everything.append(theirs)
                    for claim, statement, samples, measure in self._samples(label, name, ours, theirs, units):
                        if selection is None or selection.wants([claim]):
                            recorder.paired(claim, statement, samples, _UNITS[measure], _GOALS[measure])
                    gains.append(_gains(ours, theirs))
        heading = f"{self.name}: " if self.name else ""
        columns = [column.format(reference=self.reference_title) for column in _COLUMNS]
        recorder.table(f"{heading}quality", columns, [run.row(runs.full.cost) for run in everything])
        recorder.table(f"{heading}at equal cost", _GAIN_COLUMNS, gains)
        self._panels = self._make_panels(runs, name_of(recorder.row), ours_made, theirs_made)

    def _samples(
        self, label: str, baseline: str, ours: _Run, theirs: _Run, units: list[int]
    ) -> Iterator[tuple[str, str, Samples, str]]:
        """Name, statement, numbers and measure of the claims about one variant and one baseline."""
        counts = {"ours": ours.cost.macs, "theirs": theirs.cost.macs}
        for measure in self.measures:
            if measure == "accuracy":
                if ours.accuracy is None or theirs.accuracy is None:
                    raise ValueError(f"`measures` has 'accuracy', and there is no judge for {self.model!r}.")
                shares = {"ours": ours.accuracy.tolist(), "theirs": theirs.accuracy.tolist()}
                samples = Samples("difference", shares, ACCURACY_TOLERANCE, False, counts, units)
            else:
                errors = {"ours": ours.rmse.tolist(), "theirs": theirs.rmse.tolist()}
                formula = "psnr_gain" if measure == "psnr" else "difference"
                samples = Samples(formula, errors, RMSE_TOLERANCE, True, counts, units)
            words = _WORDS[measure].format(reference=self.reference_title)
            statement = f"{words} {theirs.title}, which cost as much, {self.variants[label].title}"
            yield self._claim(measure, label, baseline), statement, samples, measure

    def _make_panels(
        self, runs: _Runs, method: str, ours: Sequence[_Run], theirs: Mapping[str, Sequence[_Run]]
    ) -> list[_plot.Panel]:
        """PSNR, and accuracy where there is a judge, of all runs by whose they are."""

        def panel(measure: str, values: Callable[[_Run], np.ndarray | None], lines: Mapping[str, float]) -> _plot.Panel:
            series: dict[str, list[_plot.Point]] = {method: []}
            for name in theirs:
                series[self.baselines[name].title or "fewer steps"] = []
            for points, made in zip(series.values(), (ours, *theirs.values()), strict=True):
                for run in {run.title: run for run in made}.values():
                    mean, low, high = _mean(values(run))
                    if mean is not None and low is not None and high is not None:
                        label = run.title.removeprefix(f"{method}, ")
                        points.append(_plot.Point(run.cost.macs / 1e9, mean, (low, high), label))
            return _plot.Panel(measure, {name: points for name, points in series.items() if points}, lines)

        panels = [panel(f"PSNR to {self.reference_title} (dB)", lambda run: run.psnr, {})]
        if runs.full.accuracy is not None:
            lines = {self.reference_title: float(runs.full.accuracy.mean())}
            if runs.zoo.ceiling is not None:
                lines["the judge on real pictures"] = runs.zoo.ceiling
            panels.append(panel("attribute accuracy (balanced)", lambda run: run.accuracy, lines))
        return [panel for panel in panels if panel.series]

    def draw(self, title: str, stem: Path) -> list[Path]:
        """Draw quality against cost of what was measured last to `stem.png`, or `stem-NAME.png`."""
        if not self._panels:
            return []
        title = f"{title} on {self.model}: means over {self.pictures} pictures, 95% intervals"
        figure = _plot.quality_against_cost(title, "cost of the denoiser (GMACs a picture)", self._panels)
        return [_plot.save(figure, stem.with_name(f"{stem.name}{self.name and '-'}{self.name}.png"))]


class _Runs:
    """Runs of one study on some of its pictures, each made once; the reference run is the first."""

    def __init__(self, study: QualityCost, units: list[int], bar: tqdm) -> None:
        self.study, self.units, self.bar = study, units, bar
        self.zoo = study.zoo(study.model)
        self.conditions = self.zoo.conditions(study.pictures)
        self._baselines: dict[tuple[str, int], _Run] = {}
        self._probed: dict[str, dict[int, Cost]] = {}
        self._reference: np.ndarray | None = None
        steps = study.reference.steps or study.steps
        self.full = self.of(study.reference, steps, _titled(study.reference, steps))
        self._reference = self.full.pictures

    def of(self, variant: Variant, steps: int, title: str) -> _Run:
        """Pictures by a variant, compared with those of the reference run, or for that one with themselves."""
        calls = 0

        def counted(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return forward(*args, **kwargs)

        with variant.on(self.zoo.pipe) as pipe, called_by(self.zoo.denoiser(pipe), counted):
            pictures = self._generate(pipe, variant, self.units, steps)
        cost = self._cost(variant, steps, _per(calls, math.ceil(len(self.units) / BATCH)))
        compared = pictures if self._reference is None else self._reference
        accuracy = self.zoo.accuracy(pictures, self.conditions, self.units)
        self.bar.update()
        return _Run(title, cost, pictures, rmse(pictures, compared).numpy(), psnr(pictures, compared).numpy(), accuracy)

    def at_cost(self, name: str, baseline: Variant, cost: Cost) -> _Run:
        """Pictures by a baseline with the number of steps that costs as much."""
        probed = {steps: probe.macs for steps, probe in self._probes(baseline).items()}
        steps = baseline.steps or equal_cost_steps(cost.macs, probed)
        if (name, steps) not in self._baselines:
            self._baselines[name, steps] = self.of(baseline, steps, _titled(baseline, steps))
        else:
            self.bar.update()
        return self._baselines[name, steps]

    def _generate(self, pipe: DiffusionPipeline, variant: Variant, units: Sequence[int], steps: int) -> np.ndarray:
        conditions = [self.conditions[unit] for unit in units]
        return self.zoo.generate(pipe, conditions, units, steps, self.study.guidance_scale, **variant.options)

    def _probes(self, variant: Variant) -> dict[int, Cost]:
        """What few steps cost, by their number."""
        what = repr({**variant.settings(), "steps": None, "title": None})
        if what not in self._probed:
            self._probed[what] = {steps: self._measured_cost(variant, steps) for steps in _PROBES}
        return self._probed[what]

    def _cost(self, variant: Variant, steps: int, calls: float) -> Cost:
        """Of one picture. Where nothing is enabled, all calls cost the same, and `calls` of them were made."""
        if variant.configs or variant.prepare is not None:
            return self._measured_cost(variant, steps)
        probe = self._probes(variant)[_PROBES[0]]
        return Cost(calls, _per(calls * probe.macs, probe.calls))

    def _measured_cost(self, variant: Variant, steps: int) -> Cost:
        """In runs of their own, since counting takes other attention kernels and time; always of the same pictures."""
        costs = []
        with variant.on(self.zoo.pipe) as pipe:
            for unit in range(self.study.cost_pictures):
                run = functools.partial(self._generate, pipe, variant, [unit], steps)
                costs.append(denoiser_cost(self.zoo.denoiser(pipe), run))
        count = len(costs)
        return Cost(_per(sum(cost.calls for cost in costs), count), _per(sum(cost.macs for cost in costs), count))


def _per(total: float, count: float) -> float:
    """`total / count`, as a whole number where it is one."""
    quotient = total / count
    return int(quotient) if quotient == int(quotient) else quotient


def _titled(variant: Variant, steps: int) -> str:
    return f"{variant.title}, {steps} steps" if variant.title else f"{steps} steps"


def _gains(ours: _Run, theirs: _Run) -> list[Any]:
    with np.errstate(invalid="ignore"):
        nearer = ours.psnr - theirs.psnr  # not a number where both equal the reference
    better = None if ours.accuracy is None or theirs.accuracy is None else ours.accuracy - theirs.accuracy
    return [ours.title, theirs.title, ours.cost.macs / theirs.cost.macs, *_mean(nearer), *_mean(better)]
