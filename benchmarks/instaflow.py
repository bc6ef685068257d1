"""What InstaFlow is worth: reflow and one-step distillation against DPM-Solver++ with as many steps, and what reflow adds.

    diffusers-ext bench instaflow            # records diffusers_ext/results/instaflow.json

For three training seeds: reflow, from pairs of the guided teacher; distillation of its result to one step; and distillation
of the teacher alone, in as many optimizer steps as the other two together. About five minutes of one core for each half; all
seeds share the teacher's pairs. A training that was broken off goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._few_steps import FewSteps, claims_of, prompts_file, trained
from benchmarks._record import Recorder
from diffusers_ext.training.train_instaflow import main as train_instaflow

MODEL, SCALE, SEEDS, STEPS = "avatars-sd", 3.0, (0, 1, 2), 500
TRAINING = (
    "--num_pairs=1500", "--train_batch_size=16", "--learning_rate=1e-3", "--lr_scheduler=cosine", "--use_ema",
    "--ema_decay=0.98", "--proportion_empty_prompts=0.0", "--checkpointing_steps=100", "--checkpoints_total_limit=1",
)  # fmt: skip
FROM_TEACHER = (f"--guidance_scale={SCALE:g}", "--teacher_steps=12", "--pairs_seed=0")
FROM_REFLOW = ("--guidance_scale=1", "--teacher_steps=6")  # guidance is in its weights
STUDY = FewSteps(MODEL, SCALE)
BENCHMARK = Benchmark(
    "instaflow",
    settings={
        **STUDY.settings, "training": list(TRAINING), "steps": STEPS, "training_seeds": list(SEEDS),
        "from_teacher": list(FROM_TEACHER), "from_reflow": list(FROM_REFLOW),
    },
    threads=1,
)  # fmt: skip


def _trained(name: str, stage: str, start: Path | str, steps: int, seed: int, *flags: str) -> Path:
    return trained(
        train_instaflow,
        f"instaflow/{name}-seed{seed}",
        [
            f"--stage={stage}", f"--pretrained_model_name_or_path={start}", f"--prompts={prompts_file()}", *TRAINING,
            *flags, f"--max_train_steps={steps}", f"--seed={seed}",
        ],
    )  # fmt: skip


def students(seed: int) -> dict[str, Path]:
    """Folders of the three students of a training seed."""
    base, pairs = dx.zoo_path(MODEL), f"--pairs_dir={OUTPUT / 'cache' / 'instaflow' / 'pairs'}"
    reflow = _trained("reflow", "reflow", base, STEPS, seed, *FROM_TEACHER, pairs)
    return {
        "reflow": reflow,
        "distilled": _trained("distilled", "distill", reflow, STEPS, seed, *FROM_REFLOW),
        "direct": _trained("direct", "distill", base, 2 * STEPS, seed, *FROM_TEACHER, pairs),
    }


COMPARED = {
    "distilled_1": ("distilled", 1),
    "reflow_1": ("reflow", 1),
    "reflow_2": ("reflow", 2),
    "reflow_4": ("reflow", 4),
}


@BENCHMARK.part(*(claim for name in (*COMPARED, "over_direct") for claim in claims_of(name)), minutes=72)
def few_steps(recorder: Recorder) -> None:
    """Students against DPM-Solver++ with as many steps, and the distilled one against direct distillation."""
    folders = [students(seed) for seed in tqdm(SEEDS, desc="training seeds")]

    def pipes(name: str) -> list[Any]:
        return [dx.Pipeline.from_pretrained(made[name], dtype=torch.float32) for made in folders]

    for name, (student, steps) in COMPARED.items():
        STUDY.compare(recorder, name, f"InstaFlow, {student}", steps, pipes(student))
    direct = [STUDY.draw(pipe, 1, 1.0) for pipe in pipes("direct")]
    STUDY.compare(
        recorder, "over_direct", "InstaFlow, distilled", 1, pipes("distilled"), over=direct,
        over_title="distillation without reflow, 1 step",
    )  # fmt: skip
    STUDY.draw_sheet(OUTPUT / "instaflow-pictures.png")


if __name__ == "__main__":
    BENCHMARK.main()
