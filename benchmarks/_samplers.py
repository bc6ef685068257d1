"""How near a sampler comes to the solution of its equation, against others at equal calls of the denoiser.

    BENCHMARK.add(OracleStudy({"ours": Variant("order 3", scheduler=dx.OurScheduler)}))
    BENCHMARK.add(TrajectoryStudy("avatars-sd", 3.0, {"ours": Variant("order 3", scheduler=dx.OurScheduler)}, minutes=9))
    BENCHMARK.add(StepOverhead({"ours": Variant("order 3", scheduler=dx.OurScheduler)}))

Samplers are `Variant`s: a scheduler class with options, enabled methods, or `prepare`, which changes a copy of the
pipeline. A sampler that differs by the number of calls (a searched plan) is a function of that number that returns a
`Variant`. On the oracles the pipeline is a `DDPMPipeline` with the exact denoiser as `unet`, so that `prepare` and hooks
work there as they do on pictures.

**What is compared.** All start from the same noise at the same end of the process and go to clean data, on the grid that the
study gives to all: whole timesteps with "trailing" spacing for pictures, and for oracles log-SNRs evenly spread, on which
an order of convergence shows. A budget is of calls, not of steps: a sampler takes the number of steps whose calls, counted
in a run, are nearest to it, and of two equally near numbers the larger. Peers are diffusers' own with their default orders;
what pipelines pass and they do not know is kept from them. Where they are off the common ground, it is said here: DEIS ends
at the first training timestep, DDIM and PNDM take steps of whole timesteps that may not add up to the grid, and on pictures
of flows DPM-Solver++ and UniPC round the timesteps. On oracles each is compared with the exact solution where it ends,
timesteps are not rounded, DDIM is DPM-Solver++ of order 1, which is the same update, PNDM has its uniform timesteps, the
only ones that it knows, and Heun's grid ends at the last of such timesteps.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks import _plot
from benchmarks._bench import OUTPUT, Selection
from benchmarks._quality import RMSE_TOLERANCE, Variant, equal_cost_steps
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import BATCH, ZooModel, weights
from diffusers_ext import proofs
from diffusers_ext.metrics import CallCounter, bootstrap_interval, rmse, time_ratio
from diffusers_ext.oracles import (
    GaussianMixtureDenoiser,
    LowRankMixtureDenoiser,
    convergence_order,
    sampler_error,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sampler = Variant | Callable[[int], Variant]

CACHE = OUTPUT / "cache"
BEST = "best"  # in `over`: the best peer of a budget
_ENDS = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
_PROBES = (4, 8)  # steps at which calls are counted, to know them at every other number
_ORDER_POINTS = 4  # budgets, from the largest down, that the order of convergence is fitted to


# --- peers -----------------------------------------------------------------------------------------------------------


@functools.cache
def fitting(cls: type, unrounded: bool = False) -> type:
    """A scheduler of diffusers that takes what any pipeline passes and starts where the others start.

    Args:
        cls: its class. A generator and `mu` are not handed on to it where it does not know them or is not to use them;
            the flow grid begins a training step before pure noise; noise is scaled to the first level exactly.
        unrounded: timesteps are real numbers, where the class would cut them to whole ones and tell the model another
            noise level than that of its state.
    """

    class Fitting(cls):  # type: ignore[misc, valid-type]
        def set_timesteps(
            self, num_inference_steps: int | None = None, device: Any = None, mu: Any = None, sigmas: Any = None
        ) -> None:
            if _is_flow(self) and "sigmas" in inspect.signature(super().set_timesteps).parameters:
                levels = np.linspace(1.0, 0.0, int(num_inference_steps or len(sigmas)) + 1)[:-1]
                levels[0] = 1 - 1 / self.config.num_train_timesteps
                super().set_timesteps(device=device, sigmas=levels)
            else:
                super().set_timesteps(int(num_inference_steps or len(sigmas)), device=device)
            if unrounded:
                self.timesteps = _times_of(self)

        def step(self, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
            if "generator" in inspect.signature(super().step).parameters:
                kwargs["generator"] = generator
            return super().step(*args, **kwargs)

        @property
        def init_noise_sigma(self) -> Any:
            if issubclass(cls, HeunDiscreteScheduler):
                return (self.sigmas.max() ** 2 + 1) ** 0.5
            return self.__dict__.get("init_noise_sigma", 1.0)

        @init_noise_sigma.setter
        def init_noise_sigma(self, value: float) -> None:
            self.__dict__["init_noise_sigma"] = value

    Fitting.__name__ = Fitting.__qualname__ = cls.__name__
    return Fitting


def _times_of(scheduler: Any) -> torch.Tensor:
    """Timesteps of a scheduler's noise levels."""
    levels = scheduler.sigmas[:-1].double().numpy()
    if _is_flow(scheduler):
        return torch.from_numpy(levels * scheduler.config.num_train_timesteps).float()
    bar = scheduler.alphas_cumprod.double().numpy()
    return torch.from_numpy(np.interp(np.log(levels), np.log((1 - bar) / bar) / 2, np.arange(len(bar)))).float()


def _is_flow(scheduler: Any) -> bool:
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or bool(scheduler.config.get("use_flow_sigmas"))


def _peer(title: str, cls: type, unrounded: bool = False, **options: Any) -> Variant:
    return Variant(title, scheduler=fitting(cls, unrounded), scheduler_options=options)


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PEERS: dict[str, Variant] = {
    "ddim": _peer("DDIM", DDIMScheduler),
    "dpm_solver_pp_2m": _peer("DPM-Solver++ 2M", DPMSolverMultistepScheduler),
    "unipc": _peer("UniPC", UniPCMultistepScheduler),
    "deis": _peer("DEIS", DEISMultistepScheduler),
    "pndm": _peer("PNDM", PNDMScheduler, skip_prk_steps=True),
    "heun": _peer("Heun", HeunDiscreteScheduler),
}
FLOW_PEERS: dict[str, Variant] = {
    "euler": _peer("Euler", FlowMatchEulerDiscreteScheduler),
    "dpm_solver_pp_2m": _peer("DPM-Solver++ 2M", DPMSolverMultistepScheduler, **_FLOW),
    "unipc": _peer("UniPC", UniPCMultistepScheduler, **_FLOW),
}
ORACLE_PEERS: dict[str, Variant] = {
    "ddim": _peer("DDIM", DPMSolverMultistepScheduler, True, solver_order=1),
    "dpm_solver_pp_2m": _peer("DPM-Solver++ 2M", DPMSolverMultistepScheduler, True),
    "unipc": _peer("UniPC", UniPCMultistepScheduler, True),
    "deis": _peer("DEIS", DEISMultistepScheduler, True),
    "pndm": _peer("PNDM", PNDMScheduler, skip_prk_steps=True, timestep_spacing="trailing", set_alpha_to_one=False),
    "heun": _peer("Heun", HeunDiscreteScheduler),
}
FLOW_ORACLE_PEERS: dict[str, Variant] = {
    "euler": _peer("Euler", FlowMatchEulerDiscreteScheduler),
    "dpm_solver_pp_2m": _peer("DPM-Solver++ 2M", DPMSolverMultistepScheduler, True, **_FLOW),
    "unipc": _peer("UniPC", UniPCMultistepScheduler, True, **_FLOW),
}
# Pipelines that neither scale the first noise nor the model's input.
_UNSCALED = ("DiTPipeline", "DDPMPipeline")


def peers_of(pipeline: str, flow: bool) -> dict[str, Variant]:
    """diffusers' samplers for a pipeline of that class, whose process is rectified flow or not."""
    if flow:
        return dict(FLOW_PEERS)
    return {name: peer for name, peer in PEERS.items() if name != "heun" or pipeline not in _UNSCALED}


def reference_run(flow: bool, steps: int) -> Variant:
    """The run that pictures are compared with: DPM-Solver++ 2M with many steps."""
    cls = fitting(DPMSolverMultistepScheduler, unrounded=flow)
    return Variant(f"{steps} steps", scheduler=cls, scheduler_options=_FLOW if flow else {}, steps=steps)


def variant_of(sampler: Sampler, calls: int) -> Variant:
    """The variant that a sampler is at a budget of `calls`."""
    return sampler if isinstance(sampler, Variant) else sampler(calls)


def _settings_of(sampler: Sampler, calls: Iterable[int]) -> dict[str, Any]:
    if isinstance(sampler, Variant):
        return sampler.settings()
    return {str(number): sampler(number).settings() for number in calls}


# --- one run ---------------------------------------------------------------------------------------------------------


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
        self.reference = reference_run(_is_flow(own), reference_steps)

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
            "scheduler": type(scheduler).__qualname__, "config": dict(scheduler.config),
            "sources": [proofs.source_hash(name) for name in (__name__, ours) if name.startswith(("benchmarks.", "diffusers_ext."))],
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
        }  # fmt: skip
        if reference:
            what["unrounded"] = _is_flow(scheduler)
        else:
            what["reference"] = self._key(self.reference, self.reference_steps, True)
        try:
            return json.dumps(what, sort_keys=True)
        except TypeError:  # tensors among the options
            return None


# --- studies ---------------------------------------------------------------------------------------------------------


class _Study:
    """What the two studies share: runs by sampler and budget, tables, claims, and a drawing."""

    quick = True
    formula: str  # of `Samples`
    tolerance: float
    unit: str
    goal: tuple[str, float]
    statement: str  # how a claim begins

    def __init__(
        self,
        name: str,
        grounds: Sequence[str],
        variants: Mapping[str, Sampler],
        peers: Mapping[str, Sampler] | None,
        calls: Sequence[int],
        claim_calls: Sequence[int],
        over: Sequence[str],
        units: int,
        minutes: float,
    ) -> None:
        if not variants or not calls or not over:
            raise ValueError("`variants`, `calls` or `over` is empty; there is nothing to compare.")
        if not set(claim_calls) <= set(calls):
            raise ValueError(f"`claim_calls` is {list(claim_calls)}; allowed are those of `calls`, {list(calls)}.")
        if peers is not None and (twice := set(peers) & {*variants, BEST}):
            raise ValueError(f"`peers` has {sorted(twice)}; allowed are names that no variant has, and not {BEST!r}.")
        self.name, self.grounds, self.variants = name, tuple(grounds), dict(variants)
        self.peers = None if peers is None else dict(peers)
        self.calls, self.claim_calls, self.over = tuple(calls), tuple(claim_calls), tuple(over)
        self.units, self.minutes = units, minutes
        self._drawn: dict[str, _plot.Panel] = {}

    # --- what a subclass writes

    def _ground(self, key: str, units: list[int] | None) -> Ground:
        raise NotImplementedError

    def _default_peers(self, key: str) -> Mapping[str, Sampler]:
        raise NotImplementedError

    def _title(self, key: str) -> str:
        raise NotImplementedError

    # --- Part

    def _prefix(self, key: str) -> str:
        return self.name if key == self.name else f"{self.name}_{key}"

    def _claim(self, key: str, label: str, calls: int, peer: str) -> str:
        return f"{self._prefix(key)}_{label}_at_{calls}_over_{peer}"

    def _claims_of(self, key: str, label: str, calls: int) -> list[str]:
        return [self._claim(key, label, calls, peer) for peer in self.over]

    @property
    def claims(self) -> list[str]:
        return [
            name
            for key in self.grounds
            for label in self.variants
            for calls in self.claim_calls
            for name in self._claims_of(key, label, calls)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            self.name: {
                "calls": list(self.calls),
                "over": list(self.over),
                "variants": {label: _settings_of(sampler, self.calls) for label, sampler in self.variants.items()},
                "peers": {
                    key: {label: _settings_of(sampler, self.calls) for label, sampler in self._peers(key).items()}
                    for key in self.grounds
                },
            }
        }

    @property
    def seeds(self) -> dict[str, Any]:
        return {self.name: list(range(self.units))}

    def _peers(self, key: str) -> Mapping[str, Sampler]:
        return self._default_peers(key) if self.peers is None else self.peers

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        """Run the samplers and add claims, and tables of errors by calls and of differences to each peer.

        Raises:
            ValueError: `over` names no peer, or an error is zero or not finite.
        """
        self._drawn = {}
        for key in self.grounds:
            pairs = [
                (label, calls)
                for label in self.variants
                for calls in self.claim_calls
                if selection is None or selection.wants(self._claims_of(key, label, calls))
            ]
            if selection is None:
                self._measure_all(recorder, key, pairs)
            elif pairs:
                self._measure_some(recorder, key, pairs, selection)

    def _measure_all(self, recorder: Recorder, key: str, pairs: Sequence[tuple[str, int]]) -> None:
        ground, peers = self._ground(key, None), self._peers(key)
        everyone = {**self.variants, **peers}
        runs: dict[tuple[str, int], Run] = {}
        with tqdm(total=len(everyone) * len(self.calls), desc=self._title(key), unit="run", leave=False) as bar:
            for label, sampler in everyone.items():
                for calls in self.calls:
                    runs[label, calls] = ground.run(label, sampler, calls)
                    bar.update()
        for label, calls in pairs:
            best = min(peers, key=lambda peer: float(runs[peer, calls].errors.mean()))
            for over in self.over:
                self._add_claim(recorder, key, label, calls, over, best if over == BEST else over, runs, None)
        recorder.table(f"{self._title(key)}: error by calls", *self._error_table(everyone, runs))
        recorder.table(f"{self._title(key)}: against each peer", *self._peer_table(key, runs))
        self._drawn[key] = self._panel(everyone, runs)

    def _measure_some(
        self, recorder: Recorder, key: str, pairs: Sequence[tuple[str, int]], selection: Selection
    ) -> None:
        """Only the claims that are wanted, with only the peers that they are about."""
        units, peers = selection.units(self.units), self._peers(key)
        ground = self._ground(key, units)
        runs: dict[tuple[str, int], Run] = {}

        def run(label: str, sampler: Sampler, calls: int) -> float:
            runs[label, calls] = ground.run(label, sampler, calls)
            return float(runs[label, calls].errors.mean())

        for label, calls in tqdm(pairs, desc=self._title(key), unit="run", leave=False):
            run(label, self.variants[label], calls)
            for over in self.over:
                claim = self._claim(key, label, calls, over)
                if not selection.wants([claim]):
                    continue
                peer: str | None = over
                if over == BEST:  # the best of all pictures may not be that of these few
                    peer = _recorded_peer(recorder.row.key, claim, list(peers))
                    peer = peer or min(peers, key=lambda name: run(name, peers[name], calls))
                if peer in peers:
                    run(str(peer), peers[str(peer)], calls)
                self._add_claim(recorder, key, label, calls, over, str(peer), runs, units)

    def _add_claim(
        self,
        recorder: Recorder,
        key: str,
        label: str,
        calls: int,
        over: str,
        peer: str,
        runs: Mapping[tuple[str, int], Run],
        units: list[int] | None,
    ) -> None:
        peers = self._peers(key)
        if peer not in peers:
            raise ValueError(f"`over` has {peer!r}; allowed are {BEST!r} and the peers, {', '.join(peers)}.")
        ours, theirs = runs[label, calls], runs[peer, calls]
        counts = {"ours": ours.calls, "theirs": theirs.calls}
        if over == BEST:
            counts["best"] = list(peers).index(peer)
        columns = {"ours": ours.errors.tolist(), "theirs": theirs.errors.tolist()}
        title = variant_of(self.variants[label], calls).title or label
        them = variant_of(peers[peer], calls).title or peer
        best = ", the best peer" if over == BEST else ""
        recorder.paired(
            self._claim(key, label, calls, over),
            f"{self._title(key)}: {self.statement} that of {them}{best}, at {calls} calls, {title}",
            Samples(self.formula, columns, self.tolerance, counts=counts, units=units),
            self.unit,
            self.goal,
        )

    # --- tables and drawing

    def _error_table(
        self, everyone: Mapping[str, Sampler], runs: Mapping[tuple[str, int], Run]
    ) -> tuple[list[str], list[list[Any]]]:
        """Mean and median error of each sampler by budget, the calls that it made, and its empirical order."""
        rows = []
        last = sorted(self.calls)[-_ORDER_POINTS:]
        for label, sampler in everyone.items():
            title = variant_of(sampler, self.calls[0]).title or label
            made = [runs[label, calls].calls for calls in self.calls]
            text = "as asked" if made == list(self.calls) else ", ".join(f"{number:g}" for number in made)
            for name, statistic in (("mean", np.mean), ("median", np.median)):
                errors = {calls: float(statistic(runs[label, calls].errors)) for calls in self.calls}
                order = None
                if len(last) > 1 and min(errors.values()) > 0:
                    order = convergence_order([errors[calls] for calls in last], [runs[label, n].calls for n in last])
                rows.append([title, text, name, *errors.values(), order])
        return ["sampler", "calls made", "error", *(f"{calls} calls" for calls in self.calls), "order"], rows

    def _peer_table(self, key: str, runs: Mapping[tuple[str, int], Run]) -> tuple[list[str], list[list[Any]]]:
        """What each variant gains on each peer at each budget, paired over the units."""
        rows = []
        for label, sampler in self.variants.items():
            for peer, other in self._peers(key).items():
                for calls in self.calls:
                    ours, theirs = runs[label, calls].errors, runs[peer, calls].errors
                    titles = [variant_of(one, calls).title or name for one, name in ((sampler, label), (other, peer))]
                    difference = ours - theirs
                    ratio = float(np.median(ours) / np.median(theirs))
                    rows.append([*titles, calls, float(difference.mean()), *bootstrap_interval(difference, np.mean), ratio])  # fmt: skip
        return ["sampler", "peer", "calls", "error less theirs", "low", "high", "median over theirs"], rows

    def _panel(self, everyone: Mapping[str, Sampler], runs: Mapping[tuple[str, int], Run]) -> _plot.Panel:
        series = {}
        for label, sampler in everyone.items():
            points = []
            for calls in self.calls:
                run = runs[label, calls]
                interval = bootstrap_interval(run.errors, np.median)
                points.append(_plot.Point(run.calls, float(np.median(run.errors)), interval))
            series[variant_of(sampler, self.calls[0]).title or label] = points
        return _plot.Panel("median error", series)

    def draw(self, title: str, stem: Path) -> list[Path]:
        """Draw error against calls of what was measured last to `stem-NAME.png`."""
        if not self._drawn:
            return []
        titles = {self._title(key): panel for key, panel in self._drawn.items()}
        figure = error_against_calls(title.partition(":")[0], titles, bold=len(self.variants))
        return [_plot.save(figure, stem.with_name(f"{stem.name}-{self.name}.png"))]


def _recorded_peer(key: str, claim: str, peers: Sequence[str]) -> str | None:
    """The peer that a recorded claim over the best one is about, or None where there is no such record."""
    result = proofs.read_result(key)
    for entry in result["claims"] if result else []:
        if entry["name"] == claim:
            number = entry["samples"].get("counts", {}).get("best")
            return None if number is None or number >= len(peers) else peers[int(number)]
    return None


class OracleStudy(_Study):
    """A part of a benchmark: error to the exact solution where the score is exact. It takes seconds.

    A claim is the gain on a peer at a budget in dB, 20 log10 of their error over ours, as the mean over the samples:
    6 dB is half the error, 9.54 dB a third. Claims are named `NAME_PROBLEM_LABEL_at_CALLS_over_PEER`.

    Args:
        variants: label -> sampler.
        peers: label -> sampler; None takes those of diffusers for the process of each problem.
        problems: names among `PROBLEMS`.
        calls: budgets.
        claim_calls: those that claims are about.
        over: the peers that claims are about; "best" is the one with the least mean error of each budget.
        goal: gain in dB that a claim is to reach.
        samples: how many starts there are.
        minutes: that it takes on two idle cores.
        name: begins the names of claims and drawings.

    Raises:
        ValueError: nothing to compare, `claim_calls` are not among `calls`, or a problem is unknown.
    """

    formula = "psnr_gain"
    tolerance = 1e-4  # of errors of 1e-3 to 1: states are float32, and paths near a border multiply what is rounded
    unit = "dB"
    statement = "error below"

    def __init__(
        self,
        variants: Mapping[str, Sampler],
        peers: Mapping[str, Sampler] | None = None,
        *,
        problems: Sequence[str] = ("mixture", "low_rank", "guided"),
        calls: Sequence[int] = (5, 8, 10, 15, 20, 30, 50),
        claim_calls: Sequence[int] = (5, 10, 20),
        over: Sequence[str] = ("dpm_solver_pp_2m",),
        goal: float = 0.0,
        samples: int = 64,
        minutes: float = 1,
        name: str = "oracle",
    ) -> None:
        for problem in problems:
            if problem not in PROBLEMS:
                raise ValueError(f"`problems` has {problem!r}; allowed are {', '.join(PROBLEMS)}.")
        self.goal = (">=", goal)
        super().__init__(name, problems, variants, peers, calls, claim_calls, over, samples, minutes)

    def _ground(self, key: str, units: list[int] | None) -> OracleGround:
        return OracleGround(PROBLEMS[key], self.units, units)

    def _default_peers(self, key: str) -> Mapping[str, Sampler]:
        return FLOW_ORACLE_PEERS if PROBLEMS[key].flow else ORACLE_PEERS

    def _title(self, key: str) -> str:
        return PROBLEMS[key].title


class TrajectoryStudy(_Study):
    """A part of a benchmark: distance of pictures to those of the same seeds and 200 steps.

    A claim is the root mean square error of a picture less that of a peer, as the mean over the pictures. Claims are
    named `NAME_LABEL_at_CALLS_over_PEER`; the differences to all peers are in a table. The runs of the reference and of
    everything that is a scheduler alone are kept on disk, and made once for all papers; a quick run makes its own.

    Args:
        model: checkpoint of the zoo.
        guidance_scale: of classifier-free guidance; 1 for none, None for an unconditional model.
        variants: label -> sampler.
        peers: label -> sampler; None takes those of diffusers that work in the model's pipeline.
        calls: budgets.
        claim_calls: those that claims are about; None for all.
        over: the peers that claims are about; "best" is the one with the least mean error of each budget.
        pictures: how many.
        reference_steps: of the reference run.
        minutes: that it takes on two idle cores.
        name: of claims, settings, tables and drawings; the model with its guidance, unless given.
        zoo: gives the checkpoint by name.
        cache: folder of runs; None keeps none.

    Raises:
        ValueError: nothing to compare, or `claim_calls` are not among `calls`.
    """

    formula = "difference"
    tolerance = RMSE_TOLERANCE
    unit = ""
    goal = ("<=", 0.0)
    statement = "RMSE to the reference run less"

    def __init__(
        self,
        model: str,
        guidance_scale: float | None,
        variants: Mapping[str, Sampler],
        peers: Mapping[str, Sampler] | None = None,
        *,
        calls: Sequence[int] = (5, 8, 12, 20),
        claim_calls: Sequence[int] | None = None,
        over: Sequence[str] = (BEST,),
        pictures: int = 64,
        reference_steps: int = 200,
        minutes: float,
        name: str = "",
        zoo: Callable[[str], ZooModel] = ZooModel,
        cache: Path | None = CACHE,
    ) -> None:
        self.model, self.guidance_scale, self.reference_steps = model, guidance_scale, reference_steps
        self.zoo, self.cache = zoo, cache
        self._zoo = functools.cache(zoo)
        name = name or (model if guidance_scale is None else f"{model}_w{guidance_scale:g}")
        claim_calls = calls if claim_calls is None else claim_calls
        super().__init__(name, [name], variants, peers, calls, claim_calls, over, pictures, minutes)

    @property
    def settings(self) -> dict[str, Any]:
        found = super().settings
        found[self.name] |= {
            "model": self.model, "weights": weights(self.model), "guidance_scale": self.guidance_scale,
            "reference": reference_run(self._kind[1], self.reference_steps).settings(),
        }  # fmt: skip
        return found

    @functools.cached_property
    def _kind(self) -> tuple[str, bool]:
        """Class of the pipeline, and whether its process is rectified flow; nothing is loaded for it."""
        index = json.loads((dx.zoo_path(self.model) / "model_index.json").read_text(encoding="utf-8"))
        return index["_class_name"], index["scheduler"][1].startswith("FlowMatch")

    def _ground(self, key: str, units: list[int] | None) -> PictureGround:
        cache = self.cache if units is None else None
        zoo = self._zoo(self.model)
        return PictureGround(zoo, self.guidance_scale, self.units, units, self.reference_steps, cache)

    def _default_peers(self, key: str) -> Mapping[str, Sampler]:
        return peers_of(*self._kind)

    def _title(self, key: str) -> str:
        scale = self.guidance_scale
        return (
            self.model if scale is None else f"{self.model}, {f'guidance {scale:g}' if scale != 1 else 'no guidance'}"
        )


class StepOverhead:
    """A part of a benchmark: the time of `step` itself over that of diffusers' DPM-Solver++ of order 2.

    Two claims a variant: `NAME_time_LABEL` is the median ratio, and `NAME_not_slower_LABEL` the lower end of its interval
    less the upper end of that of upstream against itself, which is to be at most zero.

    Args:
        variants: label -> sampler with a scheduler.
        peer: what they are compared with.
        rows: of the state; each has 16 numbers.
        steps: of a run; only `step` is timed, on a scheduler that is ready.
        rounds: that count.
        minutes: that it takes on two idle cores.
        name: begins the names of claims and tables.
    """

    quick = False
    seeds: Mapping[str, Any] = {}

    def __init__(
        self,
        variants: Mapping[str, Sampler],
        *,
        peer: Variant = Variant("DPM-Solver++ 2M", scheduler=DPMSolverMultistepScheduler),  # noqa: B008
        rows: int = 4096,
        steps: int = 20,
        rounds: int = 21,
        minutes: float = 0.5,
        name: str = "step",
    ) -> None:
        if not variants:
            raise ValueError("`variants` is empty; there is nothing to compare.")
        self.variants, self.peer, self.rows = dict(variants), peer, rows
        self.steps, self.rounds, self.minutes, self.name = steps, rounds, minutes, name

    @property
    def claims(self) -> list[str]:
        return [f"{self.name}_{what}_{label}" for label in self.variants for what in ("time", "not_slower")]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            self.name: {"rows": self.rows, "steps": self.steps, "rounds": self.rounds, "peer": self.peer.settings()}
        }

    def measure(self, recorder: Recorder, selection: Selection | None) -> None:
        """Time the runs and add the claims and a table."""
        everyone = {"upstream": self.peer, **{f"ours {label}": sampler for label, sampler in self.variants.items()}}
        runs = {name: self._run(variant_of(sampler, self.steps)) for name, sampler in everyone.items()}
        result = time_ratio(runs, baseline="upstream", repeats=self.rounds, warmup=2)
        spread = result.noise.interval
        rows = []
        for label in self.variants:
            ratio, title = result[f"ours {label}"], variant_of(self.variants[label], self.steps).title or label
            recorder.claim(
                f"{self.name}_time_{label}", f"time of a step over that of {self.peer.title}, {title}",
                ratio.median, "x", ratio.interval,
            )  # fmt: skip
            recorder.claim(
                f"{self.name}_not_slower_{label}",
                f"lower end of the interval of that ratio less the upper end of upstream's against itself, {title}",
                ratio.interval[0] - spread[1], "x", goal=("<=", 0.0),
            )  # fmt: skip
            seconds = result.seconds[f"ours {label}"] / self.steps
            rows.append([title, 1e6 * seconds, ratio.median, *ratio.interval, *spread])
        columns = ["sampler", "a step (microseconds)", "over upstream", "low", "high", "upstream again, low", "high "]
        recorder.table(f"{self.name}: time", columns, rows)

    def _run(self, variant: Variant) -> Callable[[], None]:
        """A function that makes all steps of a run, each time on another scheduler that is ready."""
        ground = OracleGround(PROBLEMS["mixture"], 1)
        with variant.on(ground.pipe) as pipe:
            pipe.scheduler.set_timesteps(self.steps)
            ready = [copy.deepcopy(pipe.scheduler) for _ in range(2 * (self.rounds + 2))]
        x = torch.randn(self.rows, *ground.pipe.unet.shape, generator=torch.Generator().manual_seed(0))
        output = 0.1 * x

        @torch.no_grad()
        def run() -> None:
            scheduler, state = ready.pop(), x
            for t in scheduler.timesteps:
                state = scheduler.step(output, t, state, return_dict=False)[0]

        return run

    def draw(self, title: str, stem: Path) -> list[Path]:
        return []


# --- drawing ---------------------------------------------------------------------------------------------------------


def error_against_calls(title: str, panels: Mapping[str, _plot.Panel], bold: int = 0) -> Figure:
    """Panels side by side, error against calls of the denoiser, both axes logarithmic.

    Args:
        title: of the whole figure.
        panels: their titles, and what is in them.
        bold: how many of the first series of each panel to draw as solid lines; the others are dashed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(6 * len(panels), 5), dpi=120, layout="constrained")
    figure.suptitle(title)
    colors, markers = colormaps["tab20"].colors, "osD^vPX*<>"  # type: ignore[attr-defined]
    for axes, (name, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (label, points) in enumerate(panel.series.items()):
            costs, values = [point.cost for point in points], [point.value for point in points]
            style = "-" if i < bold else "--"
            color, marker = colors[(2 * i + i // 10) % 20], markers[i % len(markers)]
            axes.plot(costs, values, style, color=color, marker=marker, markersize=4, linewidth=1.3, label=label)
            ends = [point.interval for point in points]
            axes.fill_between(costs, [low for low, _ in ends], [high for _, high in ends], color=color, alpha=0.12)
        axes.set(title=name, xlabel="calls of the denoiser", ylabel=panel.measure, xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({round(point.cost) for points in panel.series.values() for point in points}))
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    return figure
