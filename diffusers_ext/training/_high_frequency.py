r"""What a picture has at high spatial frequencies, and distances that weigh it: the loss of HiPA (arXiv 2311.18158).

The authors published no code, and name neither the perceptual distance nor the edge operator. What is taken here is said at
each function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

Features = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def high_pass(pictures: torch.Tensor, cutoff: float) -> torch.Tensor:
    r"""H: the part of pictures above a spatial frequency, :math:`x - F^{-1}(M F x)` with the 2D Fourier transform F.

    The ideal low pass M keeps :math:`\sqrt{u^2 + v^2} \le` `cutoff`, in whole periods a picture.

    Args:
        pictures: `(..., height, width)` in float32 or float64.
        cutoff: at least 0, where only the mean is taken off.
    """
    height, width = pictures.shape[-2:]
    options = {"device": pictures.device, "dtype": pictures.dtype}
    down, across = torch.fft.fftfreq(height, 1 / height, **options), torch.fft.rfftfreq(width, 1 / width, **options)
    low = torch.hypot(down[:, None], across[None]) <= cutoff
    return pictures - torch.fft.irfft2(torch.fft.rfft2(pictures) * low, s=(height, width))


def edges(pictures: torch.Tensor) -> torch.Tensor:
    r"""E: how strong edges are, :math:`\sqrt{g_x^2 + g_y^2 + 10^{-12}}` with Sobel's g of the mean over the channels.

    Borders are replicated: zeros around a picture would be an edge of their own.

    Args:
        pictures: `(batch, channels, height, width)`.

    Returns:
        `(batch, 1, height, width)`.
    """
    x = nn.functional.pad(pictures.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    # Differences first, so that they are exactly 0 where there is no edge.
    across, down = x[..., :, 2:] - x[..., :, :-2], x[..., 2:, :] - x[..., :-2, :]
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gy = down[..., :, :-2] + 2 * down[..., :, 1:-1] + down[..., :, 2:]
    return (gx.square() + gy.square() + 1e-12).sqrt()


def default_cutoff(pictures: torch.Tensor) -> float:
    """An eighth of the shorter side: a quarter of the highest frequency that pictures `(..., height, width)` can hold."""
    return min(pictures.shape[-2:]) / 8


class EncoderFeatures:
    """Feature maps of a frozen VAE's encoder, as the eye of a perceptual distance.

    Every latent pipeline has one, trained on pictures like those that it makes, so that nothing is downloaded and no
    licence of a third network matters. Maps are those after its first layer and after each block, from fine to coarse.

    Args:
        vae: an `AutoencoderKL`.

    Raises:
        ValueError: its encoder has other parts.
    """

    def __init__(self, vae: nn.Module) -> None:
        encoder = getattr(vae, "encoder", None)
        if not all(hasattr(encoder, part) for part in ("conv_in", "down_blocks")):
            raise ValueError(f"`vae` is a {type(vae).__name__}; an AutoencoderKL is needed for its encoder's features.")
        self._encoder: nn.Module = encoder  # type: ignore[assignment]

    def __call__(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Maps `(batch, channels_i, height_i, width_i)` of pictures `(batch, channels, height, width)` in [-1, 1]."""
        maps = [self._encoder.conv_in(pictures)]  # type: ignore[operator]
        for block in self._encoder.down_blocks:  # type: ignore[union-attr]
            maps.append(block(maps[-1]))
        return maps


def spatial_loss(pred: torch.Tensor, target: torch.Tensor, features: Features | None = None) -> torch.Tensor:
    """Mean absolute difference of the pixels, and where there are features, the mean over their maps of how far apart unit
    feature vectors are: the squared distance over the channels, as LPIPS has it (Zhang et al. 2018, equation 1, without its
    learned weights).

    Args: as for `high_frequency_promoting_loss`.
    """
    loss = (pred - target).abs().mean()
    if features is None:
        return loss
    normal = nn.functional.normalize
    with torch.no_grad():
        wanted = [normal(of.float(), dim=1, eps=1e-6) for of in features(target)]
    distances = [
        (normal(found.float(), dim=1, eps=1e-6) - of).square().sum(dim=1).mean()
        for found, of in zip(features(pred), wanted, strict=True)
    ]
    return loss + torch.stack(distances).mean()


def high_frequency_promoting_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    features: Features | None = None,
    hf_weight: float = 0.1,
    cutoff: float | None = None,
) -> torch.Tensor:
    r"""What HiPA trains by: :math:`L_{spatial} + \lambda (|H(\hat x) - H(x)|^2 + |E(\hat x) - E(x)|^2)`, means over elements.

    Args:
        pred: :math:`\hat x`, `(batch, channels, height, width)` in [-1, 1] and a little beyond.
        target: x, of the same shape.
        features: gives feature maps of pictures, such as `EncoderFeatures`, or any other network that you have; None: the
            spatial loss is of pixels alone.
        hf_weight: :math:`\lambda`; 0 is the spatial loss alone. Edges are large numbers: 1 may outweigh the spatial part.
        cutoff: see `high_pass`; None takes `default_cutoff`. Of white noise, 95 % of the energy lies above that default:
            choose it by the spectrum of the pictures.

    Returns:
        One number, in float32.

    Raises:
        ValueError: the shapes differ, or a number is out of range.
    """
    if pred.shape != target.shape or pred.ndim != 4:
        raise ValueError(
            f"`pred` has shape {tuple(pred.shape)} and `target` {tuple(target.shape)}; both must be (batch, channels, "
            "height, width) and the same."
        )
    check_high_frequency(hf_weight, cutoff)
    pred, target = pred.float(), target.float()
    loss = spatial_loss(pred, target, features)
    if hf_weight == 0:
        return loss
    fine = high_pass(pred - target, default_cutoff(pred) if cutoff is None else cutoff)  # H is linear
    return loss + hf_weight * (fine.square().mean() + (edges(pred) - edges(target)).square().mean())


def check_high_frequency(hf_weight: float, cutoff: float | None) -> None:
    """Raise `ValueError` where one of them is negative."""
    if not hf_weight >= 0:
        raise ValueError(f"`hf_weight` is {hf_weight}; it must be at least 0.")
    if cutoff is not None and not cutoff >= 0:
        raise ValueError(f"`cutoff` is {cutoff}; it must be at least 0.")
