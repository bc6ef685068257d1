r"""Several denoising steps at once: ParaDiGMS (Shih et al. 2023, arXiv 2305.16317), on stock pipelines.

A sampler's states follow :math:`x_{j+1} = x_j + \Delta_j(x_j) + n_j`, with the noise :math:`n_j` drawn beforehand. Picard
iteration (algorithm 1 of the paper) guesses the states of a window of steps, evaluates the denoiser at all of them in one
batch, and sums up the steps: far fewer passes than steps, each of a larger batch.

The stock pipeline does everything but the order of the steps. While it runs, it sees another scheduler in place of its own.
One turn of its loop is one pass: the scheduler hands out as many timesteps as there are passes, its `step` takes the steps
of the whole window with copies of the pipeline's scheduler, and just before each call of the denoiser the inputs of one step
become those of the window. Guidance and all else in between works on a larger batch and needs not know. The rows of that
batch are ordered as those of the pipeline, with the steps of the window innermost.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ._fixed_point import FixedPointWindow

_SHARED = ("txt_ids", "img_ids", "ip_adapter_masks")  # arguments of denoisers that have no batch dimension


def step_variances(schedulers: list[Any], timesteps: torch.Tensor) -> torch.Tensor:
    r"""Variance of the noise that the SDE's step adds, at the states of the scheduler.

    From level :math:`(\alpha, \sigma)` to :math:`(\alpha', \sigma')` it is that of the next state given this one and the
    clean picture, :math:`(\sigma'^2 / \sigma^2) (\sigma^2 - \alpha^2 \sigma'^2 / \alpha'^2)`, as in DDPM. Levels are read off
    what the scheduler adds noise by, so they are in the scale of its states.

    Args:
        schedulers: copies, the j-th to begin at step j.
        timesteps: of all steps, `(steps,)`.

    Returns:
        `(steps,)`, float64.

    Raises:
        ValueError: the scheduler adds no noise.
    """
    if not any(hasattr(schedulers[0], name) for name in ("add_noise", "scale_noise")):
        raise ValueError(
            f"`tolerance` is relative to the scheduler's noise, and {type(schedulers[0]).__name__} has neither `add_noise` nor "
            "`scale_noise`; with it, only 0 is allowed."
        )
    one = torch.ones(1, dtype=torch.float64, device=timesteps.device)
    zero = torch.zeros_like(one)

    def noised(j: int, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        scheduler, t = schedulers[j], timesteps[j : j + 1]
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(clean, t, noise)
        return scheduler.add_noise(clean, noise, t)

    last = torch.as_tensor(getattr(schedulers[0], "final_alpha_cumprod", 1.0)).to(one)
    steps = range(len(timesteps))
    alpha = torch.cat([noised(j, one, zero) for j in steps] + [last.sqrt().view(1)]).double()
    square = torch.cat([noised(j, zero, one) for j in steps] + [(1 - last).sqrt().view(1)]).double() ** 2
    ratio = alpha[:-1] / alpha[1:]
    return (square[1:] / square[:-1] * (square[:-1] - ratio**2 * square[1:])).clamp(min=0)


def _constants(scheduler: Any) -> dict[int, Any]:
    """What is in a scheduler before its first step and stays the same: tables, grid and config; a memo for `deepcopy`."""
    parts = [part for value in vars(scheduler).values() for part in (value if isinstance(value, list) else [value])]
    return {id(part): part for part in parts if isinstance(part, (torch.Tensor, FrozenDict))}


class _RandomState:
    """Of the generators that a step draws from; the global one of the device where there is none."""

    def __init__(self, generator: Any, device: torch.device) -> None:
        self.generators = generator if isinstance(generator, list) else [generator]
        self.device = device

    def get(self) -> list[torch.Tensor]:
        return [self._global("get") if one is None else one.get_state() for one in self.generators]

    def set(self, states: list[torch.Tensor]) -> None:
        for one, state in zip(self.generators, states, strict=True):
            self._global("set", state) if one is None else one.set_state(state)

    def _global(self, verb: str, *state: torch.Tensor) -> Any:
        module = torch if self.device.type == "cpu" else torch.get_device_module(self.device)
        of_device = {"device": self.device} if self.device.type in ("cuda", "xpu") else {}
        return getattr(module, f"{verb}_rng_state")(*state, **of_device)


class _Passes:
    """Stands in for the timesteps: as long as they are, and iterated once a pass."""

    def __init__(self, run: _ParallelRun) -> None:
        self._run = run

    def __len__(self) -> int:
        return len(self._run.scheduler.timesteps)

    def __iter__(self) -> Iterator[torch.Tensor]:
        self._run.begin()
        for _ in range(len(self)):  # no more, where a pipeline that was interrupted lets all others go by
            if self._run.completed == len(self):
                return
            self._run.inside = True
            yield self._run.timesteps_now[0]


class _ParallelRun:
    """Stands in for the scheduler of a pipeline during one call; see the module.

    Attributes:
        scheduler: copy of the pipeline's own, which is left alone.
        window: None until the first pass is over: only then the first state is known.
        inside: whether the denoiser is called for this run now, and not, say, by a callback.
    """

    def __init__(self, pipe: ParadigmsMixin, parallel: int, tolerance: float, copies: int) -> None:
        self.scheduler = copy.deepcopy(pipe.scheduler, _constants(pipe.scheduler))
        # Pipelines look at the arguments that it takes.
        self.step = functools.update_wrapper(functools.partial(self._step), self.scheduler.step)
        self._pipe, self._parallel, self._tolerance, self._copies = pipe, parallel, tolerance, copies
        self._thread = threading.get_ident()
        self.window: FixedPointWindow | None = None
        self.inside = False

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not made yet, as in a copy
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    # --- what the pipeline sees --------------------------------------------------------------------------------------

    @property
    def timesteps(self) -> _Passes:
        return _Passes(self)

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As it is: states of other steps take its place, and each is scaled for its own."""
        return sample

    def _step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """All steps of the window, of outputs `(batch * steps, ...)`; returns the last state that is done."""
        self.inside = False
        if self.window is None:
            variances = torch.zeros(len(self.timesteps), device=sample.device)
            if self._tolerance > 0:
                variances = step_variances(self._fresh, self.scheduler.timesteps)
            self.window = FixedPointWindow(sample, len(variances), self._parallel, self._tolerance, variances)
        draws = "generator" in inspect.signature(self.scheduler.step).parameters
        self._random = _RandomState(kwargs.get("generator") if draws else [], sample.device)
        times, results = self.timesteps_now, []
        outputs = model_output.reshape(len(sample), len(times), *model_output.shape[1:]).unbind(1)
        if self.completed == 0:
            _scaled(self._before, sample, times[0])  # some schedulers warn where this was not asked for
        scheduler, self._after = self._copy(self._before), []
        for output, t, state in zip(outputs, times, self.window.states, strict=False):
            result = scheduler.step(output, t, state, *args, return_dict=False, **kwargs)[0]
            results.append(torch.cat([result.chunk(self._copies)[0]] * self._copies))
            self._after.append((self._copy(scheduler), self._random.get()))
        self._first, self.done = self.completed, self.window.advance(torch.stack(results))
        self._continue_from(self.completed)
        return SchedulerOutput(self.window.states[0]) if return_dict else (self.window.states[0],)

    # --- the window --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The grid is set: prepare what each step needs."""
        self.window = None
        constants = _constants(self.scheduler)
        self._copy = lambda scheduler: copy.deepcopy(scheduler, dict(constants))
        self._before = self._copy(self.scheduler)
        self._fresh = [self._copy(self.scheduler) for _ in self.scheduler.timesteps]
        if hasattr(self.scheduler, "set_begin_index"):
            for j, scheduler in enumerate(self._fresh):
                scheduler.set_begin_index(j)
        self._scalers = [copy.copy(scheduler) for scheduler in self._fresh]

    @property
    def completed(self) -> int:
        """How many steps are done."""
        return 0 if self.window is None else self.window.begin

    @property
    def passes(self) -> int:
        return 0 if self.window is None else self.window.rounds

    @property
    def timesteps_now(self) -> torch.Tensor:
        """Of the steps in the window."""
        end = min(self._parallel, len(self.timesteps)) if self.window is None else self.window.end
        return self.scheduler.timesteps[self.completed : end]

    def _continue_from(self, step: int) -> None:
        """Take up the history of the scheduler, and the random numbers, as they are before a step."""
        self._before, states = self._after[step - self._first - 1]
        self._random.set(states)

    def widen(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before each call of the denoiser: the inputs of one step become those of all steps in the window."""
        if not self.inside or threading.get_ident() != self._thread:
            return None
        names = (self._pipe._sample_argument, "timestep")
        call = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
        sample, times = call[self._pipe._sample_argument], self.timesteps_now
        batch, width = len(sample), len(times)
        call = {name: _repeated(value, batch, width) for name, value in call.items() if name not in _SHARED} | {
            name: value for name, value in call.items() if name in _SHARED
        }
        states = [sample] * width
        if self.window is not None:
            times_over = batch // len(self.window.states[0])
            states[1:] = [one.repeat(times_over, *[1] * (one.ndim - 1)) for one in self.window.states[1:width]]
        scalers = self._scalers[self.completed : self.completed + width]
        scaled = [_scaled(*given) for given in zip(scalers, states, times, strict=True)]
        call[self._pipe._sample_argument] = torch.stack(scaled, dim=1).flatten(0, 1)
        rows = times.to(sample.device).repeat(batch)
        call["timestep"] = self._pipe._denoiser_timesteps(rows, call["timestep"])
        return (), call

    # --- callbacks ---------------------------------------------------------------------------------------------------

    def calling(self, callback: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """A callback for the stock loop, which calls the user's once for each step that is done."""

        def after_pass(pipe: Any, turn: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert self.window is not None
            answer: dict[str, Any] = {}
            for j, state in enumerate(self.done, start=self._first):
                given = {**tensors, **({"latents": state.clone()} if "latents" in tensors else {})}
                before, attributes = {**tensors, "latents": state}, dict(vars(pipe))
                found = {**given, **callback(pipe, j, self.scheduler.timesteps[j], dict(given))}
                changed = {name: value for name, value in found.items() if _differ(value, before.get(name))}
                touched = any(_differ(value, attributes.get(name)) for name, value in vars(pipe).items())
                if changed or touched:  # interrupted, or later states were computed with something else
                    self.window.restart(j + 1, changed.get("latents", state))
                    self._continue_from(j + 1)
                    answer = changed
                    break
            return {**answer, "latents": self.window.states[0]}

        return after_pass


def _scaled(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample


def _repeated(value: Any, batch: int, times: int) -> Any:
    """Conditions of a batch, each row `times` over; what has no row for each sample as it is."""
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(times, dim=0) if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: part if name in _SHARED else _repeated(part, batch, times) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_repeated(part, batch, times) for part in value)
    return value


def _differ(value: Any, other: Any) -> bool:
    if value is other:
        return False
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return not torch.equal(value, other)
    plain = (bool, int, float, str)
    return not (isinstance(value, plain) and isinstance(other, plain) and value == other)


class _CompletedSteps:
    """A progress bar that shows completed steps, whatever the loop tells it."""

    def __init__(self, bar: Any, iterable: Any, run: _ParallelRun) -> None:
        self._bar, self._iterable, self._run, self._shown = bar, iterable, run, 0

    def update(self, n: int = 1) -> None:
        self._bar.update(self._run.completed - self._shown)
        self._shown = self._run.completed

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> _CompletedSteps:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        return self._bar.__exit__(*exception)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def in_parallel(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The `__call__` of a stock pipeline with two more arguments, `parallel` and `tolerance`.

    For classes derived from `ParadigmsMixin` and the stock pipeline.
    """
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def call(self: ParadigmsMixin, *args: Any, parallel: int = 10, tolerance: float = 0.1, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        more = arguments.pop("kwargs", {})
        self._check(arguments | more, parallel, tolerance)
        run = _ParallelRun(self, parallel, tolerance, self._copies(arguments))
        callback = arguments.get("callback_on_step_end")
        if callback is not None:
            if hasattr(callback, "tensor_inputs"):  # diffusers' PipelineCallback
                arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
            arguments["callback_on_step_end"] = run.calling(callback)
        scheduler, denoiser = self.scheduler, getattr(self, self._denoiser)
        hook = denoiser.register_forward_pre_hook(run.widen, with_kwargs=True)
        self.__dict__["scheduler"] = run  # not by `setattr`, which would write it into the config
        try:
            return stock(**arguments, **more)
        finally:
            self.__dict__["scheduler"] = scheduler
            hook.remove()
            self._num_passes = run.passes

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, default, annotation in (("parallel", 10, "int"), ("tolerance", 0.1, "float"))
    ]
    given = list(signature.parameters.values())
    place = len(given) - (given[-1].kind is inspect.Parameter.VAR_KEYWORD)
    call.__signature__ = signature.replace(parameters=[*given[:place], *added, *given[place:]])  # type: ignore[attr-defined]
    call.__doc__ = f"""Draw pictures, with several denoising steps at once.

        Args:
            parallel: largest number of steps in one pass; the denoiser gets that many times the batch.
            tolerance: a state is done when a pass moves it by less than this share of the standard deviation of the noise
                that the SDE's step adds there, as a root mean square over the sample. 0 gives the sequential run.
            the others: those of `{stock.__qualname__}`. `callback_on_step_end` is called for each step, in order, once it is
                done; what it changes holds from there on, and ends the pass. Tensors other than `latents` are to be returned, and
                not changed in place.

        Raises:
            ValueError: an argument is out of range, or cannot be had with several steps at once.
        """
    return call


class ParadigmsMixin(DiffusionPipeline):
    """Several denoising steps at once, for a stock pipeline: derive from this and from it, and wrap its `__call__`.

        class ParadigmsDDPMPipeline(ParadigmsMixin, DDPMPipeline):
            __call__ = in_parallel(DDPMPipeline.__call__)

    The stock loop must take one step a turn, by `self.scheduler.step`, give the denoiser sample and timestep, and treat the
    rows of a batch alike. Any scheduler with one denoiser call a step will do: multistep solvers keep their history, and
    stochastic ones draw for each step what they draw in the sequential run.
    """

    _denoiser: ClassVar[str] = "unet"
    _sample_argument: ClassVar[str] = "sample"
    _output_types: ClassVar[tuple[str, ...]] = ("pil", "np", "pt", "latent")
    _scales_input: ClassVar[bool] = True  # whether the stock loop does what schedulers of large sigmas need
    # Arguments that make the loop depend on the number of the turn, or cut the timesteps.
    _refused: ClassVar[tuple[str, ...]] = ()
    _num_passes = 0

    @property
    def num_passes(self) -> int:
        """How many passes the last call took, one after another. A sequential run takes as many as it has steps."""
        return self._num_passes

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """Counts completed steps."""
        run = self.__dict__.get("scheduler")
        if not isinstance(run, _ParallelRun):
            return super().progress_bar(iterable, total)
        return _CompletedSteps(super().progress_bar(total=len(run.timesteps)), iterable, run)

    def _copies(self, arguments: Mapping[str, Any]) -> int:
        """How often the states of the loop hold each sample."""
        return 1

    def _denoiser_timesteps(self, timesteps: torch.Tensor, given: Any) -> torch.Tensor:
        """What the denoiser is told for timesteps; `given` is what the pipeline told it for the first."""
        return timesteps.to(given.dtype)

    def _check(self, arguments: Mapping[str, Any], parallel: Any, tolerance: Any) -> None:
        for name, number in (("parallel", parallel), ("num_inference_steps", arguments["num_inference_steps"])):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"`{name}` is {number!r}; it must be a positive integer.")
        if isinstance(tolerance, bool) or not (isinstance(tolerance, (int, float)) and 0 <= tolerance < math.inf):
            raise ValueError(f"`tolerance` is {tolerance!r}; it must be 0 or a positive number.")
        if arguments["output_type"] not in self._output_types:
            raise ValueError(
                f"`output_type` is {arguments['output_type']!r}; allowed are {', '.join(map(repr, self._output_types))}."
            )
        for name in self._refused:
            if arguments.get(name) is not None:
                raise ValueError(f"`{name}` is given; with several steps at once it must be left out.")
        if arguments.get("callback") is not None:
            raise ValueError("`callback` is given; use `callback_on_step_end`.")
        if getattr(self.scheduler, "order", 1) != 1:
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__}, which calls the denoiser {self.scheduler.order} times a "
                "step; allowed are schedulers that call it once."
            )
        if not self._scales_input and getattr(self.scheduler, "init_noise_sigma", 1.0) != 1.0:
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__}, whose states the denoiser takes scaled; the stock pipeline "
                "does not do that. Allowed are schedulers with `init_noise_sigma` 1."
            )
        denoiser = getattr(self, self._denoiser)
        for module in denoiser.modules():
            registry = vars(module).get("_diffusers_hook")
            for name, hook in ({} if registry is None else registry.hooks).items():
                if hook._is_stateful:
                    raise ValueError(
                        f"`{self._denoiser}` has the hook {name!r}, which keeps something from step to step, and here one call "
                        "has several steps. Disable it."
                    )


class ParadigmsStableDiffusionPipeline(ParadigmsMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with several denoising steps at once; loads from its folders."""

    __call__ = in_parallel(StableDiffusionPipeline.__call__)


class ParadigmsStableDiffusionXLPipeline(ParadigmsMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with several denoising steps at once; loads from its folders."""

    _refused = ("denoising_end",)
    __call__ = in_parallel(StableDiffusionXLPipeline.__call__)


class ParadigmsDiTPipeline(ParadigmsMixin, DiTPipeline):
    """`DiTPipeline` with several denoising steps at once; loads from its folders."""

    _denoiser, _sample_argument, _output_types = "transformer", "hidden_states", ("pil", "np", "pt")
    _scales_input = False
    __call__ = in_parallel(DiTPipeline.__call__)

    def _copies(self, arguments: Mapping[str, Any]) -> int:
        return 2 if arguments["guidance_scale"] > 1 else 1


class ParadigmsDDPMPipeline(ParadigmsMixin, DDPMPipeline):
    """`DDPMPipeline` with several denoising steps at once; loads from its folders."""

    _output_types, _scales_input = ("pil", "np", "pt"), False
    __call__ = in_parallel(DDPMPipeline.__call__)


class ParadigmsFluxPipeline(ParadigmsMixin, FluxPipeline):
    """`FluxPipeline` with several denoising steps at once; loads from its folders."""

    _denoiser, _sample_argument, _scales_input = "transformer", "hidden_states", False
    __call__ = in_parallel(FluxPipeline.__call__)

    def _denoiser_timesteps(self, timesteps: torch.Tensor, given: Any) -> torch.Tensor:
        return timesteps.to(given.dtype) / 1000


class ParadigmsPipeline:
    """Finds the class for a pipeline. It is no pipeline itself."""

    classes: ClassVar[tuple[type[ParadigmsMixin], ...]] = (
        ParadigmsStableDiffusionPipeline, ParadigmsStableDiffusionXLPipeline, ParadigmsDiTPipeline, ParadigmsDDPMPipeline,
        ParadigmsFluxPipeline,
    )  # fmt: skip

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline) -> ParadigmsMixin:
        """The same pipeline with several denoising steps at once. It shares its components with `pipe`.

        Raises:
            ValueError: there is no class for it.
        """
        for found in cls.classes:
            if type(pipe) in (found, found.__bases__[1]):
                return found.from_pipe(pipe, dtype=pipe.dtype)
        names = ", ".join(found.__bases__[1].__name__ for found in cls.classes)
        raise ValueError(f"`pipe` is a {type(pipe).__name__}; allowed are {names}.")
