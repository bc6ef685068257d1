r"""Fine-tune a masked language model by the rewards that its decoding earns at every step (MDPO).

    accelerate launch -m diffusers_ext.training.train_mdpo --pretrained_model_name_or_path MODEL \
        --train_data_dir problems.jsonl --reward exact_match --max_completion_length 128 --num_inference_steps 64 \
        --output_dir my-model

Lines of the .jsonl file have a prompt and an answer. Each prompt gets a group of completions; in every step the text with all
masks drawn is judged, and a step is worth what it adds to the reward, and what comes after it. Only the steps with the largest
advantages are trained, at all masks that they saw. The model is any `AutoModelForMaskedLM` whose tokenizer has a mask and an
end-of-text token. Answers are decoded in one block, by `RunningConfidenceScheduler` or without its re-masking; the scheduler is
saved beside the model, in `scheduler/`.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

import torch

from ..schedulers._unmasking import UnmaskingScheduler
from ..schedulers.running_confidence import RunningConfidenceScheduler
from ._loop import setup_logging, train
from ._unmasking_policy import (
    Runs,
    UnmaskingPolicyTask,
    add_policy_arguments,
    check_policy_arguments,
    clipped_objective,
    mean_where,
)

SCHEDULERS = ("running_confidence", "running_confidence_cosine", "surest_first")


def step_advantages(rewards: torch.Tensor) -> torch.Tensor:
    r"""What each step is worth within its group (He et al. 2025, arXiv 2508.13148).

    .. math:: A_t = (r_t - r_{t-1} + 1) + \frac{1}{T - t} \sum_{s > t} r_s

    less its mean over the group, over its deviation plus 1e-4. The first step adds :math:`r_1`, and after the last comes
    :math:`r_T`.

    Args:
        rewards: `(..., G, T)` of the text with all masks drawn, in T steps of G completions of a prompt.
    """
    steps = rewards.shape[-1]
    gain = rewards.diff(dim=-1, prepend=torch.zeros_like(rewards[..., :1])) + 1
    after = rewards.flip(-1).cumsum(-1).flip(-1) - rewards
    left = torch.arange(steps - 1, -1, -1, device=rewards.device)
    value = gain + torch.where(left > 0, after / left.clamp(min=1), rewards)
    return (value - value.mean(-2, keepdim=True)) / (value.std(-2, keepdim=True) + 1e-4)


def mdpo_loss(
    log_prob: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    masked: torch.Tensor,
    reference: torch.Tensor | None = None,
    epsilon: float = 0.2,
    beta: float = 0.0,
) -> torch.Tensor:
    r"""The clipped loss of one step of each run (He et al. 2025, arXiv 2508.13148), to be made small.

    The mean over a row's masks of :math:`c\,(-\frac{L}{M} \min(r A, \mathrm{clip}(r) A) + \frac{\beta}{2} \log^2
    \frac{p_{ref}}{p})`; M of the L tokens are masks, and c, the confidence, is the old probability of the token that was drawn.

    Args:
        log_prob, old: `(rows, L)`, log-probabilities of the tokens that were drawn, now and then.
        advantage: `(rows,)`.
        masked: `(rows, L)` bool, the masks that the step saw.
        reference: `(rows, L)`, by the model as it was; needed for `beta` above 0.
        epsilon: of the clipped ratio.
        beta: weight of the distance to the reference.
    """
    share = masked.shape[1] / masked.sum(1, keepdim=True).clamp(min=1)
    values = -share * clipped_objective(log_prob, old, advantage, epsilon)
    if beta > 0:
        assert reference is not None
        values = values + beta / 2 * (reference - log_prob).square()
    return mean_where(old.exp() * values, masked)


def backslides(rewards: torch.Tensor) -> torch.Tensor:
    """`(...,)` bool: rewards `(..., T)` that were at their highest possible value, 1, at some step and are not at the end."""
    return (rewards >= 1).any(-1) & (rewards[..., -1] < 1)


class MDPOTask(UnmaskingPolicyTask):
    script = "train_mdpo"

    def decoder(self) -> UnmaskingScheduler:
        sizes = {
            "block_length": self.args.max_completion_length, "num_inference_steps": self.args.num_inference_steps
        }  # fmt: skip
        if self.args.scheduler == "surest_first":
            return UnmaskingScheduler(**sizes)
        schedule = "cosine" if self.args.scheduler.endswith("cosine") else "linear"
        return RunningConfidenceScheduler(**sizes, schedule=schedule)

    def step_rewards(self, runs: Runs, score: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`(rows, S)`: what the prediction of each step earns."""
        return torch.stack([score(tokens) for tokens in runs.predictions.unbind(1)], 1)

    def worth(self, runs: Runs, score: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        group = self.args.num_generations
        advantages = step_advantages(self.step_rewards(runs, score).unflatten(0, (-1, group)))
        steps = advantages.abs().sum(1).topk(self.args.sample_train_steps, -1).indices.repeat_interleave(group, 0)
        return steps, advantages.flatten(0, 1).gather(1, steps)

    def where(self, runs: Runs) -> torch.Tensor:
        return runs.states == self.mask

    def step_loss(
        self,
        log_prob: torch.Tensor,
        old: torch.Tensor,
        advantage: torch.Tensor,
        where: torch.Tensor,
        reference: torch.Tensor | None,
    ) -> torch.Tensor:
        return mdpo_loss(log_prob, old, advantage, where, reference, self.args.epsilon, self.args.beta)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheduler", default="running_confidence", choices=SCHEDULERS, help="Of the runs.")
    parser.add_argument("--sample_train_steps", type=int, default=8, help="Steps of a run that are trained.")
    add_policy_arguments(parser).set_defaults(
        num_inference_steps=128, num_generations=4, num_iterations=1, temperature=0.4, epsilon=0.2, beta=0.02,
        learning_rate=7e-7, adam_weight_decay=0.0, train_batch_size=1,
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not 1 <= args.sample_train_steps <= args.num_inference_steps:
        raise ValueError(
            f"`--sample_train_steps` is {args.sample_train_steps}; allowed are 1 to the {args.num_inference_steps} steps of a "
            "run."
        )
    check_policy_arguments(args, args.sample_train_steps)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, MDPOTask(args))


if __name__ == "__main__":
    main()
