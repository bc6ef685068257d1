"""What CAT Pruning is worth: against fewer steps at equal cost, and against other ways to choose as many tokens.

    diffusers-ext bench cat_pruning            # records diffusers_ext/results/cat_pruning.json

Settings were fixed before measuring: those of the paper, with its two numbers of steps. The other choices compute as many
tokens in the same steps: at random, those that moved most, and those left out for longest. Time is that of whole runs: of few
tokens, as here, gathering rows and choosing tokens is no small part. 32 pictures.

Caches of other people are met at 20 steps, also with half of the tokens kept. Their runs are shared with the benchmarks of the
other caches: where they are not on disk yet, making them takes about 8 minutes a model more.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._frontier import Frontier
from benchmarks._quality import QualityCost, Variant
from benchmarks._record import Recorder
from benchmarks._zoo import BATCH, ZooModel
from diffusers_ext.hooks.cat_pruning import Tokens, choose_tokens, put_on
from diffusers_ext.metrics import time_ratio

MODELS = {"avatars-flow": 3.0, "fashion-dit": 3.0}  # with the guidance scale
STEPS = (28, 50)
PICTURES, FRONTIER_STEPS, FRONTIER_SCALES = 32, 20, {"avatars-flow": 3.0, "fashion-dit": 4.0}
SETTINGS: dict[str, Any] = {"start_step": 5, "keep_ratio": 0.3}
TIMING: dict[str, Any] = {"steps": 28, "pictures": 16, "rounds": 7, "threads": 1}


class RandomTokens(dx.CATPruningConfig):
    """Tokens at random, others in each step, the same in all pictures."""

    def apply(self, module: nn.Module) -> None:
        step = 0

        def choose(tokens: Tokens, budget: int, fresh_share: float) -> torch.Tensor:
            nonlocal step
            step = 0 if tokens.counts is None else step + 1
            pictures, number = tokens.labels.shape
            chosen = torch.randperm(number, generator=torch.Generator().manual_seed(step))[:budget]
            return chosen.sort().values.repeat(pictures, 1)

        put_on(module, self, choose)


class MovedMost(dx.CATPruningConfig):
    """The tokens whose noise moved most."""

    def apply(self, module: nn.Module) -> None:
        put_on(module, self, lambda tokens, budget, _: tokens.change.norm(dim=-1).topk(budget).indices.sort().values)


class Watched(dx.CATPruningConfig):
    """The method itself, noting which tokens it computes."""

    computed: ClassVar[list[torch.Tensor]] = []

    def apply(self, module: nn.Module) -> None:
        def choose(tokens: Tokens, budget: int, fresh_share: float) -> torch.Tensor:
            chosen = choose_tokens(tokens, budget, fresh_share)
            self.computed.append(torch.zeros_like(tokens.labels, dtype=torch.bool).scatter(1, chosen, True))
            return chosen

        put_on(module, self, choose)


def baselines(steps: int) -> dict[str, Variant]:
    """Fewer steps, and as many steps with other tokens."""
    return {
        "fewer_steps": Variant(),
        "random": Variant("tokens at random", [RandomTokens(**SETTINGS)], steps=steps),
        "moved": Variant("tokens that moved most", [MovedMost(**SETTINGS)], steps=steps),
        "stale": Variant(
            "tokens left out for longest", [dx.CATPruningConfig(**SETTINGS, fresh_share=0.0)], steps=steps
        ),
    }


BENCHMARK = Benchmark("cat_pruning", settings={**SETTINGS, "timing": TIMING}, peers=["cache-dit"])
for model, scale in MODELS.items():
    for steps in STEPS:
        BENCHMARK.add(
            QualityCost(
                model,
                steps=steps,
                guidance_scale=scale,
                variants={"k0.3": Variant("keep 0.3", [dx.CATPruningConfig(**SETTINGS)])},
                baselines=baselines(steps),
                pictures=PICTURES,
                name=f"{model}_{steps}",
                minutes=3 if steps == 50 else 2,
            )
        )
    _kept = {
        f"k{ratio:g}": Variant(f"keep {ratio:g}", [dx.CATPruningConfig(**{**SETTINGS, "keep_ratio": ratio})])
        for ratio in (SETTINGS["keep_ratio"], 0.5)
    }
    BENCHMARK.add(Frontier(model, FRONTIER_STEPS, _kept, guidance_scale=FRONTIER_SCALES[model], minutes=2))


@BENCHMARK.part(*(f"never_computed_{model}" for model in MODELS), minutes=1)
def never_computed(recorder: Recorder, pictures: int = BATCH) -> None:
    """Tokens that no step computed after the full ones, in one batch."""
    for model, scale in tqdm(MODELS.items(), desc="tokens never computed"):
        zoo = ZooModel(model)
        Watched.computed.clear()
        with dx.enabled(zoo.pipe, Watched(**SETTINGS)) as pipe:
            zoo.generate(pipe, zoo.conditions(pictures), range(pictures), STEPS[0], scale)
        computed = torch.stack(Watched.computed[:-1])  # the last choice is for a step that there is not
        steps, _, tokens = computed.shape
        recorder.claim(
            f"never_computed_{model}",
            f"image tokens, of {tokens}, that none of the {steps} steps after the full ones computed, most of {pictures} "
            f"pictures, {model}",
            float((~computed.any(0)).sum(1).max()), "", goal=("<=", 0.0),
        )  # fmt: skip


@BENCHMARK.part(*(f"time_over_plain_{model}" for model in MODELS), minutes=4)
def run_times(recorder: Recorder) -> None:
    """Time of runs over that of runs without the method, alternating in one process."""
    torch.set_num_threads(TIMING["threads"])
    count, steps = TIMING["pictures"], TIMING["steps"]
    for model, scale in MODELS.items():
        plain, pruned = ZooModel(model), ZooModel(model)
        dx.enable(pruned.pipe, dx.CATPruningConfig(**SETTINGS))
        runs = {
            name: functools.partial(zoo.generate, zoo.pipe, zoo.conditions(count), range(count), steps, scale)
            for name, zoo in (("plain", plain), ("pruned", pruned))
        }
        ratio = time_ratio(runs, baseline="plain", repeats=TIMING["rounds"])["pruned"]
        recorder.claim(
            f"time_over_plain_{model}",
            f"time of a run of {steps} steps and {count} pictures over that of the full run, {model}",
            ratio.median, "x", ratio.interval,
        )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
