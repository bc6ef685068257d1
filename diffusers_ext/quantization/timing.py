"""What depends on the timestep in a quantized denoiser: which of the calibrated timesteps it runs at.

A `Clock` is a pre-hook of the denoiser. Layers that have a table with one entry a timestep hold the same clock, and pick
their entry from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

_TIMESTEP = "timestep"
_HANDLES = "_clock_handles"  # attribute of a denoiser; a copy of the denoiser has handles of its own hooks there


class Clock:
    """Which entry of a table holds at the timestep that the denoiser was last called with.

    An entry holds from its timestep down to the next one: a timestep between two of the table takes the noisier one, one
    above all of them the first.

    Args:
        times: timesteps of the table, falling.
        strict: whether a timestep that is not in the table is refused.

    Attributes:
        index: `(n,)`, entry of each row of the batch, or of all rows (n = 1). The first entry before any call.
        position: place of the timestep among the positional arguments of the denoiser.
        known: `(n,)`, whether the timestep is in the table. What two of its numerical format cannot tell apart are equal.
    """

    def __init__(self, times: Sequence[float], strict: bool = False) -> None:
        self.times, self.strict, self.position = tuple(times), strict, 1
        self.index, self.known = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)
        self._tables = {"cpu": torch.tensor(self.times, dtype=torch.float32, device="cpu")}

    def read(self, timestep: Any) -> None:
        """Take the timestep of a call: a number, a tensor of one, or one for each row.

        Raises:
            ValueError: the clock is strict, and the timestep is not in its table.
        """
        given = torch.as_tensor(timestep).flatten()
        if given.numel() > 1 and given.stride(0) == 0:  # one timestep, expanded
            given = given[:1]
        slack = 2 * torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
        given = given.float()[:, None]
        times = self._times_on(given.device)
        slack = slack * given.abs()
        self.index = ((times >= given - slack).sum(1) - 1).clamp(min=0)
        self.known = ((times[self.index] - given[:, 0]).abs() <= slack[:, 0]).detach()
        if self.strict and not bool(self.known.all()):
            raise ValueError(
                f"`timestep` is {given.flatten().tolist()}; the model's temporal features are cached for the {len(self.times)} "
                f"timesteps {self.times[0]:g} to {self.times[-1]:g} of its calibration alone: use the same scheduler and "
                "number of steps, or calibrate with `temporal='auto'`."
            )

    def _times_on(self, device: torch.device) -> torch.Tensor:
        """`times` as a tensor, which is copied to a device once. Threads that come at once agree on one of their copies."""
        name = str(device)
        if name not in self._tables:
            self._tables.setdefault(name, self._tables["cpu"].to(device))
        return self._tables[name]

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """As a pre-hook."""
        self.read(kwargs[_TIMESTEP] if _TIMESTEP in kwargs else args[self.position])

    def pick(self, table: torch.Tensor, rows: int) -> torch.Tensor:
        """Entries of a table `(..., times)`: `(...)` where all rows are at one timestep, else `(..., rows)`.

        Raises:
            ValueError: `rows` is no multiple of the number of timesteps of the call.
        """
        chosen = table.index_select(-1, self.index.to(table.device))
        count = chosen.shape[-1]
        if count == 1:
            return chosen[..., 0]
        if rows % count:
            raise ValueError(f"A layer got {rows} rows in a call with {count} timesteps; a multiple of them is needed.")
        return chosen.repeat_interleave(rows // count, -1)


def timestep_position(cls: type) -> int:
    """Place of the timestep among the positional arguments of a class of denoisers."""
    return list(inspect.signature(cls.forward).parameters).index(_TIMESTEP) - 1  # type: ignore[attr-defined]


def attach_clocks(model: nn.Module, clocks: Iterable[Clock]) -> None:
    """Make clocks read the timestep of each call of a denoiser."""
    for clock in clocks:
        clock.position = timestep_position(type(model))
        handle = model.register_forward_pre_hook(clock, with_kwargs=True)
        vars(model).setdefault(_HANDLES, []).append(handle)


def detach_clocks(model: nn.Module) -> None:
    """Undo `attach_clocks`."""
    for handle in vars(model).pop(_HANDLES, []):
        handle.remove()


def falling(times: Iterable[float]) -> list[float]:
    """Different timesteps, the noisiest first."""
    return sorted(set(times), reverse=True)
