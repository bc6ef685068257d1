"""What learned scores of heads and neurons are worth: against weight magnitude, chance, and scores learned at single steps.

    diffusers-ext bench ecodiff            # records diffusers_ext/results/ecodiff.json

Scores are learned here with three seeds on captions or classes and noise of their own, two to four minutes each on an idle core;
a training that is broken off goes on, and one that is finished is kept. The rival that is learned at single steps matches what
the denoiser gives at one random step of a run, and takes three times as many optimizer steps, which cost about as much. Settings
are the paper's for SDXL, but for the number of steps of a run and the price of the scores, which is the paper's for FLUX: it is
shared by all heads and neurons, of which these models have few. It was looked at with another seed, and nothing else was tuned.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._quality import RMSE_TOLERANCE, denoiser_cost
from benchmarks._record import Recorder, Samples
from benchmarks._trainings import trained_once, training_folder, with_task, write_lines
from benchmarks._zoo import ZooModel, weights
from benchmarks.data import FOLDER, load_fashion_mnist
from benchmarks.zoo import _avatars, _fashion
from diffusers_ext.metrics import frechet_distance, rmse, time_ratio
from diffusers_ext.models._groups import find_groups
from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training._trajectories import Walk, travel
from diffusers_ext.training.train_ecodiff import EcoDiffTask, mask_penalty, parse_args

MODELS = {"sd": ("avatars-sd", 3.0), "dit": ("fashion-dit", 4.0)}  # with the guidance scale
STEPS, RATIOS, SEEDS, PICTURES, FIRST_SEED = 10, (0.1, 0.2, 0.3), (0, 1, 2), 128, 10**6
TRAINING = {
    "num_inference_steps": STEPS, "beta": 0.01, "mask_eps": 0.5, "train_batch_size": 4, "num_targets": 100, "learning_rate": 0.1,
    "checkpointing_steps": 20, "checkpoints_total_limit": 2, "num_validation_images": 1,
}  # fmt: skip
OPTIMIZER_STEPS = {"whole": 100, "single": 300}
TIMING = {"batch": 16, "rounds": 21, "threads": 1}
RIVALS = {"magnitude": "weight magnitude", "random": "chance", "single": "scores learned at single steps"}
BENCHMARK = Benchmark(
    "ecodiff",
    settings={
        "models": {label: {"model": name, "weights": weights(name), "guidance_scale": scale} for label, (name, scale) in MODELS.items()},
        "training": TRAINING, "optimizer_steps": OPTIMIZER_STEPS, "ratios": list(RATIOS), "pictures": PICTURES, "timing": TIMING,
    },
)  # fmt: skip


class SingleStepTask(EcoDiffTask):
    """Masks shall not change what the denoiser gives at one random step of a run without masks."""

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        key = self.number(batch)
        step = 1 + int(
            torch.randint(STEPS - 1, (), generator=torch.Generator().manual_seed(key + 10**6 * self.args.seed))
        )
        losses: list[torch.Tensor] = []
        with self.masks.applied(self.denoiser) as use:

            def walk() -> Walk:
                yield True
                for _ in range(1, step):
                    yield False
                    yield True
                wanted = yield False
                use(self.masks(self.uniform(key, step), self.args.mask_eps))
                given = yield True
                losses.append((given - wanted.detach()).square().mean())

            travel(self.pipeline, self.run_of(batch["index"].tolist()), walk(), visits=2)
        return losses[0] + self.args.beta * mask_penalty(self.masks, self.args.penalty)


def learned(label: str, kind: str, seed: int) -> dx.EcoDiffMasks:
    """Scores of a training; made, or gone on with, where it is not finished."""
    model, scale = MODELS[label]
    settings = [TRAINING, OPTIMIZER_STEPS, MODELS, weights(model)]
    work = training_folder("ecodiff", "diffusers_ext.training.train_ecodiff", settings)
    folder = work / f"{label}-{kind}-{seed}"
    values: dict[str, Any] = {
        **TRAINING, "pretrained_model_name_or_path": dx.zoo_path(model), "guidance_scale": scale, "seed": seed,
        "max_train_steps": OPTIMIZER_STEPS[kind],
    }  # fmt: skip
    if label == "sd":
        captions = _avatars.captions("generator")[seed * 100 : (seed + 1) * 100]
        values["prompts"] = write_lines(work / f"prompts-{seed}.txt", captions)
    script = with_task(parse_args, {"whole": EcoDiffTask, "single": SingleStepTask}[kind])
    return dx.EcoDiffMasks.from_pretrained(trained_once(script, folder, values))


def magnitudes(model: nn.Module) -> dx.EcoDiffMasks:
    """Scores that are root mean squares of the weights that make and take a unit's channels."""
    masks = dx.EcoDiffMasks.for_model(model)
    scores = []
    for group in find_groups(model):
        size, squares = group.units * group.width, []
        for layer, copies in group.writers:
            squares.append(model.get_submodule(layer).weight.square().reshape(copies, size, -1).sum((0, 2)))
        for layer, first in group.readers:
            squares.append(model.get_submodule(layer).weight[:, first : first + size].square().sum(0))
        scores.append(torch.stack(squares).sum(0).reshape(group.units, group.width).sum(1).sqrt())
    with torch.no_grad():
        masks.scores.copy_(torch.cat(scores))
    return masks


def by_chance(model: nn.Module, seed: int) -> dx.EcoDiffMasks:
    masks = dx.EcoDiffMasks.for_model(model)
    with torch.no_grad():
        masks.scores.copy_(torch.rand(len(masks.scores), generator=torch.Generator().manual_seed(seed)))
    return masks


def scores_of(label: str, model: nn.Module) -> dict[str, Callable[[], list[dx.EcoDiffMasks]]]:
    return {
        "ours": lambda: [learned(label, "whole", seed) for seed in SEEDS],
        "magnitude": lambda: [magnitudes(model)],
        "random": lambda: [by_chance(model, seed) for seed in SEEDS],
        "single": lambda: [learned(label, "single", seed) for seed in SEEDS],
    }


@functools.cache
def real_features(label: str) -> tuple[Callable[[np.ndarray], torch.Tensor], torch.Tensor]:
    """A judge's features, and those of held-out pictures."""
    if label == "dit":
        judge = _fashion.judge()
        return judge.features, judge.features(load_fashion_mnist("reference")[0][:2000, :, :, None])
    rows = json.loads((FOLDER / "avatars_splits.json").read_text())["reference"]
    avatars = dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge")).eval()
    return avatars.features, avatars.features(np.load(FOLDER / "avatars.npz")["image"][rows] / 255.0)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def pruned(zoo: ZooModel, masks: dx.EcoDiffMasks, ratio: float) -> Any:
    return masks.prune(copy.copy(zoo.pipe), ratio)


def quality(recorder: Recorder, label: str) -> None:
    """Distance to the pictures of the whole model, of the same seeds."""
    name, scale = MODELS[label]
    zoo = ZooModel(name)
    conditions, seeds = zoo.conditions(PICTURES), range(FIRST_SEED, FIRST_SEED + PICTURES)
    net, real = real_features(label)

    def draw(pipe: Any) -> np.ndarray:
        return zoo.generate(pipe, conditions, seeds, STEPS, scale)

    def measured(pictures: np.ndarray) -> list[float]:
        accuracy = zoo.accuracy(pictures, conditions, range(PICTURES))
        assert accuracy is not None
        return [float(accuracy.mean()), frechet_distance(net(pictures), real, resamples=2).value]

    full, denoiser = draw(zoo.pipe), zoo.denoiser(zoo.pipe)
    count = parameters(denoiser)
    macs = denoiser_cost(denoiser, lambda: zoo.generate(zoo.pipe, conditions[:1], [0], STEPS, scale)).macs
    rows: list[list[Any]] = [["whole model", 0.0, 1.0, 1.0, 0.0, *measured(full)]]
    masks = {kind: make() for kind, make in scores_of(label, denoiser).items()}
    errors: dict[tuple[str, float], np.ndarray] = {}
    for ratio in tqdm(RATIOS, desc=f"{name}: shares"):
        for kind, each in masks.items():
            found = []
            for number, one in enumerate(each):
                pipe = pruned(zoo, one, ratio)
                pictures, small = draw(pipe), zoo.denoiser(pipe)
                found.append(rmse(pictures, full))
                cost = denoiser_cost(small, lambda: zoo.generate(pipe, conditions[:1], [0], STEPS, scale)).macs  # noqa: B023
                title = {"ours": "EcoDiff", **RIVALS}[kind] + (f", seed {number}" if len(each) > 1 else "")
                rows.append(
                    [title, ratio, parameters(small) / count, cost / macs, float(found[-1].mean()), *measured(pictures)]
                )
            errors[kind, ratio] = np.mean(found, axis=0)
    for ratio in RATIOS:
        for kind, title in RIVALS.items():
            recorder.paired(
                f"{label}_over_{kind}_{ratio:.0%}".removesuffix("%"),
                f"RMSE to the whole model's pictures with {ratio:.0%} of heads and neurons cut, less that of {title}, mean over "
                f"{len(SEEDS)} trainings, {name}",
                Samples(
                    "difference", {"ours": errors["ours", ratio].tolist(), "theirs": errors[kind, ratio].tolist()},
                    RMSE_TOLERANCE,
                ),
                "", ("<=", 0.0),
            )  # fmt: skip
    columns = ["scores", "share cut", "parameters", "MACs", "mean RMSE", "attribute accuracy", "Fréchet (judge)"]
    recorder.table(f"{label}: pruned", columns, rows)


def _claims(label: str) -> Sequence[str]:
    return [f"{label}_over_{kind}_{100 * ratio:.0f}" for ratio in RATIOS for kind in RIVALS]


for _label, _minutes in (("sd", 20), ("dit", 30)):
    BENCHMARK.part(*_claims(_label), minutes=_minutes)(functools.partial(quality, label=_label))


@BENCHMARK.part(*(f"{what}_{label}" for label in MODELS for what in ("time", "parameters")), minutes=2)
def time(recorder: Recorder) -> None:
    """Of one denoiser call with 30 % cut, over that of the whole model."""
    torch.set_num_threads(TIMING["threads"])
    for label, (name, _) in MODELS.items():
        model = ZooModel(name).denoiser(ZooModel(name).pipe)
        small = learned(label, "whole", SEEDS[0]).prune(model, RATIOS[-1])
        config, batch = model.config, TIMING["batch"]
        call: dict[str, Any] = {"timestep": torch.full((batch,), 500), "return_dict": False}
        states = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
        if label == "sd":
            call |= {"sample": states, "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim)}
        else:
            call |= {"hidden_states": states, "class_labels": torch.arange(batch) % 10}
        with torch.no_grad():
            runs = {"whole": functools.partial(model, **call), "pruned": functools.partial(small, **call)}
            ratio = time_ratio(runs, baseline="whole", repeats=TIMING["rounds"])["pruned"]
        recorder.claim(
            f"time_{label}", f"time of a call with {RATIOS[-1]:.0%} cut over that of the whole model, batch {batch}, {name}",
            ratio.median, "x", ratio.interval, ("<=", 1.0),
        )  # fmt: skip
        recorder.claim(
            f"parameters_{label}", f"parameters with {RATIOS[-1]:.0%} of heads and neurons cut over those of the whole model, {name}",
            parameters(small) / parameters(model), "x",
        )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
