"""HEX (Lee et al. 2025, arXiv 2510.05040): the same question decoded with several block lengths, and a vote.

A masked diffusion language model is trained on all orders, so that each block length of semi-autoregressive decoding acts as
an expert of its own. Every length draws several answers, and the answer that most of them gave wins.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import BlockRefinementScheduler
from diffusers.utils import BaseOutput

from ._masked_diffusion import MaskedDiffusionPipeline

TIES = ("smallest_block", "none")


@dataclass
class HEXOutput(BaseOutput):
    """Output of `HEXPipeline`. Samples are ordered by block length, as given, and then by seed.

    Attributes:
        sequences: int64 `(prompts, samples, gen_length)`.
        answers: of each prompt, the one that won; None where nothing could be read, or, with `tie="none"`, at a tie.
        votes: of each prompt, how often each answer was given.
        texts: of each prompt, all samples; None without a tokenizer.
        block_lengths: of each sample.
        num_calls: of each prompt, calls of the model for all its samples.
    """

    sequences: torch.Tensor
    answers: list[Any]
    votes: list[dict[Any, int]]
    texts: list[list[str]] | None
    block_lengths: list[int]
    num_calls: list[int]


def vote(answers: Sequence[Any], block_lengths: Sequence[int], tie: str = "smallest_block") -> Any:
    """The answer that was given most often; the order of the answers does not matter.

    Args:
        answers: None does not vote.
        block_lengths: with which each was decoded.
        tie: of the answers given equally often, "smallest_block" takes the one that was given with the smallest blocks (and
            of those the first in order), "none" takes none.
    """
    given: dict[Any, list[int]] = {}
    for answer, length in zip(answers, block_lengths, strict=True):
        if answer is not None:
            given.setdefault(answer, []).append(length)
    if not given:
        return None
    most = max(map(len, given.values()))
    best = [answer for answer, lengths in given.items() if len(lengths) == most]
    if len(best) > 1 and tie == "none":
        return None
    return min(best, key=lambda answer: (sorted(given[answer]), answer))


def whole_text(text: Any) -> Any:
    """The text without the blanks around it, or None where nothing is left; tokens as they are."""
    return (text.strip() or None) if isinstance(text, str) else text


class HEXPipeline(MaskedDiffusionPipeline):
    """Decodes each prompt with several block lengths and seeds, and lets the answers vote.

    The components are those of `MaskedDiffusionPipeline`, the scheduler one of this package: `UnmaskingScheduler` is what the
    paper decodes with. The model must
    have been trained on all orders: one that is block-causal knows one block length.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        messages: list | None = None,
        input_ids: torch.Tensor | list[torch.Tensor] | None = None,
        block_lengths: Sequence[int] = (8, 16, 32, 64, 128),
        seeds_per_block: int = 5,
        extractor: Callable[[Any], Any] = whole_text,
        tie: str = "smallest_block",
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> HEXOutput | tuple:
        """Answer prompts.

        Args:
            prompt, messages, input_ids: as in `MaskedDiffusionPipeline`.
            block_lengths: lengths of the blocks, the experts; those above `gen_length` are one block.
            seeds_per_block: answers of each.
            extractor: gives the answer of a text (a tuple of tokens without a tokenizer): anything that can be hashed and
                sorted, or None where there is none.
            tie: "smallest_block" or "none", see `vote`.
            generator: of which the seeds of all samples are drawn.
            return_dict: False gives a tuple.
            options: other arguments of `MaskedDiffusionPipeline`, such as `gen_length` and `temperature`, which should be
                above 0: at 0 all seeds are the same.

        Raises:
            ValueError: an argument is out of its range.
        """
        if not block_lengths or not all(isinstance(length, int) and length >= 1 for length in block_lengths):
            raise ValueError(f"`block_lengths` is {block_lengths!r}; whole numbers of at least 1 are needed.")
        if not isinstance(seeds_per_block, int) or seeds_per_block < 1:
            raise ValueError(f"`seeds_per_block` is {seeds_per_block!r}; a whole number of at least 1 is needed.")
        if tie not in TIES:
            raise ValueError(f"`tie` is {tie!r}; allowed are {' and '.join(map(repr, TIES))}.")
        if type(self.scheduler) is BlockRefinementScheduler:
            raise ValueError(
                "`scheduler` is a BlockRefinementScheduler, which takes no generator a row; take `UnmaskingScheduler`."
            )
        allowed = set(inspect.signature(MaskedDiffusionPipeline.__call__).parameters)
        for name in options:
            if name in (
                "block_length",
                "block_policy",
                "num_texts_per_prompt",
                "output_type",
                "streamer",
                "attention_mask",
            ):
                raise ValueError(f"`{name}` is given; `HEXPipeline` does not take it.")
            if name not in allowed:
                raise ValueError(f"`{name}` is no argument of `MaskedDiffusionPipeline`.")
        kind = "seq" if self.tokenizer is None else "text"
        source = {"prompt": prompt, "messages": messages, "input_ids": input_ids}
        count = self._count(**source)
        device = "cpu" if generator is None else generator.device
        tokens, texts, calls = [], [], torch.zeros(count, dtype=torch.long)
        for length in block_lengths:
            seeds = torch.randint(2**63 - 1, (count * seeds_per_block,), generator=generator, device=device)
            made = super().__call__(
                **source,
                block_length=length,
                num_texts_per_prompt=seeds_per_block,
                generator=[torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()],
                output_type=kind,
                **options,
            )
            tokens.append(made.sequences.unflatten(0, (count, seeds_per_block)))
            texts.append(made.texts)
            calls += torch.tensor(made.num_calls).view(count, seeds_per_block).sum(1)
        sequences = torch.cat(tokens, 1)
        lengths = [length for length in block_lengths for _ in range(seeds_per_block)]
        said = [
            [text for made in texts for text in made[i * seeds_per_block : (i + 1) * seeds_per_block]]
            if kind == "text"
            else [tuple(row) for row in sequences[i].tolist()]
            for i in range(count)
        ]
        read = [[extractor(text) for text in row] for row in said]
        answers = [vote(row, lengths, tie) for row in read]
        votes = [dict(Counter(answer for answer in row if answer is not None).most_common()) for row in read]
        values = (sequences, answers, votes, said if kind == "text" else None, lengths, calls.tolist())
        return HEXOutput(*values) if return_dict else values

    def _count(self, prompt: Any, messages: Any, input_ids: Any) -> int:
        """How many prompts there are."""
        if isinstance(prompt, list):
            return len(prompt)
        if messages is not None:
            return 1 if isinstance(messages[0], dict) else len(messages)
        if input_ids is None or (isinstance(input_ids, torch.Tensor) and input_ids.ndim == 1):
            return 1
        return len(input_ids)
