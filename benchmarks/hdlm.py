"""What the correction of visible tokens is worth to a model that was trained on hybrid noise.

    diffusers-ext bench hdlm            # records diffusers_ext/results/hdlm.json

Settings were fixed before measuring: the authors' epsilon of 0.01 and eta of 0.015, 64 steps for 64 tokens. Three models are
fine-tuned from the zoo's by `train_hdlm` on the chapters that it was trained on, for at most three minutes of one core each; a
text's number is the mean over the three, with the same random numbers for both samplers. The zoo's model without that training
stands beside them. The paper's claim is a lower likelihood cost at no loss of diversity, so the entropy is claimed as well: a
loss of more than 0.05 nats counts. The likelihood bounds of the paper's hyperschedules need a training each and are not
measured.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForMaskedLM

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, Decoded, fine_tuned, means, pipeline, write
from diffusers_ext.training import train_hdlm

SETTINGS: dict[str, Any] = {"texts": 64, "length": 64, "steps": 64, "eta": 0.015, "window": (8, 8)}
SEEDS = (0, 1, 2)
TRAINING: dict[str, Any] = {
    "epsilon": 0.01, "max_seq_length": 72, "train_batch_size": 16, "max_train_steps": 150, "learning_rate": 5e-4,
    "lr_warmup_steps": 15, "lr_scheduler": "constant_with_warmup", "checkpointing_steps": 30, "num_validation_texts": 0,
}  # fmt: skip
BENCHMARK = Benchmark("hdlm", settings={"model": MODEL, "training": TRAINING, **SETTINGS})


@BENCHMARK.part("nats_of_correction", "entropy_of_correction", minutes=12)
def correction(recorder: Recorder) -> None:
    """With correction and without, text by text."""
    steps, (width, levels) = SETTINGS["steps"], SETTINGS["window"]
    plain, corrected = dx.AdaptiveCorrectionScheduler(eta=0.0), dx.AdaptiveCorrectionScheduler(eta=SETTINGS["eta"])
    sliding = dx.HyperScheduleScheduler(hyperschedule="sliding", width=width, num_levels=levels)
    schedulers = {"plain": (plain, steps), "corrected": (corrected, steps)}
    schedulers["sliding window"] = (sliding, sliding.num_steps(SETTINGS["length"]))
    made: dict[str, Decoded] = {}
    groups: dict[str, list[Decoded]] = {name: [] for name in schedulers}
    for seed in (None, *SEEDS):
        folder = dx.zoo_path(MODEL) if seed is None else fine_tuned(train_hdlm.main, TRAINING, seed=seed)
        model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
        for name, (scheduler, count) in schedulers.items():
            title = f"{name}, {'no hybrid training' if seed is None else f'model {seed}'}"
            pipe = pipeline(scheduler, model)
            found = write(title, pipe, SETTINGS["texts"], SETTINGS["length"], num_inference_steps=count)
            made[title] = found
            if seed is not None:
                groups[name].append(found)

    def mean(name: str, kind: str) -> list[float]:
        return means(getattr(one, kind) for one in groups[name])

    for kind, said, goal in (
        ("nats", "the judge's negative log-likelihood", ("<=", 0.0)), ("entropy", "the entropy of tokens", (">=", -0.05)),
    ):  # fmt: skip
        recorder.paired(
            f"{kind}_of_correction",
            f"{said} of texts with correction less that without, {steps} steps, hybrid models from {MODEL}",
            Samples("difference", {"ours": mean("corrected", kind), "theirs": mean("plain", kind)}, 0.02, each=False),
            "nats a token", goal=goal,
        )  # fmt: skip
    recorder.table("texts", ["texts by", *COLUMNS], [[name, *found.row] for name, found in made.items()])


if __name__ == "__main__":
    BENCHMARK.main()
