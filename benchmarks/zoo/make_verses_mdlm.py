"""Make the zoo's `verses-mdlm`: a masked diffusion language model on the King James Bible, with its own tokenizer.

    python -m benchmarks.data.fetch kjv
    python -m benchmarks.zoo.make_verses_mdlm make outputs/verses-mdlm

takes about an hour on one idle core, and continues where it was stopped. `start` and `finish` are its first and last
step alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
)

from benchmarks.data import load_kjv
from benchmarks.zoo import _make
from diffusers_ext.metrics.text import masked_nll_bound

FOLDER = Path(__file__).parent / "verses-mdlm"
MASKS = 16
LENGTH, VOCABULARY = 128, 2048
SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|start|>", "eos_token": "<|end|>", "mask_token": "<|mask|>"}
TRAINING = (
    "--max_seq_length", str(LENGTH), "--random_length_probability", "0.3", "--train_batch_size", "32",
    "--max_train_steps", "1200", "--learning_rate", "2e-3", "--validation_steps", "400", "--checkpointing_steps", "200",
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


def make(folder: Path) -> None:
    """All three steps; continues where it was stopped."""
    if not (folder / "start" / "config.json").is_file():
        start(folder / "start")
    data = ("--train_data_dir", str(folder / "texts.jsonl"))
    _make.run_trainer("masked_diffusion_lm", folder / "start", folder / "model", (*data, *TRAINING))
    finish(folder / "model")


def finish(trained: Path) -> None:
    """Embed the trained model, measure what is embedded, and write its card from the measured numbers."""
    AutoModelForMaskedLM.from_pretrained(trained, dtype=torch.float16).save_pretrained(FOLDER)
    AutoTokenizer.from_pretrained(trained).save_pretrained(FOLDER)
    _make.clean_config(FOLDER / "config.json")
    words, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForMaskedLM.from_pretrained(FOLDER)
    training = load_kjv("generator")
    counts = np.bincount(np.concatenate(words(training).input_ids), minlength=len(words)) + 1.0
    surprise = torch.from_numpy(-np.log(counts / counts.sum()))
    measured: dict[str, Any] = {"parameters": _make.size_in_millions(FOLDER)}
    for name, texts in (("unseen chapters", load_kjv("reference")), ("chapters trained on", training[::19])):
        windows = [
            ids[i : i + LENGTH] for ids in words(texts).input_ids for i in range(0, len(ids) - LENGTH + 1, LENGTH)
        ]
        ids = torch.tensor(windows)
        bound = masked_nll_bound(model, ids, words.mask_token_id, samples=MASKS)
        letters = torch.tensor([len(words.decode(row)) for row in windows])
        measured[name] = {
            "windows": len(windows), "nats_per_token": bound.nats_per_token, "interval": bound.interval(),
            "bits_per_character": bound.per(letters).bits_per_token, "unigram_nats_per_token": surprise[ids].mean().item(),
        }  # fmt: skip
    measured["text"] = sample(model, words)
    _make.write_quality(FOLDER, measured, card)


def sample(model, words, prompt: str = "And it came to pass") -> str:
    """What stock `LLaDA2Pipeline` writes after a prompt: one token a step, drawn, with seed 0."""
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(), words)
    pipe.set_progress_bar_config(disable=True)
    ids = words(prompt, return_tensors="pt").input_ids
    return prompt + pipe(
        input_ids=ids, gen_length=96, block_length=32, num_inference_steps=32, temperature=1.0, threshold=1.0,
        editing_threshold=None, generator=torch.Generator().manual_seed(0),
    ).texts[0]  # fmt: skip


def card(quality: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {found['windows']} | {found['nats_per_token']:.3f} | {found['interval'][0]:.3f} to "
        f"{found['interval'][1]:.3f} | {found['bits_per_character']:.3f} | {found['unigram_nats_per_token']:.3f} |"
        for name, found in quality.items()
        if isinstance(found, dict) and "windows" in found
    )
    text = "\n".join(f"> {line}  " for line in quality["text"].split("\n"))
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
tags:
- diffusers_ext
- masked-diffusion
---

# verses-mdlm

A masked diffusion language model of {quality["parameters"]:.1f} M parameters on the King James Bible: a bidirectional
ModernBERT with a vocabulary of {VOCABULARY:,} byte pairs. It is the model on which `diffusers_ext` measures what is made
for masked diffusion language models. Stock transformers loads it and stock diffusers drives it:

```python
import diffusers_ext as dx
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(dx.zoo_path("verses-mdlm"))
model = AutoModelForMaskedLM.from_pretrained(dx.zoo_path("verses-mdlm"))
pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(), tokenizer)
ids = tokenizer("And it came to pass", return_tensors="pt").input_ids
output = pipe(input_ids=ids, gen_length=96, block_length=32, temperature=1.0, threshold=1.0, editing_threshold=None)
print(output.texts[0])
```

Its tokens predict themselves (logits are not shifted). `<|end|>` ends a chapter and fills what follows. It was trained on
windows of {LENGTH} tokens, three in ten of them cut to a random length.

## How likely it finds text

Upper bound on the negative log-likelihood of windows of {LENGTH} tokens ({MASKS} masks each), beside that of single
tokens drawn by their frequency. No unseen chapter was trained on.

| text | windows | nats a token | interval | bits a character | single tokens, nats a token |
|---|---|---|---|---|---|
{rows}

What it writes after "And it came to pass", one token a step, temperature 1, seed 0:

{text}

## Limits

It knows this one book, has its language and none of its sense, and must not be taken for it.

## Training

Trained from scratch by `python -m benchmarks.zoo.make_verses_mdlm make` on 1,130 chapters: each token is masked with
probability t, t uniform, and cross-entropies are weighed by 1 / t.

Data: King James Bible, in the public domain in most of the world. Licence of the weights: Apache-2.0.
"""


if __name__ == "__main__":
    _make.main(__doc__, start, make, finish)
