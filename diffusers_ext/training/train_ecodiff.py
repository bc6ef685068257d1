r"""Learn which attention heads and feed-forward neurons a pipeline's denoiser can do without (EcoDiff). It needs no pictures.

    accelerate launch -m diffusers_ext.training.train_ecodiff --pretrained_model_name_or_path PIPELINE --prompts prompts.txt \
        --num_inference_steps 20 --guidance_scale 7.5 --beta 0.5 --train_batch_size 4 --max_train_steps 100 \
        --output_dir my-masks

Each head and neuron gets a score, and by it a random mask. The weights are frozen. A whole run with masks shall end with the
latents that the same run ends with without them, and `--beta` draws the scores down. Gradients go through the whole run with
the memory of one denoising step. The result is an `EcoDiffMasks`; `masks.prune(pipe, ratio=0.2)` then removes the heads and
neurons with the lowest scores.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from ..models._groups import HEADS, NEURONS
from ..models.ecodiff import EcoDiffMasks, denoiser_name
from ._card import training_card
from ._chain import backpropagate, check_memoryless, last_sample, pipeline_loop
from ._data import SampleNoise, generator_for
from ._loop import setup_logging, train
from ._trajectories import (
    Conditions,
    TrajectoryTask,
    add_trajectory_arguments,
    check_trajectory_arguments,
    pipeline_classes,
    read_prompts,
    with_gradients,
)

_MASKS = 0x4D61736B  # a seed of their own: masks do not depend on the noise that runs start from


def mask_penalty(masks: EcoDiffMasks, kind: str = "l1") -> torch.Tensor:
    r"""Sum over heads and neurons of the mean over layers of a layer's mean :math:`|\lambda|`, or :math:`\sigma(0.4 \lambda + 1)`.

    Args:
        kind: `l1`, the authors' for SDXL, or `sigmoid`, theirs for FLUX.
    """
    values = masks.scores.abs() if kind == "l1" else torch.sigmoid(0.4 * masks.scores + 1)
    layers = list(zip(masks.config.kinds, masks.split(values).values(), strict=True))
    means = [[part.mean() for of, part in layers if of == wanted] for wanted in dict.fromkeys(masks.config.kinds)]
    return torch.stack([torch.stack(each).mean() for each in means]).sum()


def ecodiff_loss(
    sample: torch.Tensor, target: torch.Tensor, masks: EcoDiffMasks, beta: float, penalty: str = "l1"
) -> torch.Tensor:
    r""":math:`\|z_0(m) - z_0\|^2 + \beta R(\lambda)` (arXiv 2412.02852), a mean over the elements.

    Args:
        sample: what the run with masks ends with.
        target: what the run without masks ends with.
        beta: price of high scores.
        penalty: see `mask_penalty`.
    """
    return (sample - target).float().square().mean() + beta * mask_penalty(masks, penalty)


class EcoDiffTask(TrajectoryTask):
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        pipeline = DiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        self.denoiser: nn.Module = getattr(pipeline, denoiser_name(pipeline))
        check_memoryless(pipeline.scheduler)
        self.by_class = "class_labels" in inspect.signature(pipeline.__call__).parameters
        if self.by_class != (args.prompts is None):
            needed = "of classes, which it knows" if self.by_class else "of texts"
            raise ValueError(f"`--prompts` is {args.prompts!r}, and {type(pipeline).__name__} makes pictures {needed}.")
        self.conditions: list[Any] = pipeline_classes(pipeline) if self.by_class else read_prompts(args.prompts)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.masks = EcoDiffMasks.for_model(self.denoiser, args.masks, args.initial_score)
        self.trained = {"masks": self.masks}

    def dataset(self, args: argparse.Namespace) -> Conditions:
        return Conditions(self.shown(range(args.num_targets)))

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        self.masks.to(accelerator.device)
        rows, size, found = range(len(dataset)), self.args.train_batch_size, []
        for start in tqdm(rows[::size], desc="Targets", disable=not accelerator.is_local_main_process, delay=2.0):
            chosen = list(rows[start : start + size])
            ends = last_sample(pipeline_loop(self.pipeline, self.run_of(chosen)), self.pipeline.scheduler)
            found.append(ends[: len(chosen)].cpu())  # with guidance `DiTPipeline` has each sample twice
        self.targets = torch.cat(found)

    def run_of(self, rows: list[int]) -> dict[str, Any]:
        """The call that makes these rows of the data set, each from noise of its own."""
        generators = SampleNoise(self.args.seed, torch.tensor(rows)).generators
        return self.call(self.shown(rows), generators)

    def uniform(self, key: int, step: int) -> torch.Tensor:
        """What the masks of a denoiser call are drawn from, the same in all processes."""
        generator = generator_for(_MASKS ^ self.args.seed, key * self.args.num_inference_steps + step)
        return torch.rand(len(self.masks.scores), generator=generator).to(self.masks.scores.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, key = self.args, self.number(batch) // self.args.gradient_accumulation_steps
        target = self.targets[batch["index"]].to(self.masks.scores.device)

        def loss(sample: torch.Tensor) -> torch.Tensor:
            return ecodiff_loss(sample[: len(target)], target, self.masks, args.beta, args.penalty)

        with self.masks.applied(self.denoiser) as use:
            found = backpropagate(
                pipeline_loop(self.pipeline, self.run_of(batch["index"].tolist())), self.pipeline.scheduler, loss,
                [self.masks.scores], begin=lambda step: use(self.masks(self.uniform(key, step), args.mask_eps)),
            )  # fmt: skip
        return with_gradients(found.loss, [self.masks.scores], found.gradients)

    @contextmanager
    def enabled(self) -> Iterator[Any]:
        yield self.masks.prune(copy.copy(self.pipeline), self.args.validation_ratio)

    def save(self, folder: Path) -> None:
        self.masks.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(args, "train_ecodiff", "EcoDiffMasks", summary, ["pruning"], library="diffusers_ext")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_trajectory_arguments(parser).set_defaults(learning_rate=0.1, max_train_steps=100, train_batch_size=4)
    parser.add_argument("--masks", nargs="+", default=[HEADS, NEURONS], choices=(HEADS, NEURONS))
    parser.add_argument(
        "--beta",
        type=float,
        default=0.5,
        help="Price of high scores, shared by all heads and neurons: SDXL 0.5, FLUX and small models 0.01.",
    )
    parser.add_argument("--penalty", choices=("l1", "sigmoid"), default="l1", help="Of the scores: SDXL's, or FLUX's.")
    parser.add_argument("--mask_eps", type=float, default=0.5, help="Of the hard concrete law; FLUX: 0.1.")
    parser.add_argument("--initial_score", type=float, default=3.0)
    parser.add_argument("--num_targets", type=int, default=100, help="Runs whose ends are learned from.")
    parser.add_argument(
        "--validation_ratio", type=float, default=0.2, help="Share that is cut for validation pictures."
    )
    args = parser.parse_args(argv)
    if not 0 <= args.beta < float("inf"):
        raise ValueError(f"`--beta` is {args.beta}; it must be a number of at least 0.")
    if not 0 < args.mask_eps < float("inf"):
        raise ValueError(f"`--mask_eps` is {args.mask_eps}; it must be a number above 0.")
    if not abs(args.initial_score) < float("inf"):
        raise ValueError(f"`--initial_score` is {args.initial_score}; it must be a finite number.")
    if args.num_targets < 1:
        raise ValueError(f"`--num_targets` is {args.num_targets}; it must be at least 1.")
    if not 0 <= args.validation_ratio < 1:
        raise ValueError(f"`--validation_ratio` is {args.validation_ratio}; it must lie in [0, 1).")
    check_trajectory_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, EcoDiffTask(args))


if __name__ == "__main__":
    main()
