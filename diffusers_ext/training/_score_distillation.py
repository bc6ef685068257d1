r"""Score distillation: a student learns from the difference of two scores, the teacher's and that of what it makes itself.

    loss = distillation_loss(clean, vsd_gradient(wanted, fake, sigma))     # gradients for the student

`clean` are samples that the student made, with its graph; `wanted` and `fake` are noise that is predicted in noisy versions of
them, by the teacher and by a model of the student's own samples. That model, a `FakeScore`, learns beside the student:

    task.callbacks = [fake := FakeScore(parameters, accelerator, learning_rate=1e-3)]
    fake.learn(denoising_loss)                                             # in `Task.loss`

It takes its optimizer step right after the student's, as the two take turns on the same samples (Wang et al. 2023, ProlificDreamer,
algorithm 1), and is kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ._loop import Callback


def vsd_gradient(wanted: torch.Tensor, fake: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    r""":math:`\sigma_t^2 (\epsilon_{teacher} - \epsilon_{fake})`, by the clean sample, up to the positive factor of a weight.

    Args:
        wanted, fake: predicted noise of the noisy samples, `(batch, ...)`.
        sigma: noise level, in a shape that broadcasts against them.
    """
    return sigma.square() * (wanted - fake)


def distillation_loss(clean: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    r""":math:`\frac12 \mathrm{mean} (x_0 - \mathrm{sg}(x_0 - g))^2`, whose gradient by :math:`x_0` is g over the number of elements.

    Args:
        clean: :math:`x_0`, `(batch, ...)`, with the graph of the student.
        gradient: g, of the same shape; taken as a constant.
    """
    target = (clean - gradient).detach()
    return 0.5 * (clean - target).float().square().mean()


class FakeScore(Callback):
    """What learns the score of the student's samples, with an AdamW of its own.

    Args:
        parameters: by name; those of a LoRA on the teacher, or of a whole copy of it.
        accelerator: of the run.
        learning_rate: constant.
        max_grad_norm: of its gradients.
        accumulate: micro-batches that make an optimizer step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        accelerator: Accelerator,
        learning_rate: float,
        max_grad_norm: float = 1.0,
        accumulate: int = 1,
    ) -> None:
        self.parameters, self.accelerator = dict(parameters), accelerator
        self.max_grad_norm, self.accumulate = max_grad_norm, accumulate
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=learning_rate, weight_decay=0.0)

    def learn(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, the mean over a micro-batch."""
        found = torch.autograd.grad(loss / self.accumulate, list(self.parameters.values()))
        for parameter, gradient in zip(self.parameters.values(), found, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def around_step(self, step: Callable[[], None]) -> None:
        step()
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        values = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return {"parameters": values, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
