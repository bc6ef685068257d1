"""What DPM-Solver-v3 is worth: against DPM-Solver++ 2M and UniPC at equal calls, on exact scores and on the zoo.

    diffusers-ext bench dpm_solver_v3            # records diffusers_ext/results/dpm_solver_v3.json

Settings were fixed before measuring: the defaults (third order, full corrector) on the pipeline's timesteps, the same in
equal steps of log-SNR, which the paper takes for small pictures, and the paper's pseudo-order corrector. On exact scores the
goal is an error below a third (9.54 dB) at 10 calls. Statistics are measured on other samples, captions and seeds than what
is compared. They are kept in `outputs/bench/cache`, and go on there where they were broken off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMPipeline, DiffusionPipeline

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._dc_ratios import GuidedOracle
from benchmarks._grounds import CACHE, PROBLEMS
from benchmarks._quality import Variant
from benchmarks._samplers import OracleStudy, TrajectoryStudy
from benchmarks._zoo import ZooModel
from benchmarks.zoo import _avatars
from diffusers_ext import proofs
from diffusers_ext.schedulers._model_statistics import weight_marks

ORACLE: dict[str, Any] = {"samples": 1024, "num_lambdas": 120}
ZOO: dict[str, Any] = {"samples": 96, "num_lambdas": 60, "sample_steps": 20, "batch_size": 32}
SEED, THIRD = 1000, 9.54
FLUX: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 32}
BENCHMARK = Benchmark("dpm_solver_v3", settings={"statistics": {"oracle": ORACLE, "zoo": ZOO, "seed": SEED}})

Prepare = Callable[[DiffusionPipeline], DiffusionPipeline]


def collect(label: str, *args: Any, **options: Any) -> dx.DPMSolverV3Statistics:
    """Statistics, going on with those of the same sources in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    file = CACHE / f"statistics-{label}-{proofs.source_hash('diffusers_ext.schedulers.collect')[:16]}.safetensors"
    return dx.collect_statistics(*args, seed=SEED, checkpoint=file, **options)


@functools.cache
def of_oracle(name: str) -> dx.DPMSolverV3Statistics:
    """Of a problem, on samples of its data; with guidance on what it makes itself."""
    problem, count = PROBLEMS[name], ORACLE["samples"]
    scheduler = problem.scheduler()
    pipe, samples = DDPMPipeline(problem.make(scheduler), scheduler), None
    if problem.guidance_scale == 1:
        samples = pipe.unet.sample(count, generator=torch.Generator().manual_seed(SEED))
    else:
        pipe = DDPMPipeline(GuidedOracle(name, scheduler), scheduler)
    return collect(f"oracle-{name}", pipe, count, samples=samples, num_lambdas=ORACLE["num_lambdas"], batch_size=count)


@functools.cache
def of_zoo(name: str, guidance_scale: float | None) -> dx.DPMSolverV3Statistics:
    """Of a checkpoint at a guidance scale, on what it makes for captions that it was trained with."""
    pipe, count = ZooModel(name).pipe, ZOO["samples"]
    call: dict[str, Any] = {key: value for key, value in ZOO.items() if key != "samples"}
    if name == "avatars-flow":
        call |= {**FLUX, "true_cfg_scale": guidance_scale, "negative_prompt": [""] * ZOO["batch_size"]}
    elif guidance_scale is not None:
        call |= {"guidance_scale": guidance_scale}
    conditions: Any = count if guidance_scale is None else _avatars.captions("generator")[:count]
    if name == "fashion-dit":
        conditions = [i % 10 for i in range(count)]  # classes
    return collect(f"{name}-{guidance_scale}", pipe, conditions, **call)


def variants(statistics: Callable[[DiffusionPipeline], dx.DPMSolverV3Statistics]) -> dict[str, Variant]:
    def prepared(**options: Any) -> Prepare:
        def prepare(pipe: DiffusionPipeline) -> DiffusionPipeline:
            pipe.scheduler = dx.DPMSolverV3Scheduler.from_config(
                pipe.scheduler.config, statistics=statistics(pipe), **options
            )
            return pipe

        return prepare

    return {
        "v3": Variant("order 3", prepare=prepared()),
        "v3_logsnr": Variant("order 3, equal steps of log-SNR", prepare=prepared(use_exponential_sigmas=True)),
        "v3_pseudo": Variant("order 3, pseudo-order corrector", prepare=prepared(pseudo_corrector=True)),
    }


def variant_of_order(order: int) -> Variant:
    """Without a corrector, on the problems without guidance."""

    def prepare(pipe: DiffusionPipeline) -> DiffusionPipeline:
        pipe.scheduler = dx.DPMSolverV3Scheduler.from_config(
            pipe.scheduler.config,
            statistics=of_the_problem(False)(pipe),
            solver_order=order,
            use_corrector=False,
        )
        return pipe

    return Variant(f"order {order}, no corrector", prepare=prepare)


def of_the_problem(guided: bool) -> Callable[[DiffusionPipeline], dx.DPMSolverV3Statistics]:
    """Of the problem whose denoiser a pipeline has."""

    def statistics(pipe: DiffusionPipeline) -> dx.DPMSolverV3Statistics:
        marks = weight_marks(pipe.unet)
        for name, problem in PROBLEMS.items():
            if (problem.guidance_scale != 1) == guided:
                made = problem.make(problem.scheduler())
                same = type(made) is type(pipe.unet) and made.config.process == pipe.unet.config.process
                if same and torch.equal(weight_marks(made), marks):
                    return of_oracle(name)
        raise ValueError("`pipe` has the denoiser of no problem.")

    return statistics


def of_the_zoo(name: str, guidance_scale: float | None, pipe: DiffusionPipeline) -> dx.DPMSolverV3Statistics:
    """Of the checkpoint of that name, which `pipe` is."""
    return of_zoo(name, guidance_scale)


for study, problems, guided in (
    ("oracle", ("mixture", "low_rank", "flow"), False),
    ("oracle_guided", ("guided",), True),
):
    BENCHMARK.add(
        OracleStudy(
            variants(of_the_problem(guided)),
            problems=problems,
            claim_calls=(10,),
            goal=THIRD,
            name=study,
            minutes=4,
        )
    )
for model, scale, minutes in (("avatars-sd", 3.0, 18), ("fashion-ddpm", None, 12), ("avatars-flow", 3.0, 18)):
    part = TrajectoryStudy(
        model, scale, variants(functools.partial(of_the_zoo, model, scale)),
        over=("dpm_solver_pp_2m", "unipc"), minutes=minutes,
    )  # fmt: skip
    part.quick = False  # statistics take longer than a quick run may
    BENCHMARK.add(part)

if __name__ == "__main__":
    BENCHMARK.main()
