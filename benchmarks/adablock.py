"""What adaptive blocks are worth: against fixed ones at the same threshold, by a judge and by calls.

    diffusers-ext bench adablock            # records diffusers_ext/results/adablock.json

Settings were fixed before measuring: the paper's thresholds and window, its default block of 32, line breaks and full stops as
delimiters. The paper's claim is of accuracy at the same cost, on tasks that the zoo's model cannot do; here it is the judge's
likelihood, of which less than a hundredth of a nat counts as no gain, at no more calls.
"""

from __future__ import annotations

from typing import Any

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, Decoder, decode, verses

SETTINGS: dict[str, Any] = {
    "texts": 64, "length": 96, "threshold": 0.9, "delimiter_threshold": 0.3, "window": 0.25, "default": 32,
    "fixed": [16, 32], "temperature": 0.0, "delimiters": ["\n", "."],
}  # fmt: skip
BENCHMARK = Benchmark("adablock", settings={"model": MODEL, **SETTINGS})


@BENCHMARK.part("nats_over_fixed", "calls_over_fixed", minutes=6)
def blocks(recorder: Recorder) -> None:
    """Judge and calls a text, less those of fixed blocks of the default length."""
    tokenizer = verses()[1]
    ids = [tokenizer(text, add_special_tokens=False).input_ids[0] for text in SETTINGS["delimiters"]]
    scheduler, common = (
        dx.UnmaskingScheduler(threshold=SETTINGS["threshold"]),
        {"temperature": SETTINGS["temperature"]},
    )
    policy = dx.AdaptiveBlockPolicy(
        ids, SETTINGS["delimiter_threshold"], window=SETTINGS["window"], default=SETTINGS["default"]
    )
    decoders = {f"blocks of {size}": Decoder(scheduler, {**common, "block_length": size}) for size in SETTINGS["fixed"]}
    decoders["adaptive blocks"] = Decoder(scheduler, {**common, "block_policy": policy})
    found = {name: decode(name, one, SETTINGS["texts"], SETTINGS["length"]) for name, one in decoders.items()}
    ours, theirs = found["adaptive blocks"], found[f"blocks of {SETTINGS['default']}"]
    for name, what, unit, column, tolerance, goal in (
        ("nats_over_fixed", "the judge's negative log-likelihood", "nats a token", "nats", 1e-2, -0.01),
        ("calls_over_fixed", "network calls", "calls a text", "calls", 0.5, 0.0),
    ):
        recorder.paired(
            name,
            f"{what} of adaptive blocks less that of blocks of {SETTINGS['default']}, threshold {SETTINGS['threshold']}, {MODEL}",
            Samples("difference", {"ours": getattr(ours, column), "theirs": getattr(theirs, column)}, tolerance),
            unit, goal=("<=", goal),
        )  # fmt: skip
    recorder.table(
        "decoders",
        ["decoder", *COLUMNS, "mean length of a block"],
        [
            [name, *one.row, SETTINGS["length"] * SETTINGS["texts"] / sum(len(blocks) for blocks in one.blocks)]
            for name, one in found.items()
        ],
    )


if __name__ == "__main__":
    BENCHMARK.main()
