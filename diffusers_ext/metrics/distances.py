"""Pictures as tensors, and per-picture distances between two sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

Pictures: TypeAlias = torch.Tensor | np.ndarray | Sequence[Image.Image]


def to_tensor(pictures: Pictures, name: str = "pictures") -> torch.Tensor:
    """Pictures in any of the forms that diffusers pipelines return, as one tensor.

    Args:
        pictures: float tensor `(n, 3, height, width)` in [0, 1]; array `(n, height, width, 3)`, `uint8` or float in
            [0, 1]; or a list of PIL images of one size. One channel in place of three is grey.
        name: the caller's name of the argument, for error messages.

    Returns:
        `float32` tensor `(n, 3, height, width)` in [0, 1]; the input itself where it is that already. Grey pictures
        have three equal channels, which share memory.

    Raises:
        ValueError: another type, shape or range.
    """
    if isinstance(pictures, torch.Tensor):
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or not pictures.is_floating_point():
            raise ValueError(
                f"`{name}` is a tensor of {pictures.dtype} and shape {tuple(pictures.shape)}; a tensor must be floating "
                "point of shape (n, 3, height, width), or (n, 1, height, width) for grey."
            )
        tensor = pictures.float()
    elif isinstance(pictures, np.ndarray):
        if (
            pictures.ndim != 4
            or pictures.shape[3] not in (1, 3)
            or not (pictures.dtype == np.uint8 or np.issubdtype(pictures.dtype, np.floating))
        ):
            raise ValueError(
                f"`{name}` is an array of {pictures.dtype} and shape {pictures.shape}; an array must be uint8 or floating "
                "point of shape (n, height, width, 3), or (n, height, width, 1) for grey."
            )
        tensor = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float()
        if pictures.dtype == np.uint8:
            return (tensor / 255).expand(-1, 3, -1, -1)
    elif isinstance(pictures, Sequence) and pictures and all(isinstance(item, Image.Image) for item in pictures):
        sizes = {picture.size for picture in pictures}
        if len(sizes) > 1:
            raise ValueError(
                f"`{name}` holds images of {len(sizes)} sizes, {sorted(sizes)[:4]}; all must be of one size."
            )
        return to_tensor(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]), name)
    else:
        raise ValueError(
            f"`{name}` is {_describe(pictures)}; allowed are a float tensor (n, 3, height, width), an array (n, height, "
            "width, 3) and a list of PIL images."
        )
    if tensor.numel() and not (tensor.amin() >= 0 and tensor.amax() <= 1):  # so written, NaN is refused as well
        low, high = tensor.amin().item(), tensor.amax().item()
        raise ValueError(f"`{name}` has values from {low:g} to {high:g}; floating-point pictures must lie in [0, 1].")
    return tensor if tensor.shape[1] == 3 else tensor.expand(-1, 3, -1, -1)


def rmse(a: Pictures, b: Pictures) -> torch.Tensor:
    """Root of the mean squared difference of each pair of pictures.

    Args:
        a, b: equally many pictures of one size, each in a form that `to_tensor` takes.

    Returns:
        Tensor `(n,)`, from 0 (identical) to 1 (black against white).

    Raises:
        ValueError: the shapes differ, or `to_tensor` refuses one.
    """
    return _mean_square(a, b).sqrt()


def psnr(a: Pictures, b: Pictures, data_range: float = 1.0) -> torch.Tensor:
    r"""Peak signal-to-noise ratio of each pair of pictures, :math:`20 \log_{10}(\text{data\_range} / \text{rmse})`.

    Args:
        a, b: equally many pictures of one size, each in a form that `to_tensor` takes.
        data_range: the difference that counts as 0 dB, in units of the [0, 1] pictures.

    Returns:
        Tensor `(n,)` in dB; infinite for identical pictures.

    Raises:
        ValueError: `data_range` is not positive, the shapes differ, or `to_tensor` refuses one.
    """
    if not data_range > 0:
        raise ValueError(f"`data_range` is {data_range!r}; it must be positive.")
    return 10 * torch.log10(data_range**2 / _mean_square(a, b))


def _mean_square(a: Pictures, b: Pictures) -> torch.Tensor:
    a, b = to_tensor(a, "a"), to_tensor(b, "b")
    if a.shape != b.shape:
        raise ValueError(f"`a` has shape {tuple(a.shape)} and `b` has {tuple(b.shape)}; they must be equal.")
    return (a - b).square().mean(dim=(1, 2, 3))


def _describe(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {', '.join(kinds)}" if kinds else f"an empty {type(value).__name__}"
    return type(value).__name__
