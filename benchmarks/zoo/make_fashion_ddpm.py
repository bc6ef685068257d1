"""Make the zoo's `fashion-ddpm`: an unconditional pixel-space `DDPMPipeline` on Fashion-MNIST.

    python -m benchmarks.data.fetch fashion-mnist
    python -m benchmarks.zoo.make_fashion_ddpm make outputs/fashion-ddpm

takes about half an hour on one idle core, and continues where it was stopped. `start` and `finish` are its first and
last step alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from tqdm.auto import tqdm

from benchmarks.data import FASHION_CLASSES
from benchmarks.zoo import _fashion, _make

FOLDER = Path(__file__).parent / "fashion-ddpm"
TRAINING = (
    *_fashion.DATA, "--train_batch_size", "32", "--max_train_steps", "2000", "--learning_rate", "1e-3", "--snr_gamma", "5",
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


def make(folder: Path) -> None:
    """All three steps; continues where it was stopped."""
    if not (folder / "start" / "model_index.json").is_file():
        start(folder / "start")
    _make.run_trainer("unconditional", folder / "start", folder / "model", TRAINING)
    finish(folder / "model")


def finish(model: Path) -> None:
    """Embed the trained pipeline, measure what is embedded, and write its card from the measured numbers."""
    _make.embed(DDPMPipeline.from_pretrained(model, dtype=torch.float16), FOLDER)
    pipe = DDPMPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

    def draw(first_seed: int) -> np.ndarray:
        pictures = []
        for first in tqdm(range(first_seed, first_seed + _fashion.PICTURES, 50), desc="Pictures"):
            generators = [torch.Generator().manual_seed(first + i) for i in range(50)]
            pictures.append(pipe(50, generator=generators, num_inference_steps=_fashion.STEPS, output_type="np").images)
        return np.concatenate(pictures)

    pictures = draw(0)
    shares = np.bincount(_fashion.judge()(pictures), minlength=10) / len(pictures)
    measured = {"distances": _fashion.distances(pictures, draw(_fashion.PICTURES)), "shares": shares.tolist()}
    _make.write_quality(FOLDER, measured, card)


def card(quality: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {share:.3f}" for name, share in zip(FASHION_CLASSES, quality["shares"], strict=True))
    return f"""---
library_name: diffusers
license: apache-2.0
pipeline_tag: unconditional-image-generation
tags:
- diffusers_ext
- ddpm
---

# fashion-ddpm

An unconditional pixel-space `DDPMPipeline` of {_make.size_in_millions(FOLDER):.1f} M parameters that draws 28x28 grey
pictures of clothes. It is the model on which `diffusers_ext` measures samplers and quantizers in pixel space, and stock
diffusers loads it:

```python
import diffusers_ext as dx
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

pipe = DDPMPipeline.from_pretrained(dx.zoo_path("fashion-ddpm"))
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
images = pipe(batch_size=8, num_inference_steps=20).images
```

## How close its pictures are

{_fashion.PICTURES:,} pictures of {_fashion.STEPS} DPM-Solver++ steps against 2,000 test pictures. A distance means little
without the two columns at its right: two sets of the model's own pictures, and {_fashion.PICTURES:,} real ones.

{_fashion.table(quality["distances"])}

Shares of the classes, as the judge reads them, each 0.100 in the data: {shares}.

## Training

Trained from scratch by `python -m benchmarks.zoo.make_fashion_ddpm make` on the first 30,000 training pictures of
Fashion-MNIST: epsilon prediction, min-SNR weights.

Data: Fashion-MNIST, MIT licence, copyright Zalando SE. Licence of the weights: Apache-2.0.
"""


if __name__ == "__main__":
    _make.main(__doc__, start, make, finish)
