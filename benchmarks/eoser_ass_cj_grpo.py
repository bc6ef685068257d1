"""What EOS rejection and ascending step sizes are worth in full-sequence decoding, and the decoder's states in training.

    diffusers-ext bench eoser_ass_cj_grpo            # records diffusers_ext/results/eoser_ass_cj_grpo.json

Settings were fixed before measuring: the paper's factors, and uniform quotas of the same number of steps to compare with. The
zoo's model fills what follows a chapter's end with end-of-text, as the paper's model does with answers; prompts stand 24 tokens
before a chapter's end. A gain of less than one token counts as none.

Policies are trained on a task with a program for its reward (`benchmarks/_digit_orders.py`), three times each, with equally many
updates; the rival takes the probability of the finished answer in one step, from an answer of masks alone, as methods for
autoregressive models were first carried over. The learning rate is larger than the paper's, as the model is tiny, and a round
has one optimizer step: of what was tried on one policy of ours with another seed (1e-4, 3e-4, 1e-3; one step or four), it is
that by which rewards rose.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._digit_orders import LENGTH, SEEDS, TASK, base, compare
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, Decoder, decode, prompts_near_ends, verses
from diffusers_ext.training._unmasking_policy import Layout, Runs
from diffusers_ext.training.train_cj_grpo import CJGRPOTask, parse_args

SETTINGS: dict[str, Any] = {"texts": 64, "length": 96, "steps": 48, "few_steps": 6, "temperature": 0.0, "left": 24}
TRAINING: dict[str, Any] = {
    "num_inference_steps": 3, "num_generations": 8, "train_batch_size": 16, "num_iterations": 1, "temperature": 1.0,
    "beta": 0.0, "learning_rate": 3e-4, "max_train_steps": 400,
}  # fmt: skip
BENCHMARK = Benchmark(
    "eoser_ass_cj_grpo",
    settings={"model": MODEL, **SETTINGS, **TASK, "training": TRAINING, "seeds": list(SEEDS)},
)  # fmt: skip


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


class OneStepTask(CJGRPOTask):
    """Log-probabilities of the finished answer, given an answer of masks alone."""

    def runs(self, layout: Layout, generators: list[torch.Generator]) -> Runs:
        found = super().runs(layout, generators)
        final = found.final[:, None].expand_as(found.states)
        return found._replace(states=torch.full_like(found.states, self.mask), predictions=final)


@BENCHMARK.part("accuracy_over_untrained", "accuracy_over_one_step", minutes=20)
def training(recorder: Recorder) -> None:
    """Three policies by the decoder's states, three by one step."""
    eos = AutoTokenizer.from_pretrained(base()[0]).eos_token_id
    scheduler = dx.AscendingStepScheduler(block_length=LENGTH, eos_token_id=eos)
    tasks = {"states of the decoder": CJGRPOTask, "one step": OneStepTask}
    compare(recorder, "cj-grpo", parse_args, tasks, TRAINING, scheduler, "accuracy_over_one_step", "ascending steps")


if __name__ == "__main__":
    BENCHMARK.main()
