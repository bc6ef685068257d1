"""How much of a picture's energy is in fine detail, which blur and skipped steps lose first."""

from __future__ import annotations

import math

import torch

from .distances import Pictures, to_tensor

_BATCH = 16


def high_frequency_share(pictures: Pictures, radius: float = 0.5) -> torch.Tensor:
    r"""Share of each picture's spectral energy at high spatial frequencies.

    The energy is that of the two-dimensional discrete cosine transform (DCT-II, orthonormal), summed over the three
    channels, without the mean of each channel. Coefficient `(i, j)` of `height x width` has the frequency `i / height`
    down and `j / width` across in units of the Nyquist frequency, half a cycle a pixel. It counts as high where
    :math:`\sqrt{(i / \text{height})^2 + (j / \text{width})^2} \ge \text{radius}`. The cosine transform mirrors the
    picture at its edges, so that opposite edges which differ are no detail, as they would be to a Fourier transform.

    Args:
        pictures: `n` pictures in a form that `to_tensor` takes.
        radius: from 0 to the square root of 2, both left out. At 0.5, the default, what is higher cannot be shown
            at half the resolution.

    Returns:
        `float64 (n,)` in [0, 1]; 0 for a picture of one colour, which has no energy. White noise has about
        :math:`1 - \pi \text{radius}^2 / 4` for radii up to 1.

    Raises:
        ValueError: `radius` is out of range, or `to_tensor` refuses the pictures.
    """
    if isinstance(radius, bool) or not 0 < radius < math.sqrt(2):
        raise ValueError(f"`radius` is {radius!r}; it must lie between 0 and the square root of 2.")
    pixels = to_tensor(pictures)
    height, width = pixels.shape[2:]
    down, across = _cosines(height).to(pixels.device), _cosines(width).to(pixels.device)
    frequency = torch.hypot(
        torch.arange(height, device=pixels.device)[:, None] / height,
        torch.arange(width, device=pixels.device) / width,
    )
    high = (frequency >= radius).double()
    shares = []
    for batch in pixels.split(_BATCH):
        batch = batch.double()
        # Less the mean here, as rounding would give a picture of one colour detail.
        energy = (down @ (batch - batch.mean((2, 3), keepdim=True)) @ across.T).square().sum(1)
        total = energy.sum((1, 2))
        shares.append(torch.where(total > 1e-20, (energy * high).sum((1, 2)) / total.clamp_min(1e-20), 0.0))
    return torch.cat(shares)


def high_frequency_energy_ratio(a: Pictures, reference: Pictures, radius: float = 0.5) -> float:
    """How much fine detail pictures have, in proportion to what a reference has: below 1 they are smoother.

    The mean `high_frequency_share` of `a` divided by that of `reference`. The two need not pair up or be equally many,
    but must be of one size. A ratio of shares does not change with brightness or contrast. Noise raises it as detail
    does: 1 is the goal, and more is no better.

    Args:
        a, reference: pictures in a form that `to_tensor` takes.
        radius: as for `high_frequency_share`.

    Raises:
        ValueError: the sizes differ, one is empty, the reference has no energy at high frequencies, or as for
            `high_frequency_share`.
    """
    a, reference = to_tensor(a, "a"), to_tensor(reference, "reference")
    if a.shape[2:] != reference.shape[2:]:
        raise ValueError(
            f"`a` is {tuple(a.shape[2:])} pixels high and wide and `reference` is {tuple(reference.shape[2:])}; they "
            "must be of one size."
        )
    for name, pictures in (("a", a), ("reference", reference)):
        if not len(pictures):
            raise ValueError(f"`{name}` is empty; at least one picture is needed.")
    of_reference = high_frequency_share(reference, radius).mean().item()
    if of_reference == 0:
        raise ValueError(f"`reference` has no energy at {radius} of the Nyquist frequency or above.")
    return high_frequency_share(a, radius).mean().item() / of_reference


def _cosines(size: int) -> torch.Tensor:
    """Matrix of the orthonormal DCT-II: row `k` is a cosine of `k / 2` cycles."""
    k, x = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k * (x + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
