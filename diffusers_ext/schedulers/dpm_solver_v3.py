"""DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268): a predictor-corrector in a parametrisation measured on the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config

from ._carried import CarriesStatistics
from ._exponential import Point, difference_weights
from ._grid import GridScheduler, check_choice, with_grid_arguments
from ._model_statistics import DPMSolverV3Statistics, Integrals

_KEPT_STEPS = 100  # coefficients of longer runs are not kept: for large latents they would be gigabytes


class _Coefficients(NamedTuple):
    """A step `state * x_s + constant + sum_j values[j] * g_j`, tensors of the shape of the statistics."""

    state: torch.Tensor
    constant: torch.Tensor
    values: tuple[torch.Tensor, ...]


class DPMSolverV3Scheduler(CarriesStatistics, GridScheduler):
    r"""Multistep solver whose linear part is fitted to the model: see `DPMSolverV3Statistics` for l, s, b and f.

    It solves :math:`x_t = \frac{\alpha_t}{\alpha_s} e^{-L} x_s - \alpha_t e^{-L} \int_s^t e^{L + S} (g + B)\, d\lambda` (the
    paper's equation 9), where :math:`g = e^{-S} f - B` would stay constant if f followed its model exactly. g is a
    polynomial through its values at earlier calls. The corrector repeats a step once the network was called at its end.

        statistics = dx.collect_statistics(pipe, prompts, guidance_scale=5.0)
        pipe.scheduler = dx.DPMSolverV3Scheduler.from_config(
            pipe.scheduler.config, statistics=statistics, model=pipe.unet
        )

    Args:
        solver_order: 1, 2 or 3: how many calls a prediction uses.
        use_corrector: correct each state after the call at it; costs no call. The last is not corrected.
        pseudo_predictor, pseudo_corrector: estimate derivatives of g by divided differences, each over as few points as
            it needs, in place of the polynomial through all. The corrector then uses one point more (section 3.3).
        lower_order_final: lower the order towards the end of the run.
    """

    statistics_class = DPMSolverV3Statistics

    @register_to_config
    @with_grid_arguments
    def __init__(
        self,
        solver_order: int = 3,
        use_corrector: bool = True,
        pseudo_predictor: bool = False,
        pseudo_corrector: bool = False,
        lower_order_final: bool = True,
    ) -> None:
        check_choice("solver_order", solver_order, (1, 2, 3))
        for name, value in (
            ("use_corrector", use_corrector), ("pseudo_predictor", pseudo_predictor),
            ("pseudo_corrector", pseudo_corrector), ("lower_order_final", lower_order_final),
        ):  # fmt: skip
            check_choice(name, value, (True, False))
        self._kept: dict[Any, Any] = {}
        self._kept_for: Any = None

    # --- statistics --------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: Any = None,
        return_unused_kwargs: bool = False,
        statistics: DPMSolverV3Statistics | None = None,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in diffusers, with statistics; with `model`, the denoiser, they must be of that.

        Raises:
            ValueError: also where they are no `DPMSolverV3Statistics`, or of another model.
        """
        if model is not None and isinstance(statistics, DPMSolverV3Statistics):
            statistics.check_model(model)
        return super().from_config(config, return_unused_kwargs, statistics, **kwargs)

    def use_statistics(self, statistics: DPMSolverV3Statistics) -> None:
        """As in `CarriesStatistics`."""
        super().use_statistics(statistics)
        self._kept = {}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As in `GridScheduler`.

        Raises:
            ValueError: also where there are no statistics, or they are of a process with other noise levels.
        """
        self.require_statistics()
        low, high = (-math.log(float(self._train_ratios[i])) for i in (-1, 0))
        config = self.statistics.config
        if config.lambda_min > low + 0.1 or config.lambda_max < high - 0.1:
            raise ValueError(
                f"`statistics` are for log-SNR from {config.lambda_min:.2f} to {config.lambda_max:.2f}, and this process "
                f"has it from {low:.2f} to {high:.2f}: they belong to another model."
            )
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)

    # --- a run -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._history: list[tuple[float, torch.Tensor]] = []  # (lambda, g), newest first
        self._previous: torch.Tensor | None = None
        self._order = 0
        if self._kept_for != self.points:
            self._kept, self._kept_for = {}, list(self.points)

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        config, here = self.config, self.points[i]
        shape = tuple(self.statistics.config.shape)
        if any(n not in (1, m) for n, m in zip(reversed(shape), reversed(sample.shape), strict=False)):
            raise ValueError(f"`statistics` are for samples of shape {shape}, and these are {tuple(sample.shape[1:])}.")
        f = self._share(i, sample) * sample - self.to_data(model_output, sample, i)
        if self._previous is not None:
            growth, shift = self._transport(i - 1, sample)
            order = self._order + config.pseudo_corrector
            if config.use_corrector and order > 1:
                # f stays what it is at the corrected state.
                s, *earlier = self._history
                nodes = [s, (here.lambda_, (f - shift) / growth), *earlier][:order]
                sample = self._step(i - 1, nodes, self._previous, config.pseudo_corrector)
            self._history = [(lambda_, torch.addcmul(shift, growth, g)) for lambda_, g in self._history]
        self._history = [(here.lambda_, f), *self._history][:3]
        left = len(self.points) - 1 - i if config.lower_order_final else config.solver_order
        self._order = min(config.solver_order, len(self._history), left)
        self._previous = sample
        return self._step(i, self._history[: self._order], sample, config.pseudo_predictor)

    def _step(
        self, i: int, nodes: list[tuple[float, torch.Tensor]], sample: torch.Tensor, pseudo: bool
    ) -> torch.Tensor:
        """From point `i` to the next, with g through `nodes`, the first of which is at point `i`."""
        lambdas = tuple(lambda_ for lambda_, _ in nodes)
        made = self._cached(("step", i, lambdas, pseudo), sample, lambda: self._coefficients(i, lambdas, pseudo))
        result = torch.addcmul(made.constant, made.state, sample)
        for weight, (_, g) in zip(made.values, nodes, strict=True):
            result.addcmul_(weight, g)
        return result

    def _coefficients(self, i: int, lambdas: tuple[float, ...], pseudo: bool) -> _Coefficients:
        here, there = self.points[i], self._target(i)
        step = self._integrals(i)
        decay = there.alpha * torch.exp(-step.L)
        state, constant = decay / here.alpha, -decay * step.C
        terms = [-decay * e for e in step.E[: len(lambdas)]]
        if self.points[i + 1].sigma == 0.0:
            # Clean data: what is predicted at the last noise level of training, with f followed up to there.
            share, growth = (1 - self._l(there)) / there.alpha, torch.exp(step.S)
            h = there.lambda_ - here.lambda_
            state, constant = share * state, share * constant - growth * step.B
            terms = [share * term - growth * h**k / math.factorial(k) for k, term in enumerate(terms)]
        offsets = [lambda_ - here.lambda_ for lambda_ in lambdas[1:]]
        values = [terms[0], *(torch.zeros_like(terms[0]) for _ in offsets)]
        for k in range(1, len(lambdas)):
            points = offsets[:k] if pseudo else offsets  # k! times a divided difference is the highest derivative
            for j, weight in enumerate(difference_weights(points, k).tolist(), start=1):
                values[j] = values[j] + weight * terms[k]
                values[0] = values[0] - weight * terms[k]
        return _Coefficients(state, constant, tuple(values))

    def _transport(self, i: int, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(growth, shift)`: a value of g at point `i` is `growth * g + shift` when taken relative to the next point."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            step = self._integrals(i)
            return torch.exp(step.S), torch.exp(step.S) * step.B

        return self._cached(("transport", i), sample, make)

    def _share(self, i: int, sample: torch.Tensor) -> torch.Tensor:
        """`(1 - l) / alpha`: f is this times the state, less the predicted data."""
        point = self.points[i]
        return self._cached(("share", i), sample, lambda: ((1 - self._l(point)) / point.alpha,))[0]

    def _integrals(self, i: int) -> Integrals:
        key = ("integrals", i)
        if key not in self._kept:  # the corrector of a step needs those of its predictor
            self._kept = {k: v for k, v in self._kept.items() if k[0] != key[0]}
            start, end = self.points[i].lambda_, self._target(i).lambda_
            self._kept[key] = self.statistics.integrals(start, end, 3)
        return self._kept[key]

    def _target(self, i: int) -> Point:
        """Where step `i` ends, or for clean data the last noise level of training."""
        if self.points[i + 1].sigma > 0.0:
            return self.points[i + 1]
        last = self._point(float(self._train_ratios[0]))
        return last if last.lambda_ > self.points[i].lambda_ else self.points[i]

    def _l(self, point: Point) -> torch.Tensor:
        return self.statistics.coefficient_l(point.lambda_)

    def _cached(self, key: tuple, sample: torch.Tensor, make: Any) -> Any:
        """Tensors that `make` gives, in the dtype and on the device of `sample`, kept for later runs on the same grid."""
        key = (*key, sample.dtype, sample.device)
        if key not in self._kept:
            made = _like(make(), sample)
            if len(self.points) > _KEPT_STEPS:
                return made
            self._kept[key] = made
        return self._kept[key]


def _like(made: Any, sample: torch.Tensor) -> Any:
    if torch.is_tensor(made):
        return made.to(dtype=sample.dtype, device=sample.device)
    parts = [_like(part, sample) for part in made]
    return type(made)(*parts) if isinstance(made, _Coefficients) else tuple(parts)
