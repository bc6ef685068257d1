"""Text by masked diffusion language models: LLaDA, Dream, SDAR, MDLM, BERT and relatives, with any unmasking scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import BlockRefinementScheduler, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput

from ..schedulers._unmasking import CurrentBlock, check_number, without_mask
from ._block_policy import BlockPolicy, FixedBlocks

ATTENTIONS = ("padding", "full", "block_causal")


@dataclass
class MaskedDiffusionOutput(BaseOutput):
    """Output of `MaskedDiffusionPipeline`.

    Attributes:
        sequences: int64 `(batch, gen_length)`, what was generated after the prompts; or, where a prompt had masks to fill,
            all rows whole, filled up on the right.
        texts: `sequences` as texts, up to the first end-of-text token that was generated; None for `output_type="seq"`.
        num_calls: for each row, the calls of the model that it took part in. With guidance each is of two rows.
        block_lengths: for each row, the lengths of its blocks.
    """

    sequences: torch.Tensor
    texts: list[str] | None
    num_calls: list[int]
    block_lengths: list[list[int]]


class MaskedDiffusionPipeline(DiffusionPipeline):
    """Generates and fills in text with a masked language model, block by block or all at once.

    The model is anything called as `model(input_ids=, attention_mask=, position_ids=).logits`; arguments that its `forward`
    does not name are left out. Every row begins at the first column and is filled up on the right, so that its positions
    are 0, 1, 2, ... whatever else is in the batch. Every mask in a row is decoded: those in the prompt (infilling) and the
    `gen_length` that follow it.

    **Who wants to know what is going on** (a cache on the model, for example) finds it here, and in nothing else:

    - A run begins where `self.progress_bar(total=)` is called, with the largest number of steps that there can be, and
      ends where the bar is left, by an exception too: `enable` makes that known to what is on.
    - The model gets `input_ids`, `attention_mask` and `position_ids` by name, and nothing more, except `timesteps` where it
      is conditioned on the time (`config.time_conditioning`) and the scheduler tells it (`model_time(step)`). Which tokens
      changed is the difference to the call before. Rows whose input is as before, the time too, are left out of a call
      (`step_cache`), and so are rows that are done, so that the rows of `input_ids` may become fewer and more again.
    - From a call of the model until the scheduler's step after it is done, `pipe.scheduler.current_block` is a
      `CurrentBlock`: which sequence each row is, the columns of the current block, how many blocks and steps came before.
      Else it is None or not there, in callbacks too. Where a policy
      sizes blocks, the columns of a block's first call are those of the policy's window, of which the block is a part
      from the left.
    - With `attention="block_causal"` the columns after the current block are not passed; else all are.

    Args:
        model: the network.
        scheduler: a `BlockRefinementScheduler`, such as all unmasking schedulers of this package.
        tokenizer: needed for texts.
        shift_logits: whether the logits at a place predict the token after it (Dream), and not the one under it.
        attention: what the model takes as `attention_mask`. "padding": `(batch, length)` of 1 and 0 (LLaDA, BERT). "full":
            bool `(batch, 1, length, length)`, true where a query sees a key, as `scaled_dot_product_attention` takes it
            (Dream). "block_causal": the same where each block also does not see later ones (SDAR, LLaDA2); blocks then
            begin at multiples of `block_length`.

    Raises:
        ValueError: `attention` is none of these.
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = ["sequences", "changed"]

    def __init__(
        self,
        model: Any,
        scheduler: BlockRefinementScheduler,
        tokenizer: Any = None,
        shift_logits: bool = False,
        attention: str = "padding",
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"`attention` is {attention!r}; allowed are {', '.join(map(repr, ATTENTIONS))}.")
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)
        self.register_to_config(shift_logits=shift_logits, attention=attention)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last run; during a run, the most that there can be."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop; masks are left then."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        messages: list | None = None,
        input_ids: torch.Tensor | list[torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        gen_length: int | None = None,
        block_length: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        editing_threshold: float | None = None,
        max_post_steps: int = 0,
        num_texts_per_prompt: int = 1,
        block_policy: BlockPolicy | None = None,
        step_cache: bool = True,
        stop_at_eos: bool = True,
        eos_token_id: int | None = None,
        mask_token_id: int | None = None,
        use_chat_template: bool = True,
        add_special_tokens: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        streamer: Any = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> MaskedDiffusionOutput | tuple:
        r"""Generate text.

        Args:
            prompt: one or several, of any lengths; the tokenizer's mask token in it is filled in. None begins with nothing.
            messages: a chat for the tokenizer's template, or a list of chats, in place of `prompt`.
            input_ids: tokens `(batch, length)` or a list of `(length,)`, in place of `prompt`.
            attention_mask: `(batch, length)`, 0 for padding in `input_ids`, on either side.
            gen_length: tokens to generate after each prompt; None is 0 where a prompt has masks, else 128.
            block_length: tokens of a block; None decodes everything in one block.
            num_inference_steps: steps of each block; None is one a token.
            guidance_scale: g of :math:`u + g (c - u)`, c the logits and u those with the prompt under masks (Nie et al.
                2025, arXiv 2502.09992, equation 16, whose w is g - 1). 1 is no guidance.
            temperature, top_p, top_k: of the draws; temperature 0 takes the likeliest token.
            threshold, editing_threshold: for schedulers that commit or edit by confidence; None leaves it to them.
            max_post_steps: steps for which tokens of a full block may still change; they end where nothing does.
            num_texts_per_prompt: texts of each prompt.
            block_policy: sizes of the blocks, in place of `block_length`.
            step_cache: whether rows whose tokens did not change since the last call of the model go without a new one.
                A model that is not told the time would give the same.
            stop_at_eos: whether a row ends with its first end-of-text token that has no masks before it; what follows
                becomes end-of-text too.
            eos_token_id, mask_token_id: None takes those of the tokenizer, or the model.
            use_chat_template: whether a text prompt is a user's message where the tokenizer has a chat template.
            add_special_tokens: whether the tokenizer adds its special tokens to a prompt.
            generator: one, or a list of one a row, by which a row is the same in every batch of rows whose blocks are
                equally long.
            streamer: such as `transformers.TextStreamer`; gets the tokens of a single row as they are settled from the
                left.
            output_type: "text" or "seq".
            return_dict: False gives a tuple.
            callback_on_step_end: called as `(pipe, step, timestep, tensors) -> dict` after each step.
            callback_on_step_end_tensor_inputs: of "sequences" `(batch, length)`, which it may give back changed, and
                "changed", where this step changed them.

        Raises:
            ValueError: an argument is out of its range, or fits neither model nor tokenizer.
            RuntimeError: the scheduler left masks.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        wanted = ["sequences"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        mask_token_id = self._token("mask_token_id", mask_token_id)
        eos_token_id = self._token("eos_token_id", eos_token_id)
        if mask_token_id is None:
            raise ValueError("`mask_token_id` is None, and neither the tokenizer nor the model has one.")
        self._check(locals())
        rows = self._rows(prompt, messages, input_ids, attention_mask, use_chat_template, add_special_tokens)
        rows = [row for row in rows for _ in range(num_texts_per_prompt)]
        infill = any(mask_token_id in row for row in rows)
        gen_length = (0 if infill else 128) if gen_length is None else gen_length
        self._check_rows(rows, gen_length, mask_token_id, generator, streamer)

        text = _Text(rows, gen_length, mask_token_id, eos_token_id, self._execution_device)
        policy = FixedBlocks(block_length) if block_policy is None else block_policy
        if self.config.attention == "block_causal":
            text.begin = text.begin // block_length * block_length
        decoder = _Decoder(self, text, policy, block_length, guidance_scale, step_cache)
        decoder.settings = {
            "mask_token_id": mask_token_id,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "sampling_method": "greedy" if temperature == 0 else "multinomial",
            "threshold": threshold,
            "editing_threshold": editing_threshold,
        }
        self._num_timesteps = decoder.most_steps(num_inference_steps, max_post_steps)
        self._interrupt = False
        revises = decoder.revises or self._edits(editing_threshold)
        stream = _Stream(streamer, text, settles_early=max_post_steps == 0 and not revises)
        done = 0
        try:
            with self.progress_bar(total=self._num_timesteps) as bar:
                while not self._interrupt and decoder.next_block(num_inference_steps):
                    for step in range(decoder.num_steps + max_post_steps):
                        before = text.tokens
                        if not decoder.step(step, generator):
                            if step >= decoder.num_steps or max_post_steps == 0:
                                break
                            continue
                        if stop_at_eos and not revises:
                            text.stop()
                        if callback_on_step_end is not None:
                            now = {"sequences": text.tokens, "changed": text.tokens != before}
                            given = {name: now[name] for name in wanted}
                            text.tokens = callback_on_step_end(self, done, step, given).pop("sequences", text.tokens)
                        stream.settled(text.first_mask)
                        done += 1
                        bar.update()
                        if self._interrupt:
                            break
                    if not self._interrupt:
                        decoder.check_filled()
                    if stop_at_eos:
                        text.stop()
                    stream.settled(text.first_mask, block_is_done=True)
                bar.update(max(0, self._num_timesteps - done))
        finally:
            self.scheduler.__dict__.pop("current_block", None)
        stream.end()
        self._num_timesteps = done
        sequences = text.tokens if infill else text.generated(gen_length)
        texts = None
        if output_type == "text":
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in text.up_to_eos(infill)]
        self.maybe_free_model_hooks()
        calls = text.calls.tolist()
        lengths = [[length for length in row if length] for row in torch.stack(text.blocks, 1).tolist()]
        if not return_dict:
            return sequences, texts, calls, lengths
        return MaskedDiffusionOutput(sequences, texts, calls, lengths)

    def _edits(self, editing_threshold: float | None) -> bool:
        """Whether the stock scheduler may change tokens of a block that it has settled."""
        if type(self.scheduler) is not BlockRefinementScheduler:
            return False
        given = self.scheduler.config.editing_threshold if editing_threshold is None else editing_threshold
        return given is not None and given > 0

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _token(self, name: str, given: int | None) -> int | None:
        """A special token: what the caller says, or the first that tokenizer, config and model have."""
        for place in (self.tokenizer, getattr(self.model, "config", None), self.model):
            if given is None and isinstance(getattr(place, name, None), int):
                given = getattr(place, name)
        return given

    def _check(self, given: dict[str, Any]) -> None:
        """Raise `ValueError` for arguments of a call that are out of range. `given` are the locals of `__call__`."""
        if sum(given[name] is not None for name in ("prompt", "messages", "input_ids")) > 1:
            raise ValueError("Give one of `prompt`, `messages` and `input_ids`.")
        if given["messages"] is not None and not given["messages"]:
            raise ValueError("`messages` is empty; a chat, or a list of chats, is needed.")
        if given["output_type"] not in ("text", "seq"):
            raise ValueError(f"`output_type` is {given['output_type']!r}; allowed are 'text' and 'seq'.")
        for name in ("prompt", "messages"):
            if given[name] is not None and self.tokenizer is None:
                raise ValueError(f"`{name}` is given, and the pipeline has no tokenizer; give `input_ids`.")
        if given["output_type"] == "text" and self.tokenizer is None:
            raise ValueError("`output_type` is 'text', and the pipeline has no tokenizer; 'seq' gives tokens.")
        for name, least in (("gen_length", 0), ("block_length", 1), ("num_inference_steps", 1), ("top_k", 1)):
            if given[name] is not None:
                check_number(name, given[name], least, whole=True)
        for name, least in (("max_post_steps", 0), ("num_texts_per_prompt", 1)):
            check_number(name, given[name], least, whole=True)
        for name in ("guidance_scale", "temperature"):
            check_number(name, given[name], 0)
        if given["top_p"] is not None and not 0 < given["top_p"] <= 1:
            raise ValueError(f"`top_p` is {given['top_p']!r}; allowed are numbers above 0, up to 1.")
        unknown = [name for name in given["wanted"] if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; allowed are {self._callback_tensor_inputs}."
            )
        policy = given["block_policy"]
        if policy is not None and not isinstance(policy, BlockPolicy) and not hasattr(policy, "lengths"):
            raise ValueError(f"`block_policy` is {policy!r}; a `BlockPolicy` is needed.")
        if policy is not None and given["block_length"] is not None:
            raise ValueError("Give one of `block_length` and `block_policy`.")
        if self.config.get("attention") == "block_causal" and given["block_length"] is None:
            raise ValueError("`block_length` is None; a block-causal model needs the one that it was trained with.")

    def _rows(
        self,
        prompt: str | list[str] | None,
        messages: list | None,
        input_ids: torch.Tensor | list[torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        use_chat_template: bool,
        add_special_tokens: bool,
    ) -> list[list[int]]:
        """The tokens of each prompt, without padding."""
        if attention_mask is not None and not isinstance(input_ids, torch.Tensor):
            raise ValueError("`attention_mask` is given without `input_ids` of shape (batch, length).")
        if input_ids is not None:
            if isinstance(input_ids, torch.Tensor) and input_ids.ndim == 1:
                input_ids = input_ids[None]
            if any(one.is_floating_point() or one.ndim != 1 for one in input_ids):
                raise ValueError("`input_ids` must hold integers, (batch, length), or be a list of (length,).")
            if not isinstance(attention_mask, torch.Tensor) or not isinstance(input_ids, torch.Tensor):
                return [one.tolist() for one in input_ids]
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` has shape {tuple(attention_mask.shape)} for `input_ids` of "
                    f"{tuple(input_ids.shape)}."
                )
            return [one[kept.bool()].tolist() for one, kept in zip(input_ids, attention_mask, strict=True)]
        prompts = [""] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        chats = None
        if messages is not None:
            chats = [messages] if isinstance(messages[0], dict) else messages
        elif prompt is not None and use_chat_template and getattr(self.tokenizer, "chat_template", None):
            chats = [[{"role": "user", "content": one}] for one in prompts]
        if chats is not None:
            made = [
                self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
                for chat in chats
            ]
            return [list(one["input_ids"]) for one in made]
        if prompt is None:
            return [[]]
        return [list(self.tokenizer(one, add_special_tokens=add_special_tokens)["input_ids"]) for one in prompts]

    def _check_rows(
        self, rows: list[list[int]], gen_length: int, mask_token_id: int, generator: Any, streamer: Any
    ) -> None:
        if not rows:
            raise ValueError("There are no prompts.")
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1 and not _named(self.model)("attention_mask"):
            raise ValueError(
                f"The prompts have {lengths} tokens, and the model takes no `attention_mask`; give prompts of one length."
            )
        if gen_length == 0 and not all(mask_token_id in row for row in rows):
            raise ValueError("`gen_length` is 0, and a prompt has no masks: there is nothing to fill.")
        if isinstance(generator, list) and len(generator) != len(rows):
            raise ValueError(f"`generator` has {len(generator)} generators for {len(rows)} rows; one each is needed.")
        if isinstance(generator, list) and type(self.scheduler) is BlockRefinementScheduler:
            raise ValueError("`generator` is a list, and BlockRefinementScheduler takes one generator.")
        if streamer is not None and len(rows) > 1:
            raise ValueError(f"`streamer` is given for {len(rows)} rows; it can follow one.")
        longest = lengths[-1] + gen_length
        limit = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"`gen_length` is {gen_length}, which makes {longest} tokens with the longest prompt; the model takes "
                f"{limit}."
            )


# --- a run -----------------------------------------------------------------------------------------------------------


class _Text:
    """The rows while they are decoded.

    Attributes:
        tokens: `(n, length)`; each step makes a new one.
        given: where the prompts' own tokens are, and everything after a row's end.
        begin: `(n,)`, where the current block of each row begins.
        end: `(n,)`, where each row ends.
        finished: `(n,)`, whether the row has come to its end of text.
    """

    def __init__(
        self, rows: list[list[int]], gen_length: int, mask: int, eos: int | None, device: torch.device
    ) -> None:
        self.mask, self.eos = mask, eos
        length = max(len(row) for row in rows) + gen_length
        filler = eos if eos is not None and eos != mask else int(mask == 0)
        tokens = [row + [mask] * gen_length + [filler] * (length - gen_length - len(row)) for row in rows]
        self.tokens = torch.tensor(tokens, dtype=torch.long, device=device)
        self.end = torch.tensor([len(row) + gen_length for row in rows], device=device)
        self.places = torch.arange(length, device=device)
        self.given = self.tokens != mask
        self.begin = self.given.long().argmin(1)
        self.gen_length = gen_length
        self.finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.calls = torch.zeros_like(self.end)
        self.blocks: list[torch.Tensor] = []  # lengths (n,) of each block, 0 in rows that are done

    @property
    def first_mask(self) -> torch.Tensor:
        """`(n,)`: the first mask of each row, or its end."""
        return torch.where(self.tokens == self.mask, self.places, self.end[:, None]).amin(1)

    def stop(self) -> None:
        """Finish the rows that have an end-of-text token with no masks before it; all after it becomes end-of-text."""
        if self.eos is None:
            return
        settled = self.places < self.first_mask[:, None]
        ends = (self.tokens == self.eos) & ~self.given & settled
        self.finished = self.finished | ends.any(1)
        after = (ends.cumsum(1) > 0) & ~self.given
        self.tokens = torch.where(after, self.eos, self.tokens)

    def generated(self, gen_length: int) -> torch.Tensor:
        """The last `gen_length` tokens of each row."""
        columns = (self.end - gen_length)[:, None] + torch.arange(gen_length, device=self.end.device)
        return self.tokens.gather(1, columns)

    def up_to_eos(self, whole: bool) -> list[list[int]]:
        """What each row says: all of it, or what follows the prompt."""
        made = (self.tokens == (-1 if self.eos is None else self.eos)) & ~self.given
        stop = torch.where(made, self.places, self.end[:, None]).amin(1).tolist()
        start = [0] * len(stop) if whole else (self.end - self.gen_length).tolist()
        return [row[i:j] for row, i, j in zip(self.tokens.tolist(), start, stop, strict=True)]


class _Decoder:
    """Decodes a `_Text` block by block: which rows need the model, and what the scheduler makes of its logits."""

    def __init__(
        self,
        pipe: MaskedDiffusionPipeline,
        text: _Text,
        policy: BlockPolicy,
        block_length: int | None,
        guidance_scale: float,
        step_cache: bool,
    ) -> None:
        self.pipe, self.text, self.policy = pipe, text, policy
        self.guidance_scale, self.step_cache = guidance_scale, step_cache
        self.causal_block = block_length if pipe.config.attention == "block_causal" else None
        self.revises = bool(getattr(pipe.scheduler, "revises", False))
        self.takes, self.scheduler_takes = _named(pipe.model), _named(pipe.scheduler)
        timed = getattr(getattr(pipe.model, "config", None), "time_conditioning", False)
        self.time = getattr(pipe.scheduler, "model_time", None) if timed else None
        self.first = text.begin
        self.settings: dict[str, Any] = {}
        self.number, self.num_steps = -1, 0
        self.seen: torch.Tensor | None = None  # tokens that `logits` are of
        self.lengths, self.running = torch.zeros_like(text.end), ~text.finished
        self.columns, self.inside, self.logits = text.tokens, text.given, torch.empty(0)  # made for each block
        self.unsettled = torch.ones_like(text.finished)

    def most_steps(self, num_inference_steps: int | None, max_post_steps: int) -> int:
        """The largest number of steps that there can be."""
        total = int((self.text.end - self.text.begin).max())
        if not isinstance(self.policy, FixedBlocks):
            return total * ((num_inference_steps or 1) + max_post_steps)
        length = self.policy.block_length or total
        full, rest = divmod(total, length)
        steps = [self.policy.steps(0, each, num_inference_steps) for each in [length] * full + [rest] * (rest > 0)]
        return sum(steps) + len(steps) * max_post_steps

    # --- blocks ------------------------------------------------------------------------------------------------------

    def next_block(self, num_inference_steps: int | None) -> bool:
        """Go on to the next block; False where there is none."""
        text = self.text
        if self.number >= 0:
            text.begin = torch.minimum(text.begin + self.lengths, text.end)
        if self.causal_block is None:  # blocks begin with a mask: what is given needs none
            masked = (text.tokens == text.mask) & (text.places >= text.begin[:, None])
            text.begin = torch.where(masked, text.places, text.end[:, None]).amin(1)
        self.running = ~text.finished & (text.begin < text.end)
        if not bool(self.running.any()):
            return False
        self.number += 1
        self.unsettled = self.running.clone()
        self.seen, self.lengths = None, torch.zeros_like(text.end)
        rows = self.running.nonzero().squeeze(1)
        remaining = (text.end - text.begin)[rows]
        total = (text.end - self.first)[rows]
        window = self.policy.window(int((text.end - self.first).max()))
        logits = None
        if window:
            self._columns(window)
            logits = without_mask(self._logits(rows, 0), text.mask)
        lengths = self.policy.lengths(self.number, remaining, total, logits)
        most = remaining.clamp(max=window) if window else remaining
        if not bool(((lengths >= 1) & (lengths <= most)).all()):
            raise ValueError(f"`block_policy` gave lengths {lengths.tolist()}; allowed are 1 to {most.tolist()}.")
        self.lengths[rows] = lengths.to(self.lengths)
        size = int(self.lengths.max())
        self._columns(size)
        text.blocks.append(self.lengths)
        self.num_steps = self.policy.steps(self.number, size, num_inference_steps)
        self.pipe.scheduler.set_timesteps(self.num_steps, device=text.tokens.device, block_length=size)
        return True

    def _columns(self, size: int) -> None:
        """Set the columns of the block `(n, size)`, and which of them are inside each row's block."""
        text, offset = self.text, torch.arange(size, device=self.text.end.device)
        known = self.seen is not None and size <= self.columns.shape[1]
        self.columns = (text.begin[:, None] + offset).clamp(max=len(text.places) - 1)
        limit = torch.minimum(text.begin + self.lengths, text.end) if known or bool(self.lengths.any()) else text.end
        self.inside = (text.begin[:, None] + offset) < limit[:, None]
        if known:
            self.logits = self.logits[:, :size].clone()

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(self, step: int, generator: Any) -> bool:
        """One step of the current block; False, and nothing is done, where no row has anything to do."""
        text, scheduler = self.text, self.pipe.scheduler
        neutral = int(text.mask == 0)  # any token but the mask, where a row's block is shorter than the longest
        block = torch.where(self.inside, text.tokens.gather(1, self.columns), neutral)
        masked = (block == text.mask).any(1)
        if step >= self.num_steps:
            busy = self.unsettled & ~masked
        else:
            busy = torch.ones_like(masked) if self.revises else masked
        rows = (self.running & ~text.finished & busy).nonzero().squeeze(1)
        if not len(rows):
            return False
        given = text.given.gather(1, self.columns) | ~self.inside
        logits = self._logits(rows, step)
        settings = {**self.settings, "prompt_mask": self._prompt_mask(given[rows])}
        settings["generator"] = [generator[i] for i in rows.tolist()] if isinstance(generator, list) else generator
        taken = {name: value for name, value in settings.items() if self.scheduler_takes(name)}
        try:
            after = scheduler.step(logits, step, block[rows], **taken).prev_sample
        finally:
            scheduler.__dict__.pop("current_block", None)
        after = torch.where(given[rows], block[rows], after)
        if step >= self.num_steps:
            self.unsettled[rows] = (after != block[rows]).any(1)
        tokens = text.tokens.clone()
        row, place = self.inside[rows].nonzero(as_tuple=True)
        tokens[rows[row], self.columns[rows[row], place]] = after[row, place]
        text.tokens = tokens
        return True

    def _prompt_mask(self, given: torch.Tensor) -> torch.Tensor:
        """As the scheduler takes it: the stock one knows only one row for all."""
        return given.all(0) if type(self.pipe.scheduler) is BlockRefinementScheduler else given

    def check_filled(self) -> None:
        """Raise where the steps of a block left masks."""
        block = self.text.tokens.gather(1, self.columns)
        left = (block == self.text.mask) & self.inside & (self.running & ~self.text.finished)[:, None]
        if bool(left.any()):
            raise RuntimeError(
                f"{type(self.pipe.scheduler).__name__} left {int(left.sum())} masks after the {self.num_steps} steps of "
                f"block {self.number}."
            )

    # --- the model ---------------------------------------------------------------------------------------------------

    def _logits(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Logits `(m, block, vocabulary)` at the columns of `rows`, of the tokens as they are now."""
        text = self.text
        need = rows
        if self.step_cache and self.seen is not None and self.time is None:
            need = rows[(text.tokens[rows] != self.seen[rows]).any(1)]
        if len(need):
            made = self._call(need, step)
            if self.seen is None:
                self.seen = torch.full_like(text.tokens, -1)
                self.logits = made.new_empty((len(text.tokens), *made.shape[1:]))
            if len(need) == len(text.tokens):
                self.logits = made
            else:
                self.logits[need] = made
            self.seen[need] = text.tokens[need]
            text.calls[need] += 1
        return self.logits if len(rows) == len(text.tokens) else self.logits[rows]

    def _call(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        text, model = self.text, self.pipe.model
        limit, width = text.end[rows], len(text.places)
        size = torch.where(self.lengths > 0, self.lengths, self.columns.shape[1])[rows]
        stop = torch.minimum(limit, text.begin[rows] + size)
        if self.causal_block is not None:
            limit, width = stop, int(stop.max())
        ids = text.tokens[rows, :width]
        columns = torch.minimum(self.columns[rows], stop[:, None] - 1)
        guided = self.guidance_scale != 1
        if guided:
            real = text.places[:width] < limit[:, None]
            ids = torch.cat([ids, torch.where(text.given[rows, :width] & real, text.mask, ids)])
            limit, columns = limit.repeat(2), columns.repeat(2, 1)
        given = {
            "attention_mask": self._attention(limit, width),
            "position_ids": text.places[:width].expand(len(ids), -1),
        }
        given = {name: value for name, value in given.items() if self.takes(name)}
        if self.time is not None:
            given["timesteps"] = torch.full((len(ids),), self.time(step), device=ids.device)
        names = torch.cat([rows, len(text.tokens) + rows]) if guided else rows
        self.pipe.scheduler.current_block = CurrentBlock(names, columns, self.number, step)
        logits = model(input_ids=ids, **given).logits
        at = (columns - 1).clamp(min=0) if self.pipe.config.shift_logits else columns
        logits = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
        if not guided:
            return logits
        conditional, free = logits.chunk(2)
        mixed = free + self.guidance_scale * (conditional - free)
        return torch.where(conditional.isneginf() | free.isneginf(), conditional, mixed)  # -inf less -inf is no number

    def _attention(self, limit: torch.Tensor, width: int) -> torch.Tensor:
        """The attention mask in the form that the model takes; keys beyond `limit` `(m,)` are not seen."""
        places = self.text.places[:width]
        seen = places < limit[:, None]  # (m, width)
        if self.pipe.config.attention == "padding":
            return seen.long()
        pairs = seen[:, None, None, :].expand(-1, 1, width, -1)
        if self.causal_block is not None:
            block = places // self.causal_block
            pairs = pairs & (block[None, :] <= block[:, None])
        return pairs


class _Stream:
    """Hands the settled tokens of a single row to a streamer, from the left."""

    def __init__(self, streamer: Any, text: _Text, settles_early: bool) -> None:
        self.streamer, self.text, self.settles_early = streamer, text, settles_early
        self.given_out = 0
        if streamer is not None:
            self.given_out = int(text.first_mask)
            streamer.put(text.tokens[0, : self.given_out].cpu())

    def settled(self, first_mask: torch.Tensor, block_is_done: bool = False) -> None:
        """Give out what lies before the first mask."""
        if self.streamer is not None and (block_is_done or self.settles_early):
            self._put(int(first_mask))

    def _put(self, end: int) -> None:
        tokens = self.text.tokens[0].cpu()
        if self.text.eos is not None and bool(self.text.finished[0]):
            made = (tokens == self.text.eos) & ~self.text.given[0].cpu()
            end = min(end, int(made.long().argmax()) + 1)
        if end > self.given_out:
            self.streamer.put(tokens[self.given_out : end])
            self.given_out = end

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _named(component: Any) -> Callable[[str], bool]:
    """Whether the forward of a model, or the step of a scheduler, takes an argument of a name."""
    component = getattr(component, "_orig_mod", component)  # of a compiled model
    function = component.forward if isinstance(component, torch.nn.Module) else component.step
    parameters = inspect.signature(function).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return lambda name: anything or name in parameters
