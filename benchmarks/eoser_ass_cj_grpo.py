"""What EOS rejection and ascending step sizes are worth in full-sequence decoding.

    diffusers-ext bench eoser_ass_cj_grpo            # records diffusers_ext/results/eoser_ass_cj_grpo.json

Settings were fixed before measuring: the paper's factors, and uniform quotas of the same number of steps to compare with. The
zoo's model fills what follows a chapter's end with end-of-text, as the paper's model does with answers; prompts stand 24 tokens
before a chapter's end. A gain of less than one token counts as none.
"""

from __future__ import annotations

from typing import Any

import torch

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, Decoder, decode, prompts_near_ends, verses

SETTINGS: dict[str, Any] = {"texts": 64, "length": 96, "steps": 48, "few_steps": 6, "temperature": 0.0, "left": 24}
BENCHMARK = Benchmark("eoser_ass_cj_grpo", settings={"model": MODEL, **SETTINGS})


def lengths(tokens: torch.Tensor) -> list[float]:
    """Tokens before the first end-of-text of each row."""
    ends = tokens == verses()[1].eos_token_id
    return (ends.cumsum(1) == 0).sum(1).double().tolist()


@BENCHMARK.part("length_gain", "nats_over_uniform", minutes=5)
def texts(recorder: Recorder) -> None:
    """How long texts become; and the judge of texts in few steps."""
    eos, common = verses()[1].eos_token_id, {"temperature": SETTINGS["temperature"]}
    many, few = ({**common, "num_inference_steps": SETTINGS[name]} for name in ("steps", "few_steps"))
    decoders = {
        "surest first": Decoder(dx.UnmaskingScheduler(), many),
        "EOS rejection": Decoder(dx.EOSRejectionScheduler(eos_token_id=eos), many),
        "surest first, few steps": Decoder(dx.UnmaskingScheduler(), few),
        "ascending steps": Decoder(dx.AscendingStepScheduler(), {**common, "block_policy": dx.AscendingBlockPolicy()}),
        "ascending steps, EOS rejection": Decoder(
            dx.AscendingStepScheduler(eos_token_id=eos), {**common, "block_policy": dx.AscendingBlockPolicy()}
        ),
    }
    starts = prompts_near_ends(SETTINGS["texts"], SETTINGS["left"])
    found = {name: decode(name, one, SETTINGS["texts"], SETTINGS["length"], starts) for name, one in decoders.items()}
    recorder.paired(
        "length_gain",
        f"tokens before end-of-text with EOS rejection less those without, {SETTINGS['steps']} steps, {MODEL}",
        Samples(
            "difference",
            {"ours": lengths(found["EOS rejection"].tokens), "theirs": lengths(found["surest first"].tokens)},
            0.5, each=False,
        ),
        "tokens a text", goal=(">=", 1.0),
    )  # fmt: skip
    recorder.paired(
        "nats_over_uniform",
        f"the judge's negative log-likelihood of ascending steps less that of uniform ones, {SETTINGS['few_steps']} steps, "
        f"{MODEL}",
        Samples(
            "difference",
            {"ours": found["ascending steps"].nats, "theirs": found["surest first, few steps"].nats}, 1e-2,
        ),
        "nats a token", goal=("<=", 0.0),
    )  # fmt: skip
    recorder.table(
        "decoders",
        ["decoder", *COLUMNS, "tokens before end-of-text"],
        [[name, *one.row, sum(lengths(one.tokens)) / SETTINGS["texts"]] for name, one in found.items()],
    )


if __name__ == "__main__":
    BENCHMARK.main()
