"""Train an `AutoencoderKL` on pictures, from scratch or further.

    accelerate launch -m diffusers_ext.training.train_autoencoder --pretrained_model_name_or_path PIPELINE_OR_VAE \
        --train_data_dir pictures/ --resolution 256 --output_dir my-vae

The result is a VAE folder whose `scaling_factor` makes the latents of the training pictures unit-variance (Rombach et
al. 2022, appendix G).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch.nn import functional as F

from ._card import training_card
from ._data import SampleNoise, load_dataset
from ._loop import Task, add_common_arguments, picture_grid, setup_logging, train


def autoencoder_loss(vae, pixel_values: torch.Tensor, noise: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """Squared and absolute reconstruction error plus `kl_weight` times the KL divergence to the unit normal.

    Args:
        vae: an `AutoencoderKL`.
        pixel_values: `(batch, channels, height, width)` in [-1, 1].
        noise: standard normal in the shape of the latents.
        kl_weight: weight of the divergence, mean over latent elements.
    """
    posterior = vae.encode(pixel_values).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    return F.mse_loss(decoded, pixel_values) + F.l1_loss(decoded, pixel_values) + kl_weight * divergence


class AutoencoderTask(Task):
    def __init__(self, args: argparse.Namespace):
        self.args = args
        folder = Path(args.pretrained_model_name_or_path)
        subfolder = None if (folder / "config.json").is_file() else "vae"
        self.vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder=subfolder)
        self.trained = {"vae": self.vae}

    def dataset(self, args):
        return load_dataset(args, annotations=())

    def prepare(self, dataset, accelerator):
        self.pictures, self.device = dataset, accelerator.device
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if self.args.resolution % factor:
            raise ValueError(f"`--resolution` is {self.args.resolution}; this VAE needs a multiple of {factor}.")
        side = self.args.resolution // factor
        self.latent_shape = (self.vae.config.latent_channels, side, side)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        return autoencoder_loss(self.vae, batch["pixel_values"], noise.normal(*self.latent_shape), self.args.kl_weight)

    def _pixels(self, count: int) -> torch.Tensor:
        count = min(count, len(self.pictures))
        return torch.stack([self.pictures[i]["pixel_values"] for i in range(count)]).to(self.device)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        pixels = self._pixels(16)
        decoded = self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        error = F.mse_loss(decoded, pixels).item()
        processor = VaeImageProcessor()
        rows = [processor.postprocess(x, output_type="pil") for x in (pixels, decoded)]
        sheet = picture_grid(rows[0] + rows[1], columns=len(rows[0]), scale=max(1, 64 // self.args.resolution))
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"step-{step:06d}.png")
        return {"reconstruction_psnr_db": 10 * float(np.log10(4 / error)), "reconstructions": np.asarray(sheet)}

    def save(self, folder: Path) -> None:
        self.vae.eval()
        with torch.no_grad():
            latents = self.vae.encode(self._pixels(512)).latent_dist.mode()
        self.vae.register_to_config(scaling_factor=1.0 / latents.std().item())
        self.vae.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(args, "train_autoencoder", "AutoencoderKL", summary, ["autoencoder"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="VAE, or pipeline that holds one.")
    parser.add_argument("--kl_weight", type=float, default=1e-4)
    return add_common_arguments(parser).parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, AutoencoderTask(args))


if __name__ == "__main__":
    main()
