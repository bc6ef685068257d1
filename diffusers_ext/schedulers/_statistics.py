"""One pass of statistics over (data, t): a stock pipeline's own loop is led to noised samples, step by step.

The pipeline is called as always, with a scheduler that solves nothing: it hands the loop a noised sample, takes what the
denoiser says of it, guidance and all, and hands out the next. So every pipeline works, with its own conditions, and what is
measured is what a scheduler would get. Derivatives are differences between visits: forward-mode differentiation runs
through such a loop as well, but not through every network (group norms behind attention, fused attention).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from safetensors import safe_open
from safetensors.torch import save_file

from ._exponential import combine, step_weights
from ._grid import GridScheduler, with_grid_arguments
from ._run import RunSchedulerOutput

# Yields states `(batch, *shape)` for the denoiser to look at, and gets the noise that it predicts in each.
Walk = Generator[torch.Tensor, torch.Tensor, None]


class GuideScheduler(GridScheduler):
    """Leads the loop of a pipeline from visit to visit. Make it with `from_config` of the pipeline's scheduler."""

    @register_to_config
    @with_grid_arguments
    def __init__(self) -> None:
        self.lay(np.zeros(0))

    @property
    def ends(self) -> tuple[float, float]:
        """Largest and smallest sigma / alpha that the model was trained with."""
        return float(self._train_ratios[-1]), float(self._train_ratios[0])

    def lay(self, ratios: np.ndarray) -> None:
        """Set the noise levels, sigma / alpha, that visits refer to."""
        self.ratios = np.asarray(ratios, dtype=np.float64)
        self.levels = [self._point(float(ratio)) for ratio in self.ratios]
        if self.config.use_flow_sigmas:
            self.times = self.config.num_train_timesteps * self.ratios / (1 + self.ratios)
        else:
            self.times = self._time_at(self.ratios)

    def lay_times(self, number: int) -> None:
        """Set levels by evenly spread timesteps, from the last of training down to the first."""
        train = self.config.num_train_timesteps
        if self.config.use_flow_sigmas:
            sigma = np.linspace(train - 1, 1, number) / train
            self.lay(sigma / (1 - sigma))
        else:
            self.lay(self._ratio_at(np.linspace(train - 1, 0, number)))

    def drift(self, level: int) -> float:
        r""":math:`d \log \alpha / d\lambda`, the linear part of :math:`dx/d\lambda = drift\, x - \sigma \epsilon`."""
        sigma = self.levels[level].sigma
        return sigma if self.config.use_flow_sigmas else sigma**2

    def begin(self, walk: Walk, plan: Sequence[int], batch: int) -> None:
        """Take a walk for the next run.

        Args:
            walk: yields visits, and gets the answer to each.
            plan: level of each visit: pipelines want to know timesteps beforehand.
            batch: number of samples in a visit.
        """
        self._walk, self._plan, self._batch = walk, list(plan), batch

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Whatever is asked for, lay the visits of the plan, after one look at the pipeline's own noise."""
        self.timesteps = torch.from_numpy(self.times[[self._plan[0], *self._plan]]).float().to(device)
        self.num_inference_steps = len(self.timesteps)
        self.points = [self.levels[level] for level in self._plan]
        self._state: torch.Tensor | None = None
        self._step_index = self._begin_index = None
        self.finished = False

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """Hand in the answer to the last visit, and give the state of the next."""
        if self._step_index is None:
            self._step_index, state = 0, next(self._walk, None)
        else:
            # Some loops double the batch themselves, for guidance.
            predicted = self.to_noise(model_output[: self._batch], self._state, self._step_index)
            self._step_index += 1
            try:
                state = self._walk.send(predicted)
            except StopIteration:
                state, self.finished = None, True
        if state is not None:
            self._state = state.to(sample)
            sample = torch.cat([self._state] * (len(sample) // self._batch))
        return RunSchedulerOutput(prev_sample=sample) if return_dict else (sample,)


def lead(
    pipe: Any,
    guide: GuideScheduler,
    walk: Walk,
    plan: Sequence[int],
    call: dict[str, Any],
    batch: int,
) -> None:
    """Call the pipeline once, along a walk. The pipeline stays as it is.

    Args:
        plan: level of each visit of the walk.
        call: keyword arguments of the call, which makes `batch` samples.

    Raises:
        RuntimeError: the pipeline's loop ended before the walk did.
    """
    led = copy.copy(pipe)
    led.scheduler = guide
    led.set_progress_bar_config(disable=True)
    guide.begin(walk, plan, batch)
    led(**call)
    if not guide.finished:
        raise RuntimeError(f"{type(pipe).__name__} did not take all {len(plan) + 1} steps of its scheduler.")


class _SolverScheduler(GridScheduler):
    """DPM-Solver++ 2M, in its Taylor form, which keeps where it ended."""

    @register_to_config
    @with_grid_arguments
    def __init__(self) -> None:
        pass

    def start(self) -> None:
        self._last: tuple[float, torch.Tensor] | None = None

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        here, data = self.points[i], self.to_data(model_output, sample, i)
        past = [] if self._last is None or self.points[i + 1].sigma == 0 else [self._last]
        weights = step_weights("data", here, self.points[i + 1], [lambda_ - here.lambda_ for lambda_, _ in past])
        self._last = (here.lambda_, data)
        self.end = combine(weights, sample, [data, *(m for _, m in past)])
        return self.end


def clean_samples(pipe: Any, call: dict[str, Any], batch: int, steps: int) -> torch.Tensor:
    """What the pipeline itself makes, before any decoding: `(batch, *shape)`."""
    made = copy.copy(pipe)
    made.scheduler = solver = _SolverScheduler.from_config(pipe.scheduler.config)
    made.set_progress_bar_config(disable=True)
    made(**{**call, "num_inference_steps": steps})
    return solver.end[:batch].clone()


def calls(
    pipe: Any, conditions: Sequence[Any] | int, batch_size: int, seed: int, call: dict[str, Any]
) -> list[tuple[int, dict[str, Any]]]:
    """The calls that a pass makes: number of samples, and keyword arguments, of each.

    Args:
        conditions: prompts or class labels, one a sample; for an unconditional pipeline the number of samples.
        call: more arguments, the same in every call.

    Raises:
        ValueError: the pipeline does not take such conditions, or there are none.
    """
    names = inspect.signature(pipe.__call__).parameters
    if isinstance(conditions, int):
        name, total = "batch_size", conditions
    else:
        name, total = next((name for name in ("prompt", "class_labels") if name in names), ""), len(conditions)
    if name not in names or total < 1 or batch_size < 1:
        raise ValueError(
            f"`conditions` is {conditions!r} and `batch_size` {batch_size!r}; {type(pipe).__name__} needs at least one "
            "prompt or class label, or an unconditional pipeline their number."
        )
    made = []
    for start in range(0, total, batch_size):
        count = min(batch_size, total - start)
        given = count if isinstance(conditions, int) else list(conditions[start : start + count])
        options = {"generator": torch.Generator().manual_seed(seed + start), "output_type": "latent"}
        made.append((count, {name: given, **{k: v for k, v in options.items() if k in names}, **call}))
    return made


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """The network that a pipeline calls at each step.

    Raises:
        ValueError: it has none.
    """
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), torch.nn.Module):
            return getattr(pipe, name)
    raise ValueError(f"`pipe` is {type(pipe).__name__}; a pipeline with a `unet` or a `transformer` is needed.")


class Checkpoint:
    """What a pass has found, kept after each batch.

    Args:
        file: where; None keeps nothing.
        settings: all that it follows from, with `tensors`.
    """

    def __init__(self, file: str | os.PathLike | None, settings: str, tensors: Sequence[torch.Tensor]) -> None:
        self.file = None if file is None else Path(file)
        parts = [tensor.detach().float().cpu().contiguous().numpy().tobytes() for tensor in tensors]
        self.digest = hashlib.sha256(b"".join([settings.encode(), *parts])).hexdigest()

    def save(self, tensors: dict[str, torch.Tensor], done: int) -> None:
        """Write aside, then put in place."""
        if self.file is not None:
            aside = self.file.with_name(f".partial-{self.file.name}")
            content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(content, aside, {"settings": self.digest, "done": str(done)})
            aside.replace(self.file)

    def load(self) -> tuple[dict[str, torch.Tensor], int]:
        """What was kept last, and after how many batches; nothing and 0 where there is no file.

        Raises:
            ValueError: the file is of other settings.
        """
        if self.file is None or not self.file.exists():
            return {}, 0
        with safe_open(self.file, "pt") as content:
            metadata = content.metadata() or {}
            if metadata.get("settings") != self.digest:
                raise ValueError(f"`checkpoint` is {str(self.file)!r}, which is of another model or other settings.")
            return {name: content.get_tensor(name) for name in content.keys()}, int(metadata["done"])  # noqa: SIM118
