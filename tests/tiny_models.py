"""Tiny untrained models that trainings begin with, each written as a folder, and what they make."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import diffusers_ext as dx

VERSES = [
    "In the beginning God created the heaven and the earth.\nAnd the earth was without form, and void.",
    "The book of the generation of Jesus Christ.\nAbraham begat Isaac;\nand Isaac begat Jacob.",
]


def tiny_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels, out_channels=channels, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False, sample_size=16, shift_factor=0.1,
    )  # fmt: skip


def unconditional(folder: Path) -> None:
    unet = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)


def class_conditional(folder: Path) -> None:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = DiTPipeline(transformer, tiny_vae(1), DDIMScheduler(clip_sample=False))
    pipe.register_to_config(id2label={0: "boot, ankle boot", 3: "bag"})
    pipe.save_pretrained(folder)


def flux(folder: Path) -> None:
    base = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"), dtype=torch.float32)
    words = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], extra_ids=0)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(3), text_encoder=base.text_encoder,
        tokenizer=base.tokenizer, text_encoder_2=t5, tokenizer_2=words, transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip


def masked_lm(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"pad_token": "<pad>", "eos_token": "<end>", "mask_token": "<mask>"}
    vocab = {token: i for i, token in enumerate([*special.values(), *alphabet])}
    letters = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters, **special).save_pretrained(folder)
    ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=len(vocab), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            layer_types=["full_attention"] * 2, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1,
            sep_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip


def draw_classes(folder: Path) -> None:
    pipe = DiTPipeline.from_pretrained(folder)
    assert pipe.get_label_ids(["ankle boot", "boot", "bag"]) == [0, 0, 3]
    pipe([0, 3], num_inference_steps=1)


def draw_text(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    ids = tokenizer("In the <mask>eginning", return_tensors="pt").input_ids
    assert (ids == tokenizer.mask_token_id).sum() == 1
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
