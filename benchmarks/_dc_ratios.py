"""Ratios of DC-Solver that the benchmark uses: what is searched, and what was found.

    python -m benchmarks._dc_ratios            # searches what `data/dc_ratios.json` does not have yet
    python -m benchmarks._dc_ratios NAME ...   # these, again

Searches see ten prompts, or as many starts, of other seeds and captions than those of the studies. They can be broken off
and go on. One on avatars-sd takes about 300 calls of the network with 20 pictures, a third of them with gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMPipeline, ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

import diffusers_ext as dx
from benchmarks._bench import OUTPUT
from benchmarks._grounds import PROBLEMS
from benchmarks._quality import Variant
from benchmarks._zoo import ZooModel

FOUND = Path(__file__).parent / "data" / "dc_ratios.json"
PICTURES, SEED = 10, 1000


class GuidedOracle(ModelMixin, ConfigMixin):
    """A problem's denoiser with its guidance inside, to be searched in a pipeline without any."""

    config_name = "config.json"

    def __init__(self, name: str, scheduler: Any) -> None:
        super().__init__()
        self.inner, self.scale = PROBLEMS[name].make(scheduler), PROBLEMS[name].guidance_scale
        size = self.inner.config.sample_size
        self.register_to_config(in_channels=self.inner.config.in_channels, sample_size=size)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, sample: torch.Tensor, timestep: Any) -> UNet2DOutput:
        plain = self.inner(sample, timestep).sample
        if self.scale == 1:
            return UNet2DOutput(sample=plain)
        labels = torch.arange(len(sample)) % self.inner.config.num_classes
        conditional = self.inner(sample, timestep, labels).sample
        return UNet2DOutput(sample=plain + self.scale * (conditional - plain))


@dataclass(frozen=True)
class Searched:
    """One search.

    Attributes:
        ground: a problem, or a checkpoint of the zoo.
        guidance_scale: of the checkpoint; a problem has its own.
        calls: number of steps.
    """

    ground: str
    guidance_scale: float | None
    calls: int

    def run(self, file: Path) -> dict[str, Any]:
        if self.ground in PROBLEMS:
            scheduler = PROBLEMS[self.ground].scheduler()
            pipe: Any = DDPMPipeline(GuidedOracle(self.ground, scheduler), scheduler)
            conditions: Any = PICTURES
        else:
            zoo = ZooModel(self.ground)
            pipe, conditions = zoo.pipe, zoo.conditions(64 + PICTURES)[64:]
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
        return dx.search_dc_ratios(pipe, conditions, self.calls, self.guidance_scale, seed=SEED, file=file)


SEARCHES: dict[str, Searched] = {
    f"{ground}{'' if scale is None else f'-{scale:g}'}-{calls}": Searched(ground, scale, calls)
    for ground, scale, budgets in (
        ("mixture", None, (5, 8)),
        ("guided", None, (5, 8)),
        ("guided_low_rank", None, (5, 8)),
        ("avatars-sd", 3.0, (5, 8)),
        ("avatars-sd", 7.5, (5, 8)),
    )
    for calls in budgets
}


def read() -> dict[str, Any]:
    """What was found, by name."""
    return json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {}


def sampler(ground: str, guidance_scale: float | None = None) -> tuple[Callable[[int], Variant], tuple[int, ...]]:
    """DC-Solver with the ratios of each number of calls that was searched, and these numbers."""
    found = read()
    made = {
        search.calls: Variant(
            "DC-Solver", scheduler=dx.DCSolverMultistepScheduler, steps=search.calls,
            scheduler_options={"dc_ratios": found[name]["dc_ratios"]},
        )
        for name, search in SEARCHES.items()
        if (search.ground, search.guidance_scale) == (ground, guidance_scale) and name in found
    }  # fmt: skip
    return made.__getitem__, tuple(made)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SEARCHES)}")
    names = parser.parse_args(argv).names
    unknown = sorted(set(names) - set(SEARCHES))
    if unknown:
        parser.error(f"there is no search {unknown}; there are {', '.join(SEARCHES)}")
    work = OUTPUT / "dc_ratios"
    for name in names or [name for name in SEARCHES if name not in read()]:
        print(name, flush=True)
        found = SEARCHES[name].run(work / f"{name}.json")
        content = {**read(), name: found}  # read after the search: another process may have written meanwhile
        ordered = {known: content[known] for known in SEARCHES if known in content}
        FOUND.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
