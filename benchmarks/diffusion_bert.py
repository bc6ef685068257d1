"""Spindle schedule against the plain one: likelihood bound and texts of models fine-tuned with each.

    diffusers-ext bench diffusion_bert            # records diffusers_ext/results/diffusion_bert.json

Settings were fixed before measuring: the authors' lambda of 0.3 and their loss, with and without it, from the same checkpoint
on the same texts in the same order; three seeds each, for at most three minutes of one core. The bound is the honest one
(`spindle_bound`, which is that of masked diffusion where lambda is 0), on windows of unseen chapters, with the same strata of
steps for both. A text's or window's number is the mean over the seeds. Texts are drawn in 16 steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, PROMPT, Decoded, TrigramJudge, prompts, unseen, verses
from benchmarks._trainings import training_folder
from benchmarks.data import load_kjv
from diffusers_ext.metrics.text import token_entropy
from diffusers_ext.training import train_diffusion_bert
from diffusers_ext.training.train_diffusion_bert import spindle_bound

SETTINGS: dict[str, Any] = {"texts": 64, "length": 64, "steps": 16, "windows": 96, "draws": 16, "diffusion_steps": 2048}
SEEDS, LAMBDAS = (0, 1, 2), {"spindle": 0.3, "plain": 0.0}
TRAINING = (
    "--max_seq_length=72", "--train_batch_size=16", "--max_train_steps=110", "--learning_rate=5e-4", "--lr_warmup_steps=15",
    "--lr_scheduler=constant_with_warmup", "--checkpointing_steps=30", "--num_validation_texts=0",
    f"--num_diffusion_steps={SETTINGS['diffusion_steps']}", "--checkpoints_total_limit=1", "--resume_from_checkpoint=latest",
)  # fmt: skip
BENCHMARK = Benchmark(
    "diffusion_bert", settings={"model": MODEL, "training": list(TRAINING), "lambdas": LAMBDAS, **SETTINGS}
)


def trained(lam: float, seed: int) -> Any:
    """A pipeline; trains it, or goes on, where that was not done."""
    folder = training_folder("diffusion_bert", "diffusers_ext.training.train_diffusion_bert", list(TRAINING))
    output = folder / f"lambda-{lam:g}-{seed}"
    if not (output / "model_index.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        texts = folder / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in load_kjv("generator")))
        where = (f"--pretrained_model_name_or_path={dx.zoo_path(MODEL)}", f"--train_data_dir={texts}")
        train_diffusion_bert.main([*where, *TRAINING, f"--lam={lam}", f"--seed={seed}", f"--output_dir={output}"])
    pipe = dx.MaskedDiffusionPipeline.from_pretrained(Path(output))
    pipe.set_progress_bar_config(disable=True)
    pipe.model.eval()
    return pipe


def bounds(pipe: Any, name: str) -> list[float]:
    """Nats a token of each window."""
    windows, draws, steps = unseen(SETTINGS["length"]), SETTINGS["draws"], SETTINGS["diffusion_steps"]
    windows = windows[torch.linspace(0, len(windows) - 1, SETTINGS["windows"]).long()]
    generator, found = torch.Generator().manual_seed(0), []
    for window in tqdm(windows, desc=f"bound, {name}"):
        ids = window.expand(draws, -1)
        level = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws  # one in each stratum
        k, u = (level * steps).long() + 1, torch.rand(ids.shape, generator=generator)
        lam, frequencies = pipe.scheduler.config.lam, pipe.scheduler.statistics
        mask = verses()[1].mask_token_id
        found.append(float(spindle_bound(pipe.model, ids, mask, frequencies, k, steps, u, lam).mean()) / ids.shape[1])
    return found


def texts(pipe: Any) -> Decoded:
    """Text i is drawn with seed i."""
    starts = prompts(SETTINGS["texts"], PROMPT + SETTINGS["length"])
    output = pipe(
        input_ids=starts, gen_length=SETTINGS["length"], num_inference_steps=SETTINGS["steps"], stop_at_eos=False,
        output_type="seq", generator=[torch.Generator().manual_seed(i) for i in range(len(starts))],
    )  # fmt: skip
    made = output.sequences
    nats = TrigramJudge.of_the_training_data().nats_per_token(torch.cat([starts, made], 1), PROMPT)
    return Decoded(made, nats, token_entropy(made).tolist(), output.num_calls, output.block_lengths)


@BENCHMARK.part("bound_over_plain", "judge_over_plain", minutes=22)
def spindle(recorder: Recorder) -> None:
    """With the spindle schedule less without, window by window and text by text."""
    bound: dict[str, list[list[float]]] = {name: [] for name in LAMBDAS}
    judge: dict[str, list[list[float]]] = {name: [] for name in LAMBDAS}
    rows = []
    for seed in SEEDS:
        for name, lam in LAMBDAS.items():
            pipe = trained(lam, seed)
            nats, made = bounds(pipe, f"{name} {seed}"), texts(pipe)
            bound[name].append(nats)
            judge[name].append(made.nats)
            rows.append([f"{name}, seed {seed}", sum(nats) / len(nats), *made.row])
    for claim, values, said in (
        ("bound_over_plain", bound, "the bound on the negative log-likelihood of unseen windows"),
        ("judge_over_plain", judge, f"the judge's negative log-likelihood of texts of {SETTINGS['steps']} steps"),
    ):
        mean = {name: [sum(each) / len(SEEDS) for each in zip(*values[name], strict=True)] for name in LAMBDAS}
        recorder.paired(
            claim, f"{said} with the spindle schedule less that with the plain one, {MODEL} fine-tuned",
            Samples("difference", {"ours": mean["spindle"], "theirs": mean["plain"]}, 0.02, each=False),
            "nats a token", goal=("<=", 0.0),
        )  # fmt: skip
    recorder.table("trainings", ["schedule", "bound, nats a token", *COLUMNS], rows)


if __name__ == "__main__":
    BENCHMARK.main()
