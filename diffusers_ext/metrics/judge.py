"""Judges: small classifiers that score what a generator made of its captions or classes, and give features of pictures.

`AvatarJudge` reads the attributes of avatars, `FashionJudge` the classes of Fashion-MNIST.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .attributes import ATTRIBUTES, CLASSES, balanced_accuracy, hair_shows, parse_caption
from .distances import Pictures, to_tensor

_SIDE, _FASHION_SIDE = 32, 28
_FASHION_CLASSES = 10
_BATCH = 256


def _convolution(channels_in: int, channels_out: int, **options: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, bias=False, **options), nn.BatchNorm2d(channels_out), nn.ReLU()]


def _square(pixels: torch.Tensor, side: int) -> torch.Tensor:
    if pixels.shape[2:] != (side, side):
        height, width = pixels.shape[2:]
        raise ValueError(
            f"`pictures` are {height} pixels high and {width} wide; the judge reads {side}x{side} pictures only."
        )
    return pixels


def _in_batches(
    judge: ModelMixin, function: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor
) -> torch.Tensor:
    """`function` of the pictures, in inference mode: a verdict depends on the picture alone, not on its batch."""
    training = judge.training
    judge.eval()
    try:
        found = [function(batch.to(judge.device, judge.dtype)).float().cpu() for batch in pixels.split(_BATCH)]
    finally:
        judge.train(training)
    return torch.cat(found)


class AvatarJudge(ModelMixin, ConfigMixin):
    """Attribute classifier for 32x32 avatars: one convolutional trunk, and one linear head an attribute.

        judge = AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge"))
        judge(pictures)["hat"]              # [True, False, ...]
        judge.score(pictures, captions)     # {"hat": 0.99, ..., "skin": 0.97}

    Args:
        channels: width of the trunk: of the two layers that see colours and edges at resolution 16, of the layer that
            sees shapes there, and of the layer at resolution 8.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, int, int] = (32, 48, 64)) -> None:
        super().__init__()
        first, second, third = channels
        self.trunk = nn.Sequential(
            *_convolution(3, first, kernel_size=4, stride=2, padding=1),
            *_convolution(first, first, kernel_size=1),  # tells colours apart that differ by 10 of 255
            *_convolution(first, second, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            *_convolution(second, third, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.4),
        )
        features = third * (_SIDE // 8) ** 2
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(classes)) for name, classes in CLASSES.items()})

    def logits(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Unnormalised log-probabilities by attribute, `(n, classes)` in the order of `CLASSES`, differentiable.

        Args:
            pixels: float tensor `(n, 3, 32, 32)` in [0, 1], on the model's device and of its dtype.
        """
        features = self.trunk(2 * pixels - 1)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def forward(self, pictures: Pictures) -> dict[str, list[Any]]:
        """The likeliest class of every attribute.

        Args:
            pictures: `n` pictures of 32x32 in a form that `diffusers_ext.metrics.to_tensor` takes: float tensor
                `(n, 3, 32, 32)` in [0, 1], array `(n, 32, 32, 3)`, or list of PIL images.

        Returns:
            By attribute a list of `n` labels: bool for hat, glasses, beard, smile and long_hair, names for the others.

        Raises:
            ValueError: another type, shape or range.
        """
        pixels = _square(to_tensor(pictures), _SIDE)
        chosen = _in_batches(self, self._chosen, pixels).long()
        return {
            name: [CLASSES[name][index] for index in column.tolist()]
            for name, column in zip(ATTRIBUTES, chosen.T, strict=True)
        }

    def _chosen(self, pixels: torch.Tensor) -> torch.Tensor:
        """Numbers of the likeliest classes, `(n, attributes)`."""
        logits = self.logits(pixels)
        return torch.stack([logits[name].argmax(1) for name in ATTRIBUTES], dim=1)

    @torch.no_grad()
    def features(self, pictures: Pictures) -> torch.Tensor:
        """Last layer before the heads, averaged over its 4x4 positions, for distances between sets of pictures.

        Averaged, so that a thousand pictures are several times more than there are features.

        Args:
            pictures: as in `forward`.

        Returns:
            `float32 (n, 64)`, or as wide as the last of `channels`, on the CPU.

        Raises:
            ValueError: another type, shape or range.
        """
        pixels = _square(to_tensor(pictures), _SIDE)
        return _in_batches(self, lambda batch: self.trunk(2 * batch - 1).unflatten(1, (-1, 16)).mean(2), pixels)

    def score(self, pictures: Pictures, captions: Sequence[str]) -> dict[str, float]:
        """How well pictures follow their captions: balanced accuracy by attribute.

        Hair colour is scored on the captions under which hair can be seen (`hair_shows`): all but short hair under a
        hat. It is NaN where there is no such caption. What the judge gets on real pictures of unseen captions, the
        most that a generator can be seen to reach, is in the `accuracy.json` beside its weights.

        Args:
            pictures: as in `forward`.
            captions: the caption of each picture, in the avatars' grammar.

        Raises:
            ValueError: numbers of pictures and captions differ, or there are none, or a caption or a picture is
                malformed.
        """
        if isinstance(captions, str):
            raise ValueError(f"`captions` is the single string {captions!r}; a list with one a picture is needed.")
        wanted = [parse_caption(str(caption)) for caption in captions]
        pixels = to_tensor(pictures)
        if len(pixels) != len(wanted):
            raise ValueError(
                f"`captions` has {len(wanted)} entries for {len(pixels)} pictures; one a picture is needed."
            )
        if not wanted:
            raise ValueError("`pictures` is empty; there is nothing to score.")
        seen = self(pixels)
        scores = {}
        for name in ATTRIBUTES:
            pairs = [
                (guess, caption[name])
                for guess, caption in zip(seen[name], wanted, strict=True)
                if name != "hair_color" or hair_shows(caption)
            ]
            scores[name] = balanced_accuracy(*zip(*pairs, strict=True)) if pairs else float("nan")
        return scores


class FashionJudge(ModelMixin, ConfigMixin):
    """Classifier of the ten classes of Fashion-MNIST, 28x28 grey pictures.

        judge = FashionJudge.from_pretrained(dx.zoo_path("fashion-judge"))
        judge(pictures)                     # [9, 2, 1, ...]
        judge.accuracy(pictures, labels)    # 0.90

    Args:
        channels: width of the trunk: of the layers at resolution 14 that see edges and shapes, and of the one at 7.
        width: of the layer before the last, the number of features.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, int, int] = (32, 48, 64), width: int = 64) -> None:
        super().__init__()
        first, second, third = channels
        self.trunk = nn.Sequential(
            *_convolution(1, first, kernel_size=4, stride=2, padding=1),
            *_convolution(first, second, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            *_convolution(second, third, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(third * (_FASHION_SIDE // 8) ** 2, width),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, _FASHION_CLASSES))

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unnormalised log-probabilities `(n, 10)` in the order of the data set's labels, differentiable.

        Args:
            pixels: float tensor `(n, 1, 28, 28)` in [0, 1], on the model's device and of its dtype.
        """
        return self.head(self.trunk(2 * pixels - 1))

    @torch.no_grad()
    def forward(self, pictures: Pictures) -> list[int]:
        """The likeliest class of every picture, 0 to 9.

        Args:
            pictures: `n` grey pictures of 28x28 in a form that `diffusers_ext.metrics.to_tensor` takes: float tensor
                `(n, 1, 28, 28)` in [0, 1], array `(n, 28, 28, 1)`, or list of PIL images; or with three equal channels.

        Raises:
            ValueError: another type, shape or range, or a picture has colours.
        """
        return _in_batches(self, lambda batch: self.logits(batch).argmax(1), _grey(pictures)).long().tolist()

    @torch.no_grad()
    def features(self, pictures: Pictures) -> torch.Tensor:
        """What the last layer reads the class from, for distances between sets of pictures.

        Args:
            pictures: as in `forward`.

        Returns:
            `float32 (n, width)` on the CPU.

        Raises:
            ValueError: as in `forward`.
        """
        return _in_batches(self, lambda batch: self.trunk(2 * batch - 1), _grey(pictures))

    def accuracy(self, pictures: Pictures, labels: Sequence[int]) -> float:
        """Share of the pictures in which the judge sees the class that they should show.

        The most that a generator can be seen to reach, the judge's accuracy on real pictures, is in the `accuracy.json`
        beside its weights.

        Args:
            pictures: as in `forward`.
            labels: the class of each picture, 0 to 9: a sequence, array or tensor.

        Raises:
            ValueError: numbers of pictures and labels differ, or there are none, or a label or a picture is malformed.
        """
        wanted = labels.tolist() if isinstance(labels, (torch.Tensor, np.ndarray)) else list(labels)
        wrong = [label for label in wanted if label not in range(_FASHION_CLASSES)]
        if wrong:
            raise ValueError(f"`labels` has {wrong[0]!r}; allowed are 0 to {_FASHION_CLASSES - 1}.")
        seen = self(pictures)
        if len(seen) != len(wanted):
            raise ValueError(f"`labels` has {len(wanted)} entries for {len(seen)} pictures; one a picture is needed.")
        if not seen:
            raise ValueError("`pictures` is empty; there is nothing to score.")
        return sum(guess == label for guess, label in zip(seen, wanted, strict=True)) / len(seen)


def _grey(pictures: Pictures) -> torch.Tensor:
    """Pictures as `(n, 1, 28, 28)`."""
    pixels = _square(to_tensor(pictures), _FASHION_SIDE)
    if not (pixels == pixels[:, :1]).all():
        raise ValueError("`pictures` have colours; the judge reads grey pictures, with one channel or equal channels.")
    return pixels[:, :1]
