"""Make the zoo's `fashion-dit`: a class-conditional `DiTPipeline` on Fashion-MNIST, with its own autoencoder.

    python -m benchmarks.data.fetch fashion-mnist
    python -m benchmarks.zoo.make_fashion_dit make outputs/fashion-dit

takes about 40 minutes on one idle core, and continues where it was stopped. `start` and `finish` are its first and last
step alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from benchmarks.data import FASHION_CLASSES
from benchmarks.zoo.make_fashion_ddpm import FASHION_DATA

AUTOENCODER = (
    *FASHION_DATA, "--train_batch_size", "16", "--max_train_steps", "2500", "--learning_rate", "2e-3",
    "--kl_weight", "1e-4", "--validation_steps", "500", "--checkpointing_steps", "500",
)  # fmt: skip
TRAINING = (
    *FASHION_DATA, "--cache_latents", "--center_crop", "--train_batch_size", "64", "--max_train_steps", "1800",
    "--learning_rate", "1e-3", "--snr_gamma", "5", "--validation_steps", "500", "--checkpointing_steps", "250",
)  # fmt: skip


def start(folder: Path) -> None:
    """Write the untrained pipeline."""
    torch.manual_seed(0)
    # The pipeline's null class is 1000 whatever the classes are, so there is a row for each of 1,000.
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=8, sample_size=14,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, sample_size=28, block_out_channels=(16, 16), layers_per_block=1,
        latent_channels=4, norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, mid_block_add_attention=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    DiTPipeline(transformer, vae, scheduler, dict(enumerate(FASHION_CLASSES))).save_pretrained(folder)
