"""Gradients of a loss on what a sampler ends with, through the whole run, with the memory of one denoising step.

    found = backpropagate(pipeline_loop(pipe, {"prompt": ..., "generator": ...}), pipe.scheduler, loss, parameters)

The sampler's own loop is led, be it a pipeline's or any other: its scheduler is replaced by one that makes the loop run twice.
First forwards without gradients, noting the sample before each step. Then, from the last step to the first, the loop is given
the noted sample again, and the gradient by what comes out of the step is taken through that one step (Zhang et al. 2024,
arXiv 2412.02852, call it time step gradient checkpointing). It costs one more forward call a step.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

# Schedulers whose step depends on the timestep and the sample alone, so that one step can be taken again by itself.
MEMORYLESS = (
    "DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip

Loop = Callable[[Any], Any]  # runs a sampler's loop with the scheduler that it is given


@dataclass(frozen=True)
class ChainGradient:
    """What came of a run.

    Attributes:
        loss: its value, without a graph.
        gradients: by each parameter; zero where the loss does not depend on one.
        sample: what the run ended with, without a graph.
    """

    loss: torch.Tensor
    gradients: list[torch.Tensor]
    sample: torch.Tensor


class _Arrived(Exception):
    """The run is at its end: what the loop would do with the sample is not wanted."""


class _ChainScheduler:
    """The scheduler of a led loop.

    Args:
        scheduler: a fresh one, that the loop prepares by `set_timesteps`.
        loss: of the last sample; None to stop there.
        parameters: by which gradients are taken.
        begin: called with the number of the step before each denoiser call, also when the step is taken again.
        checkpoint: whether steps are taken again; else one graph of the whole run is kept.
    """

    def __init__(
        self,
        scheduler: Any,
        loss: Callable[[torch.Tensor], torch.Tensor] | None,
        parameters: Sequence[torch.Tensor],
        begin: Callable[[int], None],
        checkpoint: bool,
    ) -> None:
        self._scheduler, self._loss, self._begin = scheduler, loss, begin
        self._parameters, self._checkpoint = list(parameters), checkpoint
        self._samples: list[torch.Tensor] = []  # before each step
        self._followed: list[torch.Tensor] = []  # after each step
        self._random: list[Any] = []
        self._visit = 0
        self._current: Any = None  # the scheduler where the loop is
        self._given: torch.Tensor  # the sample before the step that is taken again next
        self._pulled: torch.Tensor  # the gradient by the sample after it
        self.value: torch.Tensor | None = None
        self.sample: torch.Tensor
        self.gradients = [torch.zeros_like(p) for p in self._parameters]
        # Pipelines look at its arguments, to know whether it takes a generator.
        self.step = functools.wraps(scheduler.step)(functools.partial(self._step))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scheduler"], name)

    @property
    def timesteps(self) -> torch.Tensor:
        forwards = self._scheduler.timesteps
        return forwards if self._loss is None or not self._checkpoint else torch.cat([forwards, forwards.flip(0)])

    def _number(self) -> int:
        """Of the step at this visit."""
        count = len(self._scheduler.timesteps)
        return self._visit if self._visit < count else 2 * count - 1 - self._visit

    def _at_this_step(self) -> Any:
        """The scheduler where the loop is."""
        if self._current is None:
            self._current = copy.copy(self._scheduler)
            if hasattr(self._current, "set_begin_index"):
                self._current.set_begin_index(self._number())
        return self._current

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        current = self._at_this_step()
        return current.scale_model_input(sample, *args, **kwargs) if hasattr(current, "scale_model_input") else sample

    def _step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        number, count = self._number(), len(self._scheduler.timesteps)
        if float(timestep) != float(self._scheduler.timesteps[number]):
            raise RuntimeError(f"The loop is at timestep {float(timestep)}; a run from the first timestep is needed.")
        again = self._visit >= count
        generators = _generators(options.get("generator"), model_output.device)
        if again:
            for generator, state in zip(generators, self._random[number], strict=True):
                generator.set_state(state)
        else:
            self._samples.append(sample.detach())
            self._random.append([generator.get_state() for generator in generators])
        after = self._at_this_step().step(model_output, timestep, sample, *args, return_dict=False, **options)[0]
        if again:
            self._check_same(after, self._followed.pop())
            self._pull(after)
        else:
            self._followed.append(after.detach())
        self._visit, self._current = self._visit + 1, None
        if self._visit == count:
            self._ended = [(generator, generator.get_state()) for generator in generators]
            self._end(after)
        if self._visit == 2 * count:
            for generator, state in self._ended:  # as a run that takes no step again leaves them
                generator.set_state(state)
            raise _Arrived
        number = self._number()
        if self._visit >= count:  # the first step's sample is nobody's output
            after = self._given = self._samples.pop().requires_grad_(number > 0)
        self._begin(number)
        return _Output(after) if return_dict else (after,)

    def _end(self, sample: torch.Tensor) -> None:
        """After the last step forwards."""
        self.sample = sample.detach()
        if self._loss is None:
            raise _Arrived
        torch.set_grad_enabled(True)
        last = self.sample.clone().requires_grad_() if self._checkpoint else sample
        loss = self._loss(last)
        self.value = loss.detach()
        if not self._checkpoint:
            self._add(torch.autograd.grad(loss, self._parameters, allow_unused=True))
            raise _Arrived
        self._pulled, *found = torch.autograd.grad(loss, [last, *self._parameters], allow_unused=True)
        self._add(found)

    def _check_same(self, after: torch.Tensor, before: torch.Tensor) -> None:
        """Raise where a step leads elsewhere than the first time, which would make the gradient wrong without a sign of it."""
        coarse = torch.is_autocast_enabled(before.device.type) or before.dtype.itemsize < 4
        apart = (after.detach() - before).float().norm()
        if not apart <= (0.1 if coarse else 0.003) * before.float().norm():  # kernels with and without gradients differ
            raise RuntimeError(
                "A step taken again gives something else: the denoiser draws at random, and `begin` does not set what it draws."
            )

    def _pull(self, after: torch.Tensor) -> None:
        """Take the gradient through the step that was just taken again."""
        inner = self._given.requires_grad
        wanted = [self._given, *self._parameters] if inner else self._parameters
        found = torch.autograd.grad(after, wanted, self._pulled, allow_unused=True)
        if inner:
            self._pulled, *found = found
        self._add(found)

    def _add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        for total, gradient in zip(self.gradients, gradients, strict=True):
            if gradient is not None:
                total += gradient


class _Output(tuple):
    """What a step gives: `.prev_sample`, and a tuple of one."""

    prev_sample: torch.Tensor

    def __new__(cls, sample: torch.Tensor) -> _Output:
        output = super().__new__(cls, (sample,))
        output.prev_sample = sample
        return output


def _generators(given: Any, device: torch.device) -> list[torch.Generator]:
    """Where a step draws its noise from."""
    if given is not None:
        return list(given) if isinstance(given, list | tuple) else [given]
    if device.type == "cuda":
        return [torch.cuda.default_generators[device.index or 0]]
    return [torch.default_generator]


def pipeline_loop(pipe: DiffusionPipeline, call: dict[str, Any]) -> Loop:
    """The loop of a pipeline; the pipeline stays as it is.

    Args:
        call: keyword arguments of the call, the same at each run: with generators, give fresh ones to each.
    """

    def loop(scheduler: Any) -> Any:
        led = copy.copy(pipe)
        led.scheduler = scheduler
        led.set_progress_bar_config(disable=True)
        return inspect.unwrap(type(pipe).__call__)(led, **call)  # without the decorator that turns gradients off

    return loop


def check_memoryless(scheduler: Any) -> None:
    """Raise `ValueError` where steps of a scheduler depend on those before."""
    if type(scheduler).__name__ not in MEMORYLESS:
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, whose steps may depend on those before; allowed are "
            f"{', '.join(MEMORYLESS)}."
        )


def backpropagate(
    loop: Loop,
    scheduler: Any,
    loss: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    *,
    begin: Callable[[int], None] | None = None,
    checkpoint: bool = True,
) -> ChainGradient:
    """Run a sampler, and take the gradient of a loss on what it ends with.

    What a step of the scheduler draws at random is drawn again when the step is taken again. The denoiser has to be a
    function of its input and of what `begin` sets.

    Args:
        loop: runs the sampler from its first timestep with a scheduler that it is given, such as `pipeline_loop`.
        scheduler: whose steps are taken; a fresh one is made from its configuration.
        loss: takes the last sample, as the loop hands it from step to step, and gives a scalar. It may also depend on the
            parameters directly.
        parameters: what gradients are taken by. They are returned and not added to `.grad`.
        begin: called with the number of a step, from 0, before its denoiser call, and again, with gradients on, before the
            call that is made again.
        checkpoint: False keeps the graph of the whole run instead: the same gradient, less time, more memory.

    Raises:
        ValueError: the scheduler's steps depend on those before.
        RuntimeError: the loop does not start at the first timestep, or ends before it has taken all steps; or a step that is
            taken again gives something else.
    """
    check_memoryless(scheduler)
    led = _run(loop, scheduler, loss, parameters, begin, checkpoint)
    assert led.value is not None
    return ChainGradient(led.value, led.gradients, led.sample)


def last_sample(loop: Loop, scheduler: Any, begin: Callable[[int], None] | None = None) -> torch.Tensor:
    """What a run ends with, before any decoding, without gradients. Arguments and errors are those of `backpropagate`."""
    check_memoryless(scheduler)
    return _run(loop, scheduler, None, (), begin, True).sample


def _run(
    loop: Loop,
    scheduler: Any,
    loss: Callable[[torch.Tensor], torch.Tensor] | None,
    parameters: Sequence[torch.Tensor],
    begin: Callable[[int], None] | None,
    checkpoint: bool,
) -> _ChainScheduler:
    begin = begin or (lambda step: None)
    fresh = type(scheduler).from_config(scheduler.config)
    led = _ChainScheduler(fresh, loss, parameters, begin, checkpoint)
    with torch.set_grad_enabled(loss is not None and not checkpoint):  # also puts it back
        begin(0)
        try:
            loop(led)
        except _Arrived:
            return led
    raise RuntimeError("The loop ended before it had taken all steps of its scheduler.")
