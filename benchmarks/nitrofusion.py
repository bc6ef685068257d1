"""What NitroFusion is worth: a changing pool of heads against one that stays, against one head a place, and against its start.

    diffusers-ext bench nitrofusion            # records diffusers_ext/results/nitrofusion.json

For three training seeds: a student of one step by regression on the teacher's pairs, which is the start of the other three; the
adversarial training with a pool of heads of which one in a hundred is made new after each step; the same without that; and
with one head a noise level and level of the encoder. Each step of all three trains as many heads on as many pictures. About a minute
and a half of one core for each; all share the teacher's pairs, with `benchmarks.instaflow`. A training that was broken off goes on.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._few_steps import FewSteps, claims_of, prompts_file, trained
from benchmarks._record import Recorder, Samples
from diffusers_ext.training.train_nitrofusion import main as train_nitrofusion

MODEL, SCALE, SEEDS = "avatars-sd", 3.0, (0, 1, 2)
PAIRS = ("--num_pairs=1500", f"--guidance_scale={SCALE:g}", "--teacher_steps=12", "--pairs_seed=0")
COMMON = ("--shifted_timestep=250", "--use_ema", "--ema_decay=0.98", "--adam_weight_decay=0")
START = (
    "--stage=distill", "--train_batch_size=16", "--max_train_steps=120", "--learning_rate=1e-3", "--lr_scheduler=cosine",
    "--checkpointing_steps=60", "--checkpoints_total_limit=1",
)  # fmt: skip
STEPS = 200
ADVERSARIAL = (
    "--stage=adversarial", "--train_batch_size=8", f"--max_train_steps={STEPS}", "--learning_rate=1e-4", "--adam_beta1=0.5",
    "--learning_rate_heads=5e-4", f"--checkpointing_steps={STEPS // 2}",
)  # fmt: skip
VARIANTS = {
    "pool": ("--heads_per_group=4", "--refresh_rate=0.01"),
    "no_refresh": ("--heads_per_group=4", "--refresh_rate=0"),
    "one_head": ("--heads_per_group=1", "--refresh_rate=0"),
}
TITLES = {"no_refresh": "the pool without refresh", "one_head": "one head a place", "start": "the start"}
STUDY = FewSteps(MODEL, SCALE)
BENCHMARK = Benchmark(
    "nitrofusion",
    settings={
        **STUDY.settings, "pairs": list(PAIRS), "both": list(COMMON), "start": list(START), "adversarial": list(ADVERSARIAL),
        "variants": {name: list(flags) for name, flags in VARIANTS.items()}, "training_seeds": list(SEEDS),
    },
    threads=1,
)  # fmt: skip


def students(seed: int) -> dict[str, Path]:
    """Folders of the start and of the three students of a training seed."""
    both = [
        f"--pretrained_model_name_or_path={dx.zoo_path(MODEL)}", f"--prompts={prompts_file()}", *PAIRS, *COMMON,
        f"--pairs_dir={OUTPUT / 'cache' / 'instaflow' / 'pairs'}", f"--seed={seed}",
    ]  # fmt: skip
    start = trained(train_nitrofusion, f"nitrofusion/start-seed{seed}", [*both, *START])
    found = {"start": start}
    for name, flags in VARIANTS.items():
        more = [*both, *ADVERSARIAL, *flags, f"--student_path={start}"]
        found[name] = trained(train_nitrofusion, f"nitrofusion/{name}-seed{seed}", more)
    return found


def pipeline(folder: Path, checkpoint: int | None = None) -> Any:
    """A student, as it is or as it was."""
    pipe = dx.Pipeline.from_pretrained(folder, dtype=torch.float32)
    if checkpoint is not None:
        pipe.unet = UNet2DConditionModel.from_pretrained(folder / f"checkpoint-{checkpoint}" / "unet_ema")
    return pipe


@functools.cache
def _folders() -> list[dict[str, Path]]:
    return [students(seed) for seed in tqdm(SEEDS, desc="training seeds")]


def _drawn(name: str, checkpoint: int | None = None) -> list[np.ndarray]:
    """Pictures of one step, by training seed."""
    return [STUDY.draw(pipeline(made[name], checkpoint), 1, 1.0) for made in _folders()]


LATE = tuple(f"late_change_{name}" for name in VARIANTS)


@BENCHMARK.part(
    *(claim for name in ("pool_1", "over_start", "over_no_refresh", "over_one_head", "pool_4_over_1") for claim in claims_of(name)),
    *LATE, minutes=34,
)  # fmt: skip
def one_step(recorder: Recorder) -> None:
    """The student of the changing pool against the others, and each against itself half way."""
    pool = [pipeline(made["pool"]) for made in _folders()]
    ours = STUDY.compare(recorder, "pool_1", "NitroFusion", 1, pool)
    others: dict[str, list[np.ndarray]] = {"pool": ours}
    for name, title in TITLES.items():
        others[name] = _drawn(name)
        STUDY.compare(
            recorder, f"over_{name}", "NitroFusion", 1, pool, over=others[name], over_title=f"{title}, 1 step"
        )
    STUDY.compare(recorder, "pool_4_over_1", "NitroFusion", 4, pool, over=ours, over_title="the same in 1 step")
    rows = []
    for name in VARIANTS:
        middle = [STUDY.frechet(each) for each in _drawn(name, STEPS // 2)]
        end = [STUDY.frechet(each) for each in others[name]]
        rows.append([name, float(np.mean(middle)), float(np.mean(end))])
        recorder.paired(
            f"late_change_{name}",
            f"Fréchet distance to real pictures (judge features, a training each) after {STEPS} steps less that after "
            f"{STEPS // 2}: {TITLES.get(name, 'NitroFusion')}",
            Samples("difference", {"ours": end, "theirs": middle}, 1e-3, True), "", ("<=", 0.0),
        )  # fmt: skip
    recorder.table("curve", ["student", f"Fréchet at {STEPS // 2}", f"Fréchet at {STEPS}"], rows)
    STUDY.draw_sheet(OUTPUT / "nitrofusion-pictures.png")


if __name__ == "__main__":
    BENCHMARK.main()
