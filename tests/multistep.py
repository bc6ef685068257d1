"""The simplest scheduler on the shared grid and core: multistep Taylor of a fixed order, for tests of the two."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from diffusers_ext.schedulers._exponential import combine, midpoint_scale, step_weights
from diffusers_ext.schedulers._grid import GridScheduler, with_grid_arguments


class MultistepScheduler(GridScheduler):
    @register_to_config
    @with_grid_arguments
    def __init__(self, solver_order: int = 2, kind: str = "data", midpoint: bool = False) -> None:
        pass

    def start(self) -> None:
        self.kept: list[tuple[float, torch.Tensor]] = []

    def update(self, model_output, sample, i, generator):
        convert = self.to_data if self.config.kind == "data" else self.to_noise
        here, there = self.points[i], self.points[i + 1]
        order = 1 if there.sigma == 0 else min(self.config.solver_order, len(self.kept) + 1)
        past = self.kept[: order - 1]
        scale = (
            midpoint_scale(self.config.kind, there.lambda_ - here.lambda_)
            if self.config.midpoint and order > 1
            else 1.0
        )
        kind = "data" if there.sigma == 0 else self.config.kind
        current = convert(model_output, sample, i)
        weights = step_weights(kind, here, there, [lambda_ - here.lambda_ for lambda_, _ in past], order, scale)
        newest = current if kind == self.config.kind else self.to_data(model_output, sample, i)
        self.kept = [(here.lambda_, current), *self.kept][:3]
        return combine(weights, sample, [newest, *(m for _, m in past)])
