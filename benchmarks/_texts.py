"""What benchmarks of text samplers share: the zoo's language model, trainings from it, prompts that it never saw, and a judge.

The judge is no network: an interpolated trigram model of the chapters that the language model was trained on. It knows nothing
of masks, and is asked about text that follows a prompt. A low negative log-likelihood alone says little, since it is low for
text that repeats itself, so the entropy of the tokens stands beside it.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer

import diffusers_ext as dx
from benchmarks._trainings import trained_once, training_folder, write_lines
from benchmarks.data import load_kjv
from diffusers_ext.metrics.text import token_entropy

MODEL = "verses-mdlm"
PROMPT = 8  # tokens


@functools.cache
def verses() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    folder = dx.zoo_path(MODEL)
    return AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def pipeline(scheduler: Any, model: Any = None) -> Any:
    """Our pipeline with a scheduler on the zoo's model, or on another with its tokenizer."""
    zoo, tokenizer = verses()
    pipe = dx.MaskedDiffusionPipeline(zoo if model is None else model, scheduler, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fine_tuned(main: Callable[[list[str]], None], settings: Mapping[str, Any], **own: Any) -> Path:
    """Folder of what a training script makes of the zoo's model and the chapters that it was trained on.

    Trains, or goes on, where that was not done with these sources and settings. Checkpoints are kept until it is finished.

    Args:
        main: of the script, `train_<key>`.
        settings: its arguments in all trainings of the benchmark.
        own: those of this training, its seed among them.
    """
    module = main.__module__
    work = training_folder(module.rpartition("train_")[2], module, dict(settings))
    folder = work / "-".join(f"{name}_{value}" for name, value in own.items())
    texts = write_lines(work / "texts.jsonl", [json.dumps({"text": text}) for text in load_kjv("generator")])
    values = {
        "pretrained_model_name_or_path": dx.zoo_path(MODEL), "train_data_dir": texts, **settings, **own, "checkpoints_total_limit": 1
    }  # fmt: skip
    return trained_once(main, folder, values)


@functools.cache
def unseen(length: int, count: int | None = None) -> torch.Tensor:
    """Windows `(n, length)` of chapters that the model never saw: all, or `count` that are spread over them."""
    if count is not None:
        windows = unseen(length)
        return windows[torch.linspace(0, len(windows) - 1, count).long()]
    ids = verses()[1](load_kjv("reference")).input_ids
    return torch.tensor([row[i : i + length] for row in ids for i in range(0, len(row) - length + 1, length)])


def prompts(count: int, length: int) -> torch.Tensor:
    """Beginnings `(count, PROMPT)` of unseen windows of `length`, spread over all chapters."""
    return unseen(length, count)[:, :PROMPT]


def prompts_near_ends(count: int, left: int) -> torch.Tensor:
    """`(count, PROMPT)` tokens of unseen chapters, after which `left` tokens are left to the chapter's end."""
    ids = [row for row in verses()[1](load_kjv("reference")).input_ids if len(row) >= PROMPT + left]
    chosen = torch.linspace(0, len(ids) - 1, count).long().tolist()
    return torch.tensor([ids[i][-PROMPT - left :][:PROMPT] for i in chosen])


class TrigramJudge:
    """Witten-Bell interpolation of trigrams, bigrams, unigrams and equal probability."""

    def __init__(self, rows: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.after: dict[tuple[int, ...], Counter] = defaultdict(Counter)
        for row in rows:
            for i, token in enumerate(row):
                for order in range(min(i, 2) + 1):
                    self.after[tuple(row[i - order : i])][token] += 1

    @classmethod
    @functools.cache
    def of_the_training_data(cls) -> TrigramJudge:
        tokenizer = verses()[1]
        return cls(tokenizer(load_kjv("generator")).input_ids, len(tokenizer))

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        seen = self.after.get(context)
        lower = self.probability(token, context[1:]) if context else 1 / self.vocabulary
        if not seen:
            return lower
        total, kinds = seen.total(), len(seen)
        return (seen[token] + kinds * lower) / (total + kinds)

    def nats_per_token(self, rows: torch.Tensor, given: int) -> list[float]:
        """Negative log-likelihood of each of `rows` `(n, length)` after its first `given` tokens."""
        result = []
        for row in rows.tolist():
            nats = [-math.log(self.probability(row[i], tuple(row[i - 2 : i]))) for i in range(given, len(row))]
            result.append(sum(nats) / len(nats))
        return result


def judge(starts: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """The judge's negative log-likelihood a token of each of `tokens` `(n, length)` after its prompt in `starts`."""
    return TrigramJudge.of_the_training_data().nats_per_token(torch.cat([starts, tokens], 1), starts.shape[1])


def means(columns: Iterable[Sequence[float]]) -> list[float]:
    """Of each text or window, over trainings: `columns` has a row for each training."""
    return [sum(row) / len(row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Decoder:
    """A way to decode: a scheduler and the arguments of the call."""

    scheduler: Any
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoded:
    """What a decoder made of the prompts.

    Attributes:
        tokens: `(n, gen_length)`.
        nats: of each text, per token, by the judge.
        entropy: of the tokens of each text, in nats.
        calls: of the model, of each text.
        blocks: lengths of the blocks of each text; empty where the pipeline has none.
    """

    tokens: torch.Tensor
    nats: list[float]
    entropy: list[float]
    calls: list[int]
    blocks: list[list[int]]

    @property
    def row(self) -> list[float]:
        """For a table: the means of judge, entropy and calls."""
        return [sum(values) / len(values) for values in (self.nats, self.entropy, self.calls)]


COLUMNS = ["judge, nats a token", "entropy of tokens, nats", "calls a text"]


def write(
    name: str,
    pipe: Any,
    count: int,
    gen_length: int,
    starts: torch.Tensor | None = None,
    batch: int = 32,
    **call: Any,
) -> Decoded:
    """Texts that a pipeline writes after `count` prompts, or after `starts`; text i is drawn with seed i.

    Args:
        name: said beside the progress bar.
        batch: texts at once.
        call: more arguments of the pipeline's call; one that has a row a text takes a `batch` of `count`.
    """
    starts = prompts(count, PROMPT + gen_length) if starts is None else starts
    pipe.set_progress_bar_config(disable=True)
    tokens, calls, blocks = [], [], []
    for first in tqdm(range(0, count, batch), desc=name):
        ids = starts[first : first + batch]
        found = pipe(
            input_ids=ids,
            gen_length=gen_length,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(ids))],
            stop_at_eos=False,
            output_type="seq",
            **call,
        )
        tokens.append(found.sequences)
        calls += found.num_calls
        blocks += getattr(found, "block_lengths", [])
    made = torch.cat(tokens)
    return Decoded(made, judge(starts, made), token_entropy(made).tolist(), calls, blocks)


def decode(
    name: str, decoder: Decoder, count: int, gen_length: int, starts: torch.Tensor | None = None, batch: int = 32
) -> Decoded:
    """`write` with the zoo's model."""
    return write(name, pipeline(decoder.scheduler), count, gen_length, starts, batch, **decoder.call)
