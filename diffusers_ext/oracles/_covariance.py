"""Covariances of the components of a mixture, by their eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# From eigenvalues `(K, n)` to factors that broadcast to `(B, K, n)`.
Gain = Callable[[torch.Tensor], torch.Tensor]


class DiagonalCovariance(nn.Module):
    r""":math:`\Sigma_k = \mathrm{diag}(v_k)` for K components in D dimensions."""

    variances: torch.Tensor

    def __init__(self, components: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("variances", torch.ones(components, dimension, dtype=torch.float64))

    def filter(self, z: torch.Tensor, gain: Gain) -> torch.Tensor:
        r""":math:`g(\Sigma_k) z_k` for `z` of shape `(B, K, D)`."""
        return gain(self.variances.double()) * z

    def trace(self, gain: Gain) -> torch.Tensor:
        r""":math:`\mathrm{tr}\, g(\Sigma_k)`, `(B, K)`."""
        return gain(self.variances.double()).sum(-1)

    def matrix(self, gain: Gain) -> torch.Tensor:
        r""":math:`g(\Sigma_k)`, `(B, K, D, D)`."""
        return torch.diag_embed(gain(self.variances.double()))

    def smallest(self) -> float:
        """The smallest eigenvalue of all components."""
        return float(self.variances.min())


class LowRankCovariance(nn.Module):
    r""":math:`\Sigma_k = U_k \mathrm{diag}(l_k) U_k^\top + v_k I` with orthonormal columns :math:`U_k` (D x r).

    A full covariance is the case r = D, v = 0.
    """

    basis: torch.Tensor
    variances: torch.Tensor
    noise: torch.Tensor

    def __init__(self, components: int, dimension: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= dimension:
            raise ValueError(f"`rank` is {rank!r}; it must lie between 1 and the dimension, {dimension}.")
        self.register_buffer("basis", torch.eye(dimension, rank, dtype=torch.float64).repeat(components, 1, 1))
        self.register_buffer("variances", torch.ones(components, rank, dtype=torch.float64))
        self.register_buffer("noise", torch.zeros(components, dtype=torch.float64))

    def filter(self, z: torch.Tensor, gain: Gain) -> torch.Tensor:
        r""":math:`g(\Sigma_k) z_k` for `z` of shape `(B, K, D)`."""
        basis, noise = self.basis.double(), self.noise.double()[:, None]
        inside = torch.einsum("bkd,kdr->bkr", z, basis)
        kept = torch.einsum("bkr,kdr->bkd", gain(self.variances.double() + noise) * inside, basis)
        if basis.shape[1] == basis.shape[2]:
            return kept
        return kept + gain(noise) * (z - torch.einsum("bkr,kdr->bkd", inside, basis))

    def trace(self, gain: Gain) -> torch.Tensor:
        r""":math:`\mathrm{tr}\, g(\Sigma_k)`, `(B, K)`."""
        noise = self.noise.double()[:, None]
        _, dimension, rank = self.basis.shape
        kept = gain(self.variances.double() + noise).sum(-1)
        return kept if rank == dimension else kept + (dimension - rank) * gain(noise).squeeze(-1)

    def matrix(self, gain: Gain) -> torch.Tensor:
        r""":math:`g(\Sigma_k)`, `(B, K, D, D)`."""
        basis, noise = self.basis.double(), self.noise.double()[:, None]
        kept, rest = gain(self.variances.double() + noise), gain(noise)
        identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        return torch.einsum("kdr,bkr,ker->bkde", basis, kept - rest, basis) + rest[..., None] * identity

    def smallest(self) -> float:
        """The smallest eigenvalue of all components."""
        _, dimension, rank = self.basis.shape
        least = float((self.variances + self.noise[:, None]).min())
        return least if rank == dimension else min(least, float(self.noise.min()))


def from_matrix(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors as columns and eigenvalues of a symmetric positive semi-definite matrix.

    Raises:
        ValueError: it is not symmetric, or an eigenvalue is negative.
    """
    scale = float(covariance.abs().max())
    if not torch.allclose(covariance, covariance.T, rtol=0, atol=1e-9 * scale):
        raise ValueError("`covariance` is not symmetric.")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if float(values.min()) < -1e-9 * scale:
        raise ValueError(f"`covariance` has the eigenvalue {float(values.min()):g}; none may be negative.")
    return vectors, values.clamp(min=0)


def from_factors(factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Orthonormal columns and eigenvalues of :math:`F_k F_k^\top`, for `factors` of shape `(K, D, r)`."""
    basis, singular, _ = torch.linalg.svd(factors, full_matrices=False)
    return basis, singular**2
