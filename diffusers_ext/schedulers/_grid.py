r"""What all ODE schedulers share: the process, the grid of noise levels, and everything that a stock pipeline calls.

The process is :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`: that of a beta schedule (:math:`\alpha^2 + \sigma^2 = 1`,
:math:`\alpha_t^2 = \bar\alpha_t`), or rectified flow (:math:`\alpha = 1 - \sigma`). A scheduler adds its update rule.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import is_scipy_available

from ._exponential import Point
from ._run import RunScheduler, RunSchedulerOutput

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
SPACINGS = ("linspace", "leading", "trailing")


class GridScheduler(RunScheduler):
    """Base of our ODE schedulers; a subclass writes `update`, and `start` where it keeps something over steps.

    A subclass's `__init__` takes its own arguments and is decorated with `register_to_config` and, below that,
    `with_grid_arguments`, which adds these:

    Args:
        num_train_timesteps: number of timesteps that the model was trained with.
        beta_start, beta_end, beta_schedule, trained_betas: the process, as in all of diffusers' schedulers. The
            schedule is "linear", "scaled_linear" or "squaredcos_cap_v2".
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of the predicted clean sample
            (Saharia et al. 2022), for models of pixels only.
        timestep_spacing, steps_offset: how timesteps are spread: "linspace", "leading" or "trailing".
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: other grids of sigma / alpha between the same ends;
            exponential ones are uniform in log-SNR. Their timesteps are real numbers and are not rounded.
        use_flow_sigmas: the process is rectified flow.
        flow_shift: shift of the flow grid towards noise, `s -> shift s / (1 + (shift - 1) s)`.
        use_dynamic_shifting, time_shift_type: the shift comes from `mu` of `set_timesteps`, "exponential" or "linear".
        final_sigmas_type: the grid ends at clean data ("zero") or at the first training timestep ("sigma_min").
        rescale_betas_zero_snr: rescale the schedule so that it ends in pure noise (Lin et al. 2023).
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", timestep_spacing, SPACINGS)
        check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        check_choice("time_shift_type", time_shift_type, ("exponential", "linear"))
        for name, flag in (
            ("thresholding", thresholding), ("use_karras_sigmas", use_karras_sigmas),
            ("use_exponential_sigmas", use_exponential_sigmas), ("use_beta_sigmas", use_beta_sigmas),
            ("use_flow_sigmas", use_flow_sigmas), ("use_dynamic_shifting", use_dynamic_shifting),
            ("rescale_betas_zero_snr", rescale_betas_zero_snr),
        ):  # fmt: skip
            check_choice(name, flag, (True, False))
        check_number("num_train_timesteps", num_train_timesteps, 2, whole=True)
        check_number("steps_offset", steps_offset, 0, whole=True)
        check_number("flow_shift", flow_shift, 0, open_low=True)
        check_number("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0, 1, open_low=True)
        check_number("sample_max_value", sample_max_value, 0, open_low=True)
        others = (use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas)
        if sum(others) > 1:
            raise ValueError(
                "Only one of `use_karras_sigmas`, `use_exponential_sigmas` and `use_beta_sigmas` can be True."
            )
        if (prediction_type == "flow_prediction") != use_flow_sigmas:
            raise ValueError(
                f"`prediction_type` is {prediction_type!r} with `use_flow_sigmas` {use_flow_sigmas!r}; 'flow_prediction' "
                "goes with `use_flow_sigmas=True`, and the other types with False."
            )
        _check_betas(beta_start, beta_end, beta_schedule, trained_betas)
        if use_beta_sigmas and not is_scipy_available():
            raise ImportError("`use_beta_sigmas=True` needs scipy: pip install scipy.")
        if use_flow_sigmas:
            levels = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
            self._train_ratios = (levels / (1 - levels)).numpy()[:-1]  # the last one is pure noise
        else:
            betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
            # In float32, as the schedulers that models are trained with keep it.
            self.betas = _zero_terminal_snr(betas) if rescale_betas_zero_snr else betas
            self.alphas = 1.0 - self.betas
            self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
            if rescale_betas_zero_snr:
                # Close to zero: an infinite ratio has no logarithm. Schedules may be below 2^-24 the step before already.
                self.alphas_cumprod[-1] = min(2**-24, float(self.alphas_cumprod[-2]) / 2)
            table = self.alphas_cumprod.double()
            self._train_ratios = torch.sqrt((1 - table) / table).numpy()
        self.init_noise_sigma = 1.0
        self.points: list[Point] = []
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.sigmas = torch.from_numpy(np.append(self._train_ratios[::-1], 0.0)).float()

    # --- what a subclass writes --------------------------------------------------------------------------------------

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """The state at `self.points[i + 1]`.

        Args:
            model_output: what the denoiser predicted at `self.points[i]`, in float32 or float64.
            sample: the state there, in the same dtype; not to be written into.
            i: index of the step.
            generator: for schedulers that draw noise.
        """
        raise NotImplementedError

    # --- the grid ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; the config of a flow-matching scheduler, as of SD3 and Flux, is understood as well."""
        config = from_flow_config(config, ("invert_sigmas", "shift_terminal", "stochastic_sampling"))
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay the grid for a run; called by the pipelines.

        Args:
            num_inference_steps: number of steps, which is that of denoiser calls.
            device: where `timesteps` will be.
            timesteps: the timesteps themselves, strictly falling, instead of a number of steps.
            sigmas: noise levels, strictly falling, instead: sigma / alpha, or for flow sigma before the shift.
            mu: logarithm of the dynamic shift, with `use_dynamic_shifting`; not used without it.

        Raises:
            ValueError: not exactly one of the three is given (a number beside a list must be its length), a list does
                not fall, a value is out of range, or `mu` is missing.
        """
        given = [values for values in (timesteps, sigmas) if values is not None]
        if len(given) == 2 or (not given and num_inference_steps is None):
            raise ValueError("Give one of `num_inference_steps`, `timesteps` and `sigmas`.")
        if given and num_inference_steps not in (None, len(given[0])):
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps!r}, and the list has {len(given[0])} values."
            )
        betas, train = self.config.trained_betas, self.config.num_train_timesteps
        if betas is not None and len(betas) != train:
            raise ValueError(f"`trained_betas` has {len(betas)} values; `num_train_timesteps` is {train}.")
        if self.config.use_dynamic_shifting and mu is None:
            raise ValueError("`mu` is None; with `use_dynamic_shifting=True` it must be given.")
        if not given:
            self._check_number(num_inference_steps)
        ratios, times = self._levels(
            num_inference_steps, _falling("timesteps", timesteps), _falling("sigmas", sigmas), mu
        )
        self.num_inference_steps = len(times)
        last = 0.0 if self.config.final_sigmas_type == "zero" else float(self._train_ratios[0])
        if last > ratios[-1] * (1 - 1e-6):  # the grid is there already: no step is left but the one to clean data
            last = 0.0
        self.points = [self._point(float(ratio)) for ratio in (*ratios, last)]
        kept = [point.sigma for point in self.points] if self.config.use_flow_sigmas else [*ratios, last]
        self.sigmas = torch.tensor(kept, dtype=torch.float32)  # on the CPU: nothing waits for a device
        whole = not self.config.use_flow_sigmas and np.array_equal(times, np.round(times))
        self.timesteps = torch.from_numpy(times.astype(np.int64 if whole else np.float32)).to(device)
        self._rewind()
        self.start()

    def _check_number(self, number: Any) -> None:
        limit = self.config.num_train_timesteps
        if not (isinstance(number, (int, np.integer)) and 1 <= number <= limit):
            raise ValueError(f"`num_inference_steps` is {number!r}; allowed are integers from 1 to {limit}.")

    def _levels(
        self, number: int | None, timesteps: np.ndarray | None, sigmas: np.ndarray | None, mu: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`(sigma / alpha, timestep)` of each step, in float64."""
        config, train = self.config, self.config.num_train_timesteps
        if config.use_flow_sigmas:
            if timesteps is not None:
                levels = _below_pure_noise(timesteps / train, train)
            else:
                levels = np.linspace(1.0, 0.0, int(number or 0) + 1)[:-1] if sigmas is None else sigmas
                levels = self._shifted(_below_pure_noise(levels, train), mu)
            if not 0 < levels[-1] <= levels[0] < 1:
                raise ValueError(f"The noise levels are {levels.tolist()!r}; allowed are values over 0 and up to 1.")
            ratios = levels / (1 - levels)
        elif sigmas is not None:
            ratios, levels = sigmas, None
        else:
            times = self._spaced(int(number or 0)) if timesteps is None else timesteps
            if times[0] > train - 1 or times[-1] < 0:
                raise ValueError(f"`timesteps` is {list(times)!r}; allowed are values from 0 to {train - 1}.")
            ratios = self._ratio_at(times)
        replaced = self._other_grid(len(ratios)) if timesteps is None and sigmas is None else None
        if replaced is not None:
            ratios = replaced
        if config.use_flow_sigmas:
            return ratios, train * ratios / (1 + ratios)
        return ratios, self._time_at(ratios) if sigmas is not None or replaced is not None else times

    def _spaced(self, n: int) -> np.ndarray:
        """Whole timesteps, as upstream's DPM-Solver spreads them."""
        train, spacing = self.config.num_train_timesteps, self.config.timestep_spacing
        if spacing == "linspace":
            return (
                np.linspace(0, train - 1, n + 1).round()[::-1][:-1] if n < train else np.arange(train - 1.0, -1.0, -1.0)
            )
        if spacing == "leading":
            times = (
                (np.arange(0, n + 1) * (train // (n + 1))).round()[::-1][:-1] if n < train else np.arange(train)[::-1]
            )
            return times + min(self.config.steps_offset, train - 1 - times[0])  # none twice
        return np.arange(train, 0, -train / n).round()[:n] - 1.0

    def _other_grid(self, n: int) -> np.ndarray | None:
        """Ratios from that of the last training timestep to that of the first, where `sigma_min` leaves one to end at."""
        config = self.config
        ramp = np.linspace(0, 1, n + (config.final_sigmas_type == "sigma_min"))[:n]
        high, low = self._train_ratios[-1], self._train_ratios[0]
        if config.use_karras_sigmas:  # Karras et al. 2022, equation 5, rho = 7
            return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        if config.use_exponential_sigmas:
            return high * (low / high) ** ramp
        if config.use_beta_sigmas:  # Lee et al. 2024 (arXiv 2407.12173), alpha = beta = 0.6
            # By name: an exported file that names scipy in an import would need it for all grids.
            return low + importlib.import_module("scipy.stats").beta.ppf(1 - ramp, 0.6, 0.6) * (high - low)
        return None

    def _shifted(self, levels: np.ndarray, mu: float | None) -> np.ndarray:
        if self.config.use_dynamic_shifting and mu is not None:
            shift = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        else:
            shift = self.config.flow_shift
        return shift * levels / (1 + (shift - 1) * levels)

    def _point(self, ratio: float) -> Point:
        if self.config.use_flow_sigmas:
            return Point(1 / (1 + ratio), ratio / (1 + ratio))
        return Point(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))

    def _ratio_at(self, times: np.ndarray) -> np.ndarray:
        """sigma / alpha at real timesteps: its logarithm is linear in between."""
        return np.exp(np.interp(times, np.arange(len(self._train_ratios)), np.log(self._train_ratios)))

    def _time_at(self, ratios: np.ndarray) -> np.ndarray:
        return np.interp(np.log(ratios), np.log(self._train_ratios), np.arange(len(self._train_ratios)))

    # --- a run -------------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> RunSchedulerOutput | tuple[torch.Tensor]:
        """One step of the grid.

        Args:
            model_output: prediction of the denoiser, in the shape of `sample`.
            timestep: the timestep that it was made for: an element of `self.timesteps`. Looked up in the first step only.
            sample: the current state.
            generator: for schedulers that draw noise.
            return_dict: False gives a tuple.

        Returns:
            the next state, in the dtype of `model_output`. Computed in float32 at least.

        Raises:
            ValueError: `set_timesteps` was not called, or the run is over.
        """
        i = self._enter(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        previous = self.update(model_output.to(dtype), sample.to(dtype), i, generator)
        self._leave(i)
        previous = previous.to(model_output.dtype)
        return RunSchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def to_data(self, model_output: torch.Tensor, sample: torch.Tensor, i: int) -> torch.Tensor:
        """The clean sample that a prediction at point `i` stands for, after thresholding."""
        alpha, sigma = self.points[i]
        kind = self.config.prediction_type
        if kind == "sample":
            data = model_output
        elif kind == "epsilon":
            data = (sample - sigma * model_output) / alpha
        elif kind == "v_prediction":
            data = alpha * sample - sigma * model_output
        else:
            data = sample - sigma * model_output
        return self._thresholded(data) if self.config.thresholding else data

    def to_noise(self, model_output: torch.Tensor, sample: torch.Tensor, i: int) -> torch.Tensor:
        """The noise that a prediction at point `i` stands for; with thresholding, that of the thresholded data."""
        alpha, sigma = self.points[i]
        kind = self.config.prediction_type
        if kind == "sample" or self.config.thresholding:
            return (sample - alpha * self.to_data(model_output, sample, i)) / sigma
        if kind == "epsilon":
            return model_output
        if kind == "v_prediction":
            return alpha * model_output + sigma * sample
        return sample + alpha * model_output

    def _thresholded(self, data: torch.Tensor) -> torch.Tensor:
        limit = torch.quantile(data.abs().flatten(1), self.config.dynamic_thresholding_ratio, dim=1)
        limit = limit.clamp(min=1.0, max=self.config.sample_max_value).view(-1, *[1] * (data.ndim - 1))
        return data.clamp(-limit, limit) / limit

    def is_last(self, i: int) -> bool:
        return i + 1 == self.num_inference_steps

    # --- what pipelines and trainers call ----------------------------------------------------------------------------

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`alpha_t x_0 + sigma_t noise`, at any timesteps `(batch,)`."""
        times = torch.as_tensor(timesteps).double().cpu().reshape(-1).numpy()
        if self.config.use_flow_sigmas:
            sigma = times / self.config.num_train_timesteps
            alpha = 1 - sigma
        else:
            ratio = self._ratio_at(times)
            alpha, sigma = 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        like = {"dtype": original_samples.dtype, "device": original_samples.device}
        return torch.from_numpy(alpha).to(**like).view(shape) * original_samples + torch.from_numpy(sigma).to(**like).view(shape) * noise  # fmt: skip

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """As `add_noise`, in the order of arguments of flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def with_grid_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments of `GridScheduler` to a subclass's `__init__`, after its own, and set the grid up first.

    diffusers reads the arguments of a config off the signature, so the result shows all of them. They go by name: what is
    given by position diffusers notes as a default, and `from_config` would drop it.
    """
    own = list(inspect.signature(init).parameters.values())[1:]
    grid = list(inspect.signature(GridScheduler.__init__).parameters.values())[1:]
    named = {parameter.name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*grid, *own]}
    order = [parameter.name for parameter in own] + [name for name in named if name not in {p.name for p in own}]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.Signature([first, *(named[name] for name in order)])

    @functools.wraps(init)
    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        GridScheduler.__init__(self, **{parameter.name: bound.arguments[parameter.name] for parameter in grid})
        init(self, **{parameter.name: bound.arguments[parameter.name] for parameter in own})

    full.__signature__ = signature  # type: ignore[attr-defined]
    return full


def from_flow_config(config: Any, unsupported: Sequence[str]) -> Any:
    """The config of a flow-matching scheduler of diffusers in the words of its diffusion schedulers; others as they are.

    Args:
        config: what `from_config` was given.
        unsupported: settings of flow-matching schedulers that must be off.

    Raises:
        ValueError: one of these is on.
    """
    if not isinstance(config, Mapping) or "shift" not in config or "beta_start" in config:
        return config
    for name in unsupported:
        if config.get(name):
            raise ValueError(f"`{name}` is {config[name]!r} in the config; only schedulers without it can be followed.")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
    return {name: value for name, value in config.items() if name != "shift"} | flow


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise `ValueError` where an argument has none of the allowed values."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"`{name}` is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False, whole: bool = False
) -> None:
    """Raise `ValueError` unless an argument is a finite number, or whole number, from `low` (or over it) to `high`."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (open_low and value == low):
        bounds = f"{'over' if open_low else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
        raise ValueError(f"`{name}` is {value!r}; allowed are {'whole ' if whole else ''}numbers {bounds}.")


def _falling(name: str, values: Sequence[float] | None) -> np.ndarray | None:
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.all(np.isfinite(array)) or np.any(np.diff(array) >= 0):
        raise ValueError(f"`{name}` is {values!r}; strictly falling numbers are needed.")
    return array


def _below_pure_noise(levels: np.ndarray, train: int) -> np.ndarray:
    """Levels whose first is not pure noise, which has no finite log-SNR, but at most a training step before it."""
    if levels[0] != 1.0:
        return levels
    gap = min(1 / train, (1 - levels[1]) / 2 if len(levels) > 1 else 1.0)
    return np.concatenate([[1 - gap], levels[1:]])


def _check_betas(start: Any, end: Any, schedule: Any, trained: Any) -> None:
    check_number("beta_start", start, 0, 1, open_low=True)
    check_number("beta_end", end, 0, 1, open_low=True)
    check_choice("beta_schedule", schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
    if trained is None:
        return
    if not isinstance(trained, (list, tuple, np.ndarray)) or len(trained) < 2:
        raise ValueError(f"`trained_betas` is {trained!r}; a list of `num_train_timesteps` numbers is needed.")
    for beta in trained:
        check_number("trained_betas", beta, 0, 1, open_low=True)


def _betas(n: int, start: float, end: float, schedule: str, trained: Sequence[float] | None) -> torch.Tensor:
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float32)
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
    steps = torch.arange(n + 1, dtype=torch.float64) / n  # Nichol and Dhariwal 2021, equation 17
    bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.clamp(1 - bar[1:] / bar[:-1], max=0.999).float()


def _zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas of the same schedule, shifted and scaled so that it ends in pure noise (Lin et al. 2023, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
