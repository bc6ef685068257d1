"""Make the zoo's `avatars-flow`: a small rectified-flow transformer in the layout of `FluxPipeline`, on avatars.

    python -m benchmarks.zoo.make_avatars_flow make outputs/avatars-flow

takes about an hour on one idle core, and continues where it was stopped. `start` and `finish` are its first and last
step alone. The autoencoder, the CLIP tokenizer and the first weights of the CLIP text encoder are those of `avatars-sd`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from benchmarks.zoo import _avatars, _make
from diffusers_ext import zoo_path

FOLDER = Path(__file__).parent / "avatars-flow"
TRAINING = (
    *_avatars.DATA, "--max_sequence_length", "32", "--train_text_encoder", "--cache_latents", "--center_crop",
    "--train_batch_size", "64", "--max_train_steps", "1700", "--learning_rate", "1e-3", "--validation_steps", "500",
    "--checkpointing_steps", "250", "--num_validation_images", "6", "--validation_prompts",
    *_avatars.VALIDATION_PROMPTS,
)  # fmt: skip


def t5_tokenizer(captions: list[str]) -> T5Tokenizer:
    """One token a word of the captions; single letters for everything else."""
    words = Counter(word for caption in captions for word in caption.replace(",", "").split())
    total = sum(words.values())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (",", -2.0)]
    vocab += [("\u2581" + word, float(np.log(count / total))) for word, count in sorted(words.items())]
    letters = [
        "\u2581",
        *map(chr, range(ord("a"), ord("z") + 1)),
        *map(chr, range(ord("A"), ord("Z") + 1)),
        *"0123456789.-'",
    ]
    return T5Tokenizer(vocab=vocab + [(letter, -20.0) for letter in letters], extra_ids=0, model_max_length=32)


def start(folder: Path) -> None:
    """Write the untrained pipeline."""
    torch.manual_seed(0)
    base = StableDiffusionPipeline.from_pretrained(zoo_path("avatars-sd"), dtype=torch.float32)
    words = t5_tokenizer(_avatars.captions("generator"))
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=6, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    base.vae.register_to_config(shift_factor=0.0)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=base.vae, text_encoder=base.text_encoder,
        tokenizer=base.tokenizer, text_encoder_2=t5, tokenizer_2=words, transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip


def make(folder: Path) -> None:
    """All three steps; continues where it was stopped."""
    if not (folder / "start" / "model_index.json").is_file():
        start(folder / "start")
    _make.run_trainer("text_to_image_flux", folder / "start", folder / "model", TRAINING)
    finish(folder / "model")


def finish(model: Path) -> None:
    """Embed the trained pipeline, measure what is embedded, and write its card from the measured numbers."""
    _make.embed(FluxPipeline.from_pretrained(model, dtype=torch.float16), FOLDER)
    pipe = FluxPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)

    def draw(captions, generators, guidance) -> np.ndarray:
        return pipe(
            list(captions), negative_prompt=[""] * len(captions), true_cfg_scale=guidance, height=32, width=32,
            max_sequence_length=32, num_inference_steps=_avatars.STEPS, generator=generators, output_type="np",
        ).images  # fmt: skip

    _make.write_quality(FOLDER, _avatars.follows_captions(draw), card)


def card(quality: dict[str, Any]) -> str:
    return f"""---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
tags:
- diffusers_ext
- flux
---

# avatars-flow

A rectified-flow transformer of {_make.size_in_millions(FOLDER):.1f} M parameters in the layout of `FluxPipeline` (CLIP and
T5 text encoders, two double and six single blocks) that draws 32x32 pixel-art portraits from exact captions. It is the
model on which `diffusers_ext` measures what is made for Flux-like transformers, and stock diffusers loads it:

```python
import diffusers_ext as dx
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained(dx.zoo_path("avatars-flow"))
prompt = "a person with tan skin and short brown hair, a green hat, dark sunglasses, a happy smile, navy clothes"
image = pipe(
    prompt, negative_prompt="", true_cfg_scale=3.0, height=32, width=32, max_sequence_length=32, num_inference_steps=20
).images[0]
```

It was trained at that size and with prompts of 32 tokens: give `height`, `width` and `max_sequence_length`, whose
defaults are made for larger models. Guidance is true guidance: give `negative_prompt=""`.

## How well it follows captions

Balanced accuracy on {quality["captions"]} captions that neither it nor the judge was trained on, {_avatars.STEPS} Euler
steps, read by a judge trained on other pictures. The last but one column is the judge on real pictures of those
captions.

{_avatars.table(quality)}

## Limits

{_avatars.missed(quality)}It draws portraits in this one style, from captions of the grammar of `avatars-sd`, and must not
be used to judge people.

## Training

Trained by `python -m benchmarks.zoo.make_avatars_flow make` on 6,974 pictures of 70 % of the captions: velocity on
straight lines, logit-normal times, prompt dropout 0.1. The autoencoder is that of `avatars-sd`, the CLIP text encoder
started from it.

Data: portraits made with DiceBear `pixel-art`, whose design is CC0 1.0. Licence of the weights: Apache-2.0.
"""


if __name__ == "__main__":
    _make.main(__doc__, start, make, finish)
