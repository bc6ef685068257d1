r"""Skip the first steps of a run by the closed-form solution for Gaussian data (Wang and Vastola 2023, arXiv 2303.02490).

Early in a run a network sees little more of its data than their mean and covariance. For data :math:`N(m, S)` with
:math:`S = U \mathrm{diag}(l) U^\top + v (I - U U^\top)` the probability-flow ODE of :math:`x_t = a_t x_0 + s_t \epsilon` is
solved exactly (section 3; v = 0 there). From T to t the distance to :math:`a m` is scaled along each eigenvector:

.. math:: x_t = a_t m + \sum_k \sqrt{\frac{s_t^2 + a_t^2 l_k}{s_T^2 + a_T^2 l_k}}\, u_k u_k^\top (x_T - a_T m) + \dots

with the same for v in the remaining directions. So directions of large variance, the outline, are settled first.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from ._carried import CarriesStatistics
from ._exponential import Point, combine, step_weights
from ._grid import GridScheduler, with_grid_arguments

_EXACT_LIMIT = 2048  # above this many samples and elements, eigenvectors are found by random projections
_OVERSAMPLING, _POWER_ITERATIONS = 16, 4


class Teleported(NamedTuple):
    """Arguments for a stock pipeline: `pipe(..., latents=it.latents, timesteps=it.timesteps)`.

    Attributes:
        latents: the state at the first of the timesteps, scaled as the pipeline's `latents` are.
        timesteps: the timesteps that are left to be run, falling.
    """

    latents: torch.Tensor
    timesteps: list[int]


class GaussianTeleport(ModelMixin, ConfigMixin):
    """Mean, leading eigenpairs of the covariance, and the variance of what is left, of one Gaussian or of one a class.

    `fit` measures them. It is a stock diffusers model to save, load and push. By the constructor the data are standard
    normal.

    Args:
        shape: of the mean: that of a sample without the batch; with rank 0 also one that broadcasts to it.
        rank: number of eigenpairs of each Gaussian.
        num_classes: number of Gaussians, by class label; 0 for one without labels.

    Raises:
        ValueError: an argument is out of range.
    """

    _supports_gradient_checkpointing = False
    mean: torch.Tensor
    basis: torch.Tensor
    variances: torch.Tensor
    remainder: torch.Tensor

    @register_to_config
    def __init__(self, *, shape: Sequence[int] = (1,), rank: int = 0, num_classes: int = 0) -> None:
        super().__init__()
        size, count = math.prod(shape), max(num_classes, 1)
        if not shape or size < 1 or not 0 <= rank <= size or num_classes < 0:
            raise ValueError(
                f"`shape` is {shape!r}, `rank` {rank!r} and `num_classes` {num_classes!r}; a shape of positive numbers, a "
                "rank from 0 to its number of elements and 0 or more classes are needed."
            )
        self.register_buffer("mean", torch.zeros(count, *shape))
        self.register_buffer("basis", torch.eye(size, rank).repeat(count, 1, 1))
        self.register_buffer("variances", torch.ones(count, rank))
        self.register_buffer("remainder", torch.ones(count))

    # --- making them -------------------------------------------------------------------------------------------------

    @classmethod
    def from_moments(
        cls,
        mean: torch.Tensor,
        basis: torch.Tensor | None = None,
        variances: torch.Tensor | None = None,
        remainder: torch.Tensor | float = 0.0,
    ) -> GaussianTeleport:
        """For given moments, kept in float32; with one more axis in front, of one Gaussian a class.

        Args:
            mean: `shape`, or `(num_classes, *shape)` where `basis` or `remainder` has that axis.
            basis: orthonormal columns, `(elements, rank)`; None for rank 0.
            variances: of the data along the columns, `(rank,)`.
            remainder: variance in all other directions. The paper takes 0.

        Raises:
            ValueError: the shapes do not fit, columns are not orthonormal, or a variance is negative.
        """
        remainder = torch.as_tensor(remainder, dtype=torch.float64)
        classes = len(mean) if (remainder.ndim == 1 or (basis is not None and basis.ndim == 3)) else 0
        means = mean.double() if classes else mean.double()[None]
        count, size = len(means), means[0].numel()
        basis = torch.zeros(count, size, 0) if basis is None else basis if classes else basis[None]
        variances = torch.zeros(count, 0) if variances is None else variances if classes else variances[None]
        basis, variances = basis.double(), variances.double()
        if basis.shape[:2] != (count, size) or variances.shape != (count, basis.shape[2]):
            raise ValueError(
                f"`basis` has shape {tuple(basis.shape)} and `variances` {tuple(variances.shape)}; a `mean` of "
                f"{tuple(mean.shape)} needs ({size}, rank) and (rank,), of each class."
            )
        unit = torch.eye(basis.shape[2], dtype=basis.dtype)
        if not torch.allclose(basis.mT @ basis, unit.expand(count, -1, -1), rtol=0, atol=1e-4):
            raise ValueError("`basis` has columns that are not orthonormal.")
        if not bool((variances >= 0).all()) or not bool((remainder >= 0).all()):
            raise ValueError(f"`variances` or `remainder` is negative: {variances.tolist()}, {remainder.tolist()}.")
        made = cls(shape=tuple(means.shape[1:]), rank=basis.shape[2], num_classes=classes)
        made.mean.copy_(means)
        made.basis.copy_(basis)
        made.variances.copy_(variances)
        made.remainder.copy_(remainder.expand(count))
        return made

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        latents: torch.Tensor,
        rank: int = 128,
        class_labels: torch.Tensor | Sequence[int] | None = None,
        seed: int = 0,
    ) -> GaussianTeleport:
        """Measure them on clean samples, scaled as the denoiser knows them: latents times `vae.config.scaling_factor`.

        The variance that the eigenpairs leave is spread evenly over the other directions (probabilistic principal
        components: Tipping and Bishop 1999).

        Args:
            latents: `(n, *shape)`, some thousands; or hundreds that one prompt gave.
            rank: number of eigenpairs; at most the number of samples of a class less one, and of elements.
            class_labels: integers `(n,)` from 0, each present at least twice; None for one Gaussian.
            seed: of the random projections that find eigenvectors of large data.

        Raises:
            ValueError: there are too few samples, a value is not finite, or labels do not fit.
        """
        if latents.ndim < 2 or len(latents) < 2 or not bool(torch.isfinite(latents).all()):
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}; at least 2 samples are needed, all of them finite."
            )
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"`rank` is {rank!r}; it must be an integer of at least 0.")
        labels = torch.zeros(len(latents), dtype=torch.long) if class_labels is None else torch.as_tensor(class_labels)
        counts = torch.bincount(labels.long().cpu()) if labels.shape == (len(latents),) else torch.zeros(1)
        if int(counts.min()) < 2:
            raise ValueError(
                f"`class_labels` has shape {tuple(labels.shape)} and the counts {counts.tolist()}; one label a sample, and "
                "at least 2 samples of each class from 0 on, are needed."
            )
        shape, size = latents.shape[1:], latents[0].numel()
        kept = min(rank, size, int(counts.min()) - 1)
        parts = [_moments(latents[(labels == k).to(latents.device)].flatten(1), kept, seed) for k in range(len(counts))]
        mean, basis, variances, remainder = (torch.stack(part) for part in zip(*parts, strict=True))
        if class_labels is None:
            return cls.from_moments(mean[0].reshape(shape), basis[0], variances[0], float(remainder[0]))
        return cls.from_moments(mean.reshape(-1, *shape), basis, variances, remainder)

    # --- using them --------------------------------------------------------------------------------------------------

    def denoised(
        self, sample: torch.Tensor, level: Point, class_labels: torch.Tensor | Sequence[int] | None = None
    ) -> torch.Tensor:
        r"""What the denoiser of this Gaussian predicts, :math:`E[x_0 | x_t]`: to see where a network is still like it.

        Args:
            sample: x_t, `(batch, *shape)`.
            level: :math:`(a_t, s_t)`.
            class_labels: one a sample, or a number of them that divides the batch; needed where there are classes.

        Raises:
            ValueError: shapes or labels do not fit.
        """
        a, s = level

        def gain(v: torch.Tensor) -> torch.Tensor:
            total = s**2 + a**2 * v
            return torch.where(total > 0, a * v / total.clamp(min=1e-300), 0.0)

        return self._filtered(sample, a, 1.0, gain, class_labels)

    def jump(
        self,
        sample: torch.Tensor,
        start: Point,
        end: Point,
        class_labels: torch.Tensor | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The exact solution at level `end` of the equation of this Gaussian; arguments and errors as `denoised`."""

        def gain(v: torch.Tensor) -> torch.Tensor:
            return torch.sqrt((end.sigma**2 + end.alpha**2 * v) / (start.sigma**2 + start.alpha**2 * v))

        return self._filtered(sample, start.alpha, end.alpha, gain, class_labels)

    def teleport(
        self,
        target: Any,
        noise: torch.Tensor,
        t_stop: int,
        num_inference_steps: int,
        class_labels: torch.Tensor | Sequence[int] | None = None,
    ) -> Teleported:
        """Jump from pure noise to `t_stop`, without a call of the network.

            pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
            start = statistics.teleport(pipe, noise, t_stop=700, num_inference_steps=7)
            images = pipe(prompts, latents=start.latents, timesteps=start.timesteps).images

        Args:
            target: a pipeline or its scheduler, which must have a beta schedule and take `timesteps`.
            noise: standard normal, `(batch, *shape)`.
            t_stop: the timestep to jump to, from 1 to one less than the number of training timesteps.
            num_inference_steps: how many calls are to be made from there, spread evenly; at most `t_stop`.
            class_labels: as in `denoised`.

        Raises:
            ValueError: the scheduler is not fit, or a number is out of range.
        """
        scheduler = getattr(target, "scheduler", target)
        table = getattr(scheduler, "alphas_cumprod", None)
        takes = inspect.signature(getattr(scheduler, "set_timesteps", object)).parameters
        jumps = isinstance(scheduler, GaussianTeleportScheduler)
        if table is None or "timesteps" not in takes or scheduler.config.get("use_flow_sigmas") or jumps:
            raise ValueError(
                f"`target` has {type(scheduler).__name__}; a scheduler with a beta schedule is needed whose `set_timesteps` "
                "takes `timesteps`, as `DPMSolverMultistepScheduler` and `EulerDiscreteScheduler`."
            )
        last = len(table) - 1
        if isinstance(t_stop, bool) or not isinstance(t_stop, int) or not 1 <= t_stop < last:
            raise ValueError(f"`t_stop` is {t_stop!r}; allowed are integers from 1 to {last - 1}.")
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= t_stop:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; allowed are 1 to `t_stop`, {t_stop}.")
        start, end = (Point(math.sqrt(bar), math.sqrt(1 - bar)) for bar in (float(table[last]), float(table[t_stop])))
        timesteps = np.linspace(t_stop, 0, num_inference_steps + 1).round().astype(int)[:-1].tolist()
        laid = copy.deepcopy(scheduler)
        laid.set_timesteps(timesteps=timesteps)
        one = torch.ones((), dtype=torch.float64)
        seen = laid.scale_model_input(one, laid.timesteps[0]) if hasattr(laid, "scale_model_input") else one
        scale = float(seen) * float(laid.init_noise_sigma)  # pipelines multiply latents by the second
        return Teleported(self.jump(noise, start, end, class_labels) / scale, timesteps)

    def _filtered(self, sample: torch.Tensor, at: float, to: float, gain: Any, class_labels: Any) -> torch.Tensor:
        """`to m + g(S) (x - at m)` by the eigenvalues of S, in float32 at least, in the dtype of `sample`."""
        labels = self._labels(class_labels, len(sample))
        self._check_shape(sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        result = torch.empty_like(sample, dtype=dtype)
        for k in range(len(self.mean)):
            rows = slice(None) if labels is None else (labels == k).nonzero().flatten().to(sample.device)
            mean = self.mean[k].to(sample.device, dtype)
            z = sample[rows].to(dtype) - at * mean
            rest = gain(self.remainder[k].double().cpu())
            part = float(rest) * z
            if self.config.rank:
                basis = self.basis[k].to(z)
                extra = (gain(self.variances[k].double().cpu()) - rest).to(z)
                part = part + ((z.flatten(1) @ basis * extra) @ basis.T).reshape(z.shape)
            result[rows] = to * mean + part
        return result.to(sample.dtype)

    def _check_shape(self, sample: torch.Tensor) -> None:
        own, given = tuple(self.config.shape), tuple(sample.shape[1:])
        padded = (1,) * (len(given) - len(own)) + own
        broadcasts = len(padded) == len(given) and all(a in (1, b) for a, b in zip(padded, given, strict=True))
        if own != given and (self.config.rank or not broadcasts):
            raise ValueError(f"`sample` has shape {tuple(sample.shape)}; these statistics are of shape {own}.")

    def _labels(self, class_labels: Any, batch: int) -> torch.Tensor | None:
        count = self.config.num_classes
        if (class_labels is None) != (count == 0):
            raise ValueError(
                f"`class_labels` is {class_labels!r}; these statistics are "
                f"{f'of {count} classes and need labels' if count else 'of one Gaussian, without classes'}."
            )
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels).reshape(-1).cpu()
        if batch % max(len(labels), 1) or not len(labels) or not bool(((labels >= 0) & (labels < count)).all()):
            raise ValueError(
                f"`class_labels` is {labels.tolist()!r} for a batch of {batch}; labels from 0 to {count - 1} are needed, "
                "whose number divides the batch."
            )
        return labels.repeat(batch // len(labels))


class GaussianTeleportScheduler(CarriesStatistics, GridScheduler):
    r"""A run that begins at `t_stop`: the pipeline's noise is taken there in closed form, and no call is spent on it.

    The steps from `t_stop` are those of DPM-Solver++ of order 2 (Lu et al. 2022, arXiv 2211.01095) in its Taylor form.

        statistics = dx.GaussianTeleport.fit(latents)
        pipe.scheduler = dx.GaussianTeleportScheduler.from_config(pipe.scheduler.config, statistics=statistics)

    The jump is made where the pipeline calls `scale_model_input` for the first time, and again in the first step; both
    see the same noise. A pipeline that does not call it (`DDPMPipeline`, those of flow matching) is refused in the first
    step. Image-to-image begins with its own noised picture, and nothing is jumped over.

    Args:
        t_stop: timestep at which the run begins, from 1 to one less than the number of training timesteps.
    """

    statistics_class = GaussianTeleport

    @register_to_config
    @with_grid_arguments
    def __init__(self, t_stop: int = 700) -> None:
        if isinstance(t_stop, bool) or not isinstance(t_stop, int) or t_stop < 1:
            raise ValueError(f"`t_stop` is {t_stop!r}; an integer of at least 1 is needed.")
        self._class_labels: Any = None

    def set_class_labels(self, class_labels: torch.Tensor | Sequence[int] | None) -> None:
        """Labels of the samples of the runs to come, for statistics of classes: `(batch,)`."""
        self._class_labels = class_labels

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As in `GridScheduler`; a grid of its own begins at `t_stop`, and one that is given at its first level.

        Raises:
            ValueError: also where there are no statistics, `t_stop` is no timestep of the process, or the process is a
                flow, whose pipelines do not call `scale_model_input`.
        """
        last = self.config.num_train_timesteps - 1
        if self.config.use_flow_sigmas:
            raise ValueError("`use_flow_sigmas` is True; a jump needs a beta schedule.")
        if self.config.t_stop >= last:
            raise ValueError(f"`t_stop` is {self.config.t_stop!r}; allowed are integers from 1 to {last - 1}.")
        self.require_statistics()
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)

    def start(self) -> None:
        self._last: tuple[float, torch.Tensor] | None = None
        self._jumped = False

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is; before the first step of a run from noise, where the jump takes it."""
        if not self._before_the_first():
            return sample
        self._jumped = True
        return self._jump(sample)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As in `GridScheduler`.

        Raises:
            ValueError: also where the network was not called on the state that the jump leads to.
        """
        if self._before_the_first():
            if not self._jumped:
                raise ValueError(
                    "`step` comes before `scale_model_input`: this pipeline calls its network on pure noise. Use "
                    "`GaussianTeleport.teleport` and the pipeline's `latents` and `timesteps`."
                )
            sample = self._jump(sample)
        return super().step(model_output, timestep, sample, generator, return_dict)

    def update(
        self, model_output: torch.Tensor, sample: torch.Tensor, i: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        here, there, data = self.points[i], self.points[i + 1], self.to_data(model_output, sample, i)
        past = [] if self._last is None or there.sigma == 0 else [self._last]
        weights = step_weights("data", here, there, [lambda_ - here.lambda_ for lambda_, _ in past])
        self._last = (here.lambda_, data)
        return combine(weights, sample, [data, *(m for _, m in past)])

    def _before_the_first(self) -> bool:
        return self.num_inference_steps is not None and self._step_index is None and self._begin_index is None

    def _jump(self, sample: torch.Tensor) -> torch.Tensor:
        noise = self._point(float(self._train_ratios[-1]))
        return self.statistics.jump(sample, noise, self.points[0], self._class_labels)

    # --- the grid from t_stop on -------------------------------------------------------------------------------------

    def _check_number(self, number: Any) -> None:
        if isinstance(number, (int, np.integer)) and number > self.config.t_stop:
            raise ValueError(f"`num_inference_steps` is {number!r}; allowed are 1 to `t_stop`, {self.config.t_stop}.")
        super()._check_number(number)

    def _spaced(self, n: int) -> np.ndarray:
        times = super()._spaced(n)
        return np.round(times * (self.config.t_stop / times[0]))

    def _other_grid(self, n: int) -> np.ndarray | None:
        whole = self._train_ratios
        self._train_ratios = whole[: self.config.t_stop + 1]
        try:
            return super()._other_grid(n)
        finally:
            self._train_ratios = whole


# --- measuring -------------------------------------------------------------------------------------------------------


def _moments(rows: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Mean, `rank` leading eigenvectors and eigenvalues of the covariance, and the mean of the other eigenvalues."""
    rows = rows.double()
    mean = rows.mean(0)
    centred = (rows - mean) / math.sqrt(len(rows) - 1)
    if min(centred.shape) <= _EXACT_LIMIT:
        _, singular, vectors = torch.linalg.svd(centred, full_matrices=False)
        basis, values = vectors[:rank].T, singular[:rank].square()
    else:
        basis, values = _leading_pairs(centred, rank, seed)
    rest = (centred.square().sum() - values.sum()).clamp(min=0) / max(rows.shape[1] - rank, 1)
    return mean, basis, values, rest


def _leading_pairs(rows: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenpairs of `rows.T @ rows` by subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""
    size = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, min(rank + _OVERSAMPLING, size), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(start.to(rows.device)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    values, turn = torch.linalg.eigh((rows @ basis).T @ (rows @ basis))
    order = torch.arange(len(values) - 1, len(values) - 1 - rank, -1, device=values.device)
    return basis @ turn[:, order], values[order].clamp(min=0)
