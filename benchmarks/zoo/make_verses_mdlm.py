"""Make the zoo's `verses-mdlm`: a masked diffusion language model on the King James Bible, with its own tokenizer.

    python -m benchmarks.data.fetch kjv
    python -m benchmarks.zoo.make_verses_mdlm make outputs/verses-mdlm

takes about an hour on one idle core, and continues where it was stopped. `start` and `finish` are its first and last
step alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from benchmarks.data import load_kjv

LENGTH, VOCABULARY = 128, 2048
SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|start|>", "eos_token": "<|end|>", "mask_token": "<|mask|>"}
TRAINING = (
    "--max_seq_length", str(LENGTH), "--random_length_probability", "0.3", "--train_batch_size", "32",
    "--max_train_steps", "1600", "--learning_rate", "2e-3", "--validation_steps", "500", "--checkpointing_steps", "250",
)  # fmt: skip


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding learnt from the texts."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL.values()), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=512, clean_up_tokenization_spaces=False, **SPECIAL
    )


def start(folder: Path) -> None:
    """Write the untrained model with its tokenizer, and the texts to train on."""
    torch.manual_seed(0)
    texts = load_kjv("generator")
    words = tokenizer(texts)
    model = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=len(words), hidden_size=160, intermediate_size=320, num_hidden_layers=6, num_attention_heads=5,
            layer_types=["full_attention"] * 6, max_position_embeddings=512, pad_token_id=words.pad_token_id,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, cls_token_id=words.bos_token_id,
            sep_token_id=words.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder.parent / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
