"""Make the zoo's `avatars-sd`: an untrained pipeline, its two trainings, and the embedded checkpoint with its card.

    python -m benchmarks.zoo.make_avatars_sd make outputs/avatars-sd

takes about an hour on two idle cores, and continues where it was stopped. `start` and `finish` are its first and last
step alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.zoo import _avatars, _make

FOLDER = Path(__file__).parents[2] / "diffusers_ext" / "zoo" / "avatars-sd"
AUTOENCODER = (
    *_avatars.DATA, "--train_batch_size", "16", "--max_train_steps", "5000", "--learning_rate", "2e-3", "--kl_weight",
    "1e-4", "--validation_steps", "1000", "--checkpointing_steps", "2500",
)  # fmt: skip
TEXT_TO_IMAGE = (
    *_avatars.DATA, "--train_text_encoder", "--cache_latents", "--center_crop", "--snr_gamma", "5",
    "--train_batch_size", "64", "--max_train_steps", "2200", "--learning_rate", "1e-3", "--validation_steps", "550",
    "--checkpointing_steps", "550", "--num_validation_images", "6", "--validation_prompts",
    *_avatars.VALIDATION_PROMPTS,
)  # fmt: skip


def tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learnt from the captions: one token a word, bytes for everything else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Split(Regex(r"[^a-z]"), "isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=5000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=32)


def start(folder: Path) -> None:
    """Write the untrained pipeline."""
    torch.manual_seed(0)
    words = tokenizer(_avatars.captions("generator"))
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, projection_dim=64, **ends,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(48, 64, 80), layers_per_block=2, cross_attention_dim=64,
        attention_head_dim=4, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=32, block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, mid_block_add_attention=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=words, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def make(folder: Path) -> None:
    """All four steps; continues where it was stopped."""
    if not (folder / "start" / "model_index.json").is_file():
        start(folder / "start")
    _make.run_trainer("autoencoder", folder / "start", folder / "vae", AUTOENCODER)
    options = ("--vae_path", str(folder / "vae"), *TEXT_TO_IMAGE)
    _make.run_trainer("text_to_image", folder / "start", folder / "model", options)
    finish(folder / "model")


def finish(model: Path) -> None:
    """Embed the trained pipeline, measure what is embedded, and write its card from the measured numbers."""
    _make.embed(StableDiffusionPipeline.from_pretrained(model, dtype=torch.float16), FOLDER)
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)

    def draw(captions, generators, guidance) -> np.ndarray:
        return pipe(
            list(captions), num_inference_steps=_avatars.STEPS, guidance_scale=guidance, generator=generators,
            output_type="np",
        ).images  # fmt: skip

    _make.write_quality(FOLDER, _avatars.follows_captions(draw), card)


def card(quality: dict[str, Any]) -> str:
    return f"""---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
tags:
- diffusers_ext
- stable-diffusion
---

# avatars-sd

A Stable Diffusion pipeline of {_make.size_in_millions(FOLDER):.1f} M parameters that draws 32x32 pixel-art portraits from exact
captions. It is the model on which `diffusers_ext` measures caches, adapters, quantizers and guidance: small enough for a CPU, trained
on real pictures, and loaded by stock diffusers:

```python
import diffusers_ext as dx
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"))
prompt = "a person with tan skin and short brown hair, a green hat, dark sunglasses, a happy smile, navy clothes"
image = pipe(prompt, num_inference_steps=50, guidance_scale=3.0).images[0]
```

Captions follow one grammar: skin and hair, then where there are any a hat, glasses, a beard, then mouth and clothes.

## How well it follows captions

Balanced accuracy on {quality["captions"]} captions that neither it nor the judge was trained on, {_avatars.STEPS} DDIM
steps, read by a judge trained on other pictures. The last but one column is the judge on real pictures of those
captions.

{_avatars.table(quality)}

## Limits

{_avatars.missed(quality)}It draws portraits in this one style, from captions of this grammar, and must not be used to judge people.

## Training

Trained from scratch by `python -m benchmarks.zoo.make_avatars_sd make` on 6,974 pictures of 70 % of the captions.
epsilon prediction, prompt dropout 0.1.

Data: portraits made with DiceBear `pixel-art`, whose design is CC0 1.0. Licence of the weights: Apache-2.0.
"""


if __name__ == "__main__":
    _make.main(__doc__, start, make, finish)
