"""Grokfast (arXiv 2405.20233): amplify the slow part of gradients, between `backward()` and the optimizer's step.

    grad_filter = GrokfastEMA(model.parameters())
    loss.backward()
    grad_filter.apply()          # before clipping; with mixed precision after unscaling; once for all accumulated batches
    optimizer.step()

In this package's trainers a filter is one of the task's `callbacks`, and its state is kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ._loop import Callback


class _Filter(Callback):
    """A filter with one tensor of state a parameter, which is None until that has its first gradient."""

    def __init__(self, parameters: Iterable[nn.Parameter], lamb: float) -> None:
        if not lamb >= 0:
            raise ValueError(f"`lamb` is {lamb}; it must be at least 0.")
        self.lamb = lamb
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("`parameters` has none that is trained.")
        self._state: list[torch.Tensor | None] = [None] * len(self.parameters)

    def apply(self) -> None:
        """Change the gradients that there are, in place."""
        raise NotImplementedError

    def on_gradients(self) -> None:
        self.apply()

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        given = state["state"]
        if len(given) != len(self.parameters):
            raise ValueError(f"The state is of {len(given)} parameters; this filter has {len(self.parameters)}.")
        self._state = [
            None if tensor is None else tensor.to(parameter.device)
            for tensor, parameter in zip(given, self.parameters, strict=True)
        ]


class GrokfastEMA(_Filter):
    r""":math:`h \leftarrow \alpha h + (1 - \alpha) g`, then :math:`g \leftarrow g + \lambda h` (algorithm 2).

    h begins as the first gradient. It is one more copy of the parameters. Weight decay belongs to the recipe.

    Args:
        parameters: those that are trained.
        alpha: 0 to 1, both left out: how slow is slow. The paper takes 0.8 to 0.99.
        lamb: at least 0; 0 leaves gradients as they are.

    Raises:
        ValueError: a number is out of range, or no parameter is trained.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], alpha: float = 0.98, lamb: float = 2.0) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"`alpha` is {alpha}; it must lie between 0 and 1.")
        super().__init__(parameters, lamb)
        self.alpha = alpha

    @torch.no_grad()
    def apply(self) -> None:
        for i, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            slow = self._state[i]
            if slow is None:
                slow = self._state[i] = gradient.clone()
            slow.mul_(self.alpha).add_(gradient, alpha=1 - self.alpha)
            gradient.add_(slow, alpha=self.lamb)


class GrokfastMA(_Filter):
    r""":math:`g \leftarrow g + \lambda \bar g` with the mean of the last w gradients, this one among them (algorithm 1).

    Until there are w of them, gradients stay as they are. It is w more copies of the parameters.

    Args:
        parameters: those that are trained.
        window: w, at least 1.
        lamb: at least 0; 0 leaves gradients as they are.

    Raises:
        ValueError: a number is out of range, or no parameter is trained.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], window: int = 100, lamb: float = 5.0) -> None:
        if window < 1:
            raise ValueError(f"`window` is {window}; it must be at least 1.")
        super().__init__(parameters, lamb)
        self.window = window
        self._counts = [0] * len(self.parameters)

    @torch.no_grad()
    def apply(self) -> None:
        for i, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            last = self._state[i]
            if last is None:
                last = self._state[i] = gradient.new_empty(self.window, *gradient.shape)
            last[self._counts[i] % self.window] = gradient
            self._counts[i] += 1
            if self._counts[i] >= self.window:
                gradient.add_(last.mean(0), alpha=self.lamb)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"counts": list(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._counts = list(state["counts"])
