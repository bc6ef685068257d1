"""Make the zoo's `avatars-flow`: a small rectified-flow transformer in the layout of `FluxPipeline`, on avatars.

    python -m benchmarks.zoo.make_avatars_flow make outputs/avatars-flow

takes about an hour on one idle core, and continues where it was stopped. `start` and `finish` are its first and last
step alone. The autoencoder, the CLIP tokenizer and the first weights of the CLIP text encoder are those of `avatars-sd`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from benchmarks.data import FOLDER
from diffusers_ext import zoo_path

TRAINING = (
    "--train_data_dir", str(FOLDER / "avatars.npz"), "--caption_column", "caption", "--split_file",
    str(FOLDER / "avatars_splits.json"), "--split", "generator", "--resolution", "32", "--max_sequence_length", "32",
    "--train_text_encoder", "--cache_latents", "--center_crop", "--train_batch_size", "64", "--max_train_steps", "1700",
    "--learning_rate", "1e-3", "--validation_steps", "500", "--checkpointing_steps", "250",
    "--num_validation_images", "6", "--validation_prompts",
    "a person with tan skin and short brown hair, a green hat, dark sunglasses, a happy smile, navy clothes",
    "a person with dark brown skin and long blue hair, a beard, a sad mouth, yellow clothes",
    "a person with pale skin and long red hair, clear glasses, a happy smile, mint clothes",
    "a person with brown skin and short black hair, a purple hat, a sad mouth, coral clothes",
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
    rows = json.loads((FOLDER / "avatars_splits.json").read_text())["generator"]
    words = t5_tokenizer(np.load(FOLDER / "avatars.npz")["caption"][rows].tolist())
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
