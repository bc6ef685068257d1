r"""How masks become tokens: quota x confidence x commit rule x re-mask rule, for all schedulers of masked language models.

A step sees the logits of one block and its tokens. It draws tokens for masks, says how sure it is of each (*confidence*) and
how many are due (*quota*), keeps some of them (*commit rule*) and may change tokens that are visible (*re-mask rule*). A
method overrides the rule that it is about; everything else, and what `LLaDA2Pipeline` and `MaskedDiffusionPipeline` call, is
here.

Tokens are drawn exactly. An explicit Gumbel-max in float32 never sees an outcome rarer than about :math:`2^{-24}` of the
likeliest, which lowers the temperature of samplers of many steps (Zheng et al. 2024, arXiv 2409.02908, section 4).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import BlockRefinementScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput

CONFIDENCES = ("probability", "margin", "entropy")


class CurrentBlock(NamedTuple):
    """What a pipeline decodes in one call of the model; of interest to caches.

    Attributes:
        rows: `(m,)`, which sequence of the run each row of `input_ids` is. With guidance, unconditional rows follow the
            conditional ones and are numbered on: row i of n has the partner n + i.
        columns: `(m, block)`, places of the current block in each row of `input_ids`; where a row's block is shorter, its
            last place is repeated.
        number: blocks before this one.
        step: steps before this one in this block.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    number: int
    step: int


# --- exact draws -----------------------------------------------------------------------------------------------------


def draw_uniform(
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device | str,
) -> torch.Tensor:
    """Uniform numbers of 53 bits on [0, 1), float64. Of a list of generators each fills one row, `shape[0]` of them."""
    if isinstance(generator, list):
        rows = [torch.rand(shape[1:], generator=one, dtype=torch.float64, device=one.device) for one in generator]
        return torch.stack(rows).to(device)
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)


def safe_categorical(
    logits: torch.Tensor, generator: torch.Generator | None = None, uniform: torch.Tensor | None = None
) -> torch.Tensor:
    """Draws from `softmax(logits)` over the last dimension, in float64: rare outcomes come as often as they should.

    The inverse of the cumulative distribution at one uniform number a draw; an outcome of probability 0 never comes.

    Args:
        logits: `(..., outcomes)` of any kind; -inf for what cannot come.
        generator: of the uniform numbers.
        uniform: the numbers themselves, `(...)` on [0, 1), in place of `generator`.

    Returns:
        Indices `(...)`, int64.

    Raises:
        FloatingPointError: a logit is NaN or +inf, or all of a draw are -inf.
    """
    if uniform is None:
        uniform = draw_uniform(tuple(logits.shape[:-1]), generator, logits.device)
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    total = cumulative[..., -1:]
    if not bool(total.isfinite().all()):
        raise FloatingPointError("The logits have NaN or infinity, or leave nothing to draw.")
    drawn = torch.searchsorted(cumulative / total, uniform.double().unsqueeze(-1), right=True)
    return drawn.squeeze(-1)


def without_mask(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Logits in float64; that of the mask, which no clean text has, is -inf."""
    logits = logits.double()
    if mask_token_id >= logits.shape[-1]:
        return logits
    return logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -math.inf)


def tempered(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Logits at a temperature; all but the `top_k` likeliest and the smallest set of probability `top_p` are -inf."""
    logits = logits / temperature
    if top_k is not None and 0 < top_k < logits.shape[-1]:
        least = torch.topk(logits, top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        probability = torch.softmax(ordered, -1)
        before = probability.cumsum(-1) - probability
        logits = torch.full_like(logits, -math.inf).scatter(-1, order, ordered.masked_fill(before >= top_p, -math.inf))
    return logits


# --- one step --------------------------------------------------------------------------------------------------------


@dataclass
class UnmaskingStep:
    """One step, as the rules of a scheduler see it. Draws are made where and when a rule asks for them.

    Attributes:
        logits: `(batch, block, vocabulary)`, as the model gave them.
        sample: `(batch, block)` tokens.
        masked: `(batch, block)` bool.
        given: `(batch, block)` bool, tokens that are not to change: those of the prompt.
        mask_token_id: the mask.
        step: from 0 to `num_steps` - 1; beyond, in steps after the last mask is gone.
        num_steps: of this block.
        quota: how many tokens are due in this step.
        threshold: confidence from which a token is committed beyond the quota; infinite for the quota alone.
        temperature, top_k, top_p: of the draws; temperature 0 takes the likeliest token.
        generator: of all random numbers.
    """

    logits: torch.Tensor
    sample: torch.Tensor
    masked: torch.Tensor
    given: torch.Tensor
    mask_token_id: int
    step: int
    num_steps: int
    quota: int
    threshold: float
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | list[torch.Generator] | None

    @property
    def is_last(self) -> bool:
        """Whether this step has to leave no masks."""
        return self.step >= self.num_steps - 1

    def random(self) -> torch.Tensor:
        """New uniform numbers `(batch, block)`, float64, of which each row has its own."""
        return draw_uniform(tuple(self.sample.shape), self.generator, self.sample.device)

    @functools.cached_property
    def for_tokens(self) -> torch.Tensor | None:
        """The numbers by which tokens are drawn; None at temperature 0, which takes none from the generator."""
        return None if self.temperature == 0 else self.random()

    def draw(self, where: torch.Tensor) -> torch.Tensor:
        """Tokens `(batch, block)`: drawn where `where` `(batch, block)` is true, and as they are elsewhere."""
        logits = without_mask(self.logits[where], self.mask_token_id)
        if self.for_tokens is None:
            drawn = logits.argmax(-1)
        else:
            drawn = safe_categorical(
                tempered(logits, self.temperature, self.top_k, self.top_p), uniform=self.for_tokens[where]
            )
        tokens = self.sample.clone()
        tokens[where] = drawn
        return tokens

    @functools.cached_property
    def tokens(self) -> torch.Tensor:
        """Tokens `(batch, block)` with all masks drawn."""
        return self.draw(self.masked)

    def use_tokens(self, tokens: torch.Tensor) -> None:
        """Commit from `tokens` `(batch, block)`, for rules that draw them by a law of their own."""
        self.tokens = tokens

    def log_probabilities(self, where: torch.Tensor) -> torch.Tensor:
        """What the model says where `where` is true, at temperature 1 and unfiltered: `(number, vocabulary)` float64."""
        return torch.log_softmax(without_mask(self.logits[where], self.mask_token_id), -1)

    def probability(self, tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Probability of `tokens` at temperature 1 where `where` is true, 0 elsewhere: `(batch, block)` float64."""
        found = self.log_probabilities(where).gather(-1, tokens[where].unsqueeze(-1)).squeeze(-1).exp()
        result = torch.zeros(self.sample.shape, dtype=torch.float64, device=found.device)
        result[where] = found
        return result


def the_highest(score: torch.Tensor, among: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Where the `count` highest of `score` among the true places of `among` are, in each row; of equals, the first.

    Args:
        score, among: `(batch, block)`.
        count: one number, or `(batch,)`; more than there are takes all.
    """
    order = score.masked_fill(~among, -math.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    limit = count.unsqueeze(-1) if isinstance(count, torch.Tensor) else count
    return among & (rank < limit)


# --- the scheduler ---------------------------------------------------------------------------------------------------


def check_number(name: str, value: object, least: float, most: float = math.inf, whole: bool = False) -> None:
    """Raise `ValueError` unless `value` is a number from `least` to `most`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        limits = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
        raise ValueError(f"`{name}` is {value!r}; allowed are {'whole numbers' if whole else 'numbers'}, {limits}.")


class UnmaskingScheduler(BlockRefinementScheduler):
    r"""Commits the tokens that the model is surest of, as many a step as are due, and all from a threshold on.

    It takes the place of `BlockRefinementScheduler` in `LLaDA2Pipeline`, and is the base of the schedulers of this package
    for masked language models. What it has beyond the stock one: draws in float64, the mask is never drawn, confidence is
    what the model says at temperature 1 (Nie et al. 2025, arXiv 2502.09992) and not of the tempered and filtered
    distribution, a choice of confidence (Ye et al. 2025, arXiv 2508.15487), a generator for each row.

    Rules that a method overrides: `quotas`, `confidence`, `commit`, `revise`.

    Args:
        block_length: tokens of a block, where a pipeline is not told.
        num_inference_steps: steps of a block, where nobody says.
        threshold: confidence from which a token is committed beyond the quota; None leaves it to the quota.
        confidence: "probability" of the drawn token, "margin" of the likeliest over the second, or negative "entropy" of
            the distribution.
    """

    order = 1
    revises = False  # whether a step may change visible tokens: then nothing is settled before its block is
    current_block: CurrentBlock | None = None

    @register_to_config
    def __init__(
        self,
        *,
        block_length: int = 32,
        num_inference_steps: int = 32,
        threshold: float | None = None,
        confidence: str = "probability",
    ) -> None:
        self.prepare(block_length, num_inference_steps)
        if threshold is not None:
            check_number("threshold", threshold, -math.inf)
        if confidence not in CONFIDENCES:
            raise ValueError(f"`confidence` is {confidence!r}; allowed are {', '.join(map(repr, CONFIDENCES))}.")

    def prepare(self, block_length: int, num_inference_steps: int) -> None:
        """What every constructor does: check and take over the sizes."""
        check_number("block_length", block_length, 1, whole=True)
        check_number("num_inference_steps", num_inference_steps, 1, whole=True)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1)
        self.due: list[int] | None = None

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        """Begin a block.

        Args:
            num_inference_steps: steps of the block.
            device: of `timesteps`, which count the steps that are left.
            block_length: its tokens; None takes that of the config.

        Raises:
            ValueError: one is no whole number above 0.
        """
        block_length = self.config.block_length if block_length is None else block_length
        check_number("num_inference_steps", num_inference_steps, 1, whole=True)
        check_number("block_length", block_length, 1, whole=True)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        self.due = self.quotas(block_length, num_inference_steps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> BlockRefinementSchedulerOutput | tuple:
        """Turn masks of a block into tokens. The arguments are those of `BlockRefinementScheduler.step`.

        Args:
            model_output: logits `(batch, block, vocabulary)` at the places of the block.
            timestep: step of this block, from 0.
            sample: tokens `(batch, block)`.
            mask_token_id: the mask.
            temperature: 0 takes the likeliest token.
            top_p, top_k: restrict the draws.
            sampling_method: "greedy" takes the likeliest token, as does temperature 0; "auto" and "multinomial" draw.
            threshold: as in the config, which None takes. Schedulers that do not commit by confidence have no use for it.
            editing_threshold, minimal_topk: taken from pipelines that pass them; only the stock scheduler has a use for
                them.
            prompt_mask: bool `(block,)` or `(batch, block)`, tokens that are not to change.
            generator: one, or a list of one a row, by which a row is the same in every batch of rows whose blocks are
                equally long.
            return_dict: False gives a tuple.

        Returns:
            The output of `BlockRefinementScheduler`. `transfer_index` are masks that became tokens;
            `editing_transfer_index` all other changes; `sampled_tokens` the tokens that were drawn, and `sampled_probs`
            their probabilities at temperature 1, both of no meaning where nothing was drawn.

        Raises:
            ValueError: `set_timesteps` was not called, or an argument is out of its range.
            FloatingPointError: the logits are not finite.
        """
        if self.due is None:
            raise ValueError("Call `set_timesteps` before `step`.")
        if mask_token_id is None:
            raise ValueError("`mask_token_id` is None; a mask is needed (uniform noise has none).")
        check_step(model_output, sample, temperature, top_p, sampling_method)
        number = int(timestep)
        given = torch.zeros_like(sample, dtype=torch.bool) if prompt_mask is None else prompt_mask.to(sample.device)
        threshold = self.config.get("threshold") if threshold is None else threshold
        now = UnmaskingStep(
            logits=model_output,
            sample=sample,
            masked=sample == mask_token_id,
            given=given.expand_as(sample),
            mask_token_id=mask_token_id,
            step=number,
            num_steps=self.num_inference_steps,
            quota=self.due[min(number, len(self.due) - 1)],
            threshold=math.inf if threshold is None else threshold,
            temperature=0.0 if sampling_method == "greedy" else temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
        committed = self.commit(now) & now.masked
        tokens = now.tokens if "tokens" in vars(now) else now.draw(committed)
        after = torch.where(committed, tokens, sample)
        after = torch.where(now.given, sample, self.revise(now, after))
        changed = after != sample
        return self.output(now, after, changed & now.masked, changed & ~now.masked, return_dict)

    def output(
        self,
        now: UnmaskingStep,
        after: torch.Tensor,
        committed: torch.Tensor,
        edited: torch.Tensor,
        return_dict: bool,
    ) -> BlockRefinementSchedulerOutput | tuple:
        """The result of a step in the form of the stock scheduler."""
        shown = torch.where(committed | edited, after, now.tokens if "tokens" in vars(now) else after)
        probabilities = now.probability(shown, (committed | edited) & (shown != now.mask_token_id))
        values = (after, committed, edited, shown, probabilities.float(), now.logits)
        if not return_dict:
            return values
        names = (
            "prev_sample", "transfer_index", "editing_transfer_index", "sampled_tokens", "sampled_probs", "pred_logits",
        )  # fmt: skip
        return BlockRefinementSchedulerOutput(**dict(zip(names, values, strict=True)))

    # --- the rules ---------------------------------------------------------------------------------------------------

    def quotas(self, block_length: int, num_inference_steps: int) -> list[int]:
        """How many tokens are due in each step; together `block_length`."""
        base, more = divmod(block_length, num_inference_steps)
        return [base + (step < more) for step in range(num_inference_steps)]

    def confidence(self, now: UnmaskingStep) -> torch.Tensor:
        """How sure the model is at each mask: `(batch, block)` float64; elsewhere without meaning."""
        kind = self.config.get("confidence", "probability")
        if kind == "probability":
            return now.probability(now.tokens, now.masked)
        log_p = now.log_probabilities(now.masked)
        if kind == "margin":
            first, second = log_p.topk(2, -1).values.exp().unbind(-1)
            value = first - second
        else:
            value = torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)
        result = torch.zeros(now.sample.shape, dtype=torch.float64, device=value.device)
        result[now.masked] = value
        return result

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        """Which masks become tokens now: `(batch, block)` bool. Tokens are drawn only there, if this looks at none."""
        confidence = self.confidence(now)
        return the_highest(confidence, now.masked, now.quota) | (now.masked & (confidence >= now.threshold))

    def revise(self, now: UnmaskingStep, after: torch.Tensor) -> torch.Tensor:
        """The block after this step, of the block `after` the commits: masks again, or other tokens."""
        return after


def check_step(
    logits: torch.Tensor,
    sample: torch.Tensor,
    temperature: float,
    top_p: float | None,
    sampling_method: str,
) -> None:
    """Raise `ValueError` where an argument of `step` is out of its range."""
    if logits.ndim != 3 or logits.shape[:2] != sample.shape:
        raise ValueError(
            f"`model_output` has shape {tuple(logits.shape)} for a `sample` of {tuple(sample.shape)}; it must be (batch, "
            "block, vocabulary)."
        )
    check_number("temperature", temperature, 0)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` is {top_p!r}; allowed are numbers above 0, up to 1.")
    if sampling_method not in ("auto", "greedy", "multinomial"):
        raise ValueError(f"`sampling_method` is {sampling_method!r}; allowed are 'auto', 'greedy' and 'multinomial'.")
