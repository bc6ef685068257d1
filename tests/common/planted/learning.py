"""A noise optimiser, a trainer and a metric as they should be, and the same with one fault each."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ._checks import check_number

# --- noise -----------------------------------------------------------------------------------------------------------


@dataclass
class PlantedNoiseConfig:
    """Share of new noise in the latents."""

    share: float = 0.1

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, 1)


class PlantedNoise:
    """Mixes noise into the latents, as much as the denoiser asks for."""

    def __init__(self, config: PlantedNoiseConfig) -> None:
        self.config = config

    def __call__(self, pipe: Any, latents: torch.Tensor, generator: Any = None, **call_kwargs: Any) -> torch.Tensor:
        if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel):
            raise ValueError(f"PlantedNoise does not work on {type(pipe).__name__}: it needs a U-Net with text.")
        leaf = latents.detach().clone().requires_grad_()
        with torch.enable_grad():
            states = torch.zeros(len(leaf), 3, pipe.unet.config.cross_attention_dim, dtype=leaf.dtype)
            loss = pipe.unet(leaf, 500, encoder_hidden_states=states, return_dict=False)[0].square().mean()
            (slope,) = torch.autograd.grad(loss, leaf)
        noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
        return latents + self.config.share * (noise - slope / (slope.norm() + 1e-6))


class LeavesGradients(PlantedNoise):
    """The weights of the pipeline have gradients afterwards."""

    def __call__(self, pipe: Any, latents: torch.Tensor, generator: Any = None, **call_kwargs: Any) -> torch.Tensor:
        result = super().__call__(pipe, latents, generator, **call_kwargs)
        states = torch.zeros(len(latents), 3, pipe.unet.config.cross_attention_dim, dtype=latents.dtype)
        with torch.enable_grad():
            pipe.unet(result, 500, encoder_hidden_states=states, return_dict=False)[0].mean().backward()
        return result


class WritesIntoTheLatents(PlantedNoise):
    """The caller's latents are not the caller's any more."""

    def __call__(self, pipe: Any, latents: torch.Tensor, generator: Any = None, **call_kwargs: Any) -> torch.Tensor:
        return latents.copy_(super().__call__(pipe, latents, generator, **call_kwargs))


# --- training --------------------------------------------------------------------------------------------------------


def planted_loss(weight: torch.Tensor, step: int) -> torch.Tensor:
    """Distance of the weight from a random point of step number `step`."""
    return (weight - torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))).square().mean()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("seed", "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps"):
        parser.add_argument(f"--{name}", type=int, default=1)
    for name in (
        "output_dir", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
        "max_grad_norm", "mixed_precision", "checkpoints_total_limit", "resume_from_checkpoint", "report_to",
        "logging_dir", "hub_model_id", "hub_token",
    ):  # fmt: skip
        parser.add_argument(f"--{name}")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--push_to_hub", action="store_true")
    args = parser.parse_args(argv)
    for name in ("train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps"):
        check_number(name, getattr(args, name), 1, math.inf, integer=True)
    if args.push_to_hub and args.hub_model_id is None:
        raise ValueError("`--push_to_hub` needs `--hub_model_id`.")
    return args


def main(argv: list[str] | None = None) -> None:
    train(parse_args(argv))


def train(args: argparse.Namespace, restore: bool = True) -> None:
    """Momentum descent; a checkpoint after each step holds the weight and the momentum."""
    folder, state = Path(args.output_dir), {}
    found = sorted(folder.glob("checkpoint-*")) if args.resume_from_checkpoint else []
    start = int(found[-1].name.partition("-")[2]) if found else 0
    if found:
        state = load_file(found[-1] / "state.safetensors")
    weight = state.get("weight", torch.zeros(3))
    momentum = state["momentum"] if restore and "momentum" in state else torch.zeros(3)
    for step in range(start, args.max_train_steps):
        leaf = weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(planted_loss(leaf, 1000 * args.seed + step), leaf)
        momentum = 0.9 * momentum + slope
        weight = weight - args.learning_rate * momentum
        (folder / f"checkpoint-{step + 1}").mkdir(parents=True)
        save_file({"weight": weight, "momentum": momentum}, folder / f"checkpoint-{step + 1}" / "state.safetensors")
    save_file({"weight": weight}, folder / "weight.safetensors")
    (folder / "README.md").write_text("A weight, trained.")


# --- metrics ---------------------------------------------------------------------------------------------------------


def planted_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean squared error."""
    return (a - b).double().square().mean().item()


def writing_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Right, and one of its arguments is another one afterwards."""
    return a.sub_(b).double().square().mean().item()


def wrong_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Not the mean."""
    return (a - b).double().square().sum().item()


class PlantedError:
    """Mean squared error over batches."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.reset()

    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.total += (a - b).double().square().sum().item()
        self.count += a.numel()

    def compute(self) -> float:
        if self.count == 0:
            raise ValueError("Nothing to compute: call `update` first.")
        return self.scale * self.total / self.count


class ResetsHalf(PlantedError):
    """The total stays."""

    def reset(self) -> None:
        self.total, self.count = getattr(self, "total", 0.0), 0


class SharesItsTotal(PlantedError):
    """One list for all metrics."""

    seen: list[float] = []

    def reset(self) -> None:
        super().reset()
        self.seen.clear()

    def update(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().update(a, b)
        self.seen.append(0.0)

    def compute(self) -> float:
        return super().compute() * len(self.seen) / len(self.seen) + 0.01 * len(self.seen)


class ComputesNothing(PlantedError):
    """NaN where there is nothing."""

    def compute(self) -> float:
        return self.total / self.count if self.count else math.nan
