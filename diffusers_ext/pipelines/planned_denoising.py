"""Text by planned denoising (DDPD, Liu et al. 2024, arXiv 2410.06264): a planner and a denoiser, see `DDPDScheduler`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput

from ..schedulers._token_noise import tokens_but_mask
from ..schedulers._unmasking import check_number, draw_uniform
from ._masked_diffusion import MaskedDiffusionPipeline, _named, _Text


@dataclass
class PlannedDenoisingOutput(BaseOutput):
    """Output of `PlannedDenoisingPipeline`.

    Attributes:
        sequences: int64 `(batch, gen_length)`, what was generated after the prompts; or, where a prompt had masks to fill,
            all rows whole, filled up on the right.
        texts: `sequences` as texts, up to the first end-of-text token that was generated; None for `output_type="seq"`.
        num_calls: for each row, the calls of planner and denoiser together.
        noise: for each row, how many tokens the planner took for noise when it was asked last.
    """

    sequences: torch.Tensor
    texts: list[str] | None
    num_calls: list[int]
    noise: list[float]


class PlannedDenoisingPipeline(MaskedDiffusionPipeline):
    """Writes random tokens, and redraws those that the planner takes for noise.

    Args:
        planner: says how likely each token is noise: called as a model of transformers, it gives `logits` `(batch, length)`
            or `(batch, length, 1)`, as token classification with one label does (`train_ddpd`).
        denoiser: a masked language model, as in `MaskedDiffusionPipeline`.
        scheduler: a `DDPDScheduler`.
        tokenizer: needed for texts.
    """

    model_cpu_offload_seq = "planner->denoiser"
    _optional_components = ["tokenizer"]

    def __init__(self, planner: Any, denoiser: Any, scheduler: Any, tokenizer: Any = None) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(planner=planner, denoiser=denoiser, scheduler=scheduler, tokenizer=tokenizer)

    @property
    def model(self) -> Any:
        """The denoiser, by the name that it has in `MaskedDiffusionPipeline`."""
        return self.denoiser

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        input_ids: torch.Tensor | list[torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        gen_length: int | None = None,
        start: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        num_texts_per_prompt: int = 1,
        stop_at_eos: bool = True,
        eos_token_id: int | None = None,
        mask_token_id: int | None = None,
        vocab_size: int | None = None,
        add_special_tokens: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> PlannedDenoisingOutput | tuple:
        """Generate text, or improve one.

        Args:
            prompt: one or several, of any lengths; the tokenizer's mask token in it is filled in. Prompts never change.
            input_ids: tokens `(batch, length)` or a list of `(length,)`, in place of `prompt`.
            attention_mask: `(batch, length)`, 0 for padding in `input_ids`, on either side.
            gen_length: tokens to generate after each prompt; None is 0 where a prompt has masks, else 128.
            start: `(batch, gen_length)`, tokens to begin with in place of uniformly random ones: a text to improve.
            num_inference_steps: steps that choose positions, each a call of the planner and one of the denoiser; None is one
                for each token. One more step redraws all that is still noise.
            temperature, top_p, top_k: of the draws; temperature 0 takes the likeliest token.
            num_texts_per_prompt: texts of each prompt.
            stop_at_eos: whether what follows the first end-of-text token becomes end-of-text too, in the end.
            eos_token_id, mask_token_id: None takes those of the tokenizer, or the denoiser.
            vocab_size: random tokens are below it; None takes the tokenizer's size, or that of the denoiser's config.
            add_special_tokens: whether the tokenizer adds its special tokens to a prompt.
            generator: one, or a list of one a row, by which a row is the same in every batch of equally long rows.
            output_type: "text" or "seq".
            return_dict: False gives a tuple.
            callback_on_step_end: called as `(pipe, step, timestep, tensors) -> dict` after each step.
            callback_on_step_end_tensor_inputs: of "sequences" `(batch, length)`, which it may give back changed, and
                "changed", where this step changed them.

        Raises:
            ValueError: an argument is out of its range, or fits neither networks nor tokenizer.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        wanted = ["sequences"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        mask = self._token("mask_token_id", mask_token_id)
        eos = self._token("eos_token_id", eos_token_id)
        if mask is None:
            raise ValueError("`mask_token_id` is None, and neither the tokenizer nor the denoiser has one.")
        self._check({
            "prompt": prompt, "messages": None, "input_ids": input_ids, "output_type": output_type,
            "gen_length": gen_length, "num_inference_steps": num_inference_steps, "temperature": temperature,
            "top_p": top_p, "top_k": top_k, "num_texts_per_prompt": num_texts_per_prompt, "wanted": wanted,
            "block_length": None, "block_policy": None, "max_post_steps": 0, "guidance_scale": 1.0,
        })  # fmt: skip
        rows = self._rows(prompt, None, input_ids, attention_mask, False, add_special_tokens)
        rows = [row for row in rows for _ in range(num_texts_per_prompt)]
        infill = any(mask in row for row in rows)
        gen_length = (0 if infill else 128) if gen_length is None else gen_length
        self._check_rows(rows, gen_length, mask, generator, None)
        if len({len(row) for row in rows}) > 1 and not _named(self.planner)("attention_mask"):
            raise ValueError("The prompts have several lengths, and the planner takes no `attention_mask`.")
        size = self._vocabulary(vocab_size)
        if start is not None and (infill or start.shape != (len(rows), gen_length) or bool((start == mask).any())):
            raise ValueError(
                f"`start` has shape {tuple(start.shape)}; it must be {(len(rows), gen_length)} without masks, and no prompt "
                "may have masks."
            )

        text = _Text(rows, gen_length, mask, eos, self._execution_device)
        free = ~text.given
        if start is None:
            u = draw_uniform(tuple(text.tokens.shape), generator, text.tokens.device)
            drawn = tokens_but_mask((u * (size - (mask < size))).long(), mask)
            text.tokens = torch.where(free, drawn, text.tokens)
        else:
            tokens = text.tokens.clone()
            tokens[free] = start.to(tokens).flatten()
            text.tokens = tokens
        steps = int(free.sum(1).max()) if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps, device=text.tokens.device)
        draws = {"mask_token_id": mask, "temperature": temperature, "top_p": top_p, "top_k": top_k}

        self._num_timesteps, self._interrupt = steps + 1, False
        running, noise, done = torch.ones_like(text.finished), torch.zeros(len(rows), dtype=torch.float64), 0
        noise = noise.to(running.device)
        with self.progress_bar(total=steps + 1) as bar:
            for step, t in enumerate(self.scheduler.timesteps):
                now = running.nonzero().squeeze(1)
                if self._interrupt or not len(now):
                    break
                before = text.tokens
                plan = self.scheduler.plan(
                    self._noise_logits(text, now), free[now], final=step == steps, generator=_of(generator, now)
                )
                noise[now] = plan.noise
                active = plan.chosen.any(1)
                running[now] = active
                if bool(active.any()):
                    plan = plan._make(part[active] for part in plan)
                    self._redraw(text, now[active], plan, t, _of(generator, now[active]), draws)
                if callback_on_step_end is not None:
                    tensors = {"sequences": text.tokens, "changed": text.tokens != before}
                    given = {name: tensors[name] for name in wanted}
                    text.tokens = callback_on_step_end(self, step, int(t), given).pop("sequences", text.tokens)
                done += 1
                bar.update()
            bar.update(steps + 1 - done)
        self._num_timesteps = done
        if stop_at_eos:
            text.stop()
        self.maybe_free_model_hooks()
        sequences = text.tokens if infill else text.generated(gen_length)
        texts = None
        if output_type == "text":
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in text.up_to_eos(infill)]
        values = (sequences, texts, text.calls.tolist(), noise.tolist())
        return PlannedDenoisingOutput(*values) if return_dict else values

    def _vocabulary(self, given: int | None) -> int:
        """How many tokens there are, as the caller, the tokenizer or the denoiser says."""
        if given is None and self.tokenizer is not None:
            given = len(self.tokenizer)
        if given is None:
            given = getattr(getattr(self.denoiser, "config", None), "vocab_size", None)
        if given is None:
            raise ValueError("`vocab_size` is None, and neither a tokenizer nor the denoiser's config has one.")
        check_number("vocab_size", given, 2, whole=True)
        return given

    def _logits(self, model: Any, text: _Text, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What a network says of `ids` `(m, length)`, which are `rows` of the text."""
        text.calls[rows] += 1
        given = {
            "attention_mask": (text.places < text.end[rows][:, None]).long(),
            "position_ids": text.places.expand(len(ids), -1),
        }
        takes = _named(model)
        return model(input_ids=ids, **{name: value for name, value in given.items() if takes(name)}).logits

    def _noise_logits(self, text: _Text, rows: torch.Tensor) -> torch.Tensor:
        """The planner's logits `(m, length)`."""
        logits = self._logits(self.planner, text, rows, text.tokens[rows])
        if logits.ndim == 3 and logits.shape[-1] == 1:
            logits = logits.squeeze(-1)
        if logits.ndim != 2:
            raise ValueError(f"`planner` gives logits of shape {tuple(logits.shape)}; one a token is needed.")
        return logits

    def _redraw(
        self, text: _Text, rows: torch.Tensor, plan: Any, t: torch.Tensor, generator: Any, draws: dict[str, Any]
    ) -> None:
        """Do what the plan `(m, length)` says in `rows`."""
        sample = text.tokens[rows]
        ids = torch.where(plan.masked, draws["mask_token_id"], sample)
        logits = self._logits(self.denoiser, text, rows, ids)
        after = self.scheduler.step(logits, t, sample, plan=plan, generator=generator, **draws).prev_sample
        text.tokens = text.tokens.index_put((rows,), after)


def _of(generator: Any, rows: torch.Tensor) -> Any:
    """The generators of `rows`, where there is one a row."""
    return [generator[i] for i in rows.tolist()] if isinstance(generator, list) else generator
