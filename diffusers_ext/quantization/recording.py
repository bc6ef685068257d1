"""The calibration set: inputs of the denoiser that a pipeline really makes, with their timesteps.

The full-precision pipeline is run from seeds, and calls of its denoiser are kept: guided and unguided ones as the pipeline
makes them, in one batch or in two calls. A step is a run of calls with one timestep.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

_SAMPLE = ("sample", "hidden_states")
_TIMESTEP = "timestep"
_NOT_BATCHED = ("img_ids", "txt_ids", "image_rotary_emb")  # first axes that are tokens, not rows


@dataclass(frozen=True)
class Call:
    """One call of the denoiser.

    Attributes:
        kwargs: its arguments, all by name.
        sample: name of the noisy sample among them.
        step: of the run, 0 is the noisiest.
        timestep: as the denoiser got it, the first of the batch.
    """

    kwargs: dict[str, Any]
    sample: str
    step: int
    timestep: float

    @property
    def rows(self) -> int:
        return self.kwargs[self.sample].shape[0]

    def take(self, rows: torch.Tensor) -> Call:
        """Some rows of the batch. With guidance in one batch, row i is one of each part."""
        return Call(_take(self.kwargs, rows, self.rows), self.sample, self.step, self.timestep)

    def run(self, model: nn.Module) -> Any:
        """Call the denoiser again."""
        return model(**self.kwargs)


def _take(value: Any, rows: torch.Tensor, total: int, each: int = 1) -> Any:
    """Rows of all that has `total * each` of them; `each` is the frames of a video, where text has a row for each."""
    if torch.is_tensor(value):
        if not value.ndim or value.shape[0] != total * each:
            return value
        return value.unflatten(0, (total, each))[rows].flatten(0, 1)
    if isinstance(value, dict):
        taken = {}
        for name, part in value.items():
            many = name.startswith("encoder_") and torch.is_tensor(part) and part.shape[0] % total == 0
            taken[name] = (
                part if name in _NOT_BATCHED else _take(part, rows, total, part.shape[0] // total if many else 1)
            )
        return taken
    if isinstance(value, (list, tuple)):
        return type(value)(_take(part, rows, total) for part in value)
    return value


# --- which inputs are kept -------------------------------------------------------------------------------------------


def evenly(num_steps: int, count: int) -> torch.Tensor:
    """Steps kept of each run, spread evenly: every c-th from the first on, at most `count`."""
    stride = -(-num_steps // count)
    return torch.arange(0, num_steps, stride)


def normal_steps(num_steps: int, count: int, mean: float, std: float, generator: torch.Generator) -> torch.Tensor:
    r"""Normally distributed time-step calibration (PTQ4DM, section 4.2): a step for each of `count` samples.

    :math:`t_i \sim N(mean\,T, (std\,T)^2)`, clamped to 0 to T - 1, counts sampler steps from the image: step
    `num_steps - 1 - t_i` of the run.

    Returns:
        `(count,)`, 0 is the noisiest.
    """
    t = torch.randn(count, generator=generator) * std * num_steps + mean * num_steps
    return num_steps - 1 - t.round().long().clamp(0, num_steps - 1)


# --- recording -------------------------------------------------------------------------------------------------------


class _Recorder:
    """A pre-hook of the denoiser that keeps calls.

    Args:
        keep: `(step, rows of a call) -> rows kept`; an empty tensor keeps nothing.
    """

    def __init__(self, model: nn.Module, keep: Callable[[int, int], torch.Tensor]) -> None:
        self.signature = inspect.signature(type(model).forward)
        self.keep, self.calls = keep, list[Call]()
        self.step, self._timestep = -1, float("nan")

    def begin(self) -> None:
        self.step, self._timestep = -1, float("nan")

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = self.signature.bind(model, *args, **kwargs).arguments
        given = {**{k: v for k, v in list(given.items())[1:] if k != "kwargs"}, **given.get("kwargs", {})}
        sample = next(name for name in _SAMPLE if name in given)
        timestep = float(torch.as_tensor(given[_TIMESTEP]).flatten()[0])
        if timestep != self._timestep:
            self.step, self._timestep = self.step + 1, timestep
        rows = given[sample].shape[0]
        kept = self.keep(self.step, rows)
        if len(kept):
            given = {**given, sample: given[sample].detach().clone()}
            call = Call(given, sample, self.step, timestep)
            self.calls.append(call if len(kept) == rows else call.take(kept))


def record(
    pipe: Any,
    model: nn.Module,
    runs: Sequence[tuple[int, dict[str, Any]]],
    num_steps: int,
    kept: Sequence[torch.Tensor],
    each: bool,
) -> list[Call]:
    """Run the pipeline and keep calls of its denoiser.

    Args:
        runs: number of samples, and keyword arguments, of each call of the pipeline.
        num_steps: of each.
        kept: for each run, the steps to keep: of all its samples, or (`each`) one step for each sample.
    """
    calls: list[Call] = []
    bar = pipe._progress_bar_config if hasattr(pipe, "_progress_bar_config") else None
    pipe.set_progress_bar_config(disable=True)
    try:
        for (count, arguments), steps in tqdm(
            list(zip(runs, kept, strict=True)), desc="Calibration set", unit="run", delay=2.0
        ):
            recorder = _Recorder(model, _rule(count, steps, each))
            handle = model.register_forward_pre_hook(recorder, with_kwargs=True)
            try:
                with torch.no_grad():
                    pipe(**{**arguments, "num_inference_steps": num_steps})
            finally:
                handle.remove()
            calls += recorder.calls
    finally:
        if bar is None:
            vars(pipe).pop("_progress_bar_config", None)
        else:
            pipe._progress_bar_config = bar
    return calls


def _rule(count: int, steps: torch.Tensor, each: bool) -> Callable[[int, int], torch.Tensor]:
    def keep(step: int, rows: int) -> torch.Tensor:
        if not each:
            return torch.arange(rows if bool((steps == step).any()) else 0)
        mine = (steps == step).nonzero().flatten()
        parts = max(1, rows // count)  # guidance puts every sample into the batch twice
        return torch.cat([mine + part * count for part in range(parts)])

    return keep
