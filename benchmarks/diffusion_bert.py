"""Spindle schedule against the plain one: likelihood bound and texts of models fine-tuned with each.

    diffusers-ext bench diffusion_bert            # records diffusers_ext/results/diffusion_bert.json

Settings were fixed before measuring: the authors' lambda of 0.3 and their loss, with and without it, from the same checkpoint
on the same texts in the same order; three seeds each, for at most three minutes of one core. The bound is the honest one
(`spindle_bound`, which is that of masked diffusion where lambda is 0), on windows of unseen chapters, with the same strata of
steps for both. A text's or window's number is the mean over the seeds. Texts are drawn in 16 steps.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, fine_tuned, means, unseen, verses, write
from diffusers_ext.training import train_diffusion_bert
from diffusers_ext.training.train_diffusion_bert import spindle_bound

SETTINGS: dict[str, Any] = {"texts": 64, "length": 64, "steps": 16, "windows": 96, "draws": 16, "diffusion_steps": 2048}
SEEDS, LAMBDAS = (0, 1, 2), {"spindle": 0.3, "plain": 0.0}
TRAINING: dict[str, Any] = {
    "max_seq_length": 72, "train_batch_size": 16, "max_train_steps": 110, "learning_rate": 5e-4, "lr_warmup_steps": 15,
    "lr_scheduler": "constant_with_warmup", "checkpointing_steps": 30, "num_validation_texts": 0,
    "num_diffusion_steps": SETTINGS["diffusion_steps"],
}  # fmt: skip
BENCHMARK = Benchmark("diffusion_bert", settings={"model": MODEL, "training": TRAINING, "lambdas": LAMBDAS, **SETTINGS})


def bounds(pipe: Any, name: str) -> list[float]:
    """Nats a token of each window."""
    draws, steps, generator, found = (
        SETTINGS["draws"],
        SETTINGS["diffusion_steps"],
        torch.Generator().manual_seed(0),
        [],
    )
    for window in tqdm(unseen(SETTINGS["length"], SETTINGS["windows"]), desc=f"bound, {name}"):
        ids = window.expand(draws, -1)
        level = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws  # one in each stratum
        k, u = (level * steps).long() + 1, torch.rand(ids.shape, generator=generator)
        lam, frequencies = pipe.scheduler.config.lam, pipe.scheduler.statistics
        mask = verses()[1].mask_token_id
        found.append(float(spindle_bound(pipe.model, ids, mask, frequencies, k, steps, u, lam).mean()) / ids.shape[1])
    return found


@BENCHMARK.part("bound_over_plain", "judge_over_plain", minutes=12)
def spindle(recorder: Recorder) -> None:
    """With the spindle schedule less without, window by window and text by text."""
    bound: dict[str, list[list[float]]] = {name: [] for name in LAMBDAS}
    judge: dict[str, list[list[float]]] = {name: [] for name in LAMBDAS}
    rows = []
    for seed in SEEDS:
        for name, lam in LAMBDAS.items():
            title = f"{name}, seed {seed}"
            folder = fine_tuned(train_diffusion_bert.main, TRAINING, lam=lam, seed=seed)
            pipe = dx.MaskedDiffusionPipeline.from_pretrained(folder)
            pipe.model.eval()
            nats = bounds(pipe, title)
            made = write(title, pipe, SETTINGS["texts"], SETTINGS["length"], num_inference_steps=SETTINGS["steps"])
            bound[name].append(nats)
            judge[name].append(made.nats)
            rows.append([title, sum(nats) / len(nats), *made.row])
    for claim, values, said in (
        ("bound_over_plain", bound, "the bound on the negative log-likelihood of unseen windows"),
        ("judge_over_plain", judge, f"the judge's negative log-likelihood of texts of {SETTINGS['steps']} steps"),
    ):
        mean = {name: means(values[name]) for name in LAMBDAS}
        recorder.paired(
            claim, f"{said} with the spindle schedule less that with the plain one, {MODEL} fine-tuned",
            Samples("difference", {"ours": mean["spindle"], "theirs": mean["plain"]}, 0.02, each=False),
            "nats a token", goal=("<=", 0.0),
        )  # fmt: skip
    recorder.table("trainings", ["schedule", "bound, nats a token", *COLUMNS], rows)


if __name__ == "__main__":
    BENCHMARK.main()
