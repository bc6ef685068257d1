"""Make the zoo's `fashion-dit`: a class-conditional `DiTPipeline` on Fashion-MNIST, with its own autoencoder.

    python -m benchmarks.data.fetch fashion-mnist
    python -m benchmarks.zoo.make_fashion_dit make outputs/fashion-dit

takes about 70 minutes on one idle core, and continues where it was stopped. `start` and `finish` are its first and last
step alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tqdm.auto import tqdm

from benchmarks.data import FASHION_CLASSES, load_fashion_mnist
from benchmarks.zoo import _fashion, _make

FOLDER = Path(__file__).parent / "fashion-dit"
GUIDANCE = 2.0

AUTOENCODER = (
    *_fashion.DATA, "--train_batch_size", "16", "--max_train_steps", "2500", "--learning_rate", "2e-3",
    "--kl_weight", "1e-4", "--validation_steps", "500", "--checkpointing_steps", "500",
)  # fmt: skip
TRAINING = (
    *_fashion.DATA, "--cache_latents", "--center_crop", "--train_batch_size", "64", "--snr_gamma", "5",
    "--validation_steps", "400", "--checkpointing_steps", "200",
)  # fmt: skip
# The second and the third begin with the averaged weights of the one before.
FIRST = (*TRAINING, "--max_train_steps", "1200", "--learning_rate", "1e-3")
SECOND = (*TRAINING, "--max_train_steps", "1600", "--learning_rate", "7e-4", "--seed", "1")
THIRD = (*TRAINING, "--max_train_steps", "1200", "--learning_rate", "7e-4", "--seed", "2")


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
    named(DiTPipeline(transformer, vae, scheduler)).save_pretrained(folder)


def named(pipe: DiTPipeline) -> DiTPipeline:
    """With the names of the classes in its configuration: loading takes them, and saving forgets them."""
    pipe.register_to_config(id2label=dict(enumerate(FASHION_CLASSES)))
    return pipe


def make(folder: Path) -> None:
    """All six steps; continues where it was stopped."""
    if not (folder / "start" / "model_index.json").is_file():
        start(folder / "start")
    _make.run_trainer("autoencoder", folder / "start", folder / "vae", AUTOENCODER)
    vae = ("--vae_path", str(folder / "vae"))
    _make.run_trainer("class_conditional", folder / "start", folder / "first", (*vae, *FIRST))
    _make.run_trainer("class_conditional", folder / "first", folder / "second", SECOND)
    _make.run_trainer("class_conditional", folder / "second", folder / "model", THIRD)
    finish(folder / "model")


def finish(model: Path) -> None:
    """Embed the trained pipeline, measure what is embedded, and write its card from the measured numbers."""
    _make.embed(named(DiTPipeline.from_pretrained(model, dtype=torch.float16)), FOLDER)
    pipe = DiTPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)

    def draw(guidance: float, first_seed: int) -> np.ndarray:
        pictures = []
        for first in tqdm(
            range(first_seed, first_seed + _fashion.PICTURES, 50), desc=f"Pictures, guidance {guidance:g}"
        ):
            generators = [torch.Generator().manual_seed(first + i) for i in range(50)]
            pictures.append(
                pipe([i % 10 for i in range(50)], guidance_scale=guidance, generator=generators,
                     num_inference_steps=_fashion.STEPS, output_type="np").images
            )  # fmt: skip
        return np.concatenate(pictures)

    labels, judge = [i % 10 for i in range(_fashion.PICTURES)], _fashion.judge()
    measured: dict[str, Any] = {"accuracy": {}, "distances": {}}
    for name, guidance in (("guided", GUIDANCE), ("unguided", 1.0)):
        pictures = draw(guidance, 0)
        measured["accuracy"][name] = judge.accuracy(pictures, labels)
        measured["distances"][name] = _fashion.distances(pictures, draw(guidance, _fashion.PICTURES))
    images, real = load_fashion_mnist("reference")
    measured["accuracy"]["real"] = judge.accuracy(images[:, :, :, None], real)
    _make.write_quality(FOLDER, measured, card)


def card(quality: dict[str, Any]) -> str:
    accuracy = quality["accuracy"]
    return f"""---
library_name: diffusers
license: apache-2.0
tags:
- diffusers_ext
- dit
---

# fashion-dit

A class-conditional `DiTPipeline` of {_make.size_in_millions(FOLDER):.1f} M parameters (8 blocks of width 128, patches of
2x2 latents) that draws 28x28 grey pictures of ten kinds of clothes. It is the model on which `diffusers_ext` measures
what is made for DiTs, and stock diffusers loads it:

```python
import diffusers_ext as dx
from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained(dx.zoo_path("fashion-dit"))
images = pipe(pipe.get_label_ids(["sneaker", "dress"]), guidance_scale=2.0, num_inference_steps=20).images
```

Classes: {", ".join(FASHION_CLASSES)}. The pipeline's null class is 1000, so the embedding has room for 1,000 classes.

## How well it follows classes

A judge trained on other pictures reads the asked class off {_fashion.PICTURES:,} pictures of {_fashion.STEPS} DDIM steps
in {accuracy["guided"]:.1%} of the cases with guidance {GUIDANCE:g}, in {accuracy["unguided"]:.1%} without; off real test
pictures in {accuracy["real"]:.1%}.

## How close its pictures are

Against 2,000 test pictures. A distance means little without the two columns at its right: two sets of the model's own
pictures, and {_fashion.PICTURES:,} real ones.

Guidance {GUIDANCE:g}:

{_fashion.table(quality["distances"]["guided"])}

No guidance:

{_fashion.table(quality["distances"]["unguided"])}

## Training

Trained from scratch by `python -m benchmarks.zoo.make_fashion_dit make` on the first 30,000 training pictures of
Fashion-MNIST: epsilon prediction, min-SNR weights, label dropout 0.1.

Data: Fashion-MNIST, MIT licence, copyright Zalando SE. Licence of the weights: Apache-2.0.
"""


if __name__ == "__main__":
    _make.main(__doc__, start, make, finish)
