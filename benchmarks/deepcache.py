"""What DeepCache is worth: against fewer steps, against the authors' package, and under `torch.compile`.

    diffusers-ext bench deepcache            # records diffusers_ext/results/deepcache.json
    diffusers-ext bench deepcache --quick    # a few pictures and rounds, records nothing

Settings were fixed before measuring: intervals 2, 3, 5 and 10 at branch 0, the paper's default. The package comparison
runs the same modules on a cached step, in one process, alternating.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._record import Recorder
from diffusers_ext.hooks.deepcache import cached_modules
from diffusers_ext.metrics import bootstrap_interval, count_macs, psnr, time_ratio

DATA = Path(__file__).parent / "data"
INTERVALS = (2, 3, 5, 10)
SETTINGS: dict[str, Any] = {
    "model": "avatars-sd",
    "scheduler": "DDIMScheduler",
    "steps": 50,
    "guidance_scale": 3.0,
    "pictures": 64,
    "branch": 0,
    "intervals": list(INTERVALS),
    "timing": {"steps": 20, "batch": 16, "rounds": 11, "threads": 1, "intervals": [2, 3, 5]},
    "sd_like": {
        "block_out_channels": [64, 128, 256, 256], "layers_per_block": 2, "cross_attention_dim": 128, "sample_size": 32,
        "batch": 2, "steps": 20, "rounds": 9, "threads": 2, "interval": 3,
    },
}  # fmt: skip


def held_out_captions(count: int) -> list[str]:
    """The first `count` captions of the reference split, each once; the generator and the judge saw none of them."""
    rows = json.loads((DATA / "avatars_splits.json").read_text())["reference"]
    captions = np.load(DATA / "avatars.npz")["caption"][rows]
    return [str(caption) for caption in dict.fromkeys(captions.tolist())][:count]


def generate(pipe: StableDiffusionPipeline, captions: list[str], steps: int, settings: dict[str, Any]) -> np.ndarray:
    """Pictures `(n, 3, height, width)` in [0, 1], seed i for caption i."""
    pictures = []
    for start in range(0, len(captions), 16):
        batch = captions[start : start + 16]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        pictures.append(
            pipe(
                batch, num_inference_steps=steps, guidance_scale=settings["guidance_scale"], generator=generators,
                output_type="np",
            ).images
        )  # fmt: skip
    return np.concatenate(pictures).transpose(0, 3, 1, 2)


def quality(recorder: Recorder, pipe: StableDiffusionPipeline, settings: dict[str, Any]) -> None:
    """Distance to the full run, seed by seed, of DeepCache and of fewer steps at equal multiply-accumulates."""
    captions, steps = held_out_captions(settings["pictures"]), settings["steps"]
    judge = dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge"))
    bar = tqdm(total=1 + 2 * len(settings["intervals"]), desc="Pictures", unit="run")

    def accuracy(pictures: np.ndarray) -> float:
        return statistics.mean(judge.score(torch.from_numpy(pictures), captions).values())

    macs = {1: float(run_macs(pipe.unet, steps, 1, settings["branch"]))}
    full = generate(pipe, captions, steps, settings)
    bar.update()
    rows = [[f"{steps} steps", macs[1] / 1e9, 1.0, float("inf"), accuracy(full)]]
    for interval in settings["intervals"]:
        macs[interval] = run_macs(pipe.unet, steps, interval, settings["branch"])
        with dx.enabled(pipe, dx.DeepCacheConfig(interval=interval, branch=settings["branch"])):
            cached = generate(pipe, captions, steps, settings)
        bar.update()
        fewer_steps = max(1, round(steps * macs[interval] / macs[1]))
        fewer = generate(pipe, captions, fewer_steps, settings)
        bar.update()
        ours, theirs = (psnr(torch.from_numpy(x), torch.from_numpy(full)).numpy() for x in (cached, fewer))
        gain = ours - theirs
        recorder.claim(
            f"equal_macs_psnr_N{interval}",
            f"PSNR to the full run above that of {fewer_steps} steps, which cost as much, interval {interval}",
            float(gain.mean()), "dB", bootstrap_interval(gain, np.mean), (">=", 0.0),
        )  # fmt: skip
        cost = macs[interval] / 1e9
        rows.append(
            [f"DeepCache, interval {interval}", cost, macs[1] / macs[interval], float(ours.mean()), accuracy(cached)]
        )
        ratio = steps / fewer_steps
        rows.append([f"{fewer_steps} steps", macs[1] / ratio / 1e9, ratio, float(theirs.mean()), accuracy(fewer)])
    bar.close()
    recorder.table(
        "quality", ["run", "GMACs a picture", "times fewer MACs", "PSNR to full (dB)", "attribute accuracy"], rows
    )


def call(unet: UNet2DConditionModel, batch: int, timestep: int) -> dict[str, Any]:
    config, generator = unet.config, torch.Generator().manual_seed(timestep)
    side, width = config.sample_size, config.cross_attention_dim
    return {
        "sample": torch.randn((batch, config.in_channels, side, side), generator=generator),
        "encoder_hidden_states": torch.randn((batch, 32, width), generator=torch.Generator().manual_seed(0)),
        "return_dict": False,
    }


@torch.no_grad()
def run_macs(unet: UNet2DConditionModel, steps: int, interval: int, branch: int) -> int:
    """Multiply-accumulates of the denoiser for one guided picture (two rows a call)."""
    model = copy.deepcopy(unet)
    dx.enable(model, dx.DeepCacheConfig(interval=interval, branch=branch))
    return count_macs(lambda: [model(timestep=torch.tensor(999 - i), **call(model, 2, 999 - i)) for i in range(steps)])


def denoiser(unet: UNet2DConditionModel, steps: int, batch: int) -> Callable[[], None]:
    """A run of `steps` denoiser calls on a fixed input, as a pipeline makes them."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    options = call(unet, batch, 0)
    sample = options.pop("sample")

    @torch.no_grad()
    def run() -> None:
        for t in scheduler.timesteps:
            unet(sample, t, **options)

    return run


def against_package(recorder: Recorder, unet: UNet2DConditionModel, settings: dict[str, Any]) -> None:
    """Time of a run here over time of the same run in the authors' package, the same modules on a cached step."""
    from types import SimpleNamespace

    from DeepCache import DeepCacheSDHelper

    timing = settings["timing"]
    torch.set_num_threads(timing["threads"])
    rows = []
    for interval in timing["intervals"]:
        ours, theirs = copy.deepcopy(unet), copy.deepcopy(unet)
        dx.enable(ours, dx.DeepCacheConfig(interval=interval, branch=settings["branch"]))
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(timing["steps"])
        helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=theirs, scheduler=scheduler))
        helper.set_params(cache_interval=interval, cache_branch_id=settings["branch"])
        helper.enable()
        runs = {
            "package": denoiser(theirs, timing["steps"], timing["batch"]),
            "ours": denoiser(ours, timing["steps"], timing["batch"]),
            "plain": denoiser(unet, timing["steps"], timing["batch"]),
        }
        result = time_ratio(runs, baseline="package", repeats=timing["rounds"])
        ratio = result["ours"]
        recorder.claim(
            f"time_over_package_N{interval}",
            f"time of a run over that of the DeepCache 0.1.1 package, interval {interval}",
            ratio.median,
            "x",
            ratio.interval,
        )
        recorder.claim(
            f"not_slower_than_package_N{interval}",
            f"lower end of the interval of that ratio, interval {interval}",
            ratio.interval[0],
            "x",
            goal=("<=", 1.0),
        )
        noise, plain = result.noise, result["plain"].median
        rows.append([interval, result.seconds["plain"], result.seconds["package"], result.seconds["ours"],
                     result.seconds["plain"] / result.seconds["ours"], result["ours"].median, *result["ours"].interval,
                     noise.median, *noise.interval, plain])  # fmt: skip
    recorder.table(
        "time against the package",
        ["interval", "plain (s)", "package (s)", "ours (s)", "speed-up", "ours / package", "low", "high",
         "package / package", "low ", "high ", "plain / package"],
        rows,
    )  # fmt: skip
    names = cached_modules(unet, settings["branch"])
    recorder.table("modules that run on a cached step", ["module"], [[name] for name in names])


def module_seconds(unet: UNet2DConditionModel, names: list[str]) -> tuple[list[float], list[Any]]:
    """A one-element sum of seconds spent in the named modules, filled by forward hooks, and the hooks' handles."""
    spent, began, handles = [0.0], [0.0], []

    def before(*_: Any) -> None:
        began[0] = time.perf_counter()

    def after(*_: Any) -> None:
        spent[0] += time.perf_counter() - began[0]

    for name in names:
        module = unet.get_submodule(name)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return spent, handles


@torch.no_grad()
def overhead(recorder: Recorder, label: str, unet: UNet2DConditionModel, batch: int, branch: int, rounds: int) -> None:
    """Time of a cached step over the time of its modules in a plain forward of the same round."""
    plain, ours = copy.deepcopy(unet), copy.deepcopy(unet)
    dx.enable(ours, dx.DeepCacheConfig(interval=10**6, branch=branch))
    spent, handles = module_seconds(plain, cached_modules(plain, branch))
    options = call(unet, batch, 0)
    sample, t = options.pop("sample"), torch.tensor(500)
    ours(sample, t, **options)
    ratios = []
    for _ in tqdm(range(rounds * 4 + 3), desc=f"Cached step, {label}", unit="round", delay=2.0, leave=False):
        spent[0] = 0.0
        plain(sample, t, **options)
        began = time.perf_counter()
        ours(sample, t, **options)
        ratios.append((time.perf_counter() - began) / spent[0])
    for handle in handles:
        handle.remove()
    ratios = ratios[3:]
    recorder.claim(
        f"cached_step_over_listed_modules_{label}",
        f"time of a cached step over the time of its modules in an unhooked forward, {label}, branch {branch}",
        statistics.median(ratios), "x", bootstrap_interval(ratios), ("<=", 1.10),
    )  # fmt: skip


def compiled(recorder: Recorder, unet: UNet2DConditionModel, settings: dict[str, Any]) -> None:
    """Whether the speed-up survives `torch.compile`, and the number of graphs."""
    from torch._dynamo.utils import counters

    like = settings["sd_like"]
    torch.set_num_threads(like["threads"])
    config = dx.DeepCacheConfig(interval=like["interval"], branch=settings["branch"])
    models = {name: copy.deepcopy(unet) for name in ("plain", "cached", "plain, compiled", "cached, compiled")}
    dx.enable(models["cached"], config)
    dx.enable(models["cached, compiled"], config)
    graphs, runs, warmup = {}, {}, []
    for name, model in models.items():
        if name.endswith("compiled"):
            torch._dynamo.reset()
            model = torch.compile(model)
        runs[name] = denoiser(model, like["steps"], like["batch"])
    for name in ("plain, compiled", "cached, compiled"):
        counters.clear()
        began = time.perf_counter()
        runs[name]()
        warmup.append(time.perf_counter() - began)
        first = counters["stats"]["unique_graphs"]
        runs[name]()
        runs[name]()
        graphs[name] = (first, counters["stats"]["unique_graphs"])
    result = time_ratio(runs, baseline="plain", repeats=like["rounds"])
    eager = result["cached"].rounds
    both = zip(result["cached, compiled"].rounds, result["plain, compiled"].rounds, eager, strict=True)
    kept = [(cached / plain) / ratio for cached, plain, ratio in both]
    recorder.claim(
        "compiled_speedup",
        "compiled and cached over compiled and plain, divided by the same ratio without compiling",
        statistics.median(kept), "x", bootstrap_interval(kept), ("<=", 1.15),
    )  # fmt: skip
    recorder.claim(
        "compiled_graphs_growth", "graphs compiled after the first run of 20 steps",
        graphs["cached, compiled"][1] - graphs["cached, compiled"][0], "graphs", None, ("==", 0),
    )  # fmt: skip
    rows = [[name, seconds, graphs.get(name, (0, 0))[1]] for name, seconds in result.seconds.items()]
    recorder.table("torch.compile", ["run", "seconds", "graphs"], rows)


def sd_like(settings: dict[str, Any]) -> UNet2DConditionModel:
    """A U-Net in the layout of Stable Diffusion 1.5, smaller, with random weights: for time only."""
    like = settings["sd_like"]
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=like["sample_size"], block_out_channels=tuple(like["block_out_channels"]), attention_head_dim=8,
        layers_per_block=like["layers_per_block"], cross_attention_dim=like["cross_attention_dim"],
    ).eval()  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Few pictures and rounds; records nothing.")
    args = parser.parse_args(argv)
    settings = copy.deepcopy(SETTINGS)
    if args.quick:
        settings["pictures"], settings["intervals"] = 8, [3]
        settings["timing"] |= {"rounds": 3, "intervals": [3]}
        settings["sd_like"]["rounds"] = 2
    print(f"About {3 if args.quick else 12} minutes on two idle cores.")
    recorder = Recorder(
        "deepcache", settings, seeds={"pictures": list(range(settings["pictures"]))}, peers=["DeepCache"]
    )
    torch.set_num_threads(2)
    pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    quality(recorder, pipe, settings)
    against_package(recorder, pipe.unet, settings)
    big = sd_like(settings)
    overhead(
        recorder, "avatars-sd", pipe.unet, settings["timing"]["batch"], settings["branch"], settings["timing"]["rounds"]
    )
    overhead(recorder, "sd-like", big, settings["sd_like"]["batch"], settings["branch"], settings["timing"]["rounds"])
    compiled(recorder, big, settings)
    recorder.print()
    if not args.quick:
        print(f"Recorded in {recorder.write()}")


if __name__ == "__main__":
    main()
