"""Train the velocity refiner of FlowTurbo for the frozen transformer of a Flux pipeline, on captioned pictures.

    accelerate launch -m diffusers_ext.training.train_velocity_refiner --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 512 --output_dir my-refiner

The teacher is the transformer itself: from a noisy picture it steps a little down to the next noise level, and the refiner
learns the difference of its velocities at the two. The result is a `VelocityRefiner` for `FlowTurboConfig(refiner=...)`.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from ..enabling import enabled
from ..hooks.flowturbo import FlowTurboConfig
from ..models.velocity_refiner import VelocityRefiner, rotary_of_state
from ._card import training_card
from ._data import SampleNoise
from ._diffusion import write_samples
from ._flux import FluxTask, Velocity, add_flux_arguments, check_flux_arguments
from ._loop import add_common_arguments, check_common_arguments, setup_logging, train


@contextmanager
def observed(transformer: nn.Module) -> Iterator[dict[str, Any]]:
    """What the transformer's first block is given in the last call: `hidden_states`, `temb` and `image_rotary_emb`."""
    seen: dict[str, Any] = {}
    block = transformer.transformer_blocks[0]  # type: ignore[index]
    handle = block.register_forward_pre_hook(lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True)  # type: ignore[operator,union-attr]
    try:
        yield seen
    finally:
        handle.remove()


def refiner_loss(
    refiner: nn.Module,
    transformer: nn.Module,
    velocity: Velocity,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    gaps: torch.Tensor,
) -> torch.Tensor:
    r"""Mean of :math:`|\\phi(x', t', v) + v - v(x', t')|^2` with :math:`x' = x + (t' - t) v` (arXiv 2409.18128, section 3.2).

    Args:
        refiner: :math:`\\phi`.
        transformer: whose velocity it is.
        velocity: calls the transformer with tokens `(batch, tokens, channels)` and noise levels, returns tokens.
        x: noisy tokens.
        sigmas: noise levels t, `(batch,)` in [0, 1]; 0 is clean, 1 is noise.
        gaps: t - t', `(batch,)`; t' ends at 0.
    """
    lower = (sigmas - gaps).clamp_min(0.0)
    with torch.no_grad():
        before = velocity(x, sigmas)
        with observed(transformer) as seen:
            after = velocity(x + (lower - sigmas)[:, None, None] * before, lower)
    tokens = seen["hidden_states"]
    rotary = rotary_of_state(seen.get("image_rotary_emb"), tokens.shape[1])
    offset = refiner(tokens, before, seen["temb"], rotary)
    return (offset + before - after).float().square().mean()


class RefinerTask(FluxTask):
    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        set_seed(args.seed)  # the refiner's first weights belong to the run
        self.refiner = VelocityRefiner(**VelocityRefiner.config_for(self.pipeline.transformer))
        self.trained = {"refiner": self.refiner}

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        latents = self.latents(batch, noise)
        captions = self.captions(batch, noise)
        sigmas, gaps = noise.uniform(), noise.uniform() * self.args.max_gap
        at, shape = sigmas.view(-1, 1, 1, 1), latents.shape
        noisy = self.pipeline._pack_latents((1 - at) * latents + at * noise.normal(*shape[1:]), *shape)
        velocity = self.velocity(captions, latents)
        return refiner_loss(self.refiner, self.pipeline.transformer, velocity, noisy, sigmas, gaps)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        if not self.args.validation_prompts:
            return {}
        with tempfile.TemporaryDirectory() as saved:
            self.refiner.save_pretrained(saved)
            with enabled(self.pipeline, FlowTurboConfig(saved, self.args.validation_refiner_steps)) as pipeline:
                pictures = self.pictures(pipeline)
        return write_samples(pictures, self.args.num_validation_images, folder, step)

    def save(self, folder: Path) -> None:
        self.refiner.eval().save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(
            args, "train_velocity_refiner", "VelocityRefiner", summary, ["text-to-image"], library="diffusers_ext"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flux_arguments(parser, validation_steps=10)
    parser.add_argument("--max_gap", type=float, default=0.12, help="Largest step of noise levels between two calls.")
    parser.add_argument("--validation_refiner_steps", type=int, default=3)
    add_common_arguments(parser).set_defaults(learning_rate=5e-5)  # the authors' rate
    args = parser.parse_args(argv)
    check_flux_arguments(args)
    if not 0 < args.max_gap <= 1:
        raise ValueError(f"`--max_gap` is {args.max_gap}; it must lie in (0, 1].")
    if args.validation_refiner_steps < 0:
        raise ValueError(f"`--validation_refiner_steps` is {args.validation_refiner_steps}; it must be at least 0.")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, RefinerTask(args))


if __name__ == "__main__":
    main()
