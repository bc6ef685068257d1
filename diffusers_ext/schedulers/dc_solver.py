r"""DC-Solver: UniPC with dynamic compensation (Zhao et al. 2024, arXiv 2409.03755).

UniPC's corrector moves a sample after the network was asked at it, and the prediction that is kept belongs to the sample
before. With guidance the two differ. DC-Solver replaces the kept prediction :math:`m_i` of step `i` by the interpolation
of the last three at a time near by, :math:`t' = t_{i-1} + \rho_i (t_i - t_{i-1})` (equation 10 of the paper), with one
ratio :math:`\rho_i` a step, found by `search_dc_ratios` for a model, a number of steps and a scale of guidance.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging

from ._grid import check_choice, check_number, from_flow_config

logger = logging.get_logger(__name__)

DC_ORDER = 2  # K of the paper: the degree of the interpolation
# What ratios depend on besides the model, the number of steps and the guidance.
GRID_SETTINGS = (
    "timestep_spacing", "steps_offset", "final_sigmas_type", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "use_flow_sigmas", "flow_shift", "solver_order", "solver_type", "predict_x0",
    "lower_order_final", "disable_corrector",
)  # fmt: skip
_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "solver_type": ("bh1", "bh2"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
}
_OTHER_SOLVERS = ("midpoint", "heun", "logrho")  # of related schedulers' configs; UniPC takes them for "bh2"


def _with_unipc_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments of UniPC, without `solver_p`, to those of `init`, which gets them all to check.

    All are given by name only: diffusers takes those given by position for defaults, and loses them.
    """
    own = inspect.signature(init)
    unipc = dict(list(inspect.signature(UniPCMultistepScheduler.__init__).parameters.items())[1:])
    unipc.pop("solver_p")
    merged = {**unipc, **dict(list(own.parameters.items())[1:])}
    named = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in merged.values()]
    signature = own.replace(parameters=[own.parameters["self"], *named])

    @functools.wraps(init)
    def full(self: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        _check_unipc(given, named)
        init(self, **{name: given[name] for name in own.parameters if name != "self"})
        self.register_to_config(disable_corrector=list(given["disable_corrector"]))  # as it is when loaded
        # Without its `register_to_config`, which would note `solver_p` as an argument that was left at its default.
        unipc_init = inspect.unwrap(UniPCMultistepScheduler.__init__)
        unipc_init(self, **{name: given[name] for name in unipc}, solver_p=None)

    full.__signature__ = signature  # type: ignore[attr-defined]
    return full


class DCSolverMultistepScheduler(UniPCMultistepScheduler):
    r"""UniPC with dynamic compensation; takes the arguments of `UniPCMultistepScheduler` except `solver_p`, by name.

        found = search_dc_ratios(pipe, prompts, num_inference_steps=5, guidance_scale=7.5)
        pipe.scheduler = DCSolverMultistepScheduler.from_config(pipe.scheduler.config, **found)

    Where a ratio is 1 nothing is computed: with all at 1 or without ratios the result is that of UniPC with the same
    `disable_corrector`, bit for bit. A run that starts in the middle compensates from its third step on.

    Args:
        dc_ratios: :math:`\rho_i` of each step; the first two are 1, since three predictions are needed. None is UniPC.
        dc_key: what the ratios were found for: "model", "num_inference_steps", "guidance_scale" and "grid". Another grid
            is warned of in `set_timesteps`; another model or guidance, which a scheduler does not see, by
            `check_dc_ratios`.
        disable_corrector: steps whose result is not corrected; that of the first, as in the paper.
        solver_order: 2 for guided, 3 for unconditional sampling.

    Raises:
        ValueError: a wrong argument; or in `set_timesteps` a number of steps that the ratios are not for, or that makes
            two steps to the same noise level.
    """

    timesteps: torch.Tensor

    @register_to_config
    @_with_unipc_arguments
    def __init__(
        self,
        dc_ratios: Sequence[float] | None = None,
        dc_key: Mapping[str, Any] | None = None,
        disable_corrector: Sequence[int] = (0,),
    ) -> None:
        if dc_ratios is not None:
            numbers = isinstance(dc_ratios, (list, tuple)) and all(map(_is_finite, dc_ratios))
            if not numbers or any(ratio != 1 for ratio in dc_ratios[:DC_ORDER]):
                raise ValueError(
                    f"`dc_ratios` is {dc_ratios!r}; a list of numbers is needed, one a step, the first two of them 1."
                )
        if dc_key is not None and not isinstance(dc_key, Mapping):
            raise ValueError(f"`dc_key` is {dc_key!r}; a dict, as `search_dc_ratios` gives it, or None is needed.")
        whole = isinstance(disable_corrector, (list, tuple)) and all(type(i) is int for i in disable_corrector)
        if not whole:
            raise ValueError(f"`disable_corrector` is {disable_corrector!r}; a list of indices of steps is needed.")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; the config of a flow-matching scheduler, as of SD3 and Flux, is understood as well."""
        if isinstance(config, Mapping) and config.get("solver_type") in _OTHER_SOLVERS:
            config = {**config, "solver_type": "bh2"}
        config = from_flow_config(config, ("invert_sigmas", "stochastic_sampling"))
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay the grid of UniPC; arguments as there."""
        number = num_inference_steps if sigmas is None else len(sigmas)
        limit, ratios = self.config.num_train_timesteps, self.config.dc_ratios
        if type(number) is not int or not 1 <= number <= limit:
            raise ValueError(f"`num_inference_steps` is {number!r}; allowed are integers from 1 to {limit}.")
        if ratios is not None and len(ratios) != number:
            raise ValueError(
                f"`num_inference_steps` is {number!r}, and `dc_ratios` are for {len(ratios)} steps; search for this number "
                "of steps, or make the scheduler with `dc_ratios=None`, which is UniPC."
            )
        super().set_timesteps(number, None, None if sigmas is None else np.array(sigmas, dtype=np.float64), mu)
        self._times: list[int] = self.timesteps.tolist()
        levels, first = self.sigmas[:-1], self._times[:2]
        repeated = bool((levels.diff() >= 0).any()) or (number > 1 and first[0] == first[-1])
        if repeated or (ratios is not None and len(set(self._times)) < number):
            self.num_inference_steps = None
            raise ValueError(
                f"`num_inference_steps` is {number!r}; with these settings of the grid it gives a timestep twice. Take fewer."
            )
        self.timesteps = self.timesteps.to(device)
        self.dc_ratios: list[Any] = [1.0] * number if ratios is None else [float(ratio) for ratio in ratios]
        self._outputs: list[torch.Tensor] = []  # newest first
        grid = (self.config.dc_key or {}).get("grid", {})
        for name, found in grid.items():
            here = self.config.get(name)
            if (list(here) if isinstance(here, tuple) else here) != found:
                logger.warning(f"`dc_ratios` were found with `{name}` {found!r}, and it is {here!r}: search again.")

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> SchedulerOutput | tuple:
        """A step of UniPC, compensated; no noise is drawn, so that `generator` is taken and left alone."""
        return super().step(model_output, timestep, sample, return_dict=return_dict)

    def multistep_uni_p_bh_update(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The predictor, from the compensated prediction, which is also the one that the next corrector gets."""
        i = self.step_index
        self._outputs = [self.model_outputs[-1], *self._outputs[:DC_ORDER]]
        ratio = self.dc_ratios[i]
        plain = isinstance(ratio, float) and ratio == 1.0
        if not plain and len(self._outputs) == DC_ORDER + 1:
            nodes = [self._times[i - j] for j in range(DC_ORDER + 1)]
            weights = lagrange_weights(nodes[1] + ratio * (nodes[0] - nodes[1]), nodes)
            newest = self._outputs[0]
            mixed = sum(w * m.to(torch.promote_types(m.dtype, torch.float32)) for w, m in zip(weights, self._outputs, strict=True))  # fmt: skip
            self._outputs[0] = self.model_outputs[-1] = mixed.to(newest.dtype)  # type: ignore[union-attr]
        return super().multistep_uni_p_bh_update(model_output, *args, **kwargs)


def lagrange_weights(t: Any, nodes: Sequence[float]) -> list[Any]:
    """Weights of the values at `nodes` in their interpolation at `t`.

    Args:
        t: a number, or a tensor, by which the weights can then be differentiated.
        nodes: distinct numbers.
    """
    return [
        math.prod((t - other) / (node - other) for j, other in enumerate(nodes) if j != i)
        for i, node in enumerate(nodes)
    ]


# --- cascade polynomial regression -----------------------------------------------------------------------------------


def predict_dc_ratios(coefficients: Any, guidance_scale: float, num_inference_steps: int) -> list[float]:
    r"""Ratios of a setting that was not searched, by cascade polynomial regression (section 3.4 of the paper).

    :math:`\rho_i = \sum_{k=0}^3 c_k (i / N)^k` for steps `i` counted from 1, with each :math:`c_k` a quadratic in
    guidance / 12 whose coefficients are quadratics in N / 50. The first two ratios are 1.

    Args:
        coefficients: `(4, 3, 3)`, of `fit_dc_ratios`: by power of i / N, rising, then of guidance and of N, falling.
        guidance_scale: w.
        num_inference_steps: N.

    Raises:
        ValueError: coefficients of another shape, or a number of steps that is not positive.
    """
    table = np.asarray(coefficients, dtype=np.float64)
    if table.shape != (4, 3, 3) or not np.isfinite(table).all():
        raise ValueError(f"`coefficients` has shape {table.shape}; finite numbers of shape (4, 3, 3) are needed.")
    if type(num_inference_steps) is not int or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; allowed are integers of at least 1.")
    rows = _cpr_features(guidance_scale, num_inference_steps)
    return [1.0] * min(DC_ORDER, num_inference_steps) + (rows @ table.ravel()).tolist()


def fit_dc_ratios(found: Sequence[Mapping[str, Any]]) -> list[list[list[float]]]:
    """Coefficients for `predict_dc_ratios` from searched settings, by least squares.

    Args:
        found: results of `search_dc_ratios`, at three or more scales of guidance for each of three or more numbers of
            steps.

    Returns:
        `(4, 3, 3)` numbers, as nested lists.

    Raises:
        ValueError: the settings do not determine the 36 numbers.
    """
    keys = [item["dc_key"] for item in found]
    if not keys:
        raise ValueError("`found` is empty; results of `search_dc_ratios` are needed.")
    features = np.concatenate([_cpr_features(key["guidance_scale"], key["num_inference_steps"]) for key in keys])
    ratios = np.concatenate([np.asarray(item["dc_ratios"][DC_ORDER:], dtype=np.float64) for item in found])
    solution, _, rank, _ = np.linalg.lstsq(features, ratios, rcond=None)
    if rank < features.shape[1]:
        raise ValueError(
            f"`found` has {len(keys)} settings, which determine {rank} of {features.shape[1]} numbers; at least three scales "
            "of guidance for each of three numbers of steps of 6 or more are needed."
        )
    return solution.reshape(4, 3, 3).tolist()


def _cpr_features(guidance_scale: float, number: int) -> np.ndarray:
    """Products of powers of which a ratio is a linear combination, `(steps from the third on, 36)`."""
    if not _is_finite(guidance_scale):
        raise ValueError(f"`guidance_scale` is {guidance_scale!r}; a finite number is needed.")
    place = np.arange(DC_ORDER + 1, number + 1) / number
    guidance, size = (np.array([x**2, x, 1.0]) for x in (guidance_scale / 12, number / 50))
    return np.einsum("ik,a,b->ikab", place[:, None] ** np.arange(4), guidance, size).reshape(len(place), 36)


# --- checks ----------------------------------------------------------------------------------------------------------


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_unipc(given: Mapping[str, Any], parameters: Sequence[inspect.Parameter]) -> None:
    """What UniPC leaves unchecked: choices, and the types of the arguments, by their defaults."""
    for name, allowed in _CHOICES.items():
        check_choice(name, given[name], allowed)
    for parameter in parameters:
        name, value, default = parameter.name, given[parameter.name], parameter.default
        if isinstance(default, bool):
            check_choice(name, value, (True, False))
        elif isinstance(default, (int, float)):
            low = {"num_train_timesteps": 2, "solver_order": 1}.get(name, 0)
            check_number(name, value, low, whole=isinstance(default, int))
        elif name in ("sigma_min", "sigma_max", "shift_terminal") and value is not None:
            check_number(name, value, 0)
    betas = given["trained_betas"]
    if betas is not None and not (isinstance(betas, (list, tuple, np.ndarray)) and all(map(_is_finite, betas))):
        raise ValueError(f"`trained_betas` is {betas!r}; a list of numbers or None is needed.")
    if sum(given[f"use_{grid}_sigmas"] for grid in ("karras", "exponential", "beta")) > 1:
        raise ValueError("Only one of `use_karras_sigmas`, `use_exponential_sigmas` and `use_beta_sigmas` can be True.")
    if (given["prediction_type"] == "flow_prediction") != given["use_flow_sigmas"]:
        raise ValueError(
            f"`prediction_type` is {given['prediction_type']!r} with `use_flow_sigmas` {given['use_flow_sigmas']!r}; "
            "'flow_prediction' goes with True, and the other types with False."
        )
    if given["use_flow_sigmas"] and not given["predict_x0"]:
        raise ValueError("`predict_x0` is False with `use_flow_sigmas`; UniPC predicts flows as data only.")
    to_clean = given["final_sigmas_type"] == "zero"
    for name, right in (
        ("predict_x0", given["predict_x0"]), ("solver_type", given["solver_type"] != "bh1"),
        ("lower_order_final", given["lower_order_final"] or given["solver_order"] == 1),
    ):  # fmt: skip
        if to_clean and not right:
            raise ValueError(
                f"`{name}` is {given[name]!r} with `final_sigmas_type` 'zero'; UniPC cannot step to clean data so. Take "
                "'sigma_min', or the default."
            )
