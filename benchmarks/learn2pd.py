"""What a learned filter is worth: calls and agreement with one token a step, against fixed thresholds.

    diffusers-ext bench learn2pd            # records diffusers_ext/results/learn2pd.json

Settings were fixed before measuring: the authors' threshold of 0.96, and fixed thresholds on a grid to compare with. Three
filters are trained, on different prompts of other chapters than those measured. The rival is the fixed threshold whose agreement
is at least that of the filter and whose calls are the fewest.
"""

from __future__ import annotations

from typing import Any

import torch

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, PROMPT, Decoded, Decoder, decode, pipeline, verses
from benchmarks.data import load_kjv

SETTINGS: dict[str, Any] = {
    "texts": 64, "length": 64, "block": 32, "accept_threshold": 0.96, "thresholds": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99],
    "train_texts": 48, "train_steps": 2000, "seeds": [0, 1, 2], "temperature": 0.0,
}  # fmt: skip
BENCHMARK = Benchmark("learn2pd", settings={"model": MODEL, **SETTINGS})


def training_prompts(seed: int) -> torch.Tensor:
    """Beginnings of windows of chapters that the model was trained on."""
    rows = [
        row for row in verses()[1](load_kjv("generator")[seed :: len(SETTINGS["seeds"])]).input_ids if len(row) > PROMPT
    ]
    chosen = torch.linspace(0, len(rows) - 1, SETTINGS["train_texts"]).long().tolist()
    return torch.tensor([rows[i][:PROMPT] for i in chosen])


def agreement(found: Decoded, full: Decoded) -> list[float]:
    """Share of tokens of each text that are those of one token a step."""
    return (found.tokens == full.tokens).double().mean(1).tolist()


@BENCHMARK.part("calls_over_threshold", "agreement", minutes=20)
def filters(recorder: Recorder) -> None:
    """Means over three filters, text by text."""
    call = {"temperature": SETTINGS["temperature"], "block_length": SETTINGS["block"]}

    def run(name: str, scheduler: Any) -> Decoded:
        return decode(name, Decoder(scheduler, call), SETTINGS["texts"], SETTINGS["length"])

    full = run("one token a step", dx.UnmaskingScheduler())
    fixed = {t: run(f"threshold {t}", dx.UnmaskingScheduler(threshold=t)) for t in SETTINGS["thresholds"]}
    learned = []
    for seed in SETTINGS["seeds"]:
        made = dx.fit_parallel_filter(
            pipeline(dx.UnmaskingScheduler()), training_prompts(seed), SETTINGS["length"], SETTINGS["block"],
            steps=SETTINGS["train_steps"], seed=seed,
        )  # fmt: skip
        config = dx.LearnedParallelScheduler(
            block_length=SETTINGS["block"], accept_threshold=SETTINGS["accept_threshold"]
        ).config
        learned.append(run(f"filter {seed}", dx.LearnedParallelScheduler.from_config(config, statistics=made)))
    count = len(learned)
    agreed = [sum(row) / count for row in zip(*(agreement(one, full) for one in learned), strict=True)]
    calls = [sum(row) / count for row in zip(*(one.calls for one in learned), strict=True)]
    mean = sum(agreed) / len(agreed)
    as_good = {t: one for t, one in fixed.items() if sum(agreement(one, full)) / len(agreed) >= mean}
    threshold, rival = min(as_good.items(), key=lambda item: sum(item[1].calls), default=(None, full))
    name = "one token a step" if threshold is None else f"a threshold of {threshold}"
    recorder.paired(
        "calls_over_threshold",
        f"network calls of the learned filter less those of {name}, which agrees as well with one token a step, {MODEL}",
        Samples("difference", {"ours": calls, "theirs": [float(value) for value in rival.calls]}, 0.5, each=False),
        "calls a text", goal=("<=", 0.0),
    )  # fmt: skip
    recorder.paired(
        "agreement", f"share of tokens that are those of one token a step, learned filter, {MODEL}",
        Samples("value", {"ours": agreed}, 0.05, each=False), "", goal=(">=", 0.9),
    )  # fmt: skip
    rows = [["one token a step", *full.row, 1.0]]
    rows += [[f"threshold {t}", *one.row, sum(agreement(one, full)) / len(agreed)] for t, one in fixed.items()]
    rows += [[f"filter {i}", *one.row, sum(agreement(one, full)) / len(agreed)] for i, one in enumerate(learned)]
    recorder.table("decoders", ["decoder", *COLUMNS, "agreement with one token a step"], rows)


if __name__ == "__main__":
    BENCHMARK.main()
