"""Whether ASCED finds artifacts and takes them back: disturbances of known places, and clean runs.

    diffusers-ext bench asced            # records diffusers_ext/results/asced.json

In a patch of each picture the predicted noise is disturbed during the steps that are watched. Settings were fixed before
measuring: 25 steps and the thresholds of the paper, its lengths scaled to the size of the pictures. The method runs as the
callback that pipelines take, in a DDIM loop, since the pipeline of this pixel model takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import BATCH, ZooModel, weights
from diffusers_ext.hooks.asced import gaussian_smooth

MODEL, PICTURES, STEPS, SIDE, STRENGTH = "fashion-ddpm", 64, 25, 6, 0.5
DISTURBED = (8, 14)  # first step, and step after the last
SETTINGS: dict[str, Any] = {"detect_step": 14, "history_start": 8, "clip_range": 1.0}
BENCHMARK = Benchmark(
    "asced",
    settings={
        "model": MODEL, "weights": weights(MODEL), "pictures": PICTURES, "steps": STEPS, "patch": SIDE,
        "strength": STRENGTH, "disturbed": list(DISTURBED), "callback": SETTINGS,
    },
)  # fmt: skip


@torch.no_grad()
def run(unet: Any, config: Any, x: torch.Tensor, callback: Any = None, disturb: Callable | None = None) -> torch.Tensor:
    """A DDIM run that calls back as pipelines do."""
    scheduler = DDIMScheduler.from_config(config, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    pipe = SimpleNamespace(scheduler=scheduler, num_timesteps=STEPS)
    for i, t in enumerate(scheduler.timesteps):
        output = unet(x, t).sample
        if disturb is not None and DISTURBED[0] <= i < DISTURBED[1]:
            output = disturb(i, output)
        x = scheduler.step(output, t, x).prev_sample
        if callback is not None:
            x = callback(pipe, i, t, {"latents": x})["latents"]
    return x


def overlap(found: torch.Tensor, patch: torch.Tensor) -> torch.Tensor:
    """Intersection over union of masks `(batch, height, width)`."""
    return (found & patch).flatten(1).sum(1) / (found | patch).flatten(1).sum(1)


def spatial(pictures: torch.Tensor) -> torch.Tensor:
    """The baseline: the same search, with how far the finished picture is from its own smoothed version for the change."""
    scale = pictures.shape[-1] / 256
    pictures = pictures.clamp(-1, 1)
    lengths = {"min_area": 100 * scale**2, "max_area": 10000 * scale**2, "min_width": max(round(5 * scale), 1)}
    return dx.detect_artifacts([gaussian_smooth(pictures, 1.0), pictures], sigma=2 * scale, **lengths)


@BENCHMARK.part("overlap_over_spatial", "patch_error", "false_alarms", "clean_change", minutes=3)
def disturbances(recorder: Recorder) -> None:
    pipe = ZooModel(MODEL).pipe
    unet, size = pipe.unet, pipe.unet.config.sample_size
    columns: dict[str, list[torch.Tensor]] = {}
    for start in tqdm(range(0, PICTURES, BATCH), desc="Pictures", leave=False):
        generator = torch.Generator().manual_seed(start)
        x = torch.randn(BATCH, 1, size, size, generator=generator)
        corners = torch.randint(3, size - SIDE - 3, (BATCH, 2), generator=generator)
        grid = torch.arange(size)
        rows = (grid >= corners[:, :1]) & (grid < corners[:, :1] + SIDE)
        patch = rows[:, :, None] & ((grid >= corners[:, 1:]) & (grid < corners[:, 1:] + SIDE))[:, None]
        bumps = STRENGTH * torch.randn(STEPS, BATCH, 1, size, size, generator=generator) * patch[:, None]

        def disturb(i: int, output: torch.Tensor, bumps: torch.Tensor = bumps) -> torch.Tensor:
            return output + bumps[i]

        watching, correcting = dx.ASCEDCallback(**SETTINGS), dx.ASCEDCallback(**SETTINGS)
        clean = run(unet, pipe.scheduler.config, x)
        watched = run(unet, pipe.scheduler.config, x, watching)
        broken = run(unet, pipe.scheduler.config, x, disturb=disturb)
        mended = run(unet, pipe.scheduler.config, x, correcting, disturb)
        inside = patch[:, None].float()

        def error(pictures: torch.Tensor, clean: torch.Tensor = clean, inside: torch.Tensor = inside) -> torch.Tensor:
            squares = ((pictures - clean).square() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
            return squares.sqrt()

        found = {
            "overlap": overlap(correcting.mask, patch), "overlap_spatial": overlap(spatial(broken), patch),
            "broken": error(broken), "mended": error(mended), "false": watching.mask.flatten(1).float().mean(1),
            "change": (watched - clean).square().flatten(1).mean(1).sqrt(),
        }  # fmt: skip
        for name, values in found.items():
            columns.setdefault(name, []).append(values)
    numbers = {name: torch.cat(values).tolist() for name, values in columns.items()}

    def pair(ours: str, theirs: str) -> dict[str, list[float]]:
        return {"ours": numbers[ours], "theirs": numbers[theirs]}

    recorder.paired(
        "overlap_over_spatial",
        "intersection over union of the regions found with the patch, less that of outliers of the finished picture",
        Samples("difference", pair("overlap", "overlap_spatial"), 1e-3), "", (">=", 0.0),
    )  # fmt: skip
    recorder.paired(
        "patch_error",
        "RMSE of the patch to the undisturbed run with the correction, less that without",
        Samples("difference", pair("mended", "broken"), 1e-3), "", ("<=", 0.0),
    )  # fmt: skip
    recorder.paired(
        "false_alarms",
        "share of the pixels of undisturbed runs that are taken for artifacts",
        Samples("value", {"ours": numbers["false"]}, 1e-3), "", ("<=", 0.05),
    )  # fmt: skip
    recorder.paired(
        "clean_change",
        "RMSE that the correction adds to undisturbed runs",
        Samples("value", {"ours": numbers["change"]}, 1e-3), "",
    )  # fmt: skip
    means = {name: sum(values) / len(values) for name, values in numbers.items()}
    recorder.table("means", list(means), [list(means.values())])


if __name__ == "__main__":
    BENCHMARK.main()
