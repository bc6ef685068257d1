"""Where a scheduler is in a run: what stock pipelines ask of every scheduler, whatever its process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


@dataclass
class RunSchedulerOutput(BaseOutput):
    """Output of `step`.

    Attributes:
        prev_sample (`torch.Tensor`): the sample at the next timestep, to be passed to the denoiser next.
    """

    prev_sample: torch.Tensor


class RunScheduler(SchedulerMixin, ConfigMixin):
    """Base that counts steps; a subclass calls `_rewind` in `set_timesteps`, and in `step` `_enter` and then `_leave`."""

    order = 1
    timesteps: torch.Tensor
    num_inference_steps: int | None = None
    _step_index: int | None = None
    _begin_index: int | None = None

    def start(self) -> None:
        """Forget what was kept of an earlier run."""

    def _rewind(self) -> None:
        self._step_index = self._begin_index = None

    def _enter(self, timestep: int | float | torch.Tensor) -> int:
        """Index of the step that begins.

        Raises:
            ValueError: `set_timesteps` was not called, the run is over, or it is to begin at no timestep of the grid.
        """
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None; call `set_timesteps` first.")
        index = self._step_index
        if index is None:
            index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if index >= self.num_inference_steps:
            raise ValueError(f"All {self.num_inference_steps} steps are done; call `set_timesteps` for a new run.")
        self._step_index = index
        return index

    def _leave(self, index: int) -> None:
        """The step is done; one that raised is not, and can be taken again."""
        self._step_index = index + 1

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where a pipeline set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start in the middle, as image-to-image does."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: int | float | torch.Tensor) -> int:
        """Index of a timestep of the grid.

        Raises:
            ValueError: the grid has no such timestep.
        """
        wanted = torch.as_tensor(timestep, dtype=torch.float64, device="cpu").reshape(-1)[:1]
        found = (self.timesteps.double().cpu() == wanted).nonzero()
        if len(found) == 0:
            raise ValueError(f"`timestep` is {timestep!r}; the grid has {self.timesteps.tolist()}.")
        return int(found[0])

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is: the denoiser takes it unscaled."""
        return sample
