"""Train the UNet of a `MeanRevertingPipeline` to restore pictures, from clean pictures that are degraded on the fly.

    accelerate launch -m diffusers_ext.training.train_mean_reverting --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 64 --degradation downsample --output_dir my-model

The result is a pipeline folder that `MeanRevertingPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..pipelines.mean_reverting import MeanRevertingPipeline
from ._card import training_card
from ._data import SampleNoise, load_dataset
from ._degradation import DEGRADATIONS, check_degradation, degrade
from ._diffusion import add_validation_arguments, write_samples
from ._loop import Task, add_common_arguments, check_common_arguments, setup_logging, train


def mean_reverting_loss(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: Any,
    clean: torch.Tensor,
    mu: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    r"""Mean squared error of the prediction at :math:`x_t = \mu + a_t (x_0 - \mu) + s_t \epsilon`.

    For noise it is IR-SDE's denoising objective without weights (Luo et al. 2023, equation 12).

    Args:
        denoise: takes what the network gets, `(batch, 2 channels, height, width)`, and the timesteps.
        scheduler: `MRSamplerScheduler`; its prediction type is the target's.
        clean, mu, noise: `(batch, channels, height, width)`: clean and degraded pictures in [0, 1], standard normal noise.
        timesteps: `(batch,)` from 1 to `num_train_timesteps`.
    """
    x = scheduler.add_noise(clean, noise, timesteps, mu=mu)
    prediction = denoise(torch.cat([x - mu, mu], dim=1), timesteps)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        target = scheduler.get_velocity(clean, noise, timesteps, mu=mu)
    else:
        target = clean if kind == "sample" else noise
    return (prediction.float() - target.float()).square().mean()


class MeanRevertingTask(Task):
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.level = check_degradation(args.degradation, args.degradation_level)
        self.pipeline = MeanRevertingPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        factor = 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)
        if args.resolution % factor:
            raise ValueError(f"`--resolution` is {args.resolution}; this UNet needs a multiple of {factor}.")
        self.trained = {"unet": self.pipeline.unet}

    def dataset(self, args):
        return load_dataset(args, annotations=())

    def prepare(self, dataset, accelerator):
        channels, given = self.pipeline.unet.config.out_channels, dataset[0]["pixel_values"].shape[0]
        if given != channels:
            raise ValueError(f"The pictures have {given} channels; this UNet gives {channels}.")
        self.pipeline.to(accelerator.device)
        ids = torch.arange(min(self.args.num_validation_images, len(dataset)))
        self.clean = _to_unit(torch.stack([dataset[i]["pixel_values"] for i in ids.tolist()]))
        self.degraded = degrade(self.clean, self.args.degradation, self.level, SampleNoise(0, ids))

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        clean = _to_unit(batch["pixel_values"])
        mu = degrade(clean, self.args.degradation, self.level, noise)
        timesteps = 1 + noise.integers(self.pipeline.scheduler.config.num_train_timesteps)
        epsilon = noise.normal(*clean.shape[1:])

        def denoise(model_input: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.pipeline.unet(model_input, t, return_dict=False)[0]

        return mean_reverting_loss(denoise, self.pipeline.scheduler, clean, mu, epsilon, timesteps)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        self.pipeline.set_progress_bar_config(disable=True)
        restored = self.pipeline(
            self.degraded, self.args.validation_inference_steps, torch.Generator("cpu").manual_seed(0), output_type="pt"
        ).images.cpu()
        error = (restored - self.clean).square().mean((1, 2, 3))
        rows = torch.cat([self.degraded, restored, self.clean])  # one row each
        pictures = self.pipeline.image_processor.postprocess(rows, output_type="pil")
        return {"psnr": float(-10 * error.log10().mean()), **write_samples(pictures, len(self.clean), folder, step)}

    def save(self, folder: Path) -> None:
        self.pipeline.unet.eval()
        self.pipeline.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(
            args, "train_mean_reverting", "MeanRevertingPipeline", summary, ["image-to-image"], "diffusers_ext"
        )


def _to_unit(pixels: torch.Tensor) -> torch.Tensor:
    return pixels / 2 + 0.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--degradation", choices=tuple(DEGRADATIONS), default="downsample")
    parser.add_argument(
        "--degradation_level",
        type=float,
        help="; ".join(f"{kind}: {allowed}, {default:g}" for kind, (default, allowed) in DEGRADATIONS.items()),
    )
    add_validation_arguments(parser, steps=20)
    args = add_common_arguments(parser).parse_args(argv)
    check_degradation(args.degradation, args.degradation_level)
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, MeanRevertingTask(args))


if __name__ == "__main__":
    main()
