"""What amplified slow gradients are worth: where training groks, and where it does not.

    diffusers-ext bench grokfast            # records diffusers_ext/results/grokfast.json

Grokking: addition modulo 97, half of the pairs for training, a network of two hidden layers, Adam with the paper's settings for
such tasks (rate 1e-3, betas 0.9 and 0.98, batch 512, weight decay 0.005), the same with the filter at its defaults and without.
Counted are steps from 95 % of the training pairs right to 95 % of the others; training without the filter stops where it has
taken five times as many as with it.

Diffusion: a LoRA of rank 4 for a new style of the zoo's model, with the filter and without, at equally many steps. No gain is
expected there.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._style import BATCH, MODEL, STEPS, Curve, curve
from diffusers_ext.training.grokfast import GrokfastEMA

P, WIDTH, FACTOR, LIMIT, EVERY = 97, 128, 5, 6000, 10
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.005}
FILTER = {"alpha": 0.98, "lamb": 2.0}
SEEDS, RATE = (0, 1, 2), 1e-3
BENCHMARK = Benchmark(
    "grokfast",
    settings={
        "grokking": {"p": P, "width": WIDTH, "batch": 512, "factor": FACTOR, "limit": LIMIT, "every": EVERY, **ADAM},
        "filter": FILTER,
        "style": {"model": MODEL, "steps": STEPS, "batch": BATCH, "learning_rate": RATE},
        "seeds": list(SEEDS),
    },
)


class Adder(nn.Module):
    """Logits of a + b modulo P of pairs `(n, 2)`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(P, WIDTH)
        self.layers = nn.Sequential(
            nn.Linear(2 * WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, P)
        )

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embed(pairs).flatten(1))


def delay(seed: int, filtered: bool, most: int | None = None) -> tuple[int, int, bool]:
    """Step at which training pairs are learnt, steps from there until the others are, and whether that was reached.

    Args:
        seed: of network, pairs and batches.
        filtered: with the filter.
        most: steps after the first at which it stops; None: at `LIMIT` in all.
    """
    torch.manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    pairs = pairs[torch.randperm(len(pairs))]
    sums, half = pairs.sum(1) % P, len(pairs) // 2
    model = Adder()
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    grad_filter = GrokfastEMA(model.parameters(), **FILTER)
    learnt = None

    def right(rows: slice) -> float:
        with torch.no_grad():
            return (model(pairs[rows]).argmax(1) == sums[rows]).float().mean().item()

    name = f"seed {seed}, {'with' if filtered else 'without'} the filter"
    for step in tqdm(itertools.count(1), desc=name, leave=False, mininterval=1.0):
        rows = torch.randint(half, (512,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pairs[rows]), sums[rows]).backward()
        if filtered:
            grad_filter.apply()
        optimizer.step()
        if step % EVERY:
            continue
        if learnt is None and right(slice(half)) >= 0.95:
            learnt = step
        if learnt is not None and right(slice(half, None)) >= 0.95:
            return learnt, step - learnt, True
        stops = step >= LIMIT if learnt is None or most is None else step - learnt >= most
        if stops:
            return learnt or step, step - (learnt or step), False
    raise AssertionError("unreachable")


@BENCHMARK.part("grokking_speedup", minutes=15)
def grokking(recorder: Recorder) -> None:
    rows, ratios = [], []
    for seed in tqdm(SEEDS, desc="Grokking"):
        learnt, ours, reached = delay(seed, filtered=True)
        ours = max(ours, EVERY)
        plain_learnt, theirs, plain_reached = delay(seed, filtered=False, most=FACTOR * ours if reached else ours)
        ratios.append(theirs / ours if reached else 0.0)
        rows.append([seed, learnt, ours, reached, plain_learnt, theirs, plain_reached])
    recorder.paired(
        "grokking_speedup",
        f"steps from 95 % training to 95 % validation accuracy without the filter over those with it, at most {FACTOR}; 0 where "
        "it did not generalise",
        Samples("value", {"ours": ratios}, 1.0), "x", (">=", float(FACTOR)),
    )  # fmt: skip
    recorder.table(
        "addition modulo 97",
        ["seed", "learnt at, with", "delay, with", "generalised, with", "learnt at, without", "delay, without",
         "generalised, without"],
        rows,
    )  # fmt: skip


@BENCHMARK.part("style_loss", minutes=12)
def style(recorder: Recorder) -> None:
    def last(seed: int, callbacks: Any) -> Curve:
        return curve(seed, RATE, callbacks=callbacks)

    found = {
        label: [last(seed, callbacks) for seed in tqdm(SEEDS, desc=f"Style, {label}")]
        for label, callbacks in (("without", None), ("with", lambda parameters: [GrokfastEMA(parameters, **FILTER)]))
    }
    recorder.paired(
        "style_loss",
        f"held-out loss of a LoRA with the filter less that without, after {STEPS} steps, {MODEL}",
        Samples("difference", {"ours": [c.losses[-1] for c in found["with"]], "theirs": [c.losses[-1] for c in found["without"]]}, 1e-2),
        "",
    )  # fmt: skip
    rows = [
        [label, seed, *each.losses] for label, curves in found.items() for seed, each in zip(SEEDS, curves, strict=True)
    ]
    recorder.table(
        "a LoRA for a new style",
        ["filter", "seed", *(f"loss at {step}" for step in found["with"][0].steps)],
        rows,
    )


if __name__ == "__main__":
    BENCHMARK.main()
