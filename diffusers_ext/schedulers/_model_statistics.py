r"""Empirical model statistics of DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268), and the integrals that a step needs.

With :math:`\lambda = \log(\alpha / \sigma)` and three coefficients l, s, b, each a tensor of the sample's shape for each
:math:`\lambda`, the network's part of the probability-flow ODE is :math:`f = (\sigma \epsilon - l x) / \alpha`, and it is
modelled as changing by :math:`df/d\lambda = s f + b`. Data prediction is l = 1, s = b = 0; noise prediction is l = 0, s = -1,
b = 0. The paper takes the l, s, b that leave the least first-order error on average over the model's own trajectories.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

_MARKS = 4  # elements of each tensor that a fingerprint keeps
_MARK_TOLERANCE = 2**-7  # two roundings to bfloat16
_ELEMENTS = 2**20  # of a tensor of intermediate results
_CELL = 0.1  # the longest that one application of Simpson's rule spans, in log-SNR


class Integrals(NamedTuple):
    r"""From :math:`\lambda_s` to :math:`\lambda_t`, float64 tensors of the shape of the statistics.

    Attributes:
        L, S: :math:`\int l`, :math:`\int s`.
        B: :math:`\int e^{-S} b`, with S from :math:`\lambda_s`.
        C: :math:`\int e^{L + S} B`.
        E: :math:`\int e^{L + S} (\lambda - \lambda_s)^k / k!` for k = 0, 1, ...
    """

    L: torch.Tensor
    S: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    E: tuple[torch.Tensor, ...]


class DPMSolverV3Statistics(ModelMixin, ConfigMixin):
    """l, s and b of one model at one guidance scale, on a uniform grid of log-SNR.

    `collect_statistics` measures them. Made by the constructor they are those of data prediction. It is a stock diffusers
    model to save, load and push; `DPMSolverV3Scheduler` saves it in the folder `statistics` beside its config.

    Args:
        shape: of each statistic: that of a sample without the batch, or one that broadcasts to it.
        num_lambdas: points of the grid, at least 2.
        lambda_min, lambda_max: ends of the grid, half the logarithm of the signal-to-noise ratio. Beyond them the values
            at the ends hold.
        num_samples: how many samples they were measured on; 0 for other origins.
        num_marks: numbers in the fingerprint of the model that they belong to; 0 for none.
        guidance_scale: weight of guidance in the measured predictions, where the pipeline has one: for information.

    Raises:
        ValueError: an argument is out of range.
    """

    _supports_gradient_checkpointing = False
    l: torch.Tensor  # noqa: E741  # the paper's symbol
    s: torch.Tensor
    b: torch.Tensor
    marks: torch.Tensor

    @register_to_config
    def __init__(
        self,
        *,
        shape: Sequence[int] = (1,),
        num_lambdas: int = 2,
        lambda_min: float = -20.0,
        lambda_max: float = 20.0,
        num_samples: int = 0,
        num_marks: int = 0,
        guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        if num_lambdas < 2 or not -math.inf < lambda_min < lambda_max < math.inf:
            raise ValueError(
                f"`num_lambdas` is {num_lambdas!r}, `lambda_min` {lambda_min!r} and `lambda_max` {lambda_max!r}; at least 2 "
                "points on a rising finite grid are needed."
            )
        size = (num_lambdas, *shape)
        self.register_buffer("l", torch.ones(size))
        self.register_buffer("s", torch.zeros(size))
        self.register_buffer("b", torch.zeros(size))
        self.register_buffer("marks", torch.zeros(num_marks))

    @classmethod
    def from_tensors(
        cls,
        l: torch.Tensor,  # noqa: E741
        s: torch.Tensor,
        b: torch.Tensor,
        lambda_min: float,
        lambda_max: float,
        *,
        marks: torch.Tensor | None = None,
        **information: Any,
    ) -> DPMSolverV3Statistics:
        """For given l, s and b, each `(num_lambdas, *shape)`, kept in float32.

        Args:
            marks: `weight_marks` of the model that they belong to.
            information: `num_samples` and `guidance_scale` of the constructor.

        Raises:
            ValueError: the shapes differ, a value is not finite, or the grid is none.
        """
        for name, value in (("l", l), ("s", s), ("b", b)):
            if value.shape != l.shape or value.ndim < 2 or not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)} beside `l` of {tuple(l.shape)}; finite tensors of one shape "
                    "(num_lambdas, *shape) are needed."
                )
        marks = torch.zeros(0) if marks is None else marks
        sizes = {"shape": tuple(l.shape[1:]), "num_lambdas": len(l), "num_marks": len(marks)}
        made = cls(lambda_min=lambda_min, lambda_max=lambda_max, **sizes, **information)
        for name, value in (("l", l), ("s", s), ("b", b), ("marks", marks)):
            getattr(made, name).copy_(value)
        return made

    def check_model(self, model: torch.nn.Module) -> None:
        """Raise `ValueError` unless these are statistics of `model`, in whatever precision its weights are.

        A model with adapters or quantized weights is another model.
        """
        if len(self.marks) == 0:
            raise ValueError(f"The statistics have no fingerprint, so whether they are of this {type(model).__name__} is unknown.")  # fmt: skip
        if not same_marks(self.marks, weight_marks(model)):
            raise ValueError(
                f"The statistics belong to another model than this {type(model).__name__}: its weights differ. Measure them "
                "with `collect_statistics`."
            )

    def coefficient_l(self, lambda_: float) -> torch.Tensor:
        """l at any log-SNR, in float64 on the CPU."""
        return self._at(self.l, [lambda_])[0]

    @torch.no_grad()
    def integrals(self, start: float, end: float, degree: int) -> Integrals:
        r"""Integrals of a step, with l, s and b linear between points of the grid.

        The paper sums trapezoids over points of the grid. That is too coarse where a step is about as long as a cell, so
        here each cell, or part of one, is integrated by Simpson's rule, exact for polynomials of degree 3, and to about 1e-8
        for what grows as fast as these do.

        Args:
            start, end: :math:`\lambda_s \le \lambda_t`.
            degree: the highest k of E.
        """
        grid = np.linspace(self.config.lambda_min, self.config.lambda_max, self.config.num_lambdas)
        nodes = _refined([start, *grid[(grid > start) & (grid < end)].tolist(), end])
        L, S, B, C = (torch.zeros_like(self.coefficient_l(start)) for _ in range(4))
        E = [torch.zeros_like(L) for _ in range(degree + 1)]
        many = max(_ELEMENTS // L.numel(), 1)  # cells at once
        for first in range(0, len(nodes) - 1, many):
            part = nodes[first : first + many + 1]
            lambdas = torch.tensor(part, dtype=torch.float64).view(-1, *[1] * L.ndim)
            h, x = lambdas.diff(dim=0), _with_middles(lambdas) - start
            # l, s and b are linear in each cell
            l, s, b = (_with_middles(self._at(v, part)) for v in (self.l, self.s, self.b))  # noqa: E741
            l, s = _cumulative(l, h, L), _cumulative(s, h, S)  # noqa: E741
            b = _cumulative(torch.exp(-s) * b, h, B)
            weight = torch.exp(l + s)
            C = _cumulative(weight * b, h, C)[-1]
            E = [_cumulative(weight * x**k / math.factorial(k), h, E[k])[-1] for k in range(degree + 1)]
            L, S, B = l[-1], s[-1], b[-1]
        return Integrals(L, S, B, C, tuple(E))

    def _at(self, values: torch.Tensor, lambdas: Sequence[float]) -> torch.Tensor:
        """Values at any log-SNRs, `(n, *shape)`, in float64 on the CPU."""
        low, high, last = self.config.lambda_min, self.config.lambda_max, self.config.num_lambdas - 1
        places = torch.tensor(lambdas, dtype=torch.float64).sub(low).div(high - low).clamp(0, 1) * last
        i = places.long().clamp(max=last - 1)
        share = (places - i).view(-1, *[1] * (values.ndim - 1))
        return torch.lerp(*(values[k.to(values.device)].detach().cpu().double() for k in (i, i + 1)), share)


def _refined(nodes: Sequence[float]) -> list[float]:
    """The nodes with more between them, so that none are farther apart than a cell may be long."""
    parts = [
        np.linspace(left, right, max(math.ceil((right - left) / _CELL), 1) + 1)[:-1]
        for left, right in itertools.pairwise(nodes)
    ]
    return [*np.concatenate(parts).tolist(), nodes[-1]]


def _with_middles(ends: torch.Tensor, middles: torch.Tensor | None = None) -> torch.Tensor:
    """Values at the ends of m cells, `(m + 1, ...)`, with those in the middles between, or means: `(2 m + 1, ...)`."""
    result = ends.new_empty(2 * len(ends) - 1, *ends.shape[1:])
    result[::2] = ends
    result[1::2] = (ends[1:] + ends[:-1]) / 2 if middles is None else middles
    return result


def _cumulative(values: torch.Tensor, h: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Integral up to the ends and middles of cells of widths `h`, from `first`, of values at these places.

    By the parabola through the three values of a cell.
    """
    left, middle, right = values[:-1:2], values[1::2], values[2::2]
    whole = h / 6 * (left + 4 * middle + right)
    ends = torch.cat([first[None], first + torch.cumsum(whole, 0)])
    return _with_middles(ends, ends[:-1] + h / 24 * (5 * left + 8 * middle - right))


def weight_marks(model: torch.nn.Module) -> torch.Tensor:
    """Fingerprint of a model: a few elements of each of its tensors, at places that depend on their names.

    Numbers and not a hash, so that the same weights in another precision are recognised.

    Raises:
        ValueError: weights are not at hand (sequential offloading), or there are none.
    """
    picked = []
    for name, tensor in sorted(getattr(model, "_orig_mod", model).state_dict().items()):
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.is_meta:
            raise ValueError(f"The weights {name!r} of `model`, a {type(model).__name__}, are offloaded: call `remove_all_hooks` first.")  # fmt: skip
        places = [zlib.crc32(f"{name}.{k}".encode()) % tensor.numel() for k in range(_MARKS)]
        picked.append(tensor.detach().reshape(-1)[torch.tensor(places, device=tensor.device)].float().cpu())
    if not picked:
        raise ValueError(f"`model` is {type(model).__name__}, which has no weights.")
    return torch.cat(picked)


def same_marks(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fingerprints are of the same weights, up to rounding to bfloat16."""
    a, b = a.float().cpu(), b.float().cpu()
    return a.shape == b.shape and torch.allclose(a, b, rtol=_MARK_TOLERANCE, atol=1e-6)
