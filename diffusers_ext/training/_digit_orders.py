"""A task with a program for its reward: write the given digits in any order. `7250>` may become `0257`, but not `0227`.

All orders are right, so that a model that learned from examples is unsure of every digit; digits that are drawn at the same time
are then often equal ones. A policy that prefers some orders is right at any number of steps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

LONGEST = 5  # digits


def problems(count: int, seed: int) -> list[dict[str, str]]:
    """`{"prompt": "7250>", "answer": "0257"}`: 3 to 5 different digits, and the same in another order."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        digits = draw.sample("0123456789", draw.randint(3, LONGEST))
        found.append({"prompt": "".join(digits) + ">", "answer": "".join(draw.sample(digits, len(digits)))})
    return found


def reward(completions: Sequence[str], answers: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """1 where a completion has the digits of the prompt, each once, and nothing else; else 0."""
    return [
        float(sorted(one) == sorted(prompt.removesuffix(">"))) for one, prompt in zip(completions, prompts, strict=True)
    ]


def write(folder: Path, count: int, seed: int) -> tuple[Path, Path]:
    """Problems for policies, and the same as texts for `train_masked_diffusion_lm`: two .jsonl files."""
    found, files = problems(count, seed), (folder / "problems.jsonl", folder / "texts.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    for file, rows in zip(files, (found, [{"text": row["prompt"] + row["answer"]} for row in found]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def write_untrained_model(folder: Path, hidden_size: int = 64, num_layers: int = 3) -> None:
    """A small masked language model with a token for each digit; its weights are drawn from torch's generator."""
    special = {"pad_token": "<pad>", "eos_token": "<end>", "mask_token": "<mask>"}
    vocab = {token: i for i, token in enumerate([*special.values(), ">", *"0123456789"])}
    letters = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    letters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=letters, clean_up_tokenization_spaces=False, model_max_length=2 * LONGEST + 1, **special
    ).save_pretrained(folder)
    ModernBertForMaskedLM(
        ModernBertConfig(
            # With the default of 0.02 it takes long to learn that answers have the digits of their prompts.
            initializer_range=0.125,
            vocab_size=len(vocab), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers, num_attention_heads=4, layer_types=["full_attention"] * num_layers,
            pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip
