"""Training data and training of the filter of Learn2PD: a text decoded one token a step, and replayed knowing its end."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..schedulers._decode_filter import ParallelDecodeFilter
from ..schedulers._unmasking import UnmaskingScheduler, UnmaskingStep
from ..schedulers.learned_parallel import highest_confidence


class OracleScheduler(UnmaskingScheduler):
    """Commits all tokens that are already those of the final text: the fewest steps that lead to it (section 3.2).

    Where no likeliest token is right, the rest of the block is taken from the final text.

    Attributes:
        final: `(batch, length)`, the rows as they end.
        records: pairs `(rows, block)` of the confidences of a step and of which likeliest tokens were right.
    """

    revises = False
    final: torch.Tensor

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        assert self.current_block is not None
        count = len(now.sample)  # with guidance, as many unconditional rows follow
        rows, columns = self.current_block.rows[:count], self.current_block.columns[:count]
        self.right = self.final[rows].gather(1, columns)
        likeliest = torch.where(now.masked, now.tokens, now.logits.argmax(-1))
        correct = likeliest == self.right
        self.records.append((highest_confidence(now), correct))
        return now.masked & correct

    def revise(self, now: UnmaskingStep, after: torch.Tensor) -> torch.Tensor:
        stuck = ((after != now.sample) & now.masked).sum(1, keepdim=True) == 0
        return torch.where(stuck & now.masked, self.right, after)

    @property
    def records(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self.__dict__.setdefault("_records", [])


def replay(pipe: Any, final: torch.Tensor, prompt_length: int, block_length: int, **options: Any) -> Any:
    """Decode `final` `(batch, length)` again, with the oracle: the pipeline's output, and the oracle with its records."""
    oracle, ours = OracleScheduler(), copy.copy(pipe)
    oracle.final = final
    ours.scheduler = oracle
    output = ours(
        input_ids=final[:, :prompt_length], gen_length=final.shape[1] - prompt_length, block_length=block_length,
        temperature=0.0, step_cache=False, stop_at_eos=False, output_type="seq", **options,
    )  # fmt: skip
    return output, oracle


def fit_parallel_filter(
    pipe: Any,
    input_ids: torch.Tensor,
    gen_length: int,
    block_length: int = 32,
    hidden_size: int | None = None,
    steps: int = 2000,
    learning_rate: float = 3e-3,
    seed: int = 0,
    **options: Any,
) -> ParallelDecodeFilter:
    """Train the filter for a model, on the model's own texts after some prompts.

    Each prompt is decoded greedily one token a step, then replayed; of each step of the replay the confidences of the block
    are an input, and which of its likeliest tokens are final the target.

    Args:
        pipe: a `MaskedDiffusionPipeline`; its scheduler is not used and not changed.
        input_ids: prompts `(batch, length)`.
        gen_length, block_length: of the texts; the first a multiple of the second.
        hidden_size: of the filter.
        steps, learning_rate: of AdamW, on all records at once.
        seed: of the filter's first weights.
        options: other arguments of the pipeline, such as `mask_token_id`.

    Raises:
        ValueError: `gen_length` is no multiple of `block_length`, or `options` have what gives rows of different lengths or
            blocks that are cut.
    """
    for name in ("attention_mask", "num_texts_per_prompt", "block_policy"):
        if name in options:
            raise ValueError(
                f"`{name}` is given; prompts must be of one length, and are decoded once, in equal blocks."
            )
    if pipe.config.attention == "block_causal" and input_ids.shape[1] % block_length:
        raise ValueError(
            f"`input_ids` has {input_ids.shape[1]} tokens a row; a block-causal model needs a multiple of `block_length`, "
            f"{block_length}."
        )
    if block_length < 1 or gen_length % block_length:
        raise ValueError(f"`gen_length` is {gen_length}; it must be a multiple of `block_length`, {block_length}.")
    plain = copy.copy(pipe)
    plain.scheduler = UnmaskingScheduler()
    texts = plain(
        input_ids=input_ids, gen_length=gen_length, block_length=block_length, temperature=0.0, stop_at_eos=False,
        output_type="seq", **options,
    ).sequences  # fmt: skip
    final = torch.cat([input_ids.to(texts.device), texts], 1)
    _, oracle = replay(pipe, final, input_ids.shape[1], block_length, **options)
    confidence, correct = (torch.cat(part) for part in zip(*oracle.records, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ParallelDecodeFilter(block_length, hidden_size)
    made.to(confidence.device)
    optimizer = torch.optim.AdamW(made.parameters(), lr=learning_rate)
    for _ in tqdm(range(steps), desc="Filter", delay=2.0, leave=False):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(made(confidence), correct.float()).backward()
        optimizer.step()
    return made.eval()
