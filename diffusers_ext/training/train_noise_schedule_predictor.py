r"""Train the noise-schedule predictor of FastDiff for the frozen UNet of a `DDPMPipeline`, on pictures.

    accelerate launch -m diffusers_ext.training.train_noise_schedule_predictor --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 64 --output_dir my-predictor

At a random timestep the predictor sees a noisy picture, and learns how much of the noise a step may take away, given how
well the UNet predicts it. The result is a `NoiseSchedulePredictor` for `search_noise_schedule`.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DDPMPipeline

from ..models.noise_schedule_predictor import NoiseSchedulePredictor
from ..noise_schedule_search import ScheduleWalk
from ..schedulers.fastdiff import FastDiffScheduler
from ._card import training_card
from ._data import SampleNoise
from ._diffusion import add_validation_arguments, write_samples
from ._loop import add_common_arguments, check_common_arguments, setup_logging, train
from .train_unconditional import UnconditionalTask

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def step_loss(
    betas: torch.Tensor, noise: torch.Tensor, predicted: torch.Tensor, delta_squared: torch.Tensor
) -> torch.Tensor:
    r"""The loss of the predicted betas, `(batch,)`: the mean over a sample's elements of

    .. math:: \frac{(\delta \epsilon - \beta \epsilon_\theta / \delta)^2}{2 (\delta^2 - \beta)}
        + \frac14 \log \frac{\delta^2}{\beta} + \frac{\beta}{2 \delta^2}

    (BDDM, arXiv 2203.13508, equation 14, without its constant). It is about the likelihood that is lost by a step which takes
    :math:`\beta` of the noise variance :math:`\delta^2` away.

    Args:
        betas: :math:`\hat\beta`, `(batch,)`, over 0 and below `delta_squared`.
        noise, predicted: :math:`\epsilon` and :math:`\epsilon_\theta`, `(batch, ...)`.
        delta_squared: :math:`\delta^2`, `(batch,)`.
    """
    share = betas / delta_squared
    miss = (noise - share.view(-1, *[1] * (noise.ndim - 1)) * predicted).square().flatten(1).mean(1)
    return miss / (2 * (1 - share)) - share.log() / 4 + share / 2


def noise_of(output: torch.Tensor, x: torch.Tensor, a: torch.Tensor, delta: torch.Tensor, kind: str) -> torch.Tensor:
    """The noise that a prediction of `kind` about `x = a x_0 + delta noise` stands for.

    Raises:
        ValueError: `kind` is none of `PREDICTION_TYPES`.
    """
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return a * output + delta * x
    if kind == "sample":
        return (x - a * output) / delta
    raise ValueError(f"`prediction_type` is {kind!r}; allowed are {', '.join(PREDICTION_TYPES)}.")


class PredictorTask(UnconditionalTask):
    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        steps = self.scheduler.config.num_train_timesteps
        if not 2 * args.tau < steps:
            raise ValueError(f"`--tau` is {args.tau}; it must be below half of the {steps} timesteps.")
        if self.scheduler.config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"The pipeline's `prediction_type` is {self.scheduler.config.prediction_type!r}; allowed are {', '.join(PREDICTION_TYPES)}.")  # fmt: skip
        set_seed(args.seed)  # the predictor's first weights belong to the run
        channels = self.pipeline.unet.config.in_channels
        self.predictor = NoiseSchedulePredictor(
            in_channels=channels, hidden_channels=args.hidden_channels, num_layers=args.num_layers
        )
        self.pipeline.unet.requires_grad_(False).eval()
        self.trained = {"predictor": self.predictor}

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        clean, tau = batch["pixel_values"], self.args.tau
        table = self.scheduler.alphas_cumprod.to(clean.device)
        t = tau + noise.integers(len(table) - 2 * tau)
        epsilon = noise.normal(*clean.shape[1:])
        bar, bar_next = table[t], table[t + tau]
        a, delta = (value.sqrt().view(-1, 1, 1, 1) for value in (bar, 1 - bar))
        x = a * clean + delta * epsilon
        with torch.no_grad():
            output = self.pipeline.unet(x, t, return_dict=False)[0]
            predicted = noise_of(output.float(), x, a, delta, self.scheduler.config.prediction_type)
        return step_loss(self.predictor(x, 1 - bar_next / bar, 1 - bar), epsilon, predicted, 1 - bar).mean()

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        # Without a search: from the last timestep on, with a first step as long as even steps would be.
        number = self.args.validation_inference_steps
        pipeline = DDPMPipeline(self.pipeline.unet, self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        walk = ScheduleWalk(pipeline, self.predictor, self.args.num_validation_images)
        last = self.scheduler.config.num_train_timesteps - 1
        betas = walk(walk.start_at(last, last * (1 - 1 / number)), number)
        pipeline.scheduler = FastDiffScheduler.from_config(self.scheduler.config, noise_schedule=betas)
        generator = torch.Generator("cpu").manual_seed(0)
        pictures = pipeline(self.args.num_validation_images, generator, num_inference_steps=len(betas)).images
        return write_samples(pictures, min(8, len(pictures)), folder, step)

    def save(self, folder: Path) -> None:
        self.predictor.eval().save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(
            args, "train_noise_schedule_predictor", "NoiseSchedulePredictor", summary, ["unconditional-image-generation"],
            library="diffusers_ext",
        )  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--tau", type=int, default=200, help="Timesteps from the next noisier step to this one.")
    parser.add_argument("--hidden_channels", type=int, default=32, help="Of the predictor.")
    parser.add_argument("--num_layers", type=int, default=3, help="Of the predictor.")
    add_validation_arguments(parser, steps=6)
    add_common_arguments(parser).set_defaults(learning_rate=1e-3)
    args = parser.parse_args(argv)
    for name in ("tau", "hidden_channels", "num_layers", "num_validation_images", "validation_inference_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least 1.")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, PredictorTask(args))


if __name__ == "__main__":
    main()
