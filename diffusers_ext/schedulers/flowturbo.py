r"""The sampler of FlowTurbo (Zhao et al. 2024, arXiv 2409.18128): Heun steps first, pseudo-corrector steps after.

On the nodes :math:`t_0, t_1, \dots` of a flow, with :math:`h_i = t_{i+1} - t_i`, both kinds of step are

.. math::
    \tilde x_{i+1} = x_i + h_i d_i, \qquad d_{i+1} = v(\tilde x_{i+1}, t_{i+1}), \qquad
    x_{i+1} = x_i + \tfrac{h_i}{2} (d_i + d_{i+1}) = \tilde x_{i+1} + \tfrac{h_i}{2} (d_{i+1} - d_i)

A Heun step takes :math:`d_i = v(x_i, t_i)`, and so needs two calls. A pseudo-corrector step takes the velocity that the
step before had computed at :math:`\tilde x_i`, and so needs one; it stays of second order.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

FLAGS = ("use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
COUNTS = ("num_train_timesteps", "base_image_seq_len", "max_image_seq_len", "n_heun")


@dataclass
class FlowMatchPseudoCorrectorSchedulerOutput(BaseOutput):
    """Output of `step`.

    Attributes:
        prev_sample (`torch.Tensor`): the sample at the next timestep, to be passed to the denoiser next.
    """

    prev_sample: torch.Tensor


class FlowMatchPseudoCorrectorScheduler(FlowMatchEulerDiscreteScheduler):
    """FlowTurbo's sampler, on the grid of `FlowMatchEulerDiscreteScheduler` and with its config.

    The first step needs a call at its start anyway, and so is a Heun step at no cost. Each further Heun step adds one
    call: its timestep comes twice in `timesteps`, of which there are `num_inference_steps + n_heun - 1`. The last step, to
    clean data, is Euler's, as in `FlowMatchHeunDiscreteScheduler`.

    Args:
        n_heun: number of Heun steps at the beginning; those over the number of steps have no effect. 1 calls the denoiser
            once a step. With as many as there are steps, all are Heun steps.
        stochastic_sampling: must be False: the corrector follows the ODE.
        num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift: of the grid, as in
            `FlowMatchEulerDiscreteScheduler`.
        base_image_seq_len, max_image_seq_len: likewise.
        invert_sigmas, shift_terminal, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: likewise.
        time_shift_type: likewise.

    Raises:
        ValueError: a value is out of range.
    """

    @register_to_config
    def __init__(
        self,
        *,
        n_heun: int = 1,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        config = dict(self.config)
        for name in FLAGS:
            if not isinstance(config[name], bool):
                raise ValueError(f"`{name}` is {config[name]!r}; allowed are True and False.")
        if stochastic_sampling is not False:
            raise ValueError(f"`stochastic_sampling` is {stochastic_sampling!r}; only False is allowed.")
        for name in COUNTS:
            if not _is_number(config[name], int) or config[name] < 1:
                raise ValueError(f"`{name}` is {config[name]!r}; it must be an integer of at least 1.")
        for name in ("shift", "base_shift", "max_shift"):
            optional = name != "shift" and config[name] is None
            if not optional and not (_is_number(config[name]) and config[name] > 0):
                raise ValueError(f"`{name}` is {config[name]!r}; it must be a positive number.")
        if shift_terminal is not None and not (_is_number(shift_terminal) and 0 < shift_terminal < 1):
            raise ValueError(f"`shift_terminal` is {shift_terminal!r}; it must be None or a number in (0, 1).")
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"`time_shift_type` is {time_shift_type!r}; allowed are 'exponential' and 'linear'.")
        super().__init__(**{name: value for name, value in config.items() if name != "n_heun" and name[0] != "_"})
        self.num_inference_steps: int | None = None
        self._nodes: list[float] = []
        self._velocity: torch.Tensor | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; the config of a diffusion scheduler that is set to flow sigmas is understood as well.

        Raises:
            ValueError: the config is that of another process than a flow.
        """
        if isinstance(config, dict) and "beta_start" in config:
            if not config.get("use_flow_sigmas"):
                raise ValueError(f"`use_flow_sigmas` is {config.get('use_flow_sigmas')!r} in the config; {cls.__name__} "
                                 "samples flows only, so it must be True.")  # fmt: skip
            names = (*inspect.signature(cls).parameters, "_class_name", "_diffusers_version")
            kept = {name: value for name, value in config.items() if name in names}
            config = kept | {"shift": config.get("flow_shift", 1.0)}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lay the grid for a run; called by the pipelines.

        Args:
            num_inference_steps: number of steps.
            device: where `timesteps` will be.
            sigmas: noise levels before the shift, strictly falling, instead.
            mu: logarithm of the dynamic shift, with `use_dynamic_shifting`.
            timesteps: timesteps after the shift, strictly falling, instead.

        Raises:
            ValueError: nothing to lay a grid from is given, lengths differ, a list does not fall, a value is out of range,
                or `mu` is missing.
        """
        limit = self.config.num_train_timesteps
        needed = num_inference_steps is not None or (sigmas is None and timesteps is None)
        if needed and not (_is_number(num_inference_steps, int) and 1 <= num_inference_steps <= limit):
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps!r}; allowed are integers from 1 to {limit}."
            )
        for name, values, top in (("sigmas", sigmas, 1.0), ("timesteps", timesteps, limit)):
            if values is not None and not _falls(values, top):
                raise ValueError(
                    f"`{name}` is {values!r}; numbers over 0 and up to {top}, strictly falling, are needed."
                )
            if values is not None and num_inference_steps not in (None, len(values)):
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps!r}, and `{name}` has {len(values)} values."
                )
        if sigmas is None and timesteps is not None:
            # diffusers would shift them once more, so that the denoiser would be asked at other levels than the state's.
            if self.config.invert_sigmas:
                raise ValueError("`timesteps` is given with `invert_sigmas=True`; give `sigmas` instead.")
            self.num_inference_steps = len(timesteps)
            self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
            self.sigmas = torch.cat([self.timesteps / limit, torch.zeros(1)])
            self._step_index = self._begin_index = None
        else:
            super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        visits = torch.ones(len(self.timesteps), dtype=torch.long)
        visits[1 : self.config.n_heun] = 2
        self._nodes = [*self.sigmas[:-1].repeat_interleave(visits).tolist(), float(self.sigmas[-1])]
        self.sigmas = torch.tensor(self._nodes).to(device)
        self.timesteps = self.timesteps.repeat_interleave(visits).to(device)
        self._velocity = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowMatchPseudoCorrectorSchedulerOutput | tuple[torch.Tensor]:
        """Correct the state, then predict the next one.

        Args:
            model_output: velocity, in the shape of `sample`.
            timestep: the timestep that it was made for: an element of `self.timesteps`. Looked up in the first step only.
            sample: the state that the denoiser saw, as the last step gave it or changed since, as inpainting does.
            generator: not used: nothing is drawn.
            return_dict: False gives a tuple.

        Returns:
            the state for the next call, in the dtype of `model_output`. Computed in float32 at least.

        Raises:
            ValueError: `set_timesteps` was not called, or the run is over.
        """
        if not self._nodes:
            raise ValueError("`num_inference_steps` is None; call `set_timesteps` first.")
        if self._step_index is None:
            at = timestep.to(self.timesteps.device) if isinstance(timestep, torch.Tensor) else timestep
            self._step_index = self.index_for_timestep(at) if self.begin_index is None else self.begin_index
        i: Any = self._step_index  # diffusers' annotation allows None only
        if i + 1 >= len(self._nodes):
            raise ValueError(f"All {len(self._nodes) - 1} calls are done; call `set_timesteps` for a new run.")
        dtype = torch.promote_types(sample.dtype, torch.float32)
        state, velocity = sample.to(dtype), model_output.to(dtype)
        # Between the two visits of a timestep, h is 0: the first corrects, the second starts anew.
        if self._velocity is not None:
            state = state + (self._nodes[i] - self._nodes[i - 1]) / 2 * (velocity - self._velocity)
        state, self._velocity = state + (self._nodes[i + 1] - self._nodes[i]) * velocity, velocity
        self._step_index = i + 1
        previous = state.to(model_output.dtype)
        return FlowMatchPseudoCorrectorSchedulerOutput(prev_sample=previous) if return_dict else (previous,)


def _is_number(value: Any, kind: type = float) -> TypeGuard[float]:
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _falls(values: Sequence[float], top: float) -> bool:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        return False
    return bool(np.all(np.isfinite(array)) and array[-1] > 0 and array[0] <= top and np.all(np.diff(array) < 0))
