"""What MR Sampler is worth: against 100 calls of the usual steps, on an exact score and on a small trained network.

    diffusers-ext bench mr_sampler            # records diffusers_ext/results/mr_sampler.json

Settings were fixed before measuring: the paper's defaults (ODE, data, second order, uniform in time), 5, 10 and 20 calls.
That the last step is of first order was chosen on other mixtures; the table has the paper's full order beside it.
The usual steps are IR-SDE's: Euler-Maruyama (Euler for the ODE) of uniform steps of time, and its posterior sampling, which
is the first-order SDE solver. The network is trained here, by `train_mean_reverting`, to undo a fourfold downsampling of
Fashion-MNIST, from its first 30,000 pictures; measured are test pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks.data import load_fashion_mnist
from benchmarks.zoo._fashion import DATA
from diffusers_ext.metrics import distance_difference, kernel_distance
from diffusers_ext.oracles import GaussianMixtureDenoiser
from diffusers_ext.training import train_mean_reverting
from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training._degradation import degrade

CALLS, USUAL = (5, 10, 20), 100
ORACLE: dict[str, Any] = {"samples": 64, "components": 8, "orders": [1, 2, 3]}
TRAINING: dict[str, Any] = {
    "degradation": "downsample", "degradation_level": 4, "train_batch_size": 32, "max_train_steps": 1500,
    "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 50, "ema_decay": 0.999, "seed": 0,
}  # fmt: skip
PICTURES: dict[str, Any] = {"pictures": 192, "batch": 64, "reference": 2000, "training": TRAINING}
BENCHMARK = Benchmark("mr_sampler", settings={"calls": [*CALLS, USUAL], "oracle": ORACLE, "pictures": PICTURES})
Model = Callable[[torch.Tensor, float], torch.Tensor]  # of the state and the timestep to the noise


def sampler(scheduler: Any, model: Model, mu: torch.Tensor, start: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The end of a run of the scheduler, whose timesteps are laid."""
    x, generator = start, torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, float(t)), t, x, generator, return_dict=False, mu=mu)[0]
    return x


def euler(model: Model, mu: torch.Tensor, start: torch.Tensor, calls: int, stochastic: bool) -> torch.Tensor:
    """The reverse SDE or ODE by explicit Euler steps of uniform time (Luo et al. 2023, equations 6 and 7)."""
    process = dx.MRSamplerScheduler()
    times = np.linspace(process.last_timestep, 0, calls + 1)
    a, s = process.at(times)
    sigma_inf, x, generator = process.config.sigma_inf, start, torch.Generator().manual_seed(0)
    for i in range(calls):
        theta = math.log(a[i + 1] / a[i])  # its integral over the step
        score = -model(x, float(times[i])) / s[i]
        x = x - theta * (mu - x) + (2 if stochastic else 1) * theta * sigma_inf**2 * score
        if stochastic:
            x = x + math.sqrt(2 * theta) * sigma_inf * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x


def ours(calls: int, **options: Any) -> Any:
    scheduler = dx.MRSamplerScheduler(**options)
    scheduler.set_timesteps(calls)
    return scheduler


# --- exact score -----------------------------------------------------------------------------------------------------


@BENCHMARK.part(*(f"exact_{calls}" for calls in CALLS), minutes=1, quick=True)
def exact_score(recorder: Recorder) -> None:
    """Distance to the exact solution of the ODE for a Gaussian mixture of 64 pixels."""
    process, sigma_inf = dx.MRSamplerScheduler(), dx.MRSamplerScheduler().config.sigma_inf
    generator = torch.Generator().manual_seed(0)
    means = 0.3 * torch.randn(ORACLE["components"], 1, 8, 8, generator=generator, dtype=torch.float64)
    # About the degraded picture, in units of sigma_inf, the process is that of a beta schedule
    schedule = SimpleNamespace(config={"prediction_type": "epsilon"}, alphas_cumprod=torch.from_numpy(process.a**2))
    denoiser = GaussianMixtureDenoiser.from_components(means / sigma_inf, (0.1 / sigma_inf) ** 2, schedule)
    shape = (ORACLE["samples"], 1, 8, 8)
    mu = 0.5 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randn(shape, generator=generator, dtype=torch.float64)
    start, right = mu + sigma_inf * y, mu + sigma_inf * denoiser.exact_ode_solution(y, USUAL, 0)

    def model(x: torch.Tensor, t: float) -> torch.Tensor:
        return denoiser((x - mu) / sigma_inf, t).sample

    def errors(x: torch.Tensor) -> list[float]:
        return (x - right).square().mean((1, 2, 3)).sqrt().tolist()

    usual = errors(euler(model, mu, start, USUAL, False))
    rows: list[list[Any]] = [["Euler", USUAL, float(np.mean(usual)), None]]
    for calls in CALLS:
        rows.append(["Euler", calls, float(np.mean(errors(euler(model, mu, start, calls, False)))), None])
        for order in ORACLE["orders"]:
            found = errors(sampler(ours(calls, solver_order=order), model, mu, start))
            full = errors(sampler(ours(calls, solver_order=order, lower_order_final=False), model, mu, start))
            rows.append([f"MR Sampler, order {order}", calls, float(np.mean(found)), float(np.mean(full))])
            if order == 2:
                recorder.paired(
                    f"exact_{calls}",
                    f"RMSE to the exact solution with {calls} calls less that of Euler with {USUAL}, exact score",
                    Samples("difference", {"ours": found, "theirs": usual}, 1e-6), "", ("<=", 0.0),
                )  # fmt: skip
    recorder.table(
        "exact score: distance to the exact solution", ["steps", "calls", "RMSE", "RMSE ending in full order"], rows
    )


# --- a trained network -----------------------------------------------------------------------------------------------


def trained() -> Any:
    """The pipeline, trained where it was not; continues where it was stopped."""
    folder = Path(OUTPUT) / "mr_sampler"
    if not (folder / "start" / "model_index.json").is_file():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=28, in_channels=2, out_channels=1, layers_per_block=1, block_out_channels=(24, 32, 48),
            norm_num_groups=8, add_attention=False, down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
        )  # fmt: skip
        dx.MeanRevertingPipeline(unet, dx.MRSamplerScheduler()).save_pretrained(folder / "start")
    if not (folder / "model" / "model_index.json").is_file():
        flags = {"pretrained_model_name_or_path": folder / "start", "output_dir": folder / "model", **TRAINING}
        flags |= {"checkpointing_steps": 250, "resume_from_checkpoint": "latest", "adam_weight_decay": 0}
        options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        train_mean_reverting.main([*DATA, "--use_ema", *options])
    return dx.MeanRevertingPipeline.from_pretrained(folder / "model", dtype=torch.float32)


@BENCHMARK.part(
    *(f"psnr_{calls}" for calls in CALLS), "psnr_over_euler_10", *(f"features_{calls}" for calls in CALLS), minutes=15
)
def pictures(recorder: Recorder) -> None:
    """PSNR to the clean picture, and the judge's features, against 100 calls of posterior sampling."""
    pipe, judge = trained(), dx.FashionJudge.from_pretrained(dx.zoo_path("fashion-judge"))
    count, test = PICTURES["pictures"], load_fashion_mnist("reference")[0]
    clean = torch.from_numpy(test[:count, None]).float() / 255
    mu = degrade(clean, TRAINING["degradation"], TRAINING["degradation_level"], SampleNoise(0, torch.arange(count)))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    start = mu + pipe.scheduler.config.sigma_inf * noise
    reference = judge.features(test[-PICTURES["reference"] :, :, :, None])

    def restore(title: str, run: Callable[[Model, torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        parts = []
        for first in tqdm(range(0, count, PICTURES["batch"]), desc=title):
            rows = slice(first, first + PICTURES["batch"])

            def model(x: torch.Tensor, t: float, mu: torch.Tensor = mu[rows]) -> torch.Tensor:
                return pipe.unet(torch.cat([x - mu, mu], 1), t, return_dict=False)[0]

            with torch.no_grad():
                parts.append(run(model, mu[rows], start[rows]).clamp(0, 1))
        return torch.cat(parts)

    def posterior(calls: int) -> torch.Tensor:
        one = {"solver_type": "sde", "solver_order": 1}
        return restore(f"posterior, {calls} calls", lambda *run: sampler(ours(calls, **one), *run))

    made = {("posterior", calls): posterior(calls) for calls in (10, USUAL)}
    for calls in (10, USUAL):
        made["Euler-Maruyama", calls] = restore("Euler-Maruyama", lambda *run, n=calls: euler(*run, n, True))
    for calls in CALLS:
        made["MR Sampler", calls] = restore("MR Sampler", lambda *run, n=calls: sampler(ours(n), *run))
    errors = {name: (x - clean).square().mean((1, 2, 3)).sqrt().tolist() for name, x in made.items()}
    features = {name: judge.features(x.permute(0, 2, 3, 1).numpy()) for name, x in made.items()}
    usual, fine = errors["posterior", USUAL], features["posterior", USUAL]
    for calls in CALLS:
        recorder.paired(
            f"psnr_{calls}", f"PSNR with {calls} calls above that of posterior sampling with {USUAL}, Fashion-MNIST",
            Samples("psnr_gain", {"ours": errors["MR Sampler", calls], "theirs": usual}, 1e-4), "dB", (">=", -0.1),
        )  # fmt: skip
        found = distance_difference(features["MR Sampler", calls], fine, reference, "kernel")
        recorder.claim(
            f"features_{calls}",
            f"kernel distance of the judge to clean pictures with {calls} calls less that of posterior sampling with {USUAL}",
            found.value, "", found.interval, ("<=", 0.0),
        )  # fmt: skip
    recorder.paired(
        "psnr_over_euler_10", "PSNR with 10 calls above that of Euler-Maruyama with 10, Fashion-MNIST",
        Samples("psnr_gain", {"ours": errors["MR Sampler", 10], "theirs": errors["Euler-Maruyama", 10]}, 1e-4), "dB",
        (">=", 0.0),
    )  # fmt: skip
    rows: list[list[Any]] = [["the degraded picture", 0, *_quality(mu, clean, judge, reference)]]
    rows += [[*name, *_quality(x, clean, judge, reference)] for name, x in made.items()]
    recorder.table("Fashion-MNIST, fourfold downsampling", ["steps", "calls", "PSNR", "kernel distance"], rows)


def _quality(x: torch.Tensor, clean: torch.Tensor, judge: Any, reference: torch.Tensor) -> tuple[float, float]:
    psnr = float(-10 * (x - clean).square().mean((1, 2, 3)).log10().mean())
    return psnr, kernel_distance(judge.features(x.permute(0, 2, 3, 1).numpy()), reference).value


if __name__ == "__main__":
    BENCHMARK.main()
