"""What decoding by running confidence is worth without training, and what rewards of every step are worth in training.

    diffusers-ext bench mdpo            # records diffusers_ext/results/mdpo.json

Settings were fixed before measuring. The task has a program for its reward: digits in any order (`benchmarks/_digit_orders.py`).
The paper's tasks and its model of 8 billion parameters are far larger. Policies are trained three times each, on the same prompts
and with equally many updates; the rival gets the reward of the finished answer at each of its steps. The learning rate is larger
than the paper's, as the model is tiny: of 1e-4, 3e-4 and 1e-3 it is the one by which the rewards of one policy of ours with
another seed rose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._digit_orders import LENGTH, SEEDS, TASK, base, compare, measure
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, Decoder, decode
from diffusers_ext.training._unmasking_policy import Runs
from diffusers_ext.training.train_mdpo import MDPOTask, backslides, parse_args

STEPS, TEMPERATURE = 3, 0.4
TRAINING: dict[str, Any] = {
    "num_inference_steps": STEPS, "sample_train_steps": STEPS, "num_generations": 8, "train_batch_size": 16,
    "num_iterations": 1, "temperature": TEMPERATURE, "beta": 0.0, "learning_rate": 3e-4, "max_train_steps": 400,
}  # fmt: skip
VERSES: dict[str, Any] = {"texts": 64, "length": 64, "steps": 16, "temperature": 0.0}
BENCHMARK = Benchmark(
    "mdpo",
    settings={**TASK, "training": TRAINING, "seeds": list(SEEDS), "model": MODEL, "verses": VERSES},
)  # fmt: skip
SCHEDULERS = {"surest first": dx.UnmaskingScheduler, "running confidence": dx.RunningConfidenceScheduler}


class FinalRewardTask(MDPOTask):
    """Every step is worth what the finished answer earns."""

    def step_rewards(self, runs: Runs, score: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return score(runs.final)[:, None].expand(-1, runs.states.shape[1])


@BENCHMARK.part("decoding_accuracy", "decoding_backslides", minutes=4)
def decoding(recorder: Recorder) -> None:
    """Running confidence against the surest first, on the model before any policy."""
    rewards = {
        name: measure(base()[0], cls(block_length=LENGTH), STEPS, TEMPERATURE) for name, cls in SCHEDULERS.items()
    }
    right = {name: value[:, -1].tolist() for name, value in rewards.items()}
    slid = {name: backslides(value).double().tolist() for name, value in rewards.items()}
    for claim, what, values, goal in (
        ("decoding_accuracy", "share of right answers", right, (">=", 0.0)),
        ("decoding_backslides", "share of answers that are right at some step and wrong at the end", slid, ("<=", 0.0)),
    ):
        recorder.paired(
            claim,
            f"{what} by running confidence less that of the surest first, {STEPS} steps, digits in any order",
            Samples(
                "difference", {"ours": values["running confidence"], "theirs": values["surest first"]}, 0.02, each=False
            ),
            "", goal,
        )  # fmt: skip
    rows = [[name, sum(right[name]) / len(right[name]), sum(slid[name]) / len(slid[name])] for name in SCHEDULERS]
    recorder.table("decoding digits", ["decoder", "right", "right, then wrong"], rows)


@BENCHMARK.part("verses_nats", minutes=2)
def verses(recorder: Recorder) -> None:
    """The judge of texts, several tokens a step."""
    options = {"num_inference_steps": VERSES["steps"], "temperature": VERSES["temperature"]}
    found = {
        name: decode(name, Decoder(cls(), options), VERSES["texts"], VERSES["length"])
        for name, cls in SCHEDULERS.items()
    }
    recorder.paired(
        "verses_nats",
        f"the judge's negative log-likelihood by running confidence less that of the surest first, {VERSES['steps']} steps, "
        f"{MODEL}",
        Samples(
            "difference", {"ours": found["running confidence"].nats, "theirs": found["surest first"].nats}, 1e-2
        ),
        "nats a token", ("<=", 0.0),
    )  # fmt: skip
    recorder.table("decoding verses", ["decoder", *COLUMNS], [[name, *one.row] for name, one in found.items()])


@BENCHMARK.part("accuracy_over_untrained", "accuracy_over_final_reward", minutes=20)
def training(recorder: Recorder) -> None:
    """Three policies by rewards of every step, three by that of the end."""
    tasks = {"rewards of every step": MDPOTask, "the final reward alone": FinalRewardTask}
    scheduler = dx.RunningConfidenceScheduler(block_length=LENGTH)
    compare(recorder, "mdpo", parse_args, tasks, TRAINING, scheduler, "accuracy_over_final_reward")


if __name__ == "__main__":
    BENCHMARK.main()
