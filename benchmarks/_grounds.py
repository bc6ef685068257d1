"""Where samplers are compared: a model, starts, and the right answer of each; and the run of a sampler on it.

`OracleGround` has an exact score, as `unet` of a `DDPMPipeline`, so that `prepare` and hooks work there as they do on
pictures; errors are to the exact solution of the probability-flow equation where a sampler ends. `PictureGround` has a model of
the zoo; errors are to pictures of the same seeds by many steps.

A budget is of calls, not of steps: a sampler takes the number of steps whose calls, counted in a run, are nearest to it, and
of two equally near numbers the larger.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from benchmarks._bench import OUTPUT
from benchmarks._quality import Variant, equal_cost_steps
from benchmarks._sampler_peers import Sampler, is_flow, reference_run, variant_of
from benchmarks._zoo import BATCH, ZooModel, weights
from diffusers_ext import proofs
from diffusers_ext.metrics import CallCounter, rmse
from diffusers_ext.oracles import GaussianMixtureDenoiser, LowRankMixtureDenoiser, sampler_error

CACHE = OUTPUT / "cache"
_ENDS = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
_PROBES = (4, 8)  # steps at which calls are counted, to know them at every other number


@dataclass(frozen=True)
class Run:
    """What one sampler made with one budget.

    Attributes:
        steps: as the pipeline was asked for.
        calls: evaluations of the denoiser that were really made, a guided one counted once.
        errors: root mean square error of each unit, `(n,)`.
    """

    steps: int
    calls: float
    errors: np.ndarray


class Ground:
    """Where samplers are compared: a model, a start, and the right answer for each unit.

    A subclass writes `solve` and `count`.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[str, int], Run] = {}
        self._probed: dict[str, dict[int, float]] = {}

    def solve(self, variant: Variant, steps: int) -> tuple[np.ndarray, float]:
        """Errors `(n,)` and calls of a run of all units."""
        raise NotImplementedError

    def count(self, variant: Variant, steps: int) -> float:
        """Calls of a run, made with one unit."""
        raise NotImplementedError

    def run(self, label: str, sampler: Sampler, calls: int) -> Run:
        """The run of a sampler whose calls are nearest to `calls`; made once.

        Args:
            label: its name; one name, one sampler.
            sampler: where its variant has `steps`, these are taken.
            calls: the budget.
        """
        if (label, calls) not in self._runs:
            variant = variant_of(sampler, calls)
            steps = variant.steps
            if steps is None:
                what = label if isinstance(sampler, Variant) else f"{label} {calls}"
                if what not in self._probed:
                    self._probed[what] = {number: self.count(variant, number) for number in _PROBES}
                steps = equal_cost_steps(calls, self._probed[what])
            errors, made = self.solve(variant, steps)
            self._runs[label, calls] = Run(steps, made, errors)
        return self._runs[label, calls]


# --- exact scores ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """An oracle with the start of a run.

    Attributes:
        title: for tables.
        make: the denoiser, for a scheduler's process.
        flow: whether the process is rectified flow, on its uniform grid, or else DDPM's linear beta schedule.
        guidance_scale: of classifier-free guidance to the classes in turn; 1 is none.
    """

    title: str
    make: Callable[[Any], Any]
    flow: bool = False
    guidance_scale: float = 1.0

    def scheduler(self) -> Any:
        if self.flow:
            return FlowMatchEulerDiscreteScheduler()
        # All given: `from_config` of another class drops what is at its default, and takes its own defaults.
        return DPMSolverMultistepScheduler(
            num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
            prediction_type="epsilon", use_exponential_sigmas=True, final_sigmas_type="zero",
            timestep_spacing="trailing",
        )  # fmt: skip


def _mixture(scheduler: Any) -> GaussianMixtureDenoiser:
    """Eight Gaussians in 16 dimensions, two a class, of about unit variance all together."""
    generator = torch.Generator().manual_seed(0)
    means = 0.8 * torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    deviations = 0.3 + 0.4 * torch.rand(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    return GaussianMixtureDenoiser.from_components(means, deviations**2, scheduler, labels=torch.arange(8) % 4)


def _low_rank(scheduler: Any) -> LowRankMixtureDenoiser:
    """Six Gaussians about subspaces of 5 of 64 dimensions, two a class, as pictures lie near such."""
    generator = torch.Generator().manual_seed(0)
    means = 0.6 * torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64)
    factors = 0.35 * torch.randn(6, 1, 8, 8, 5, generator=generator, dtype=torch.float64)
    return LowRankMixtureDenoiser.from_components(means, factors, 0.2, scheduler, labels=torch.arange(6) % 3)


PROBLEMS: dict[str, Problem] = {
    "mixture": Problem("Gaussian mixture in 16 dimensions", _mixture),
    "low_rank": Problem("mixture of low-rank Gaussians in 64 dimensions", _low_rank),
    "guided": Problem("Gaussian mixture in 16 dimensions, guidance 3", _mixture, guidance_scale=3.0),
    "guided_low_rank": Problem("mixture of low-rank Gaussians, guidance 3", _low_rank, guidance_scale=3.0),
    "flow": Problem("Gaussian mixture in 16 dimensions, rectified flow", _mixture, flow=True),
}


class OracleGround(Ground):
    """A problem with an exact score; errors are to the exact solution of the probability-flow equation.

    Args:
        problem: which.
        samples: how many starts there are, drawn with seed 0.
        units: which of them to run; None for all.
    """

    def __init__(self, problem: Problem, samples: int, units: Sequence[int] | None = None) -> None:
        super().__init__()
        self.problem = problem
        scheduler = problem.scheduler()
        self.pipe = DDPMPipeline(problem.make(scheduler), scheduler)
        chosen = torch.arange(samples) if units is None else torch.as_tensor(list(units))
        shape = (samples, *self.pipe.unet.shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.start = noise[chosen]
        self.labels = chosen % self.pipe.unet.config.num_classes if problem.guidance_scale != 1 else None
        self._exact: dict[tuple[float, float | None], torch.Tensor] = {}

    def solve(self, variant: Variant, steps: int) -> tuple[np.ndarray, float]:
        with variant.on(self.pipe) as pipe:
            pipe.scheduler.set_timesteps(steps)
            exact = self._solution(float(pipe.scheduler.timesteps[0]), None if _ends_clean(pipe.scheduler) else 0.0)
            result = self._result(pipe, steps, slice(None), exact)
        return result.per_sample.numpy(), result.calls

    def count(self, variant: Variant, steps: int) -> float:
        with variant.on(self.pipe) as pipe:
            return self._result(pipe, steps, slice(1), self.start[:1]).calls

    def _result(self, pipe: Any, steps: int, rows: slice, exact: torch.Tensor) -> Any:
        return sampler_error(
            pipe.scheduler, pipe.unet, steps, self.start[rows],
            class_labels=None if self.labels is None else self.labels[rows],
            guidance_scale=self.problem.guidance_scale, exact=exact, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    def _solution(self, start: float, end: float | None) -> torch.Tensor:
        if (start, end) not in self._exact:
            self._exact[start, end] = self.pipe.unet.exact_ode_solution(
                self.start, start, end, self.labels, self.problem.guidance_scale, tolerance=1e-10
            )
        return self._exact[start, end]


def _ends_clean(scheduler: Any) -> bool:
    """Whether a run ends at clean data, or else at the first training timestep."""
    levels = getattr(scheduler, "sigmas", None)
    if levels is None:
        return float(getattr(scheduler, "final_alpha_cumprod", 1.0)) == 1.0
    return float(levels[-1]) == 0.0


# --- pictures --------------------------------------------------------------------------------------------------------


class PictureGround(Ground):
    """A model of the zoo; errors are to pictures of the same seeds by many steps.

    Args:
        zoo: the model. Its pipeline is as before after each run.
        guidance_scale: of classifier-free guidance; None for an unconditional model, 1 for none.
        pictures: how many there are.
        units: which of them to make; None for all.
        reference_steps: of the run that the others are compared with.
        cache: folder of runs made earlier, which are taken from there; None makes all. Kept are runs of schedulers
            alone, by everything that they follow from.
    """

    def __init__(
        self,
        zoo: ZooModel,
        guidance_scale: float | None,
        pictures: int,
        units: Sequence[int] | None = None,
        reference_steps: int = 200,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.zoo, self.guidance_scale, self.cache = zoo, guidance_scale, cache
        self.conditions = zoo.conditions(pictures)
        self.units = list(range(pictures)) if units is None else list(units)
        self.reference_steps = reference_steps
        own = zoo.pipe.scheduler
        names = inspect.signature(type(own).__init__).parameters
        ends = {name: value for name, value in _ENDS.items() if name in names}
        self._base = Variant(scheduler=type(own), scheduler_options=ends)
        self.reference = reference_run(is_flow(own), reference_steps)

    def solve(self, variant: Variant, steps: int) -> tuple[np.ndarray, float]:
        def make() -> dict[str, np.ndarray]:
            pictures, calls = self._generate(variant, steps, self.units)
            return {"errors": rmse(pictures, self._full).double().numpy(), "calls": np.float64(calls)}

        found = self._kept(variant, steps, make)
        return found["errors"], float(found["calls"])

    def count(self, variant: Variant, steps: int) -> float:
        return self._generate(variant, steps, self.units[:1])[1]

    @functools.cached_property
    def _full(self) -> np.ndarray:
        """The pictures of the reference run."""

        def make() -> dict[str, np.ndarray]:
            return {"pictures": self._generate(self.reference, self.reference_steps, self.units)[0]}

        return self._kept(self.reference, self.reference_steps, make, reference=True)["pictures"]

    @functools.cached_property
    def _forwards_a_step(self) -> float:
        """Forward passes of the denoiser a guided evaluation: two, where the pipeline makes them one after the other."""
        return self._forwards(Variant(), 2, self.units[:1])[1] / 2

    def _generate(self, variant: Variant, steps: int, units: Sequence[int]) -> tuple[np.ndarray, float]:
        pictures, forwards = self._forwards(variant, steps, units)
        return pictures, forwards / math.ceil(len(units) / BATCH) / self._forwards_a_step

    def _forwards(self, variant: Variant, steps: int, units: Sequence[int]) -> tuple[np.ndarray, int]:
        conditions = [self.conditions[unit] for unit in units]
        with self._base.on(self.zoo.pipe) as base, variant.on(base) as pipe:
            with CallCounter(self.zoo.denoiser(pipe)) as counter:
                pictures = self.zoo.generate(pipe, conditions, units, steps, self.guidance_scale, **variant.options)
        return pictures, counter.calls[""]

    # --- runs made earlier -------------------------------------------------------------------------------------------

    def _kept(
        self, variant: Variant, steps: int, make: Callable[[], dict[str, np.ndarray]], reference: bool = False
    ) -> Mapping[str, np.ndarray]:
        key = None if self.cache is None else self._key(variant, steps, reference)
        if key is None:
            return make()
        file = Path(self.cache or "") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{os.getpid()}.{file.name}")
            np.savez(aside, key=np.array(key), **make())
            os.replace(aside, file)
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}

    def _key(self, variant: Variant, steps: int, reference: bool) -> str | None:
        """All that a run follows from, as text; None where that cannot be told."""
        if variant.configs or variant.prepare is not None:
            return None
        with self._base.on(self.zoo.pipe) as base, variant.on(base) as pipe:
            scheduler = pipe.scheduler
        ours = type(scheduler).__module__
        what: dict[str, Any] = {
            "model": self.zoo.name, "weights": weights(self.zoo.name), "units": self.units, "steps": steps,
            "guidance_scale": self.guidance_scale, "options": dict(variant.options),
            "scheduler": type(scheduler).__qualname__, "config": {name: value for name, value in scheduler.config.items() if not name.startswith("_")},
            "sources": [proofs.source_hash(name) for name in (__name__, ours) if name.startswith(("benchmarks.", "diffusers_ext."))],
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
        }  # fmt: skip
        if reference:
            what["unrounded"] = is_flow(scheduler)
        else:
            what["reference"] = self._key(self.reference, self.reference_steps, True)
        try:
            return json.dumps(what, sort_keys=True)
        except TypeError:  # tensors among the options
            return None
