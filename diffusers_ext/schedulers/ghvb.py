r"""Heavy-ball momentum for multistep solvers (Wizadwongsa et al. 2023, arXiv 2307.11118).

Explicit multistep solvers have small regions of stability, and strong guidance makes the ODE stiff: predictions then
overshoot in turn, which shows as blotches of far too bright or dark pixels. Polyak's heavy ball averages what a solver
moves along, :math:`v_n = (1 - \beta) v_{n-1} + \beta\, d_n`: a wider region of stability for less accuracy.

`GHVBScheduler` is the paper's own method and puts the accuracy back; the other two add momentum to DPM-Solver++ and UniPC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config

from ._exponential import Point, Weights, combine, midpoint_scale, step_weights
from ._grid import GridScheduler, check_choice, check_number, with_grid_arguments

MAX_ORDER = 4


class GHVBScheduler(GridScheduler):
    r"""Generalised heavy ball, and linear multistep (PLMS) with heavy-ball or Nesterov momentum.

        pipe.scheduler = GHVBScheduler.from_config(pipe.scheduler.config, order=1.8)

    In :math:`\bar x = x / \alpha` and :math:`\bar\sigma = \sigma / \alpha` the ODE is :math:`d\bar x / d\bar\sigma =
    \epsilon`. A step is :math:`\bar x_{n+1} = \bar x_n + (\bar\sigma_{n+1} - \bar\sigma_n) u_n` (section 4 of the paper),
    with :math:`v_{-1} = \epsilon_0` and :math:`AB_k` the Adams-Bashforth formula of order `k`, lower while there are fewer
    values:

    - "generalized": :math:`v_n = (1-\beta) v_{n-1} + \beta \epsilon_n` and :math:`u_n = \frac{1}{\beta}
      \sum_{j<k} (\beta \gamma_j + (1-\beta) \gamma_{j-1}) \nabla^j v_n`, which undoes the lag of `v` up to order `k`;
    - "heavy_ball": :math:`u_n = v_n = (1-\beta) v_{n-1} + \beta\, AB_k(\epsilon)_n`, of order 1;
    - "nesterov": that `v`, and :math:`u_n = (1-\beta) v_n + \beta\, AB_k(\epsilon)_n`.

    Here :math:`\nabla` is the backward difference and :math:`\gamma = 1, \frac12, \frac5{12}, \frac38, \dots` are the
    weights of Adams-Bashforth. The formulas assume steps of equal length in :math:`\bar\sigma`; on other grids all of them
    are of order 2 at most.

    Args:
        order: `k - 1` plus the momentum number :math:`\beta`: 1.8 is `k = 2` with :math:`\beta = 0.8`. Over 0, up to 4.
            Whole numbers have no momentum: 1 is DDIM, and `k` is PLMS of order `k`. The smaller :math:`\beta` is, the wider
            is the region of stability.
        momentum: "generalized", "heavy_ball" or "nesterov".

    Raises:
        ValueError: a wrong argument, here or in `set_timesteps`.
    """

    @register_to_config
    @with_grid_arguments
    def __init__(self, order: float = 1.8, momentum: str = "generalized") -> None:
        check_number("order", order, 0, MAX_ORDER, open_low=True)
        check_choice("momentum", momentum, ("generalized", "heavy_ball", "nesterov"))

    def start(self) -> None:
        k = math.ceil(self.config.order)
        self.beta = float(self.config.order - k + 1)
        generalized = self.config.momentum == "generalized"
        self.formulas = [_adams_bashforth(j, self.beta if generalized else 1.0) for j in range(1, k + 1)]
        self.kept: list[torch.Tensor] = []  # newest first: v of "generalized", else the noise predictions
        self.velocity: torch.Tensor | None = None

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        here, there = self.points[i], self.points[i + 1]
        noise = self.to_noise(model_output, sample, i)
        if self.config.momentum == "generalized":
            self.velocity = self._averaged(noise)
            direction = self._multistep(self.velocity)
        else:
            formula = self._multistep(noise)
            # v_{-1} is the first noise, and so is the first formula
            direction = self.velocity = self._averaged(formula)
            if self.config.momentum == "nesterov":
                direction = torch.lerp(self.velocity, formula, self.beta)
        state = there.alpha / here.alpha
        return combine(Weights(state, (there.sigma - state * here.sigma,)), sample, [direction])

    def _averaged(self, new: torch.Tensor) -> torch.Tensor:
        return new if self.velocity is None else torch.lerp(self.velocity, new, self.beta)

    def _multistep(self, new: torch.Tensor) -> torch.Tensor:
        """Adams-Bashforth over `new` and what was kept."""
        self.kept = [new, *self.kept][: len(self.formulas)]
        first, *others = self.formulas[len(self.kept) - 1]
        return combine(Weights(first, tuple(others)), self.kept[0], self.kept[1:])


class HeavyBallDPMSolverMultistepScheduler(GridScheduler):
    r"""DPM-Solver++ 2M ("midpoint") with heavy-ball momentum.

        pipe.scheduler = HeavyBallDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, beta=0.8)

    A step of second order moves along :math:`v = (1-\beta) v + \beta (m_0 + \frac{h}{2 h'} (m_0 - m_1))`, of the data
    predictions `m`; the first one starts `v`. Steps of first order, which are the first and the last, are plain.

    Args:
        beta: :math:`\beta`, over 0 and up to 1; 1 is DPM-Solver++ 2M.
        lower_order_final: in runs of fewer than 15 steps the last one is of order 1, as it always is to clean data.

    Raises:
        ValueError: a wrong argument, here or in `set_timesteps`.
    """

    @register_to_config
    @with_grid_arguments
    def __init__(self, beta: float = 0.8, lower_order_final: bool = True) -> None:
        check_number("beta", beta, 0, 1, open_low=True)
        check_choice("lower_order_final", lower_order_final, (True, False))

    def start(self) -> None:
        self.kept: tuple[Point, torch.Tensor] | None = None
        self.velocity: torch.Tensor | None = None

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        here, there = self.points[i], self.points[i + 1]
        newest, kept = self.to_data(model_output, sample, i), self.kept
        self.kept = here, newest
        short = self.config.lower_order_final and len(self.points) <= 15
        if kept is None or there.sigma == 0 or (short and self.is_last(i)):
            return combine(step_weights("data", here, there), sample, [newest])
        scale = midpoint_scale("data", there.lambda_ - here.lambda_)
        weights = step_weights("data", here, there, [kept[0].lambda_ - here.lambda_], 2, scale)
        moved, self.velocity = move_with_momentum(weights, sample, [newest, kept[1]], self.velocity, self.config.beta)
        return moved


class HeavyBallUniPCMultistepScheduler(GridScheduler):
    r"""UniPC (`bh2`, data prediction) with heavy-ball momentum in its predictor and in its corrector.

        pipe.scheduler = HeavyBallUniPCMultistepScheduler.from_config(pipe.scheduler.config, beta=0.8)

    Each of the two moves along an average of its own, that of what plain UniPC would move along, and the first step of
    each starts it. The step to clean data is plain. The authors' code averages the directions divided by the :math:`\sigma`
    where each step ends; such an average falls behind as :math:`\sigma` falls, even where the prediction never changes, and
    it has no value at clean data. Here the average of equal predictions is that prediction.

    Args:
        beta: :math:`\beta`, over 0 and up to 1; 1 is UniPC.
        solver_order: p of UniPC-p, 1 to 3: 2 for guided sampling.
        lower_order_final: the last steps are of lower order.
        disable_corrector: indices of steps whose result is not corrected.

    Raises:
        ValueError: a wrong argument, here or in `set_timesteps`.
    """

    @register_to_config
    @with_grid_arguments
    def __init__(
        self,
        beta: float = 0.8,
        solver_order: int = 2,
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
    ) -> None:
        check_number("beta", beta, 0, 1, open_low=True)
        check_choice("solver_order", solver_order, (1, 2, 3))
        check_choice("lower_order_final", lower_order_final, (True, False))
        if not isinstance(disable_corrector, (list, tuple)) or any(not isinstance(i, int) for i in disable_corrector):
            raise ValueError(f"`disable_corrector` is {disable_corrector!r}; a list of indices of steps is needed.")
        self.register_to_config(disable_corrector=list(disable_corrector))  # as it is when loaded

    def start(self) -> None:
        self.kept: list[tuple[Point, torch.Tensor]] = []  # newest first
        self.velocities: dict[str, torch.Tensor] = {}
        self.last_sample: torch.Tensor | None = None
        self.last_order = 1

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        here, there = self.points[i], self.points[i + 1]
        newest = self.to_data(model_output, sample, i)
        if self.last_sample is not None and i - 1 not in self.config.disable_corrector:
            sample = self._solve("corrector", self.last_sample, here, self.last_order, (here, newest))
        self.kept = [(here, newest), *self.kept][: self.config.solver_order]
        order = len(self.kept)
        if self.config.lower_order_final:
            order = min(order, len(self.points) - 1 - i)
        if there.sigma == 0:
            return combine(step_weights("data", here, there), sample, [newest])
        self.last_sample, self.last_order = sample, order
        return self._solve("predictor", sample, there, order)

    def _solve(
        self, name: str, sample: torch.Tensor, end: Point, order: int, ahead: tuple[Point, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """From the newest point kept to `end`: with `order` predictions kept and, to correct, the one `ahead`, at `end`."""
        (start, newest), *others = [*self.kept[:order], *([ahead] if ahead else [])]
        offsets = [point.lambda_ - start.lambda_ for point, _ in others]
        scale = midpoint_scale("data", end.lambda_ - start.lambda_) if len(others) == 1 else 1.0
        weights = step_weights("data", start, end, offsets, first_derivative_scale=scale)
        moved, self.velocities[name] = move_with_momentum(
            weights, sample, [newest, *(m for _, m in others)], self.velocities.get(name), self.config.beta
        )
        return moved


def move_with_momentum(
    weights: Weights,
    sample: torch.Tensor,
    predictions: Sequence[torch.Tensor],
    velocity: torch.Tensor | None,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step along the average of the past directions and this one.

    Args:
        weights: of the plain step. Its direction is the mean of the predictions by these weights.
        sample: where the step starts.
        predictions: as `weights` has them.
        velocity: the average so far; None before the first step, which starts it.
        beta: share of this direction.

    Returns:
        the state after the step, and the new average.
    """
    total = sum(weights.predictions)
    first, *others = (weight / total for weight in weights.predictions)
    direction = combine(Weights(first, tuple(others)), predictions[0], predictions[1:])
    velocity = direction if velocity is None else torch.lerp(velocity, direction, beta)
    return combine(Weights(weights.state, (total,)), sample, [velocity]), velocity


def _adams_bashforth(k: int, beta: float) -> list[float]:
    r"""Weights of the newest `k` values, newest first, of :math:`\frac{1}{\beta} \sum_{j<k} (\beta \gamma_j + (1-\beta)
    \gamma_{j-1}) \nabla^j`; with beta 1 those of Adams-Bashforth."""
    gamma = [1.0]
    for j in range(1, k):
        gamma.append(1.0 - sum(gamma[i] / (j + 1 - i) for i in range(j)))
    share = [gamma[j] + ((1 - beta) / beta * gamma[j - 1] if j else 0.0) for j in range(k)]
    return [sum((-1) ** m * math.comb(j, m) * share[j] for j in range(m, k)) for m in range(k)]
