r"""Train the feedback module of Inner Loop Feedback for the frozen transformer of a pipeline. It needs no pictures.

    accelerate launch -m diffusers_ext.training.train_inner_loop_feedback --pretrained_model_name_or_path PIPELINE \
        --block 23 --resume_block 25 --num_inference_steps 20 --train_batch_size 8 --max_train_steps 1000 \
        --output_dir my-feedback

An optimizer step is one run of the pipeline as it is. At each step of the run but the first, the module learns what makes a
cheap step, which begins in the last blocks with features of an earlier step, give what the whole transformer gives. The result
is an `InnerLoopFeedback` for `InnerLoopFeedbackConfig(feedback=...)`.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..enabling import enabled
from ..hooks._blocks import Streams, block_names
from ..hooks._plan import Call, uninstall
from ..hooks.inner_loop_feedback import CHEAP, FULL, InnerLoopFeedbackConfig, install
from ..models.inner_loop_feedback import InnerLoopFeedback, no_feedback
from ..schedulers._model_statistics import weight_marks
from ._card import training_card
from ._data import SampleNoise
from ._loop import setup_logging, train
from ._trajectories import (
    TrajectoryTask,
    Walk,
    add_trajectory_arguments,
    check_trajectory_arguments,
    count_steps,
    travel,
    with_gradients,
)

_KEY = "inner_loop_feedback.training"
_TARGET = "target"  # runs everything and keeps nothing
States = dict[str, torch.Tensor]


class _Plan:
    """What the next call of the transformer does is told."""

    def __init__(self) -> None:
        self.next = FULL

    def mode(self, call: Call) -> str:
        return self.next


@contextmanager
def watched(
    transformer: nn.Module, feedback: InnerLoopFeedback
) -> Iterator[tuple[_Plan, Callable[[], None], list[States], list[States]]]:
    """Inside, the module is on the transformer.

    Yields:
        What tells its next step, a function that begins a run, and the features that the module predicted and those that
        block `resume` really got, of each call since they were emptied last.
    """
    predicted: list[States] = []
    real: list[States] = []
    resume = transformer.get_submodule(block_names(transformer)[feedback.config.resume - 1])
    streams, plan = Streams(resume), _Plan()
    run = install(transformer, feedback, plan, _KEY)

    def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if plan.next != CHEAP:
            real.append(streams.inputs(args, kwargs))

    handles = [
        resume.register_forward_pre_hook(see, with_kwargs=True),
        feedback.register_forward_hook(lambda _module, _args, output: predicted.append(output)),
    ]
    try:
        yield plan, lambda: run.begin(None), predicted, real
    finally:
        for handle in handles:
            handle.remove()
        uninstall(transformer, _KEY)


def feedback_loss(
    wanted: torch.Tensor, given: torch.Tensor, real: list[States], predicted: list[States], feature_weight: float
) -> torch.Tensor:
    r""":math:`\|\epsilon - \hat\epsilon\|^2 + w \|h - \hat h\|^2`, means over elements; the paper's loss as we understand it.

    Args:
        wanted, given: what the denoiser gives in a full and in a cheap step, with guidance.
        real: what block `resume` gets in the full step, by state, for each call of the transformer in a step.
        predicted: what it gets in the cheap step.
        feature_weight: w.
    """
    misses = [
        (full[name].detach() - value).float().square().mean()
        for full, cheap in zip(real, predicted, strict=True)
        for name, value in cheap.items()
    ]
    return (wanted.detach() - given).float().square().mean() + feature_weight * torch.stack(misses).mean()


def run_loss(
    pipe: Any, call: dict[str, Any], feedback: InnerLoopFeedback, steps: int, interval: int, phase: int, weight: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mean of the losses of the cheap steps beside one run of the teacher, and its gradients by the module's parameters.

    Args:
        steps: T, of the run.
        interval: in use, so that features are of the last 1 to `interval - 1` steps.
        phase: shifts the steps whose features are kept.
        weight: of the features in the loss.
    """
    parameters = list(feedback.eval().parameters())  # a copied block may drop labels, as it did when it was trained
    total = torch.zeros((), device=parameters[0].device)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    with watched(pipe.transformer, feedback) as (plan, begin, predicted, real):

        def walk() -> Walk:
            nonlocal total
            yield True
            for step in range(1, steps):
                predicted.clear()
                plan.next = CHEAP
                given = yield False
                real.clear()
                plan.next = FULL if (step + phase) % (interval - 1) == 0 else _TARGET
                wanted = yield True
                loss = feedback_loss(wanted, given, real, predicted, weight) / (steps - 1)
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                for gradient, part in zip(gradients, found, strict=True):
                    if part is not None:
                        gradient += part
                total = total + loss.detach()

        begin()
        travel(pipe, call, walk(), visits=2)
    return total, gradients


class FeedbackTask(TrajectoryTask):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        if (reason := no_feedback(self.transformer)) is not None:
            name = type(self.transformer).__name__
            raise ValueError(
                f"`--pretrained_model_name_or_path`: inner loop feedback does not work on {name}: {reason}."
            )
        marks = weight_marks(self.transformer)
        self.feedback = InnerLoopFeedback.from_transformer(self.transformer, args.block, args.resume_block, marks)
        self.steps = count_steps(self.pipeline, self.call(self.shown([0]), [torch.Generator()]))
        self.trained = {"feedback": self.feedback}

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args = self.args
        total, gradients = run_loss(
            self.pipeline, self.batch_call(batch, noise), self.feedback, self.steps, args.interval, self.number(batch),
            args.feature_weight,
        )  # fmt: skip
        return with_gradients(total, list(self.feedback.parameters()), gradients)

    @contextmanager
    def enabled(self) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            saved = stack.enter_context(tempfile.TemporaryDirectory())
            self.save(Path(saved))
            yield stack.enter_context(enabled(self.pipeline, InnerLoopFeedbackConfig(saved, self.args.interval)))

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        return {**super().validate(folder, step), "scale": self.feedback.scale.item()}

    def save(self, folder: Path) -> None:
        self.feedback.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(
            args, "train_inner_loop_feedback", "InnerLoopFeedback", summary, ["cache"], library="diffusers_ext"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_trajectory_arguments(parser).set_defaults(learning_rate=1e-3, adam_weight_decay=0.0, max_grad_norm=1.0)
    parser.add_argument("--block", type=int, required=True, help="b, whose output a full step keeps; counted from 1.")
    parser.add_argument("--resume_block", type=int, required=True, help="The block that a cheap step goes on with.")
    parser.add_argument("--interval", type=int, default=2, help="Full steps are 0, N, 2N, ... in use.")
    parser.add_argument("--feature_weight", type=float, default=0.1, help="Of the features in the loss.")
    args = parser.parse_args(argv)
    if args.interval < 2:
        raise ValueError(f"`--interval` is {args.interval}; it must be at least 2: 1 has no cheap steps.")
    if not 0 <= args.feature_weight < float("inf"):
        raise ValueError(f"`--feature_weight` is {args.feature_weight}; it must be a number of at least 0.")
    check_trajectory_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, FeedbackTask(args))


if __name__ == "__main__":
    main()
