"""Train a LoRA with which a Stable Diffusion pipeline draws in one step (HiPA). It needs prompts, and no pictures.

    accelerate launch -m diffusers_ext.training.train_hipa --pretrained_model_name_or_path PIPELINE --prompts prompts.txt \
        --rank 16 --num_pairs 4096 --guidance_scale 7.5 --train_batch_size 16 --max_train_steps 4000 --output_dir my-lora

The frozen pipeline first draws `--num_pairs` pictures in many guided steps; then the LoRA learns to reach each of them from
the same noise in one step without guidance, by a loss that weighs fine detail and edges. The result is a folder with a
standard LoRA file and the scheduler of that one step, for stock diffusers: see the card that is written with it.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from torch import nn

from ._data import SampleNoise
from ._high_frequency import EncoderFeatures, check_high_frequency, high_frequency_promoting_loss
from ._loop import setup_logging, train
from ._lora import TrainableLora, add_lora_arguments, check_lora, lora_card
from ._teacher import Pairs, TeacherTask, add_teacher_arguments, check_teacher_arguments, few_step_scheduler

__all__ = ["HiPATask", "few_step_scheduler", "high_frequency_promoting_loss", "main", "parse_args"]

LOADING = """
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(BASE)
pipe.scheduler = DDIMScheduler.from_pretrained(REPO, subfolder="scheduler")
pipe.load_lora_weights(REPO)
image = pipe("a prompt", height={side}, width={side}, num_inference_steps=1, guidance_scale=0).images[0]
"""


class HiPATask(TeacherTask):
    on_device = ("noise", "clean")

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.features = EncoderFeatures(self.pipeline.vae)
        self.scheduler = few_step_scheduler(self.pipeline.scheduler)
        self.scheduler.set_timesteps(1)
        set_seed(args.seed)  # the LoRA's first weights belong to the run
        self.trained = self.attach()

    def attach(self) -> dict[str, nn.Module]:
        """What is trained, on the teacher's own denoiser: pairs are made before the first step."""
        return {"lora": TrainableLora(self.pipeline, self.args.rank, self.args.lora_alpha)}

    def dataset(self, args: argparse.Namespace) -> Pairs:
        return self.pairs(args)

    def predict(self, noise: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Clean latents after one step without guidance, as the pipeline computes them."""
        t = self.scheduler.timesteps[0]
        with torch.no_grad():
            given = self.teacher.encode(prompts).given
        output = self.teacher.call(self.teacher.denoiser, noise, t, given)
        # The step multiplies an error of epsilon by sigma / alpha, 15 for Stable Diffusion: not in half precision.
        return self.scheduler.step(output.float(), t, noise, return_dict=False)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures `(batch, 3, height, width)` in [-1, 1] and a little beyond, with gradients where they are on."""
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0), return_dict=False)[0]

    def distance(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of pictures."""
        return high_frequency_promoting_loss(pred, target, self.features, self.args.hf_weight, self.args.cutoff)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        latents = self.predict(batch["noise"], batch["condition"])
        # Fine detail is what half precision loses first, and the VAE of XL overflows in it.
        with torch.autocast(latents.device.type, enabled=False):
            with torch.no_grad():
                target = self.decode(batch["clean"])
            return self.distance(self.decode(latents), target)

    def student_pipeline(self) -> DiffusionPipeline:
        pipeline = copy.copy(self.pipeline)
        pipeline.scheduler = few_step_scheduler(self.pipeline.scheduler)
        return pipeline

    def save(self, folder: Path) -> None:
        self.trained["lora"].save_pretrained(folder)  # type: ignore[operator]
        self.scheduler.save_pretrained(folder / "scheduler")

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        loading = LOADING.format(side=args.resolution)
        return lora_card(args, "train_hipa", summary, ["hipa", "text-to-image"], loading)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_lora_arguments(parser, rank=16)
    parser.add_argument("--hf_weight", type=float, default=0.1, help="Of detail and edges in the loss; 0: without.")
    parser.add_argument(
        "--cutoff",
        type=float,
        help="Periods a picture above which detail begins; else an eighth of the side in pixels.",
    )
    add_teacher_arguments(parser, validation_steps=1, validation_guidance_scale=0.0, pairs=True)
    args = parser.parse_args(argv)
    check_lora(args.rank, args.lora_alpha)
    check_high_frequency(args.hf_weight, args.cutoff)
    check_teacher_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, HiPATask(args))


if __name__ == "__main__":
    main()
