"""What guidance in one call is worth: against two calls a step, and against the same adapter that learnt from noised pictures.

    diffusers-ext bench agd            # records diffusers_ext/results/agd.json

Settings were fixed before measuring, tried on other seeds. Each training seed makes runs of its own captions and noise and trains
an adapter on them; the other adapter of the seed sees as many noised pictures of the same captions, in as many steps, with the
same teacher's predictions as targets. A training can be broken off and goes on, and one that is finished is kept. Accuracy is by
the judge of avatars, and within the noise if it falls short of two calls by less than the noise of two calls against
themselves: half the width of the interval of the difference between two sets of pictures of the same captions and other seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._quality import ACCURACY_TOLERANCE, RMSE_TOLERANCE, denoiser_cost
from benchmarks._record import Recorder, Samples
from benchmarks._trainings import trained_once, training_folder, with_task, write_lines
from benchmarks._zoo import ZooModel, weights
from benchmarks.zoo import _avatars
from diffusers_ext.metrics import bootstrap_interval, rmse, time_ratio
from diffusers_ext.training._data import SampleNoise, load_dataset
from diffusers_ext.training._diffusion import Latents
from diffusers_ext.training._guided import GuidedRuns, write_guided_runs
from diffusers_ext.training._teacher import Teacher
from diffusers_ext.training.train_agd import AGDTask, parse_args
from diffusers_ext.training.train_text_to_image import parse_args as parse_pictures

MODEL, STEPS, SCALE, PICTURES = "avatars-sd", 20, 3.0, 128
SEEDS = (0, 1, 2)
OTHER_SCALES, OTHER_PICTURES = (1.5, 2.0, 4.5), 32  # not those of training, where real numbers are drawn
RUNS, RUN_STEPS = 128, 20
TRAINING = (
    f"--num_runs={RUNS}", f"--num_inference_steps={RUN_STEPS}", "--run_batch_size=8", "--min_guidance_scale=1",
    "--max_guidance_scale=5", "--hidden_dim=28", "--mlp_ratio=1", "--train_batch_size=32", "--max_train_steps=250",
    "--learning_rate=1e-2", "--lr_scheduler=cosine", "--checkpointing_steps=50", "--checkpoints_total_limit=1",
    "--guidance_scale=3",
)  # fmt: skip
TIMING: dict[str, Any] = {"steps": STEPS, "pictures": 8, "rounds": 9}
STATES = ("runs", "noised")
BENCHMARK = Benchmark(
    "agd",
    settings={
        "model": MODEL, "weights": weights(MODEL), "steps": STEPS, "guidance_scale": SCALE, "pictures": PICTURES,
        "training": list(TRAINING), "other_scales": list(OTHER_SCALES), "other_pictures": OTHER_PICTURES, "timing": TIMING,
    },
)  # fmt: skip


def captions(seed: int) -> list[str]:
    """Captions of the training split, one a run."""
    distinct = list(dict.fromkeys(_avatars.captions("generator")))
    return [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:RUNS]]


@torch.no_grad()
def noise_pictures(args: Any, prompts: list[str], folder: Path) -> None:
    """As many states as the runs have: noised training pictures of the same captions, and the guided predictions there."""
    zoo = ZooModel(MODEL)
    data = parse_pictures(
        [f"--pretrained_model_name_or_path={dx.zoo_path(MODEL)}", f"--output_dir={folder}", *_avatars.DATA]
    )
    teacher, pictures = Teacher(zoo.pipe), load_dataset(data)
    latents_of = Latents(zoo.pipe.vae, data, pictures, torch.device("cpu"))
    places = {caption: i for i, caption in enumerate(pictures.captions)}
    size = args.run_batch_size
    for shard in tqdm(range(RUNS // size), desc="Noised pictures"):
        file = folder / f"runs-{shard:06d}.safetensors"
        if file.is_file():
            continue
        ids = torch.arange(shard * size, (shard + 1) * size)
        noise, own = SampleNoise(args.seed, ids), [prompts[i] for i in ids.tolist()]
        scales = args.min_guidance_scale + (args.max_guidance_scale - args.min_guidance_scale) * noise.uniform()
        pixels = torch.stack([pictures[places[caption]]["pixel_values"] for caption in own])
        latents, conditions = latents_of({"pixel_values": pixels}, noise), teacher.encode(own)
        found: dict[str, list[torch.Tensor]] = {"x": [], "t": [], "guided": []}
        for _ in range(RUN_STEPS):
            t = noise.integers(teacher.process.num_timesteps)
            x = teacher.process.add_noise(latents, noise.normal(*teacher.shape), t)
            for name, value in (("x", x), ("t", t.float()), ("guided", teacher.predict(x, t, conditions, scales))):
                found[name].append(value if name == "t" else value.half())
        states = {name: torch.stack(values, dim=1) for name, values in found.items()}
        states["inputs/encoder_hidden_states"] = conditions.given["encoder_hidden_states"].half()
        write_guided_runs(file, {**states, "scale": scales, "condition": ids})


class NoisedTask(AGDTask):
    """The same training on noised pictures."""

    def dataset(self, args: Any) -> GuidedRuns:
        noise_pictures(args, self.conditions, Path(args.runs))
        runs = GuidedRuns(args.runs)
        self.on_device = tuple(runs.columns)
        return runs


def trained(states: str, seed: int) -> Path:
    """Folder of a trained adapter; trains it first, or goes on, where these sources have not finished it."""
    folder = training_folder("agd", "diffusers_ext.training.train_agd", list(TRAINING)) / f"{states}-{seed}"
    values = {
        "pretrained_model_name_or_path": dx.zoo_path(MODEL), "seed": seed,
        "prompts": write_lines(folder.with_name(f"prompts-{seed}.txt"), captions(seed)),
        "runs": folder.with_name(f"{states}-{seed}-states"),
    }  # fmt: skip
    return trained_once(with_task(parse_args, AGDTask if states == "runs" else NoisedTask), folder, values, TRAINING)


class Pictures:
    """Pictures of the held-out captions, made by two calls a step, by one, and with adapters."""

    def __init__(self, count: int) -> None:
        self.zoo = ZooModel(MODEL)
        self.conditions, self.count = self.zoo.conditions(count), count

    def draw(self, scale: float, first_seed: int = 0) -> np.ndarray:
        seeds = range(first_seed, first_seed + self.count)
        return self.zoo.generate(self.zoo.pipe, self.conditions, seeds, STEPS, scale)

    def with_adapter(self, folder: Path, scale: float) -> np.ndarray:
        adapter = dx.AGDAdapter.from_pretrained(folder).attach(self.zoo.pipe, scale)
        try:
            return self.draw(1.0)
        finally:
            adapter.detach()

    def accuracy(self, pictures: np.ndarray) -> np.ndarray:
        found = self.zoo.accuracy(pictures, self.conditions, range(self.count))
        assert found is not None
        return found


@functools.cache
def _compared() -> dict[str, Any]:
    """Accuracy of each picture, and distances to those of two calls, by what made them: means over the training seeds."""
    pictures = Pictures(PICTURES)
    full = pictures.draw(SCALE)
    made: dict[str, list[np.ndarray]] = {
        "two calls": [full], "two calls, other seeds": [pictures.draw(SCALE, first_seed=10_000)],
        "no guidance": [pictures.draw(1.0)],
    }  # fmt: skip
    for states in STATES:
        made[states] = [pictures.with_adapter(trained(states, seed), SCALE) for seed in tqdm(SEEDS, desc=states)]
    accuracy = {name: np.mean([pictures.accuracy(each) for each in sets], axis=0) for name, sets in made.items()}
    distance = {name: np.mean([rmse(each, full).numpy() for each in sets], axis=0) for name, sets in made.items()}
    return {"accuracy": accuracy, "distance": distance, "sheet": {name: sets[0][:16] for name, sets in made.items()}}


@BENCHMARK.part(
    "accuracy_within_noise", "accuracy_over_no_guidance", "nearer_than_noised", "nearer_than_no_guidance", minutes=45
)
def pictures(recorder: Recorder) -> None:
    """Attribute accuracy and distance to the pictures of two calls."""
    found = _compared()
    accuracy, distance = found["accuracy"], found["distance"]
    low, high = bootstrap_interval(accuracy["two calls"] - accuracy["two calls, other seeds"], np.mean)
    noise = (high - low) / 2
    where = f"{MODEL}, guidance {SCALE:g}, {STEPS} steps, mean of {len(SEEDS)} training seeds"
    for name, other, column, said, goal in (
        ("accuracy_within_noise", "two calls", accuracy, "attribute accuracy less that of two calls a step", (">=", -noise)),
        ("accuracy_over_no_guidance", "no guidance", accuracy, "attribute accuracy less that without guidance", (">=", 0.0)),
        ("nearer_than_noised", "noised", distance, "RMSE to two calls less that of adapters trained on noised pictures", ("<=", 0.0)),
        ("nearer_than_no_guidance", "no guidance", distance, "RMSE to two calls less that without guidance", ("<=", 0.0)),
    ):  # fmt: skip
        tolerance, each = (ACCURACY_TOLERANCE, False) if column is accuracy else (RMSE_TOLERANCE, True)
        samples = {"ours": column["runs"].tolist(), "theirs": column[other].tolist()}
        recorder.paired(name, f"{said}, {where}", Samples("difference", samples, tolerance, each), "", goal)
    rows = [[name, float(accuracy[name].mean()), float(distance[name].mean())] for name in accuracy]
    recorder.table("pictures", ["made by", "attribute accuracy", "RMSE to two calls"], [*rows, ["noise", noise, None]])
    _save_sheet(found["sheet"])


def _save_sheet(sheet: dict[str, np.ndarray]) -> None:
    """Rows of pictures, to be looked at: `outputs/bench/agd-pictures.png`."""
    from PIL import Image

    rows = np.concatenate([np.concatenate(list(row), axis=1) for row in sheet.values()], axis=0)
    picture = Image.fromarray((rows * 255).round().astype(np.uint8))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(OUTPUT / "agd-pictures.png")


@BENCHMARK.part(*(f"nearer_than_no_guidance_{scale:g}" for scale in OTHER_SCALES), minutes=5)
def other_scales(recorder: Recorder) -> None:
    """Scales that were not seen in training, in its range."""
    pictures, rows = Pictures(OTHER_PICTURES), []
    none = pictures.draw(1.0)
    for scale in tqdm(OTHER_SCALES, desc="other scales"):
        full = pictures.draw(scale)
        ours = np.mean(
            [rmse(pictures.with_adapter(trained("runs", seed), scale), full).numpy() for seed in SEEDS], axis=0
        )
        theirs = rmse(none, full).numpy()
        recorder.paired(
            f"nearer_than_no_guidance_{scale:g}",
            f"RMSE to two calls less that without guidance, guidance {scale:g}, mean of {len(SEEDS)} training seeds, {MODEL}",
            Samples("difference", {"ours": ours.tolist(), "theirs": theirs.tolist()}, RMSE_TOLERANCE), "", ("<=", 0.0),
        )  # fmt: skip
        rows.append([scale, float(ours.mean()), float(theirs.mean())])
    recorder.table("other scales", ["guidance", "RMSE, adapters", "RMSE, no guidance"], rows)


@BENCHMARK.part("share_of_parameters", "calls_over_two_calls", "time_over_two_calls", minutes=3)
def cost(recorder: Recorder) -> None:
    """Size, work and time of a run with an adapter over those of a run with two calls a step."""
    pictures = Pictures(TIMING["pictures"])
    zoo, pipe = pictures.zoo, pictures.zoo.pipe
    adapter = dx.AGDAdapter.from_pretrained(trained("runs", SEEDS[0]))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (adapter, pipe.unet)]
    recorder.claim(
        "share_of_parameters", "trained parameters over those of the U-Net", sizes[0] / sizes[1], "", goal=("<=", 0.05)
    )

    def with_adapter(run: Callable[[], Any]) -> Any:
        adapter.attach(pipe, SCALE)
        try:
            return run()
        finally:
            adapter.detach()

    def two_calls() -> Any:
        return zoo.generate(
            pipe, pictures.conditions, range(pictures.count), TIMING["steps"], SCALE, output_type="latent"
        )

    def one_call() -> Any:
        return zoo.generate(
            pipe, pictures.conditions, range(pictures.count), TIMING["steps"], 1.0, output_type="latent"
        )

    rows: dict[str, int] = {}
    for name, run in (("two calls", two_calls), ("one call", lambda: with_adapter(one_call))):
        seen: list[int] = []
        handle = pipe.unet.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(len(args[0])))
        run()
        handle.remove()
        rows[name] = sum(seen)
    recorder.claim(
        "calls_over_two_calls", "evaluations of the denoiser, one a row of a batch, over those of two calls a step",
        rows["one call"] / rows["two calls"], "", goal=("<=", 0.5),
    )  # fmt: skip
    macs = {
        "two calls": denoiser_cost(pipe.unet, two_calls).macs,
        "one call": with_adapter(lambda: denoiser_cost(pipe.unet, one_call).macs),
    }
    torch.set_num_threads(1)
    runs = {"two calls": two_calls, "one call": lambda: with_adapter(one_call)}
    result = time_ratio(runs, baseline="two calls", repeats=TIMING["rounds"])
    torch.set_num_threads(BENCHMARK.threads)
    ratio = result["one call"]
    recorder.claim(
        "time_over_two_calls",
        f"time of a run of {TIMING['pictures']} pictures with an adapter over that with two calls a step, one thread, without the decoder",
        ratio.median, "", ratio.interval, ("<=", 0.60),
    )  # fmt: skip
    recorder.table(
        "cost", ["run", "evaluations", "GMACs", "seconds"],
        [[name, rows[name], macs[name] / 1e9, result.seconds[name]] for name in rows],
    )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
