"""Make the zoo's `fashion-ddpm`: an unconditional pixel-space `DDPMPipeline` on Fashion-MNIST.

    python -m benchmarks.data.fetch fashion-mnist
    python -m benchmarks.zoo.make_fashion_ddpm make outputs/fashion-ddpm

takes about half an hour on one idle core, and continues where it was stopped. `start` and `finish` are its first and
last step alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from benchmarks.data import FASHION_MNIST, FOLDER

FASHION_DATA = (
    "--train_data_dir", str(FASHION_MNIST), "--image_column", "train_images", "--label_column", "train_labels",
    "--split_file", str(FOLDER / "fashion_splits.json"), "--split", "generator", "--resolution", "28",
)  # fmt: skip
TRAINING = (
    "--train_batch_size", "32", "--max_train_steps", "2000", "--learning_rate", "1e-3", "--snr_gamma", "5",
    "--num_validation_images", "32", "--validation_steps", "500", "--checkpointing_steps", "250",
)  # fmt: skip


def start(folder: Path) -> None:
    """Write the untrained pipeline."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(32, 48, 64),
        norm_num_groups=8, attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
