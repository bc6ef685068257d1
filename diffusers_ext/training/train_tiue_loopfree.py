r"""Distil a Stable Diffusion pipeline into one that runs its encoder once, and its decoder for all steps at once (TiUE).

    accelerate launch -m diffusers_ext.training.train_tiue_loopfree --pretrained_model_name_or_path PIPELINE \
        --prompts prompts.txt --num_decoder_steps 4 --guidance_scale 4.5 --train_batch_size 16 --max_train_steps 20000 \
        --output_dir my-student

It needs prompts, or the captions of pictures, and no picture. An optimizer step is one run of the student from noise to sample.
The student learns from the difference between the teacher, guided, and a LoRA on the teacher that learns the student's own samples
(variational score distillation); a second term keeps each noise that it predicts near to a standard normal. The result is a
pipeline for `diffusers_ext.Pipeline.from_pretrained`, which runs without guidance in as many steps.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DiffusionPipeline
from torch.utils.data import Dataset

from ..enabling import enable
from ..hooks._plan import find_run
from ..hooks.tiue_loopfree import TiUELoopfreeConfig
from ..hub import save_pretrained
from ._card import training_card
from ._data import SampleNoise
from ._diffusion import check_proportion
from ._loop import setup_logging, train
from ._lora import TrainableLora, check_lora
from ._score_distillation import FakeScore, distillation_loss, vsd_gradient
from ._teacher import TeacherTask, add_teacher_arguments, check_teacher_arguments
from ._trajectories import Conditions

_SHARES = (0.02, 0.981)  # of the timesteps, between which the teacher judges


def noise_divergence(noises: torch.Tensor) -> torch.Tensor:
    r""":math:`\sum_n \frac12 (\mu_n^2 + v_n - 1 - \ln v_n)`, over maps n: from a normal of their mean and variance to a standard one.

    Args:
        noises: `(maps, ...)`; :math:`v_n` is the unbiased variance of all elements of a map.
    """
    flat = noises.float().flatten(1)
    mean, variance = flat.mean(dim=1), flat.var(dim=1)
    return 0.5 * (mean.square() + variance - 1 - variance.log()).sum()


class LoopfreeTask(TeacherTask):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        reason = TiUELoopfreeConfig.supports(self.teacher.denoiser)
        if reason is not None or self.teacher.by_class:
            name = type(self.pipeline).__name__
            raise ValueError(
                f"`--pretrained_model_name_or_path` is a {name}: {reason or 'a pipeline with prompts is needed'}."
            )
        self.student = self.teacher.student()
        self.trained = {"unet": self.student}
        self.student_pipe = copy.copy(self.pipeline)
        self.student_pipe.unet = self.student
        spacing = {} if args.timestep_spacing is None else {"timestep_spacing": args.timestep_spacing}
        self.student_pipe.scheduler = DDIMScheduler.from_config(
            self.pipeline.scheduler.config, clip_sample=False, thresholding=False, **spacing
        )
        enable(self.student_pipe, TiUELoopfreeConfig(steps=args.num_decoder_steps))
        self.scheduler = copy.deepcopy(self.student_pipe.scheduler)
        self.scheduler.set_timesteps(args.num_decoder_steps)
        set_seed(args.seed)  # the LoRA's first numbers belong to the run
        self.lora = TrainableLora(self.pipeline, args.rank, args.lora_alpha, targets=("to_q", "to_v"))

    def dataset(self, args: argparse.Namespace) -> Dataset:
        return Conditions(self.conditions)

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        self.student.to(accelerator.device)
        self.world = accelerator.num_processes
        self.fake = FakeScore(
            dict(self.lora.named_parameters()), accelerator, self.args.learning_rate_lora, self.args.max_grad_norm,
            self.args.gradient_accumulation_steps,
        )  # fmt: skip
        self.callbacks = [self.fake]

    def unroll(self, noise: torch.Tensor, condition: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the student makes of noise, and all the noise that it predicts, `(steps * batch, ...)`."""
        run = find_run(self.student, TiUELoopfreeConfig.key)
        assert run is not None
        run.begin(len(self.scheduler.timesteps), self.scheduler)
        latents, predicted = noise, []
        for t in self.scheduler.timesteps:
            output = self.teacher.call(self.student, latents, t, condition)
            predicted.append(self.teacher.process.data_and_noise(latents, output, t)[1])
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        run.end()
        return latents, torch.cat(predicted)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, teacher, process = self.args, self.teacher, self.teacher.process
        conditions = teacher.encode(batch["condition"])
        clean, predicted = self.unroll(noise.normal(*teacher.shape), conditions.given)

        low, high = (int(share * process.num_timesteps) for share in _SHARES)
        t, epsilon = low + noise.integers(high - low), noise.normal(*teacher.shape)
        with torch.no_grad():
            noisy = process.add_noise(clean, epsilon, t)
            fake = teacher.predict(noisy, t, conditions)
            with self.lora.disabled():
                wanted = teacher.predict(noisy, t, conditions)
            wanted, fake = (process.data_and_noise(noisy, prediction, t)[1] for prediction in (wanted, fake))
            gradient = vsd_gradient(wanted, fake, process.alpha_sigma(t, noisy)[1])
        loss = distillation_loss(clean, gradient)

        self.fake.learn(self.fake_loss(clean.detach(), conditions, noise))
        # A sum over all maps of all processes and accumulated batches, whose losses are averaged.
        parts = self.world * args.gradient_accumulation_steps
        return loss + args.lambda_kl * parts * noise_divergence(predicted)

    def fake_loss(self, clean: torch.Tensor, conditions: Any, noise: SampleNoise) -> torch.Tensor:
        r""":math:`\mathrm{mean} (\alpha_t (\epsilon_{LoRA} - \epsilon))^2`, without guidance; prompts are dropped by sample."""
        process, shape = self.teacher.process, self.teacher.shape
        t, epsilon = noise.integers(process.num_timesteps), noise.normal(*shape)
        dropped = conditions.dropped(noise.uniform() < self.args.proportion_empty_prompts)
        noisy = process.add_noise(clean, epsilon, t)
        prediction = self.teacher.call(self.teacher.denoiser, noisy, t, dropped.given)
        found = process.data_and_noise(noisy, prediction, t)[1]
        return (process.alpha_sigma(t, noisy)[0] * (found - epsilon)).float().square().mean()

    def student_pipeline(self) -> DiffusionPipeline:
        return self.student_pipe

    def save(self, folder: Path) -> None:
        self.student.eval()
        save_pretrained(self.student_pipe, folder, card=False)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(
            args, "train_tiue_loopfree", "Pipeline", summary, ["text-to-image", "distillation"], library="diffusers_ext"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_teacher_arguments(parser, validation_steps=4, validation_guidance_scale=1.0)
    parser.set_defaults(learning_rate=1e-6, guidance_scale=4.5)
    parser.add_argument("--num_decoder_steps", type=int, default=4, help="Steps of a run, in one pass of the encoder.")
    parser.add_argument(
        "--timestep_spacing", choices=("leading", "trailing", "linspace"), help="Of the steps; else the pipeline's own."
    )
    parser.add_argument("--lambda_kl", type=float, default=0.1, help="Weight of the term about the predicted noise.")
    parser.add_argument("--learning_rate_lora", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=64, help="Of the LoRA on the teacher.")
    parser.add_argument("--lora_alpha", type=float, default=108.0, help="The LoRA's scale is alpha / rank.")
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="Of the LoRA's prompts.")
    args = parser.parse_args(argv)
    check_teacher_arguments(args)
    check_lora(args.rank, args.lora_alpha)
    check_proportion("proportion_empty_prompts", args.proportion_empty_prompts)
    if args.num_decoder_steps < 1:
        raise ValueError(f"`--num_decoder_steps` is {args.num_decoder_steps}; it must be at least 1.")
    for name, positive in (("lambda_kl", False), ("learning_rate_lora", True)):
        value = getattr(args, name)
        if not 0 <= value < float("inf") or (positive and value == 0):
            raise ValueError(f"`--{name}` is {value}; it must be a number {'above' if positive else 'of at least'} 0.")
    if args.mixed_precision == "fp16":
        raise ValueError(
            "`--mixed_precision` is 'fp16', which scales the loss of the student alone; take 'bf16' or 'no'."
        )
    args.validation_inference_steps = args.num_decoder_steps
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, LoopfreeTask(args))


if __name__ == "__main__":
    main()
