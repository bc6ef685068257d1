"""Fast Forward (arXiv 2409.04206): every few optimizer steps, repeat the last update for as long as a validation loss falls.

    fast_forward = FastForward(parameters, validation_loss, optimizer)
    loss.backward()
    fast_forward.step()          # in place of `optimizer.step()`

In this package's trainers it is one of the task's `callbacks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ._loop import Callback


class FastForward(Callback):
    r"""After every `interval`-th step :math:`\Delta W = W_t - W_{t-1}` is added again, as often as the loss falls by it.

    The first addition by which it does not fall is undone exactly. An optimizer's own state stays as it is. Moving along
    :math:`\Delta W` to the minimum of a loss that is quadratic there, a stage ends at the integer nearest to it, after one
    validation more than it has additions, besides the first.

    The validation loss must be the same function at each call: of a small fixed set, and for diffusion at fixed noise and
    timesteps, without gradients, in evaluation mode. On several processes it has to be the same number on each, since each
    decides by it: `accelerator.reduce` it.

    Args:
        parameters: those that are trained. The paper's finding is about low-rank ones (LoRA): directions of full training
            change from step to step.
        validation_loss: gives one number, a tensor or a float.
        optimizer: for `step`; not needed as a callback of a task.
        interval: optimizer steps from one stage to the next, at least 1; infinite: no stage.
        warmup: optimizer steps before the first interval begins.
        patience: stages without a gain, one after another, after which there are no more; None: never.

    Attributes:
        additions: kept ones, of each stage that there was.
        validations: calls of `validation_loss`.

    Raises:
        ValueError: a number is out of range, or no parameter is trained.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        validation_loss: Callable[[], torch.Tensor | float],
        optimizer: torch.optim.Optimizer | None = None,
        interval: float = 6,
        warmup: int = 0,
        patience: int | None = 3,
    ) -> None:
        if not (interval == math.inf or (interval >= 1 and interval == int(interval))):
            raise ValueError(f"`interval` is {interval}; it must be a whole number from 1, or infinite.")
        if warmup < 0:
            raise ValueError(f"`warmup` is {warmup}; it must be at least 0.")
        if patience is not None and patience < 1:
            raise ValueError(f"`patience` is {patience}; it must be at least 1, or None.")
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("`parameters` has none that is trained.")
        self.validation_loss, self.optimizer = validation_loss, optimizer
        self.interval, self.patience = interval, patience
        self.additions: list[int] = []
        self.validations = 0
        self._since = -warmup  # steps since the last stage

    @property
    def stopped(self) -> bool:
        """Whether there will be no more stages."""
        return (
            self.patience is not None
            and not any(self.additions[-self.patience :])
            and len(self.additions) >= self.patience
        )

    def step(self) -> None:
        """The optimizer's step, and a stage where it is time for one.

        Raises:
            ValueError: it was made without an optimizer.
        """
        if self.optimizer is None:
            raise ValueError("`optimizer` was not given; it is needed for `step`.")
        self.around_step(self.optimizer.step)

    def around_step(self, step: Callable[[], Any]) -> None:
        self._since += 1
        if self._since < self.interval or self.stopped:
            step()
            return
        before = self._copy()
        step()
        self._since = 0
        self._stage(before)

    @torch.no_grad()
    def _stage(self, before: list[torch.Tensor]) -> None:
        update = [parameter - old for parameter, old in zip(self.parameters, before, strict=True)]
        best, kept = self._validate(), 0
        while True:
            here = self._copy()
            for parameter, change in zip(self.parameters, update, strict=True):
                parameter.add_(change)
            loss = self._validate()
            if not loss < best:
                break
            best, kept = loss, kept + 1
        for parameter, old in zip(self.parameters, here, strict=True):
            parameter.copy_(old)
        self.additions.append(kept)

    def _validate(self) -> float:
        self.validations += 1
        return float(self.validation_loss())

    def _copy(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def state_dict(self) -> dict[str, Any]:
        return {"additions": list(self.additions), "validations": self.validations, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.additions, self.validations = list(state["additions"]), state["validations"]
        self._since = state["since"]
