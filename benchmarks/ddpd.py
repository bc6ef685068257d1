"""What a planner is worth: texts at equal calls of the denoiser, and how much of a damaged text it repairs.

    diffusers-ext bench ddpd            # records diffusers_ext/results/ddpd.json

Three planners are trained from the body of the zoo's masked model, which is the denoiser; one that is broken off goes on. Settings
were fixed before measuring. The planner's calls are not counted in "equal calls", since it could be a smaller network; the
table has all calls. The judge's likelihood rises for texts that repeat themselves, so entropy stands beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForTokenClassification

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import MODEL, PROMPT, Decoded, Decoder, decode, fine_tuned, judge, means, unseen, verses, write
from diffusers_ext.schedulers._token_noise import tokens_but_mask
from diffusers_ext.training import train_ddpd

SEEDS = (0, 1, 2)
TRAINING: dict[str, Any] = {
    "max_seq_length": 64, "train_batch_size": 16, "max_train_steps": 250, "learning_rate": 5e-4, "lr_scheduler": "cosine",
    "lr_warmup_steps": 10, "adam_weight_decay": 0.0, "checkpointing_steps": 50,
}  # fmt: skip
TEXTS: dict[str, Any] = {"texts": 64, "length": 56}  # N = length and 2 length steps
REPAIR: dict[str, Any] = {"texts": 64, "length": 56, "share": 0.1, "steps": 12}
BENCHMARK = Benchmark(
    "ddpd", settings={"model": MODEL, "training": TRAINING, "texts": TEXTS, "repair": REPAIR, "seeds": list(SEEDS)}
)


def planned(seed: int) -> Any:
    """The pipeline with the planner of a seed."""
    folder = fine_tuned(train_ddpd.main, TRAINING, seed=seed)
    planner = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    denoiser, tokenizer = verses()
    return dx.PlannedDenoisingPipeline(planner, denoiser, dx.DDPDScheduler(), tokenizer)


@BENCHMARK.part("nats_over_masked", "nats_over_confidence", "entropy_over_masked", "drift", minutes=12)
def texts(recorder: Recorder) -> None:
    """Means over three planners, text by text."""
    length = TEXTS["length"]
    rivals = {
        "masked, random order": decode("masked", Decoder(dx.FirstHittingScheduler()), TEXTS["texts"], length),
        "masked, surest first": decode("surest", Decoder(dx.UnmaskingScheduler()), TEXTS["texts"], length),
    }
    found: dict[int, list[Decoded]] = {length: [], 2 * length: []}
    for seed in tqdm(SEEDS, desc="Planners"):
        pipe = planned(seed)
        for steps, made in found.items():
            made.append(write(f"{steps} steps", pipe, TEXTS["texts"], length, num_inference_steps=steps))

    def mean(steps: int, name: str) -> list[float]:
        return means(getattr(one, name) for one in found[steps])

    def add(
        name: str, statement: str, ours: list[float], theirs: list[float], goal: tuple[str, float] | None = ("<=", 0.0)
    ) -> None:
        samples = Samples("difference", {"ours": ours, "theirs": theirs}, 0.2, each=False)
        recorder.paired(name, f"{statement}, {MODEL}", samples, "nats a token", goal)

    masked, surest = rivals.values()
    said = "the judge's negative log-likelihood of planned denoising, one step a token, less that of"
    add("nats_over_masked", f"{said} masked diffusion in random order", mean(length, "nats"), masked.nats)
    add("nats_over_confidence", f"{said} masked diffusion, surest first", mean(length, "nats"), surest.nats)
    add(
        "entropy_over_masked", "entropy of the tokens of a text of planned denoising, one step a token, less that of masked "
        "diffusion in random order", mean(length, "entropy"), masked.entropy, (">=", -0.1),
    )  # fmt: skip
    add(
        "drift", "entropy of the tokens of a text with two steps a token less with one", mean(2 * length, "entropy"),
        mean(length, "entropy"), None,
    )  # fmt: skip
    rows = [[name, *one.row] for name, one in rivals.items()]
    rows += [
        [f"planned, {steps} steps, planner {seed}", *one.row]
        for steps, made in found.items()
        for seed, one in zip(SEEDS, made, strict=True)
    ]
    recorder.table(
        "texts", ["sampler", "judge, nats a token", "entropy of tokens, nats", "calls a text, planner's too"], rows
    )


@BENCHMARK.part("repaired", "found", minutes=2)
def repair(recorder: Recorder) -> None:
    """Texts of unseen chapters of which a share of the tokens is redrawn; means over three planners, text by text."""
    length, count = REPAIR["length"], REPAIR["texts"]
    starts, right = unseen(PROMPT + length, count).split([PROMPT, length], 1)
    tokenizer, generator = verses()[1], torch.Generator().manual_seed(0)
    others = tokens_but_mask(
        torch.randint(len(tokenizer) - 1, right.shape, generator=generator), tokenizer.mask_token_id
    )
    hit = (torch.rand(right.shape, generator=generator) < REPAIR["share"]) & (others != right)
    damaged = torch.where(hit, others, right)
    before, rows, each, shares = judge(starts, damaged), [], [], []
    rows += [["unseen text", sum(judge(starts, right)) / count, None, None], ["damaged", sum(before) / count, 0.0, 0.0]]
    for seed in SEEDS:
        made = write(
            f"planner {seed}", planned(seed), count, length, starts, batch=count, start=damaged,
            num_inference_steps=REPAIR["steps"],
        )  # fmt: skip
        after = made.tokens
        changed = after != damaged
        share = [float((changed & hit)[i].sum() / hit[i].sum().clamp(min=1)) for i in range(count)]
        spoilt = float((changed & ~hit).sum() / (~hit).sum())
        each.append(made.nats)
        shares.append(share)
        rows.append([f"planner {seed}", sum(made.nats) / count, sum(share) / count, spoilt])
    now, part = means(each), means(shares)
    recorder.paired(
        "repaired", f"the judge's negative log-likelihood after {REPAIR['steps']} steps less that of the damaged text, which "
        f"masked diffusion leaves as it is, {MODEL}",
        Samples("difference", {"ours": now, "theirs": before}, 0.2, each=False), "nats a token", ("<=", 0.0),
    )  # fmt: skip
    recorder.paired(
        "found", f"share of the damaged tokens that are replaced in {REPAIR['steps']} steps, {MODEL}",
        Samples("value", {"ours": part}, 0.1, each=False), "", (">=", 0.5),
    )  # fmt: skip
    recorder.table("repair", ["text", "judge, nats a token", "damaged tokens replaced", "right tokens replaced"], rows)


if __name__ == "__main__":
    BENCHMARK.main()
