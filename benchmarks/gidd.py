"""What uniform noise beside masks is worth: bound, samples, and what self-correction makes of them.

    diffusers-ext bench gidd            # records diffusers_ext/results/gidd.json

The zoo's model, which knows masks alone, is trained on with three shares of uniform noise (0 is masks alone, again) and three
seeds, equally long; one that is broken off goes on. Then each writes texts after prompts of unseen chapters and corrects them.
Settings were fixed before measuring. The judge's likelihood rises for texts that repeat themselves, so entropy stands beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import MODEL, PROMPT, fine_tuned, judge, means, pipeline, prompts, unseen, verses, write
from diffusers_ext.metrics.text import token_entropy
from diffusers_ext.schedulers._token_noise import HybridNoise, tokens_but_mask
from diffusers_ext.training import train_gidd
from diffusers_ext.training.train_gidd import EPS, gidd_loss

SHARES, SEEDS = (0.0, 0.1, 0.2), (0, 1, 2)
TRAINING: dict[str, Any] = {
    "max_seq_length": 64, "train_batch_size": 16, "max_train_steps": 150, "learning_rate": 5e-4, "lr_scheduler": "cosine",
    "lr_warmup_steps": 10, "adam_weight_decay": 0.0, "weighting": "dynamic", "num_validation_texts": 0,
    "checkpointing_steps": 50,
}  # fmt: skip
TEXTS: dict[str, Any] = {"texts": 32, "length": 56, "steps": 32, "corrections": 48}
BOUND: dict[str, Any] = {"windows": 32, "length": 64, "draws": 8}
BENCHMARK = Benchmark(
    "gidd",
    settings={
        "model": MODEL, "training": TRAINING, "p_uniform": list(SHARES), "texts": TEXTS, "bound": BOUND, "seeds": list(SEEDS),
    },
)  # fmt: skip


def trained(p_uniform: float, seed: int) -> Any:
    """A model; trained, or gone on with, where it is not finished."""
    folder = fine_tuned(train_gidd.main, TRAINING, p_uniform=p_uniform, seed=seed)
    return AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def bounds(model: Any, p_uniform: float) -> list[float]:
    """The bound of each unseen window, nats a token; the same noise for all models of a share."""
    mask, generator = verses()[1].mask_token_id, torch.Generator().manual_seed(0)
    values = []
    for window in unseen(BOUND["length"], BOUND["windows"]):
        clean = window.expand(BOUND["draws"], -1)
        level = (torch.arange(len(clean)) + torch.rand(len(clean), generator=generator)) / len(clean)
        t = EPS + (1 - 2 * EPS) * level
        u = torch.rand(clean.shape, generator=generator)
        others = torch.randint(model.config.vocab_size - 1, clean.shape, generator=generator)
        noisy = HybridNoise(p_uniform).add(clean, t, u, tokens_but_mask(others, mask), mask)
        values.append(float(gidd_loss(model(input_ids=noisy).logits, clean, noisy, t, mask, p_uniform)))
    return values


def measured(model: Any, p_uniform: float) -> dict[str, list[float]]:
    """Bound of each window; judge and entropy of each text before and after self-correction, and what that took."""
    count, length = TEXTS["texts"], TEXTS["length"]
    pipe, starts = pipeline(dx.GIDDScheduler(p_uniform=p_uniform), model), prompts(count, PROMPT + length)
    made = write("texts", pipe, count, length, num_inference_steps=TEXTS["steps"])
    seeds = [torch.Generator().manual_seed(10**6 + i) for i in range(count)]
    correct = dx.SelfCorrection(pipe, max_steps=TEXTS["corrections"])
    fixed = correct(torch.cat([starts, made.tokens], 1), prompt_length=PROMPT, generator=seeds)
    after = fixed.sequences[:, PROMPT:]
    return {
        "bound": bounds(model, p_uniform),
        "before": made.nats,
        "after": judge(starts, after),
        "entropy before": made.entropy,
        "entropy after": token_entropy(after).tolist(),
        "changes": [float(count) for count in fixed.num_changes],
        "calls": [float(count) for count in fixed.num_calls],
    }


@BENCHMARK.part(
    *(f"correction_{p}" for p in SHARES),
    *(f"{name}_{p}" for p in SHARES[1:] for name in ("correction_over_masks", "entropy_change", "samples_over_masks", "bound_over_masks")),
    minutes=16,
)  # fmt: skip
def trainings(recorder: Recorder) -> None:
    """Means over three trainings, text by text and window by window."""
    found: dict[float, dict[str, list[float]]] = {}
    rows = []
    for p in tqdm(SHARES, desc="Shares of uniform noise"):
        each = [measured(trained(p, seed), p) for seed in SEEDS]
        found[p] = {name: means(one[name] for one in each) for name in each[0]}
        rows += [
            [f"{p}, seed {seed}", *(sum(one[name]) / len(one[name]) for name in one)]
            for seed, one in zip(SEEDS, each, strict=True)
        ]

    def add(name: str, statement: str, ours: list[float], theirs: list[float], goal: tuple[str, float] | None) -> None:
        samples = Samples("difference", {"ours": ours, "theirs": theirs}, 0.1, each=False)
        recorder.paired(name, f"{statement}, {MODEL}", samples, "nats a token", goal)

    masks = found[0.0]
    for p in SHARES:
        now = found[p]
        title = f"trained with {p} uniform noise"
        add(
            f"correction_{p}", f"the judge's negative log-likelihood after self-correction less before, {title}",
            now["after"], now["before"], ("<=", 0.0) if p else None,
        )  # fmt: skip
        if not p:
            continue
        gains = [[b - a for a, b in zip(one["before"], one["after"], strict=True)] for one in (now, masks)]
        add(
            f"correction_over_masks_{p}", f"change of it by self-correction, {title}, less that trained on masks alone",
            *gains, ("<=", 0.0),
        )  # fmt: skip
        add(
            f"entropy_change_{p}", f"entropy of the tokens of a text after self-correction less before, {title}",
            now["entropy after"], now["entropy before"], (">=", -0.1),
        )  # fmt: skip
        add(
            f"samples_over_masks_{p}", f"the judge's negative log-likelihood of samples in {TEXTS['steps']} steps, {title}, less "
            "that trained on masks alone", now["before"], masks["before"], ("<=", 0.0),
        )  # fmt: skip
        add(
            f"bound_over_masks_{p}", f"bound on the negative log-likelihood of unseen windows, {title}, less that trained on "
            "masks alone", now["bound"], masks["bound"], None,
        )  # fmt: skip
    recorder.table(
        "trainings",
        ["uniform noise", "bound, nats a token", "judge before", "judge after", "entropy before", "entropy after",
         "tokens changed", "calls of the correction"],
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
