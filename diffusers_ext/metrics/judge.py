"""`AvatarJudge`: reads the attributes off pictures of avatars, to score what a generator made of its captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .attributes import ATTRIBUTES, CLASSES, balanced_accuracy, hair_shows, parse_caption
from .distances import Pictures, to_tensor

_SIDE = 32
_BATCH = 256


def _convolution(channels_in: int, channels_out: int, **options: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, bias=False, **options), nn.BatchNorm2d(channels_out), nn.ReLU()]


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
        pixels = to_tensor(pictures)
        if pixels.shape[2:] != (_SIDE, _SIDE):
            height, width = pixels.shape[2:]
            raise ValueError(
                f"`pictures` are {height} pixels high and {width} wide; the judge reads 32x32 pictures only."
            )
        training = self.training
        self.eval()  # a verdict depends on the picture alone, not on its batch
        try:
            batches = [self.logits(batch.to(self.device, self.dtype)) for batch in pixels.split(_BATCH)]
        finally:
            self.train(training)
        chosen = {name: torch.cat([batch[name] for batch in batches]).argmax(1).tolist() for name in ATTRIBUTES}
        return {name: [CLASSES[name][index] for index in indices] for name, indices in chosen.items()}

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
