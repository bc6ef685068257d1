"""What a method that decides by the step what the denoiser computes is worth in time.

These are functions for parts of a benchmark. They time the denoiser alone, on a fixed input: what is around it is the
same with and without the method.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._record import Recorder
from diffusers_ext.enabling import HookConfig
from diffusers_ext.metrics import bootstrap_interval, time_ratio

_TOKENS = 32


def denoiser_input(unet: UNet2DConditionModel, batch: int) -> dict[str, Any]:
    """Arguments of one call besides the timestep, the same at each call of this function."""
    config = unet.config
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    states = (batch, _TOKENS, config.cross_attention_dim)
    return {
        "sample": torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.randn(states, generator=torch.Generator().manual_seed(0)),
        "return_dict": False,
    }


def denoiser_run(unet: nn.Module, steps: int, batch: int) -> Callable[[], None]:
    """A run of `steps` denoiser calls on a fixed input, as a pipeline makes them."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    options = denoiser_input(unet, batch)
    sample = options.pop("sample")

    @torch.no_grad()
    def run() -> None:
        for t in scheduler.timesteps:
            unet(sample, t, **options)

    return run


def _timed(modules: Sequence[nn.Module]) -> tuple[list[float], list[Any]]:
    """A one-element sum of seconds spent in modules, filled by forward hooks, and the hooks' handles."""
    spent, began, handles = [0.0], [0.0], []

    def before(*_: Any) -> None:
        began[0] = time.perf_counter()

    def after(*_: Any) -> None:
        spent[0] += time.perf_counter() - began[0]

    for module in modules:
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return spent, handles


@torch.no_grad()
def overhead(
    unet: UNet2DConditionModel, config: HookConfig, modules: Sequence[str], batch: int, rounds: int, label: str
) -> list[float]:
    """Time of a cached step over the time of its modules in a plain forward of the same round.

    Args:
        unet: the model; it stays as it is.
        config: of a cache with which all steps after the first are cached.
        modules: names of those that run on a cached step, none inside another.
        batch: rows of the input.
        rounds: that count; three come before them.
        label: for the progress bar.

    Returns:
        The ratio of each round.
    """
    plain, ours = copy.deepcopy(unet), copy.deepcopy(unet)
    dx.enable(ours, config)
    spent, handles = _timed([plain.get_submodule(name) for name in modules])
    options, t = denoiser_input(unet, batch), torch.tensor(500)
    sample = options.pop("sample")
    ours(sample, t, **options)
    ratios = []
    for _ in tqdm(range(rounds + 3), desc=f"Cached step, {label}", unit="round", delay=2.0, leave=False):
        spent[0] = 0.0
        plain(sample, t, **options)
        began = time.perf_counter()
        ours(sample, t, **options)
        ratios.append((time.perf_counter() - began) / spent[0])
    for handle in handles:
        handle.remove()
    return ratios[3:]


def claim_survives_compile(
    recorder: Recorder, unet: UNet2DConditionModel, config: HookConfig, steps: int, batch: int, rounds: int
) -> None:
    """Measure the claims `compiled_speedup` and `compiled_graphs_growth`: whether `torch.compile` spoils a method.

    Args:
        recorder: takes the claims and a table.
        unet: the model; it stays as it is.
        config: of the method.
        steps: of a run.
        batch: rows of the input.
        rounds: in which each of plain and cached, compiled and not, runs once.
    """
    from torch._dynamo.utils import counters

    models = {name: copy.deepcopy(unet) for name in ("plain", "cached", "plain, compiled", "cached, compiled")}
    dx.enable(models["cached"], config)
    dx.enable(models["cached, compiled"], config)
    graphs, runs = {}, {}
    for name, model in models.items():
        if name.endswith("compiled"):
            torch._dynamo.reset()
            model = torch.compile(model)
        runs[name] = denoiser_run(model, steps, batch)
    for name in ("plain, compiled", "cached, compiled"):
        counters.clear()
        runs[name]()
        first = counters["stats"]["unique_graphs"]
        runs[name]()
        runs[name]()
        graphs[name] = (first, counters["stats"]["unique_graphs"])
    result = time_ratio(runs, baseline="plain", repeats=rounds)
    eager = result["cached"].rounds
    both = zip(result["cached, compiled"].rounds, result["plain, compiled"].rounds, eager, strict=True)
    kept = [(cached / plain) / ratio for cached, plain, ratio in both]
    recorder.claim(
        "compiled_speedup",
        "compiled and cached over compiled and plain, divided by the same ratio without compiling",
        statistics.median(kept),
        "x",
        bootstrap_interval(kept),
        ("<=", 1.15),
    )
    recorder.claim(
        "compiled_graphs_growth",
        f"graphs compiled after the first run of {steps} steps",
        graphs["cached, compiled"][1] - graphs["cached, compiled"][0],
        "graphs",
        goal=("==", 0),
    )
    rows = [[name, seconds, graphs.get(name, (0, 0))[1]] for name, seconds in result.seconds.items()]
    recorder.table("torch.compile", ["run", "seconds", "graphs"], rows)
