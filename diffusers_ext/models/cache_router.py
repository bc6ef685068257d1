r"""The router of HarmoniCa (Huang et al. 2024, arXiv 2410.01723): which parts of a transformer run at which step.

One number a step and sublayer, :math:`r_{t,i} = \mathrm{sigmoid}(p_{t,i})`: while it is trained, the share of sublayer i's own
output at step t, the rest being what is in the cache. Then sublayers run where r is over a threshold, and are taken from the
cache elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

BOUND = 5.0  # of |p|: where it is clamped to in training


class CacheRouter(ModelMixin, ConfigMixin):
    r"""Shares :math:`r_{t,i}` of one transformer at one number of steps. `train_harmonica` makes it.

    A new one has :math:`p \sim N(0, 1)`; the first step is fixed to compute.

    Args:
        steps: T, denoiser calls of a run; 0 is the first, at pure noise.
        sublayers: names of the modules that are routed, in the order of the columns.
        num_marks: numbers in the fingerprint of the transformer's weights; 0 for none.

    Attributes:
        logits: p, `(steps, sublayers)`.
        lambdas: :math:`\lambda_t`, `(steps,)`, what the router at one step costs in the finished picture, as measured last.
        marks: the fingerprint.

    Raises:
        ValueError: an argument is out of range.
    """

    _supports_gradient_checkpointing = False
    lambdas: torch.Tensor
    marks: torch.Tensor

    @register_to_config
    def __init__(self, *, steps: int = 20, sublayers: Sequence[str] = ("block",), num_marks: int = 0) -> None:
        super().__init__()
        for name, value, least in (("steps", steps, 1), ("num_marks", num_marks, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")
        if isinstance(sublayers, str) or not sublayers or not all(isinstance(name, str) for name in sublayers):
            raise ValueError(f"`sublayers` is {sublayers!r}; at least one name of a module is needed.")
        self.logits = nn.Parameter(torch.randn(steps, len(sublayers)))
        with torch.no_grad():
            self.logits[0] = BOUND
        self.register_buffer("lambdas", torch.zeros(steps))
        self.register_buffer("marks", torch.zeros(num_marks))

    def forward(self, step: int) -> torch.Tensor:
        """Shares of all sublayers at a step, `(sublayers,)` in (0, 1)."""
        return self.logits[step].sigmoid()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep p in [-5, 5], where its gradient does not vanish."""
        self.logits.clamp_(-BOUND, BOUND)

    @torch.no_grad()
    def table(self, threshold: float) -> torch.Tensor:
        """Which sublayers run: bool `(steps, sublayers)` on the CPU. At the first step all do, since nothing is stored yet."""
        computed = self.logits.float().sigmoid().cpu() > threshold
        computed[0] = True
        return computed
