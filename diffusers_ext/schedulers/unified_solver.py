r"""Unified sampling framework: a solver that may decide anew at each step (Liu et al. 2023, arXiv 2312.07243).

A step goes from a start point `s` to the next point `t` of the grid by the exponential integrator of section 3 of the
paper. What it leaves open is decided a step at a time, in a list that travels in the config:

| decision | values | paper, table 1 |
|---|---|---|
| `timestep` | of the denoiser call at the beginning of the step; in all steps or in none | timestep |
| `prediction` | "data" or "noise": whose derivatives the Taylor series has | prediction type |
| `order` | 1 to 4, at most the number of the step | Taylor order |
| `points` | for each derivative the number of points that its difference takes; nearest to `s`, newer ones first | derivative estimation |
| `scaling` | factor on the first derivative, see `derivative_scale` | derivative scaling |
| `second_scale` | factor on the second derivative; not in the paper, for DPM-Solver++ 3M as diffusers has it | |
| `start` | -1 is the last point (multistep), -p the one p - 1 before it (singlestep) | starting point |
| `corrector` | 0 for none, else Taylor order 2 to 5 by which the step is done again once its end has been evaluated | corrector |
| `corrector_scaling` | as `scaling` | |

The corrector is the paper's "pseudo" one, that of UniPC: the denoiser is not asked again for the corrected state, so each
step costs one call. Its "implicit" one and the analytic first step change the number of calls, and the prediction type of
DPM-Solver-v3 needs statistics of the model; they are not here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config

from ._exponential import Point, combine, midpoint_scale, phi, step_weights
from ._grid import GridScheduler, check_choice, with_grid_arguments

SCALINGS = ("midpoint", "bh1", "exp", "-exp")
MAX_ORDER = 4


@dataclass(frozen=True)
class SolverStep:
    """Decisions of one step; see the module.

    Raises:
        ValueError: a decision is none of those allowed.
    """

    timestep: float | None = None
    prediction: str = "data"
    order: int = 1
    points: tuple[int, ...] | None = None
    scaling: float | str = 0.0
    second_scale: float = 1.0
    start: int = -1
    corrector: int = 0
    corrector_scaling: float | str = 0.0

    def __post_init__(self) -> None:
        if self.timestep is not None and not _is_number(self.timestep):
            raise ValueError(f"`timestep` is {self.timestep!r}; a number is needed, or None.")
        check_choice("prediction", self.prediction, ("data", "noise"))
        for name, allowed in (("order", range(1, MAX_ORDER + 1)), ("corrector", (0, *range(2, MAX_ORDER + 2)))):
            value = getattr(self, name)
            if type(value) is not int or value not in allowed:
                raise ValueError(f"`{name}` is {value!r}; allowed are {', '.join(map(str, allowed))}.")
        for name in ("scaling", "corrector_scaling"):
            value = getattr(self, name)
            if value not in SCALINGS if isinstance(value, str) else not _is_number(value):
                raise ValueError(f"`{name}` is {value!r}; allowed are numbers and {', '.join(map(repr, SCALINGS))}.")
        if not _is_number(self.second_scale):
            raise ValueError(f"`second_scale` is {self.second_scale!r}; a number is needed.")
        if type(self.start) is not int or not -MAX_ORDER <= self.start <= -1:
            raise ValueError(f"`start` is {self.start!r}; allowed are integers from {-MAX_ORDER} to -1.")
        points = (self.order - 1,) * (self.order - 1) if self.points is None else self.points
        if not isinstance(points, (list, tuple)) or any(type(n) is not int for n in points):
            raise ValueError(f"`points` is {points!r}; a list of integers is needed, or None.")
        if len(points) != self.order - 1 or not all(k <= n <= MAX_ORDER for k, n in enumerate(points, 1)):
            raise ValueError(
                f"`points` is {list(points)!r}; order {self.order} needs {self.order - 1} of them, the k-th from k to "
                f"{MAX_ORDER}."
            )
        object.__setattr__(self, "points", tuple(points))

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON has it: equal steps give equal dicts."""
        default = SolverStep(order=self.order)
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        found = {name: value for name, value in found.items() if value != getattr(default, name) or name == "order"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def derivative_scale(scaling: float | str, kind: str, h: float) -> float:
    r"""Factor on the first derivative, :math:`1 + O(h)` (paper, table 1).

    A number c is :math:`1 + c h`. With z = h for noise and -h for data, "midpoint" is
    :math:`z (e^z - 1) / (2 (e^z - 1 - z))`, that of DPM-Solver-2, of DPM-Solver++ "midpoint" and of UniPC's `bh2`; "bh1" is
    :math:`z^2 / (2 (e^z - 1 - z))`, UniPC's `bh1`; "exp" and "-exp" are :math:`1 \pm (e^z - 1) / 2`.
    """
    if not isinstance(scaling, str):
        return 1.0 + scaling * h
    z = h if kind == "noise" else -h
    if scaling == "midpoint":
        return midpoint_scale(kind, h)
    if scaling == "bh1":
        return 0.5 / phi(2, z)
    return 1.0 + (0.5 if scaling == "exp" else -0.5) * math.expm1(z)


class _Named(NamedTuple):
    """A known solver as a rule for any number of steps.

    `midpoint` scales the steps of order 2; `falling` solvers end with the orders ..., 2, 1 even in long runs; `careful` ones
    take order 2, scaled, for steps that are too long for 3.
    """

    order: int
    midpoint: bool = False
    corrector: bool = False
    singlestep: bool = False
    falling: bool = False
    careful: bool = False
    second_scale: float = 1.0


NAMED: dict[str, _Named] = {
    "ddim": _Named(1),
    "taylor2": _Named(2),
    "taylor3": _Named(3),
    "taylor3-corrected": _Named(3, corrector=True, falling=True, careful=True),
    "taylor4": _Named(4),
    "dpmsolver++2m-heun": _Named(2),
    "dpmsolver++2m-midpoint": _Named(2, midpoint=True),
    "dpmsolver++3m-compat": _Named(3, midpoint=True, second_scale=0.5),
    "dpmsolver++2s": _Named(2, midpoint=True, singlestep=True),
    "unipc2": _Named(2, midpoint=True, corrector=True, falling=True),
    "unipc3": _Named(3, midpoint=True, corrector=True, falling=True),
}
_TOO_LONG = 1.0  # length in log-SNR of a step, over which a third order extrapolates too far
_LONG = 15  # steps from which on DPM-Solver++ keeps its order to the end


def named_schedule(name: str, num_steps: int, lengths: Sequence[float] | None = None) -> list[SolverStep]:
    """The schedule of a known solver, all of data prediction.

    Args:
        name: "ddim"; "taylor2" to "taylor4", multistep with full Taylor series; "taylor3-corrected", the default, the same
            with correctors of order 4, and steps longer than 1 as in "unipc2"; "dpmsolver++2m-heun" (which is "taylor2"),
            "dpmsolver++2m-midpoint", "dpmsolver++2s", "unipc2" and "unipc3" as of diffusers (`bh2`), and
            "dpmsolver++3m-compat", which has half of the second derivative, as diffusers' third order has.
        num_steps: number of steps.
        lengths: of the steps, in half log-SNR; None if all are short.

    Raises:
        ValueError: there is no such solver.
    """
    check_choice("name", name, tuple(NAMED))
    solver = NAMED[name]
    steps = []
    for i in range(num_steps):
        order = min(solver.order, i + 1)
        if solver.singlestep:
            order = 1 if i % solver.order == 0 else solver.order
        elif solver.falling or num_steps < _LONG:
            order = min(order, num_steps - i)
        careful = solver.careful and lengths is not None and lengths[i] > _TOO_LONG
        order = min(order, 2) if careful else order
        scaling = "midpoint" if (solver.midpoint or careful) and order == 2 else 0.0
        corrects = solver.corrector and i + 1 < num_steps
        steps.append(
            SolverStep(
                order=order, scaling=scaling, second_scale=solver.second_scale if order == 3 else 1.0,
                start=-order if solver.singlestep else -1, corrector=order + 1 if corrects else 0,
                corrector_scaling="midpoint" if corrects and order == 1 else 0.0,
            )
        )  # fmt: skip
    return steps


def read_schedule(schedule: Any) -> list[SolverStep]:
    """The steps of a list of dicts, checked.

    Raises:
        ValueError: it is no such list, a decision is wrong, a step needs more points than there are, or the timesteps do
            not fall.
    """
    if not isinstance(schedule, (list, tuple)) or not schedule:
        raise ValueError(
            f"`solver_schedule` is {schedule!r}; allowed are {', '.join(map(repr, NAMED))} and a list of steps."
        )
    known, steps = {item.name for item in fields(SolverStep)}, []
    for i, step in enumerate(schedule):
        if not isinstance(step, Mapping) or not set(step) <= known:
            raise ValueError(f"`solver_schedule[{i}]` is {step!r}; a dict of {', '.join(sorted(known))} is needed.")
        try:
            steps.append(SolverStep(**step))
        except ValueError as error:
            raise ValueError(f"`solver_schedule[{i}]`: {error}") from error
        if max(steps[i].order, -steps[i].start, *(n + 1 for n in steps[i].points or ()), 1) > i + 1:
            raise ValueError(
                f"`solver_schedule[{i}]` is {step!r}; there it has {i + 1} points, its start among them, and needs more."
            )
        if steps[i].corrector > i + 2:
            raise ValueError(f"`solver_schedule[{i}]` has `corrector` {steps[i].corrector}; allowed are 2 to {i + 2}.")
    times = [step.timestep for step in steps]
    given = [time for time in times if time is not None]
    if given and (len(given) < len(times) or any(a <= b for a, b in itertools.pairwise(given))):
        raise ValueError(f"`solver_schedule` has the timesteps {times!r}; none is needed, or all, strictly falling.")
    return steps


class _Evaluation(NamedTuple):
    """A point of the run: its state and what was predicted there, by kind."""

    point: Point
    state: torch.Tensor
    predictions: dict[str, torch.Tensor]


class UnifiedSolverScheduler(GridScheduler):
    """Multistep and singlestep exponential integrators, decided step by step (arXiv 2312.07243).

    The step to clean data, which all grids but `final_sigmas_type="sigma_min"` end with, is the newest data prediction,
    whatever was decided for it. A run that starts in the middle takes the points that it has.

    Args:
        solver_schedule: name of a solver for any number of steps (see `named_schedule`); or a list of one dict a step with
            decisions that differ from the defaults of `SolverStep`, for runs of that many steps only. Timesteps in it hold
            unless `set_timesteps` is given others.

    Raises:
        ValueError: an argument has a wrong value.
    """

    @register_to_config
    @with_grid_arguments
    def __init__(self, solver_schedule: str | Sequence[Mapping[str, Any]] = "taylor3-corrected") -> None:
        if isinstance(solver_schedule, str):
            check_choice("solver_schedule", solver_schedule, tuple(NAMED))
            self._own: list[SolverStep] = []
        else:
            self._own = read_schedule(solver_schedule)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As `GridScheduler.set_timesteps`; a schedule that is a list allows only its own number of steps."""
        if self._own:
            given = timesteps if timesteps is not None else sigmas
            number = num_inference_steps if given is None else len(given)
            if number not in (None, len(self._own)):
                raise ValueError(
                    f"`num_inference_steps` is {number!r}; this `solver_schedule` is for {len(self._own)} steps."
                )
            if given is None and self._own[0].timestep is not None:
                timesteps = [float(step.timestep) for step in self._own]  # type: ignore[arg-type]
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)

    def start(self) -> None:
        lengths = [there.lambda_ - here.lambda_ for here, there in itertools.pairwise(self.points)]
        self._steps = self._own or named_schedule(self.config.solver_schedule, len(lengths), lengths)
        self._kinds = {step.prediction for step in self._steps}
        # What later steps may look back to, beside the point that they add themselves; a corrector, one point more.
        self._reach = max(max(-s.start - 1, *(s.points or (0,))) for s in self._steps)
        self._reach = max(self._reach, *(max(-s.start, s.corrector - 1) for s in self._steps if s.corrector), 0)
        self._kept: list[_Evaluation] = []  # newest first

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        step, here, there = self._steps[i], self.points[i], self.points[i + 1]
        clean = there.sigma == 0.0
        convert = {"data": self.to_data, "noise": self.to_noise}
        wanted = self._kinds | {"data"} if clean else self._kinds
        found = {kind: convert[kind](model_output, sample, i) for kind in wanted}
        self._kept.insert(0, _Evaluation(here, sample, found))
        before = self._steps[i - 1] if len(self._kept) > 1 else None
        if before is not None and before.corrector and not clean:  # the last step does not look at the state
            corrected = self._advance(
                before.prediction, before.corrector, (before.corrector - 1,) * (before.corrector - 1),
                before.corrector_scaling, 1.0, -before.start, here, True,
            )  # fmt: skip
            self._kept[0] = self._kept[0]._replace(state=corrected)
        if clean:
            result = self._advance("data", 1, (), 0.0, 1.0, 0, there)
        else:
            result = self._advance(
                step.prediction, step.order, step.points or (), step.scaling, step.second_scale, -step.start - 1, there
            )
        del self._kept[self._reach :]
        return result

    def _advance(
        self,
        kind: str,
        order: int,
        counts: tuple[int, ...],
        scaling: float | str,
        second_scale: float,
        start: int,
        end: Point,
        correct: bool = False,
    ) -> torch.Tensor:
        """The state at `end`, from point number `start` of those kept, with differences to those around it."""
        start = min(start, len(self._kept) - 1)
        base = self._kept[start]
        others = [*range(start - 1, -1, -1), *range(start + 1, len(self._kept))]
        if correct:  # its own end first
            others = [0, *(j for j in others if j != 0)]
        order = min(order, len(others) + 1)
        counts = tuple(min(n, len(others)) for n in counts[: order - 1])
        others = others[: max(counts, default=0)]
        offsets = [self._kept[j].point.lambda_ - base.point.lambda_ for j in others]
        scale = derivative_scale(scaling, kind, end.lambda_ - base.point.lambda_) if order > 1 else 1.0
        weights = step_weights(kind, base.point, end, offsets, order, scale, second_scale, counts)
        return combine(weights, base.state, [self._kept[j].predictions[kind] for j in (start, *others)])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
