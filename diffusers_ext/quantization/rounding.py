r"""Learning against full precision, unit by unit: which way each weight is rounded, and the scales of activations.

AdaRound (Nagel et al. 2020, arXiv 2004.10568): a weight between two neighbours of its grid goes the share
:math:`h = \mathrm{clamp}(1.2\,\sigma(\alpha) - 0.1, 0, 1)` of the way up. :math:`\alpha` starts where h gives the weight back,
and is learnt to minimise

.. math:: \|f_q(x) - f(x)\|^2 + \lambda \sum_w \big(1 - |2h - 1|^\beta\big),

the squared error summed over axis 1 (channels of convolutions, tokens of transformer blocks, whose :math:`\lambda` so has less
weight) and averaged over the rest; :math:`\lambda` is 0 in the first 20 % of the
iterations, then :math:`\beta` falls from 20 to 2. At the end h is 1 where :math:`\alpha \ge 0`, else 0. x is what the unit gets in
the network with the weights quantized so far, f(x) what it gives in the full-precision network.

What is learnt is kept only where it lowers the unit's error on the calibration set: few iterations may leave a unit worse
than nearest rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention import AttentionInputs
from .layers import CalibratedLayer
from .recording import Call
from .timing import Clock

_STRETCH, _SHIFT = 1.2, -0.1  # of the rectified sigmoid
_WARM_UP, _BETAS = 0.2, (20.0, 2.0)


def soft_share(alpha: torch.Tensor) -> torch.Tensor:
    """h, the share of the way up."""
    return (_STRETCH * alpha.sigmoid() + _SHIFT).clamp(0, 1)


def start_alpha(share: torch.Tensor) -> torch.Tensor:
    """The alpha whose share is `share`, 0 to 1."""
    return -torch.log(_STRETCH / (share - _SHIFT) - 1)


def beta_at(iteration: int, iterations: int) -> float | None:
    """The exponent of the regulariser; None in the warm-up."""
    done = iteration / iterations
    if done < _WARM_UP:
        return None
    first, last = _BETAS
    return last + (first - last) * (1 - (done - _WARM_UP) / (1 - _WARM_UP))


def unit_error(output: Any, target: Any, power: float = 2.0) -> torch.Tensor:
    """Mean over all but axis 1 of the sum over axis 1 of `|output - target|^power`, summed over the tensors of a unit."""
    errors = [(a - b).abs().pow(power).sum(1).mean() for a, b in zip(_tensors(output), _tensors(target), strict=True)]
    return torch.stack(errors).sum()


def _tensors(output: Any) -> list[torch.Tensor]:
    parts = output if isinstance(output, (list, tuple)) else [output]
    return [part.float() for part in parts if torch.is_tensor(part) and part.is_floating_point()]


@dataclass(frozen=True)
class Sample:
    """What a unit got and gave in one call of the denoiser.

    Attributes:
        begin: called before each run of the unit; sets what the denoiser's own call would have set.
    """

    args: tuple
    kwargs: dict[str, Any]
    target: Any
    begin: Callable[[], Any] = lambda: None

    def run(self, unit: nn.Module) -> Any:
        """What the unit gives now."""
        self.begin()
        return unit(*self.args, **self.kwargs)


class _Seen(Exception):
    """Ends a run of the denoiser once the unit was seen."""


@torch.no_grad()
def _watched(model: nn.Module, unit: nn.Module, calls: Sequence[Call], outputs: bool) -> list[Any]:
    """Inputs or outputs of a unit in each call. Where it runs more than once in a call, the first time counts."""
    seen: list[Any] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Seen

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output)
        raise _Seen

    handle = unit.register_forward_hook(after) if outputs else unit.register_forward_pre_hook(before, with_kwargs=True)
    try:
        for call in calls:
            with contextlib.suppress(_Seen):
                call.run(model)
    finally:
        handle.remove()
    return seen


@contextlib.contextmanager
def full_precision(layers: Sequence[CalibratedLayer], attentions: Sequence[AttentionInputs]) -> Iterator[None]:
    """Inside, nothing is quantized."""
    before = [(layer.weights_on, layer.inputs_on) for layer in layers]
    on = [inputs.on for inputs in attentions]
    for layer in layers:
        layer.weights_on = layer.inputs_on = False
    for inputs in attentions:
        inputs.on = False
    try:
        yield
    finally:
        for layer, (weights, acts) in zip(layers, before, strict=True):
            layer.weights_on, layer.inputs_on = weights, acts
        for inputs, was in zip(attentions, on, strict=True):
            inputs.on = was


def samples_of(
    model: nn.Module,
    unit: nn.Module,
    calls: Sequence[Call],
    layers: Sequence[CalibratedLayer],
    attentions: Sequence[AttentionInputs],
    clocks: Sequence[Clock] = (),
) -> list[Sample]:
    """What a unit gets in the network as it is, and what it gives in full precision, for each call."""
    with full_precision(layers, attentions):
        targets = _watched(model, unit, calls, outputs=True)
    inputs = _watched(model, unit, calls, outputs=False)
    begins = [functools.partial(_set, clocks, call.kwargs["timestep"]) for call in calls]
    return [
        Sample(args, kwargs, target, begin)
        for (args, kwargs), target, begin in zip(inputs, targets, begins, strict=True)
    ]


def _set(clocks: Sequence[Clock], timestep: Any) -> None:
    for clock in clocks:
        clock.read(timestep)


@torch.no_grad()
def mean_error(unit: nn.Module, samples: Sequence[Sample], power: float) -> float:
    """The unit's error over all samples."""
    errors = [unit_error(sample.run(unit), sample.target, power) for sample in samples]
    return float(torch.stack(errors).mean())


def _minimise(
    unit: nn.Module,
    samples: Sequence[Sample],
    parameters: list[torch.Tensor],
    iterations: int,
    rate: float,
    power: float,
    generator: torch.Generator,
    prepare: Callable[[], None],
    penalty: Callable[[int], torch.Tensor | None],
    cosine: bool,
    tick: Callable[[], None],
) -> None:
    """Adam on the unit's error of one sample an iteration, plus a penalty."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations) if cosine else None
    for iteration in range(iterations):
        sample = samples[int(torch.randint(len(samples), (), generator=generator))]
        with torch.enable_grad():
            prepare()
            loss = unit_error(sample.run(unit), sample.target, power)
            extra = penalty(iteration)
            loss = loss if extra is None else loss + extra
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
            ):
                parameter.grad = gradient
        optimizer.step()
        if schedule is not None:
            schedule.step()
        tick()


def learn_rounding(
    unit: nn.Module,
    layers: Sequence[CalibratedLayer],
    samples: Sequence[Sample],
    *,
    iterations: int,
    rate: float,
    weight: float,
    generator: torch.Generator,
    tick: Callable[[], None] = lambda: None,
) -> bool:
    """Learn the rounding of all layers of a unit, by AdaRound; their weights are quantized from then on.

    Args:
        unit: the module whose output counts.
        layers: those in it, with known places.
        samples: what it gets and should give.
        iterations: of Adam, on one sample each.
        rate: learning rate of alpha.
        weight: lambda.
        generator: chooses samples.
        tick: called after each iteration.

    Returns:
        Whether what was learnt is better than nearest rounding, and was kept.
    """
    for layer in layers:
        layer.weights_on, layer.rounded, layer.soft, layer.up = True, None, None, None
    nearest = mean_error(unit, samples, 2.0)
    places = [layer.spread_weight_place() for layer in layers]
    alphas = [
        start_alpha(layer.weight_grid.share(layer.float_weight, place)).requires_grad_(True)
        for layer, place in zip(layers, places, strict=True)
    ]

    def prepare() -> None:
        for layer, alpha in zip(layers, alphas, strict=True):
            layer.soft = soft_share(alpha)

    def penalty(iteration: int) -> torch.Tensor | None:
        beta = beta_at(iteration, iterations)
        if beta is None:
            return None
        return (
            weight
            * torch.stack(
                [(1 - (2 * layer.soft - 1).abs().pow(beta)).sum() for layer in layers if layer.soft is not None]
            ).sum()
        )

    _minimise(unit, samples, alphas, iterations, rate, 2.0, generator, prepare, penalty, False, tick)
    with torch.no_grad():
        for layer, alpha, place in zip(layers, alphas, places, strict=True):
            layer.soft, layer.up = None, alpha >= 0
            layer.rounded = layer.weight_grid.between(layer.float_weight, layer.up.float(), place)
    if mean_error(unit, samples, 2.0) < nearest:
        return True
    for layer in layers:
        layer.rounded = layer.up = None
    return False


def learn_scales(
    unit: nn.Module,
    layers: Sequence[CalibratedLayer],
    attentions: Sequence[AttentionInputs],
    samples: Sequence[Sample],
    *,
    iterations: int,
    rate: float,
    power: float,
    generator: torch.Generator,
    tick: Callable[[], None] = lambda: None,
) -> bool:
    """Learn the scales of the activations of a unit, with the gradient of LSQ; zero points stay.

    Scales are learnt by their logarithms, so that one learning rate does for all of them and none becomes negative.

    Args:
        rate: of the logarithms, falling to 0 along a cosine.
        power: of the error.
        unit, layers, samples, iterations, generator, tick: as in `learn_rounding`.
        attentions: with quantized inputs, in the unit.

    Returns:
        Whether the learnt scales are better, and were kept.
    """
    holders: list[tuple[Any, str]] = [(layer, "input_place") for layer in layers if layer.input_place is not None]
    holders += [(inputs, "places") for inputs in attentions]
    if not holders:
        return False
    before = [getattr(holder, name) for holder, name in holders]
    was = mean_error(unit, samples, power)
    logs = [torch.zeros_like(place[0]).requires_grad_(True) for place in before]

    def prepare() -> None:
        for (holder, name), place, log in zip(holders, before, logs, strict=True):
            setattr(holder, name, torch.cat([place[:1] * log.exp(), place[1:]]))

    _minimise(unit, samples, logs, iterations, rate, power, generator, prepare, lambda _: None, True, tick)
    with torch.no_grad():
        prepare()
    for holder, name in holders:
        setattr(holder, name, getattr(holder, name).detach())
    if mean_error(unit, samples, power) < was:
        return True
    for (holder, name), place in zip(holders, before, strict=True):
        setattr(holder, name, place)
    return False
