r"""Fine-tune a masked language model by the rewards of its decoding, on the very states that it went through (CJ-GRPO).

    accelerate launch -m diffusers_ext.training.train_cj_grpo --pretrained_model_name_or_path MODEL \
        --train_data_dir problems.jsonl --reward exact_match --max_completion_length 128 --output_dir my-model

Lines of the .jsonl file have a prompt and an answer. Each prompt gets a group of completions. In every step of a completion the
tokens that it committed are made likelier, or less likely, in the state that they were drawn in, by how much better the
completion is than its group. Steps of ascending size (the default) make a run of L tokens log2 L states long. The model is any
`AutoModelForMaskedLM` whose tokenizer has a mask and an end-of-text token. Answers are decoded in one block; the scheduler is
saved beside the model, in `scheduler/`.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

import torch

from ..schedulers._unmasking import UnmaskingScheduler
from ..schedulers.ascending_steps import AscendingStepScheduler, EOSRejectionScheduler
from ._loop import setup_logging, train
from ._unmasking_policy import (
    Runs,
    UnmaskingPolicyTask,
    add_policy_arguments,
    check_policy_arguments,
    clipped_objective,
    mean_where,
)

SCHEDULERS = ("ascending", "eos_rejection", "surest_first")


def cj_grpo_loss(
    log_prob: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    committed: torch.Tensor,
    reference: torch.Tensor | None = None,
    epsilon: float = 0.5,
    beta: float = 0.0,
) -> torch.Tensor:
    r"""The clipped loss of one step of each run (Yang et al. 2025, arXiv 2509.23924), to be made small.

    The mean over the tokens that a step committed of :math:`-\min(r A, \mathrm{clip}(r) A) + \beta (\rho - \log \rho - 1)`
    with :math:`\rho = p_{ref} / p`.

    Args:
        log_prob, old: `(rows, length)`, log-probabilities of the tokens that were drawn, now and then.
        advantage: `(rows,)`, the reward less the mean of its group.
        committed: `(rows, length)` bool.
        reference: `(rows, length)`, by the model as it was; needed for `beta` above 0.
        epsilon: of the clipped ratio.
        beta: weight of the distance to the reference.
    """
    values = -clipped_objective(log_prob, old, advantage, epsilon)
    if beta > 0:
        assert reference is not None
        apart = reference - log_prob
        values = values + beta * (apart.exp() - apart - 1)
    return mean_where(values, committed)


class CJGRPOTask(UnmaskingPolicyTask):
    script = "train_cj_grpo"

    def decoder(self) -> UnmaskingScheduler:
        sizes = {
            "block_length": self.args.max_completion_length, "num_inference_steps": self.args.num_inference_steps
        }  # fmt: skip
        if self.args.scheduler == "ascending":
            return AscendingStepScheduler(**sizes, eos_token_id=self.eos)
        if self.args.scheduler == "eos_rejection":
            return EOSRejectionScheduler(**sizes, eos_token_id=self.eos)
        return UnmaskingScheduler(**sizes)

    def worth(self, runs: Runs, score: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rewards = score(runs.final).unflatten(0, (-1, self.args.num_generations))
        advantage = (rewards - rewards.mean(1, keepdim=True)).flatten()
        steps = torch.arange(runs.states.shape[1], device=advantage.device)
        return steps.expand(len(advantage), -1), advantage[:, None].expand(-1, len(steps))

    def where(self, runs: Runs) -> torch.Tensor:
        return runs.committed

    def step_loss(
        self,
        log_prob: torch.Tensor,
        old: torch.Tensor,
        advantage: torch.Tensor,
        where: torch.Tensor,
        reference: torch.Tensor | None,
    ) -> torch.Tensor:
        return cj_grpo_loss(log_prob, old, advantage, where, reference, self.args.epsilon, self.args.beta)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheduler", default="ascending", choices=SCHEDULERS, help="Of the runs.")
    add_policy_arguments(parser).set_defaults(
        num_generations=6, num_iterations=12, temperature=1.0, epsilon=0.5, beta=0.04, learning_rate=3e-6,
        adam_weight_decay=0.0, train_batch_size=1,
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.num_inference_steps is None:  # log2 of the length, as `AscendingBlockPolicy` has it
        args.num_inference_steps = max(1, args.max_completion_length.bit_length() - 1)
    check_policy_arguments(args, args.num_inference_steps)
    if args.scheduler == "ascending" and 2**args.num_inference_steps > 2 * args.max_completion_length:
        most = args.max_completion_length.bit_length()
        raise ValueError(
            f"`--num_inference_steps` is {args.num_inference_steps}; {args.max_completion_length} tokens take at most {most} "
            "steps that double."
        )
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, CJGRPOTask(args))


if __name__ == "__main__":
    main()
