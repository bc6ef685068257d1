r"""Train a one-step U-Net against a changing panel of small discriminators (NitroFusion). It needs prompts, and no pictures.

    accelerate launch -m diffusers_ext.training.train_nitrofusion --stage distill --pretrained_model_name_or_path PIPELINE \
        --prompts prompts.txt --num_pairs 100000 --guidance_scale 7.5 --output_dir my-start
    accelerate launch -m diffusers_ext.training.train_nitrofusion --stage adversarial --pretrained_model_name_or_path PIPELINE \
        --student_path my-start --prompts prompts.txt --num_pairs 100000 --guidance_scale 7.5 --output_dir my-student

The method sharpens a student that draws in one step already. Where there is none, `--stage distill` makes one: it learns to reach
the teacher's pictures from the same noise (squared distance of latents). In the adversarial stage the teacher's pictures are real
and the student's are fake. Both get noise of one level; the frozen teacher's encoder turns them into features; and heads drawn
from a pool, each tied to a noise level, a level of the encoder, whole or place, prompt or none, tell them apart. After each step a
small share of the heads is made new, so that none learns the pictures by heart. The result is a pipeline with a
`TimestepShiftLCMScheduler`, for one to four steps without guidance.
"""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from ._card import training_card
from ._data import SampleNoise
from ._discriminators import HeadPool, encoder_blocks, generator_hinge_loss, head_hinge_loss, unet_features
from ._loop import setup_logging, train
from ._one_step import OneStepTask, add_one_step_arguments, check_one_step_arguments
from ._teacher import Conditions, Pairs

__all__ = ["NitroFusionTask", "generator_hinge_loss", "head_hinge_loss", "main", "parse_args"]

STAGES = ("distill", "adversarial")


class NitroFusionTask(OneStepTask):
    on_device = ("noise", "clean")

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        unet = self.teacher.denoiser
        if not isinstance(unet, UNet2DConditionModel):
            raise ValueError(
                f"`--pretrained_model_name_or_path` has a {type(unet).__name__}; a UNet2DConditionModel is needed, whose "
                "encoder makes features."
            )
        last = self.teacher.process.num_timesteps - 1
        if max(args.head_timesteps) > last:
            raise ValueError(f"`--head_timesteps` is {args.head_timesteps}; timesteps from 0 to {last} are needed.")

    def dataset(self, args: argparse.Namespace) -> Pairs:
        return self.pairs(args)

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        args, sizes = self.args, self.teacher.denoiser.config.block_out_channels
        if args.stage == "adversarial":
            channels = [*sizes, sizes[-1]][: len(encoder_blocks(self.teacher.denoiser))]
            self.pool = HeadPool(
                args.head_timesteps, channels, args.heads_per_group, args.refresh_rate, args.seed, accelerator,
                args.learning_rate_heads, args.max_grad_norm, args.gradient_accumulation_steps,
            )  # fmt: skip
            self.callbacks = [self.pool]

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        conditions = self.encode(batch)
        if self.args.stage == "distill":
            return (self.draw(batch["noise"], conditions.given) - batch["clean"]).square().mean()
        fake = self.draw(noise.normal(*self.teacher.shape), conditions.given)
        return self.adversarial_loss(fake, batch["clean"], conditions, noise, self.number(batch), batch["sample_id"])

    def adversarial_loss(
        self,
        fake: torch.Tensor,
        real: torch.Tensor,
        conditions: Conditions,
        noise: SampleNoise,
        step: int,
        sample_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The student's loss; the heads' is taken to the pool.

        Args:
            fake: of the student, with its graph, `(batch, channels, height, width)`.
            real: of the teacher, under the same conditions.
            step: number of the optimizer step, by which heads are drawn.
            sample_ids: by which samples have their noise levels, `(batch,)`.
        """
        drawn, places = self.pool.draw(step), self.pool.places(sample_ids)
        process, shape, t = self.teacher.process, self.teacher.shape, drawn.timesteps[places]
        shown = conditions.dropped(~drawn.conditional[places]).given
        fakes, reals = (
            unet_features(self.teacher, process.add_noise(each, noise.normal(*shape), t), t, shown)
            for each in (fake, real)
        )
        told = (drawn.judge([each.detach() for each in features], places) for features in (reals, fakes))
        self.pool.learn(head_hinge_loss(*told))
        return generator_hinge_loss(drawn.judge(fakes, places, trained=False))

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        name = type(self.pipeline).__name__
        return training_card(args, "train_nitrofusion", name, summary, ["nitrofusion", "few-step", "text-to-image"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_one_step_arguments(parser, shifted_timestep=250, pairs=True)
    parser.set_defaults(learning_rate=1e-5)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument(
        "--head_timesteps", type=int, nargs="+", default=[10, 250, 500, 750], metavar="T", help="Levels of noise."
    )
    parser.add_argument("--heads_per_group", type=int, default=8, help="Heads a level of noise and of the encoder.")
    parser.add_argument("--refresh_rate", type=float, default=0.01, help="Share of the heads made new after a step.")
    parser.add_argument("--learning_rate_heads", type=float, default=1e-4)
    args = parser.parse_args(argv)
    check_one_step_arguments(args)
    if min(args.head_timesteps) < 0 or len(set(args.head_timesteps)) < len(args.head_timesteps):
        raise ValueError(f"`--head_timesteps` is {args.head_timesteps}; different timesteps from 0 on are needed.")
    if args.heads_per_group < 1:
        raise ValueError(f"`--heads_per_group` is {args.heads_per_group}; it must be at least 1.")
    if not 0 <= args.refresh_rate < 1:
        raise ValueError(f"`--refresh_rate` is {args.refresh_rate}; it must lie in [0, 1).")
    if not 0 < args.learning_rate_heads < float("inf"):
        raise ValueError(f"`--learning_rate_heads` is {args.learning_rate_heads}; it must be a number above 0.")
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, NitroFusionTask(args))


if __name__ == "__main__":
    main()
