"""What a found noise schedule is worth: distance to real pictures at equal calls, and on exact scores.

    diffusers-ext bench fastdiff            # records diffusers_ext/results/fastdiff.json

Steps are DDPM's throughout; only their levels differ. Against found schedules stand levels spread evenly over the timesteps,
levels that are denser towards clean data (quadratic), and FastDiff's own schedules, which are for speech. A predictor is
trained with each of five seeds, and a schedule searched with each, by kernel distance to training pictures, on noise of its
own. All are then measured on the same new noise, against held-out pictures. Settings were fixed before measuring; there
are six starts, not the default's 45, to save time.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import nn
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._zoo import ZooModel, weights
from benchmarks.data import load_fashion_mnist
from benchmarks.zoo import _fashion
from diffusers_ext.metrics import frechet_distance, kernel_distance
from diffusers_ext.noise_schedule_search import NoiseScheduleResult

MODEL, STEPS, SEEDS = "fashion-ddpm", (3, 4, 6, 8), (0, 1, 2, 3, 4)
TRAINING = {"max_train_steps": 150, "train_batch_size": 16, "learning_rate": 2e-3}
# Timesteps of the first two levels.
STARTS = ((999, 700), (999, 600), (999, 500), (800, 600), (800, 500), (800, 400))
EXACT_STARTS = tuple(itertools.combinations((999, 600, 300, 200, 100, 50), 2))
ATTEMPTS, WALKED, SEARCHED, SEARCH_SEED = 2, 4, 32, 10**6
FIRST_SEED, PICTURES, REAL = 1000, 256, 2000
# Of the task file of the authors' repository.
PUBLISHED = {
    3: [9e-5, 9e-3, 0.6],
    4: [3.2176e-4, 2.5743e-3, 2.5376e-2, 0.70414],
    6: [1.7838446e-6, 2.7984190e-5, 4.3231004e-4, 6.6343173e-3, 9.3570173e-2, 0.6],
    8: [6.6893250e-7, 1.0033882e-5, 1.5496854e-4, 2.3872221e-3, 3.5597630e-2, 0.36811584, 0.47354144, 0.5],
}
VARIANCES = 1.0 / np.arange(1, 65) ** 1.5  # of the Gaussian data: a few large directions and many small ones
BENCHMARK = Benchmark(
    "fastdiff",
    settings={
        "model": MODEL, "weights": weights(MODEL), "steps": list(STEPS), "training": TRAINING, "first_seed": FIRST_SEED, "pictures": PICTURES,
        "reference": REAL, "starts": STARTS, "attempts": ATTEMPTS, "samples_of_walks": WALKED, "pictures_of_searches": SEARCHED,
        "search_seed": SEARCH_SEED, "exact": {"variances": "k^-1.5, k to 64", "starts": EXACT_STARTS},
    },
)  # fmt: skip


def subset(scheduler: Any, timesteps: Sequence[float]) -> list[float]:
    """The betas of a schedule whose levels are those of these timesteps of training, rising."""
    bar = scheduler.alphas_cumprod.double().numpy()[np.round(timesteps).astype(int)]
    return (1 - bar / np.append(1.0, bar[:-1])).tolist()


def by_hand(scheduler: Any, n: int) -> dict[str, list[float]]:
    """Name -> betas of n steps."""
    shares, last = np.arange(1, n + 1) / n, scheduler.config.num_train_timesteps - 1
    return {
        "linear": subset(scheduler, shares * last),
        "quadratic": subset(scheduler, shares**2 * last),
        "published": PUBLISHED[n],
    }


# --- pictures --------------------------------------------------------------------------------------------------------


def trained(seed: int) -> dx.NoiseSchedulePredictor:
    from diffusers_ext.training.train_noise_schedule_predictor import main

    with tempfile.TemporaryDirectory() as folder:
        flags = {**TRAINING, "seed": seed, "output_dir": folder, "pretrained_model_name_or_path": dx.zoo_path(MODEL)}
        main([*_fashion.DATA, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))])
        return dx.NoiseSchedulePredictor.from_pretrained(folder)


@functools.cache
def real_features(split: str) -> torch.Tensor:
    return _fashion.judge().features(load_fashion_mnist(split)[0][:REAL, :, :, None])


@functools.cache
def search_objective() -> dx.PictureObjective:
    judge = _fashion.judge()

    def distance_to_training_pictures(pictures: np.ndarray) -> float:
        return kernel_distance(judge.features(pictures), real_features("generator"), resamples=2).value

    seeds = range(SEARCH_SEED, SEARCH_SEED + SEARCHED)
    return dx.PictureObjective(ZooModel(MODEL).pipe, seeds, distance_to_training_pictures)


def searched(predictor: dx.NoiseSchedulePredictor, n: int) -> NoiseScheduleResult:
    options: dict[str, Any] = {"conditions": WALKED, "starts": STARTS, "attempts": ATTEMPTS}
    return dx.search_noise_schedule(ZooModel(MODEL).pipe, predictor, search_objective(), n, **options)


def distances(zoo: ZooModel, config: Mapping[str, Any], betas: list[float]) -> tuple[float, float]:
    """Fréchet and kernel distance to held-out pictures."""
    zoo.pipe.scheduler = dx.FastDiffScheduler.from_config(config, noise_schedule=betas)
    pictures = zoo.generate(zoo.pipe, zoo.conditions(PICTURES), range(FIRST_SEED, FIRST_SEED + PICTURES), len(betas))
    features, real = _fashion.judge().features(pictures), real_features("reference")
    return tuple(of(features, real, resamples=2).value for of in (frechet_distance, kernel_distance))  # type: ignore[return-value]


@BENCHMARK.part(
    *(f"{kind}_at_{n}" for n in STEPS for kind in ("frechet", "kernel", "seeds")), minutes=25
)  # fmt: skip
def pictures(recorder: Recorder) -> None:
    """Of found schedules, less those of the best schedule made by hand."""
    zoo, rows, schedules = ZooModel(MODEL), [], []
    config = dict(zoo.pipe.scheduler.config)
    stock = DDPMScheduler.from_config(config)
    predictors = [trained(seed) for seed in tqdm(SEEDS, desc="Predictors", leave=False)]
    for n in tqdm(STEPS, desc="Numbers of steps", leave=False):
        found = [searched(predictor, n) for predictor in predictors]
        ours = np.array([distances(zoo, config, one.noise_schedule) for one in found])
        hand = {name: distances(zoo, config, betas) for name, betas in by_hand(stock, n).items()}
        best = np.array(list(hand.values())).min(axis=0)
        # What the search alone is worth, whose predictor always says half.
        half = distances(zoo, config, searched(dx.NoiseSchedulePredictor(in_channels=1), n).noise_schedule)
        for k, (kind, title) in enumerate((("frechet", "Fréchet"), ("kernel", "kernel"))):
            recorder.paired(
                f"{kind}_at_{n}",
                f"{MODEL}: {title} distance to real pictures with a found schedule of {n} steps, less the least of those by "
                "hand",
                Samples("difference", {"ours": ours[:, k], "theirs": [best[k]] * len(SEEDS)}, 1.0), "", ("<=", 0.0),
            )  # fmt: skip
        recorder.claim(
            f"seeds_at_{n}",
            f"{MODEL}: share of predictors whose schedule of {n} steps has no larger Fréchet distance than the best by hand",
            float(np.mean(ours[:, 0] <= best[0])), "", None, (">=", 0.8),
        )  # fmt: skip
        rows += [[n, f"found, seed {seed}", *values] for seed, values in zip(SEEDS, ours.tolist(), strict=True)]
        rows += [[n, name, *values] for name, values in {"untrained predictor": half, **hand}.items()]
        schedules += [
            [n, seed, *one.start, ", ".join(f"{beta:.4g}" for beta in one.noise_schedule)]
            for seed, one in zip(SEEDS, found, strict=True)
        ]
    recorder.table("distances to real pictures", ["steps", "schedule", "Fréchet", "kernel"], rows)
    recorder.table("found schedules", ["steps", "seed", "a of the start", "beta of the start", "betas"], schedules)


# --- exact scores ----------------------------------------------------------------------------------------------------


class PerfectPredictor(nn.Module):
    """What a predictor learns of Gaussian data, in closed form: the share u of the noise is the root of `2 u m (1 + (1 -
    u)^-2) = 1`, with m the mean square error of the best prediction of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("variances", torch.from_numpy(VARIANCES))

    device = torch.device("cpu")

    def forward(self, x: torch.Tensor, beta_next: torch.Tensor, delta_squared: torch.Tensor) -> torch.Tensor:
        d2 = delta_squared.double()[:, None]
        signal = (1 - d2) * self.variances
        m = (signal / (signal + d2)).mean(1)
        low, high = torch.zeros_like(m), torch.ones_like(m)
        for _ in range(50):
            u = (low + high) / 2
            over = 2 * u * m * (1 + (1 - u) ** -2) > 1
            low, high = torch.where(over, low, u), torch.where(over, u, high)
        return torch.minimum(low * d2[:, 0], beta_next.double())


class EndOfGaussian:
    """An objective: distance of the law at the end of a run to that of the data, exact, with the exact score.

    It is Wasserstein's of order 2, as a root mean square over the directions: a run is linear in each, so that variances
    follow from a recursion.
    """

    def __init__(self, pipe: Any) -> None:
        self.config, self.identity = pipe.scheduler.config, {"variances": VARIANCES.tolist()}

    def __call__(self, scheduler: Any, num_steps: int) -> float:
        scheduler.set_timesteps(num_steps)
        v = np.ones_like(VARIANCES)
        for here, there in zip(scheduler.points, scheduler.points[1:], strict=False):
            denoise = here.alpha * VARIANCES / (here.alpha**2 * VARIANCES + here.sigma**2)
            fresh = 1 - (there.sigma * here.alpha / (there.alpha * here.sigma)) ** 2
            noise = (1 - here.alpha * denoise) / here.sigma
            v = (there.alpha * denoise + there.sigma * math.sqrt(1 - fresh) * noise) ** 2 * v + there.sigma**2 * fresh
        return float(np.sqrt(np.mean((np.sqrt(v) - np.sqrt(VARIANCES)) ** 2)))


@BENCHMARK.part("exact_over_hand", "exact_over_untrained", minutes=1, quick=True)
def exact_scores(recorder: Recorder) -> None:
    """Of Gaussian data, with a perfect predictor."""
    stock, rows = DDPMScheduler(), []
    denoiser = dx.GaussianDenoiser.from_moments(torch.zeros(1, 8, 8), torch.from_numpy(np.diag(VARIANCES)), stock)
    pipe = DDPMPipeline(denoiser, stock)
    objective, untrained = EndOfGaussian(pipe), dx.NoiseSchedulePredictor(in_channels=1)
    options: dict[str, Any] = {"conditions": 1, "starts": EXACT_STARTS, "attempts": 0}
    for n in STEPS:
        found, half = (
            dx.search_noise_schedule(pipe, predictor, objective, n, **options)  # type: ignore[arg-type]
            for predictor in (PerfectPredictor(), untrained)
        )
        hand = {
            name: objective(dx.FastDiffScheduler.from_config(stock.config, noise_schedule=betas), n)
            for name, betas in by_hand(stock, n).items()
        }
        rows.append([n, found.score, half.score, *hand.values(), *found.start])
    errors = np.array(rows)
    for name, other, what in (
        ("exact_over_hand", errors[:, 3:6].min(axis=1), "of the best schedule by hand"),
        ("exact_over_untrained", errors[:, 2], "of the same search with an untrained predictor, which halves betas"),
    ):
        recorder.paired(
            name,
            "Gaussian data, exact score: distance to the law of the data with a found schedule below that " + what
            + f", mean over {', '.join(map(str, STEPS))} steps",
            Samples("psnr_gain", {"ours": errors[:, 1].tolist(), "theirs": other.tolist()}, 1e-4), "dB", (">=", 0.0),
        )  # fmt: skip
    recorder.table(
        "distance to the law of Gaussian data",
        ["steps", "found", "untrained", "linear", "quadratic", "published", "a of the start", "beta of the start"], rows,
    )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
