r"""Fine-tune the UNet of a `DDPMPipeline` for a fixed small number of DDIM steps (MMD-DDM).

    accelerate launch -m diffusers_ext.training.train_mmd_ddm --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 32 --num_inference_steps 5 \
        --feature_extractor openai/clip-vit-base-patch32 --output_dir my-model

Each optimizer step draws a batch by the whole short run, and takes the gradient through it of the maximum mean discrepancy
between the features of these pictures and of as many real ones. The result is a `DDIMPipeline` folder for the same number of
steps. Judge it by other features than those that it was trained with.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn
from torch.nn import functional

from ..metrics.efficientnet import EfficientNetLite0
from ..metrics.judge import AvatarJudge, FashionJudge
from ._card import training_card
from ._chain import backpropagate, pipeline_loop
from ._data import SampleNoise
from ._diffusion import write_samples
from ._loop import add_common_arguments, check_common_arguments, setup_logging, train
from ._trajectories import with_gradients
from .train_unconditional import UnconditionalTask

KERNELS = ("poly3", "linear", "rbf")
Features = Callable[[torch.Tensor], torch.Tensor]


def kernel(a: torch.Tensor, b: torch.Tensor, kind: str = "poly3") -> torch.Tensor:
    r"""Kernel of all pairs, `(n, m)`: :math:`(a \cdot b / d + 1)^3`, :math:`a \cdot b / d + 1`, or :math:`e^{-|a - b|^2 / d}`.

    Args:
        a, b: features `(n, d)` and `(m, d)`.
        kind: `poly3`, `linear` or `rbf`.
    """
    inner = a @ b.T / a.shape[1]
    if kind == "rbf":
        return torch.exp(2 * inner - (a.square().sum(1)[:, None] + b.square().sum(1)) / a.shape[1])
    return (inner + 1) ** (3 if kind == "poly3" else 1)


def mmd_loss(features: torch.Tensor, real: torch.Tensor, kind: str = "poly3") -> torch.Tensor:
    r"""The unbiased squared maximum mean discrepancy (arXiv 2301.07969, section 3.2), in float64. It may be below zero.

    Args:
        features: of drawn pictures, `(m, d)`.
        real: of real ones, `(m, d)`.
        kind: see `kernel`.
    """
    features, real = features.double(), real.double()
    within = [kernel(each, each, kind) for each in (features, real)]
    m = len(features)
    apart = sum((each.sum() - each.diagonal().sum()) / (m * (m - 1)) for each in within)
    return apart - 2 * kernel(features, real, kind).mean()


def shown(sample: torch.Tensor) -> torch.Tensor:
    """Samples as pictures in [0, 1]. The gradient passes as if nothing had been cut off, else saturated pixels had none."""
    pixels = sample / 2 + 0.5
    return pixels + (pixels.clamp(0, 1) - pixels).detach()


def load_extractor(name: str) -> tuple[nn.Module, Features]:
    """A frozen network, and its features `(n, d)` of pictures `(n, channels, height, width)` in [0, 1], differentiable.

    Args:
        name: `efficientnet` for EfficientNet-lite0 of ImageNet, a folder with a judge of the zoo, or a folder or Hub
            repository with a CLIP model.

    Raises:
        ValueError: the folder has another kind of network.
    """
    if name == "efficientnet":
        net = EfficientNetLite0.from_package()
        return net, lambda pixels: net.maps((255 * _resized(pixels, 96) - 127) / 128).mean((2, 3))
    config = Path(name, "config.json")
    kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name") if config.is_file() else None
    if kind in ("AvatarJudge", "FashionJudge"):
        judge: Any = {"AvatarJudge": AvatarJudge, "FashionJudge": FashionJudge}[kind].from_pretrained(name)
        judge.requires_grad_(False).eval()
        if kind == "FashionJudge":
            return judge, lambda pixels: judge.trunk(2 * pixels - 1)
        return judge, lambda pixels: judge.trunk(2 * pixels - 1).unflatten(1, (-1, 16)).mean(2)
    if kind is not None:
        raise ValueError(
            f"`--feature_extractor` is {name!r}, a {kind}; allowed are 'efficientnet', a judge or a CLIP model."
        )
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    clip = CLIPVisionModelWithProjection.from_pretrained(name).requires_grad_(False).eval()
    processor = CLIPImageProcessor()
    mean, std = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))

    def features(pixels: torch.Tensor) -> torch.Tensor:
        resized = _resized(pixels, clip.config.image_size)
        return clip(pixel_values=(resized - mean.to(resized)) / std.to(resized)).image_embeds

    return clip, features


def _resized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Three channels of `side` pixels."""
    pixels = pixels.expand(-1, 3, -1, -1)
    return functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def gathered(features: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Features of all processes; only one's own have a graph."""
    if accelerator.num_processes == 1:
        return features
    parts = list(accelerator.gather(features.detach()).split(len(features)))
    parts[accelerator.process_index] = features
    return torch.cat(parts)


class MMDTask(UnconditionalTask):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        config = {**self.scheduler.config, "timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
        self.scheduler = DDIMScheduler.from_config({**config, "clip_sample": False, "thresholding": False})
        self.short = DDIMPipeline(self.pipeline.unet, self.scheduler)
        self.short.set_progress_bar_config(disable=True)
        self.extractor, self.features = load_extractor(args.feature_extractor)

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        self.short.to(accelerator.device)
        self.extractor.to(accelerator.device)
        self.accelerator = accelerator

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, parameters = self.args, list(self.pipeline.unet.parameters())
        with torch.no_grad():
            real = gathered(self.features(batch["pixel_values"] / 2 + 0.5), self.accelerator)

        def loss(sample: torch.Tensor) -> torch.Tensor:
            return mmd_loss(gathered(self.features(shown(sample)), self.accelerator), real, args.kernel)

        steps = args.num_inference_steps
        first = args.seed * 2**40 + int(batch["sample_id"][0]) * steps
        call = {"batch_size": len(real) // self.accelerator.num_processes, "num_inference_steps": steps}
        with torch.random.fork_rng():
            found = backpropagate(
                pipeline_loop(self.short, {**call, "generator": noise.generators}), self.scheduler, loss, parameters,
                begin=lambda step: torch.manual_seed(first + step), checkpoint=not args.keep_graph,  # of dropout
            )  # fmt: skip
        # Each process has the gradient by its own pictures, and their mean is taken where their sum is meant.
        gradients = [gradient * self.accelerator.num_processes for gradient in found.gradients]
        return with_gradients(found.loss, parameters, gradients)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        count = self.args.num_validation_images
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        pictures = self.short(count, generators, num_inference_steps=self.args.num_inference_steps).images
        return write_samples(pictures, min(8, count), folder, step)

    def save(self, folder: Path) -> None:
        self.pipeline.unet.eval()
        self.short.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(args, "train_mmd_ddm", "DDIMPipeline", summary, ["unconditional-image-generation"])


def add_short_run_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of trainers for a fixed small number of steps, with those that every script has."""
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--num_inference_steps", type=int, default=5, help="Of the runs, and of the result.")
    parser.add_argument("--num_validation_images", type=int, default=8)
    return add_common_arguments(parser)


def check_short_run_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` where one of them is out of range."""
    for name in ("num_inference_steps", "num_validation_images"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least 1.")
    if args.mixed_precision == "fp16":
        raise ValueError("`--mixed_precision` is 'fp16', in which these small gradients vanish; take 'bf16' or 'no'.")
    check_common_arguments(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--feature_extractor", default="efficientnet", help="`efficientnet`, a folder with a judge, or a CLIP model."
    )
    parser.add_argument("--kernel", choices=KERNELS, default="poly3")
    parser.add_argument("--keep_graph", action="store_true", help="Of the whole run: faster, with more memory.")
    add_short_run_arguments(parser).set_defaults(
        learning_rate=5e-6, adam_weight_decay=0.0, max_grad_norm=0.5, train_batch_size=64
    )
    args = parser.parse_args(argv)
    if args.train_batch_size < 2:
        raise ValueError(f"`--train_batch_size` is {args.train_batch_size}; it must be at least 2 to have pairs.")
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"`--gradient_accumulation_steps` is {args.gradient_accumulation_steps}; the discrepancy is of one batch: take a "
            "larger `--train_batch_size`."
        )
    check_short_run_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, MMDTask(args))


if __name__ == "__main__":
    main()
