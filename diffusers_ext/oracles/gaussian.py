"""Denoisers of data with known density, called as a `UNet2DModel` is; the formulas are in `MixtureDenoiser`."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ._covariance import from_factors, from_matrix
from ._mixture import MixtureDenoiser, event_shape


class GaussianDenoiser(MixtureDenoiser):
    """Denoiser of Gaussian data; `exact_ode_solution` is in closed form.

        denoiser = GaussianDenoiser.from_moments(mean, covariance, scheduler)
        pipe = DDPMPipeline(unet=denoiser, scheduler=scheduler)

    Built by the constructor the data are standard normal and the schedule is DDPM's.

    Args:
        in_channels, sample_size: shape of the data: channels, and height and width.
        covariance: `full` or `diagonal`.
        process: `discrete`, `flow` or `edm` (see `NoiseProcess`).
        num_train_timesteps: length of the table of `discrete`, scale of the timesteps of `flow`.
        sigma_data: of process `edm`.
        prediction_type: `epsilon`, `v_prediction`, `sample` or `flow_prediction` (noise minus data).
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int | tuple[int, int] = 2,
        covariance: str = "full",
        process: str = "discrete",
        num_train_timesteps: int = 1000,
        sigma_data: float = 1.0,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        if covariance not in ("full", "diagonal"):
            raise ValueError(f"`covariance` is {covariance!r}; allowed are 'full' and 'diagonal'.")
        rank = math.prod(event_shape(in_channels, sample_size))
        schedule = (process, num_train_timesteps, sigma_data, prediction_type)
        self._setup(covariance, rank, in_channels, sample_size, 1, 0, *schedule)

    @classmethod
    def from_moments(cls, mean: torch.Tensor, covariance: torch.Tensor, scheduler: Any) -> GaussianDenoiser:
        """For data of a given mean and covariance, and the process and prediction type of a scheduler.

        Args:
            mean: `(channels, height, width)`.
            covariance: `(D, D)` over the flattened data, or variances of the shape of `mean`. It may be singular.
            scheduler: any diffusers scheduler of a discrete, flow-matching or EDM process.

        Raises:
            ValueError: shapes do not fit, the covariance has a negative eigenvalue, or the scheduler has another
                process.
        """
        mean = _checked("mean", mean, 3)
        covariance = torch.as_tensor(covariance).double()
        weights = torch.ones(1, 1, dtype=torch.float64)
        if covariance.shape == mean.shape:
            if not bool((covariance >= 0).all()):
                raise ValueError(f"`covariance` has the variance {float(covariance.min()):g}; none may be negative.")
            model = cls._build(scheduler, mean[None], weights, covariance="diagonal")
            model.covariances.variances.copy_(covariance.reshape(1, -1))
            return model
        size = mean.numel()
        if covariance.shape != (size, size):
            raise ValueError(
                f"`covariance` has shape {tuple(covariance.shape)}; allowed are ({size}, {size}) and {tuple(mean.shape)}."
            )
        basis, variances = from_matrix(covariance)
        model = cls._build(scheduler, mean[None], weights, covariance="full")
        model.covariances.basis.copy_(basis[None])
        model.covariances.variances.copy_(variances[None])
        return model


class GaussianMixtureDenoiser(MixtureDenoiser):
    """Denoiser of a mixture of Gaussians with diagonal covariances, class-conditional if wanted.

    Built by the constructor all components are standard normal.

    Args:
        num_components: number of Gaussians.
        num_classes: of class labels 0, 1, ...; label `num_classes` is the null class.
        in_channels, sample_size, process, num_train_timesteps, sigma_data, prediction_type: as in `GaussianDenoiser`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int | tuple[int, int] = 2,
        num_components: int = 2,
        num_classes: int = 0,
        process: str = "discrete",
        num_train_timesteps: int = 1000,
        sigma_data: float = 1.0,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        schedule = (process, num_train_timesteps, sigma_data, prediction_type)
        self._setup("diagonal", 0, in_channels, sample_size, num_components, num_classes, *schedule)

    @classmethod
    def from_components(
        cls,
        means: torch.Tensor,
        variances: torch.Tensor | float,
        scheduler: Any,
        weights: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> GaussianMixtureDenoiser:
        """For given components, and the process and prediction type of a scheduler.

        Args:
            means: `(K, channels, height, width)`.
            variances: of the shape of `means`, `(K,)`, or one for all. Zero is allowed, for data that are points.
            scheduler: as in `GaussianDenoiser.from_moments`.
            weights: `(K,)`, which need not sum to one; equal if None. Or one row a class and a last one for the null
                class, `(num_classes + 1, K)`, for classes that overlap or a null class that is not their mixture.
            labels: integers `(K,)`, the class of each component; the null class has all. None for no classes.

        Raises:
            ValueError: shapes do not fit, a variance is negative, weights are negative or sum to zero, or the
                scheduler has another process.
        """
        means = _checked("means", means, 4)
        variances = torch.as_tensor(variances).double()
        if variances.shape == means.shape[:1]:
            variances = variances[:, None].expand(-1, means[0].numel())
        elif variances.ndim == 0:
            variances = variances.expand(len(means), means[0].numel())
        elif variances.shape == means.shape:
            variances = variances.flatten(1)
        else:
            raise ValueError(
                f"`variances` has shape {tuple(variances.shape)}; allowed are (), ({len(means)},) and {tuple(means.shape)}."
            )
        if not bool((variances >= 0).all()):
            raise ValueError(f"`variances` has the value {float(variances.min()):g}; none may be negative.")
        table = _weights(weights, labels, len(means))
        model = cls._build(scheduler, means, table, num_components=len(means), num_classes=len(table) - 1)
        model.covariances.variances.copy_(variances)
        return model


class LowRankMixtureDenoiser(MixtureDenoiser):
    r"""Denoiser of a mixture of low-rank Gaussians, :math:`x_0 = m_k + F_k a + s_k n` with standard normal a and n.

    Data near a union of subspaces, as natural pictures are (Wang et al. 2024, arXiv 2409.02426). With as many factors
    as dimensions it is a mixture of Gaussians with full covariances. Built by the constructor all components are
    standard normal on the first `rank` coordinates.

    Args:
        rank: number of factors of each component.
        num_components, num_classes: as in `GaussianMixtureDenoiser`.
        in_channels, sample_size, process, num_train_timesteps, sigma_data, prediction_type: as in `GaussianDenoiser`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int | tuple[int, int] = 2,
        num_components: int = 2,
        rank: int = 1,
        num_classes: int = 0,
        process: str = "discrete",
        num_train_timesteps: int = 1000,
        sigma_data: float = 1.0,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        schedule = (process, num_train_timesteps, sigma_data, prediction_type)
        self._setup("low-rank", rank, in_channels, sample_size, num_components, num_classes, *schedule)

    @classmethod
    def from_components(
        cls,
        means: torch.Tensor,
        factors: torch.Tensor,
        noise: torch.Tensor | float,
        scheduler: Any,
        weights: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> LowRankMixtureDenoiser:
        """For given components, and the process and prediction type of a scheduler.

        Args:
            means: `(K, channels, height, width)`.
            factors: :math:`F_k`, `(K, channels, height, width, rank)`; its columns need not be orthogonal.
            noise: :math:`s_k`, a standard deviation, `(K,)` or one for all. Zero is allowed: data on the subspaces.
            scheduler: as in `GaussianDenoiser.from_moments`.
            weights, labels: as in `GaussianMixtureDenoiser.from_components`.

        Raises:
            ValueError: shapes do not fit, `noise` is negative, weights are negative or sum to zero, or the scheduler
                has another process.
        """
        means = _checked("means", means, 4)
        factors, noise = torch.as_tensor(factors).double(), torch.as_tensor(noise).double()
        if factors.shape[:-1] != means.shape or not 1 <= factors.shape[-1] <= means[0].numel():
            raise ValueError(
                f"`factors` has shape {tuple(factors.shape)}; it must be {(*means.shape, 'rank')} with a rank of 1 to "
                f"{means[0].numel()}."
            )
        if noise.shape not in ((), means.shape[:1]) or not bool((noise >= 0).all()):
            raise ValueError(f"`noise` is {noise.tolist()!r}; it must be one number or {len(means)}, none negative.")
        table = _weights(weights, labels, len(means))
        sizes = {"num_components": len(means), "num_classes": len(table) - 1, "rank": factors.shape[-1]}
        model = cls._build(scheduler, means, table, **sizes)
        basis, variances = from_factors(factors.flatten(1, 3))
        model.covariances.basis.copy_(basis)
        model.covariances.variances.copy_(variances)
        model.covariances.noise.copy_(noise.expand(len(means)) ** 2)
        return model


# --- arguments -------------------------------------------------------------------------------------------------------


def _checked(name: str, value: torch.Tensor, ndim: int) -> torch.Tensor:
    tensor = torch.as_tensor(value).double()
    if tensor.ndim != ndim or not tensor.numel() or not bool(torch.isfinite(tensor).all()):
        shape = "(channels, height, width)" if ndim == 3 else "(components, channels, height, width)"
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; it must be {shape} and finite.")
    return tensor


def _weights(weights: torch.Tensor | None, labels: torch.Tensor | None, components: int) -> torch.Tensor:
    """`(num_classes + 1, K)`, each row summing to one."""
    table = torch.ones(components) if weights is None else torch.as_tensor(weights)
    table = table.double()
    if table.ndim == 1 and labels is not None:
        classes = torch.as_tensor(labels)
        if classes.shape != (components,) or classes.is_floating_point() or int(classes.min()) < 0:
            raise ValueError(f"`labels` is {classes.tolist()!r}; it must hold {components} integers of 0 or more.")
        rows = nn.functional.one_hot(classes.long()).T.double() * table
        table = torch.cat([rows, table[None]])
    elif labels is not None:
        raise ValueError("`labels` is given beside `weights` with one row a class; give one of them.")
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or table.shape[1] != components or not bool((table >= 0).all()):
        raise ValueError(
            f"`weights` has shape {tuple(table.shape)} and the least value {float(table.min()):g}; it must be "
            f"({components},) or (num_classes + 1, {components}), none negative."
        )
    sums = table.sum(1, keepdim=True)
    if not bool((sums > 0).all()):
        empty = [row for row, total in enumerate(sums.squeeze(1).tolist()) if total == 0]
        raise ValueError(f"`weights` or `labels` leave no component to class {empty[0]}; every class needs one.")
    return table / sums
