"""The zoo's models as benchmarks use them: each loaded, asked for pictures of given seeds, and judged, all in one way.

    zoo = ZooModel("avatars-sd")
    pictures = zoo.generate(zoo.pipe, zoo.conditions(64), seeds=range(64), steps=20, guidance_scale=3.0)
    judged = zoo.accuracy(pictures, zoo.conditions(64), range(64))

A model that joins the zoo needs an entry in `_MODELS`; a pipeline class that no other has, one in `_CALLS`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from benchmarks.zoo import _avatars
from diffusers_ext.metrics import ATTRIBUTES, parse_caption
from diffusers_ext.metrics.attributes import hair_shows

BATCH = 16
_CLASS = "class"  # the one attribute of pictures that have a class only


def held_out_captions(count: int) -> list[str]:
    """The first `count` distinct captions of the reference split; neither the generator nor the judge saw them.

    Raises:
        ValueError: there are fewer.
    """
    unseen = list(dict.fromkeys(_avatars.captions("reference")))
    if not 1 <= count <= len(unseen):
        raise ValueError(f"`count` is {count!r}; allowed are 1 to {len(unseen)}, the held-out captions that there are.")
    return unseen[:count]


def _classes(count: int) -> list[int]:
    """Classes of Fashion-MNIST in turn."""
    return [i % 10 for i in range(count)]


def _nothing(count: int) -> list[None]:
    return [None] * count


# --- judges ----------------------------------------------------------------------------------------------------------


def _avatar_wanted(captions: Sequence[str]) -> dict[str, list[Any]]:
    """By attribute what each caption asks for, None where it cannot be seen."""
    parsed = [parse_caption(caption) for caption in captions]
    return {
        name: [None if name == "hair_color" and not hair_shows(caption) else caption[name] for caption in parsed]
        for name in ATTRIBUTES
    }


def accuracy_shares(
    wanted: Mapping[str, Sequence[Any]], found: Mapping[str, Sequence[Any]], units: Sequence[int]
) -> np.ndarray:
    """Shares of pictures in the balanced accuracy: their mean over all pictures is its mean over the attributes.

    A picture's share is 1 less what it gets wrong, and an attribute weighs the more the rarer the class is that the
    picture should show. So it depends on what all pictures should show and on what this one shows, and not on what the
    others show: shares of the same picture are comparable, be it one of many or of few, differences between two ways
    to make it are paired, and where all is right no resampling moves the mean from 1.

    Args:
        wanted: attribute -> label that each of all `n` pictures should show, None where it does not count.
        found: attribute -> label seen in the pictures `units`.
        units: numbers of the pictures seen, among the `n`.

    Returns:
        `(len(units),)`, at most 1.

    Raises:
        ValueError: no label counts.
    """
    counted = {name: labels for name, labels in wanted.items() if any(label is not None for label in labels)}
    if not counted:
        raise ValueError("`wanted` has no label that counts; there is nothing to judge.")
    shares = np.ones(len(units))
    for name, labels in counted.items():
        sizes = Counter(label for label in labels if label is not None)
        for place, unit in enumerate(units):
            label = labels[unit]
            if label is not None and found[name][place] != label:
                shares[place] -= len(labels) / (len(counted) * len(sizes) * sizes[label])
    return shares


# --- pipelines -------------------------------------------------------------------------------------------------------


def _stable_diffusion(prompts: Sequence[Any], guidance_scale: float | None) -> dict[str, Any]:
    return {"prompt": list(prompts), "guidance_scale": guidance_scale}


def _flux(prompts: Sequence[Any], guidance_scale: float | None) -> dict[str, Any]:
    """True guidance, by a second call of the denoiser with an empty prompt."""
    return {
        "prompt": list(prompts), "negative_prompt": [""] * len(prompts), "true_cfg_scale": guidance_scale,
        "height": 32, "width": 32, "max_sequence_length": 32,
    }  # fmt: skip


def _dit(labels: Sequence[Any], guidance_scale: float | None) -> dict[str, Any]:
    return {"class_labels": list(labels), "guidance_scale": guidance_scale}


def _unconditional(nothing: Sequence[Any], guidance_scale: float | None) -> dict[str, Any]:
    return {"batch_size": len(nothing)}


# Class of a pipeline -> keyword arguments of a call, of the conditions of a batch and the scale of guidance.
_CALLS: dict[str, Callable[[Sequence[Any], float | None], dict[str, Any]]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "FluxPipeline": _flux,
    "DiTPipeline": _dit,
    "DDIMPipeline": _unconditional,
    "DDPMPipeline": _unconditional,
}


@dataclass(frozen=True)
class _Model:
    """What a checkpoint's pictures are of.

    Attributes:
        conditions: gives that many prompts or classes that were not trained on, the same at each call.
        wanted: attribute -> labels that pictures of these conditions should show; None where nothing can be asked for.
        judge: name of the judge in the zoo.
        judge_class: public name of its class. Called with pictures, it gives the labels that it sees: a list, or lists
            by attribute.
        ceiling: entry of its `accuracy.json` with the balanced accuracy of each attribute on real pictures, or the
            recall of each class.
    """

    conditions: Callable[[int], list[Any]]
    wanted: Callable[[Sequence[Any]], dict[str, list[Any]]] | None = None
    judge: str = ""
    judge_class: str = ""
    ceiling: str = ""


_AVATARS = _Model(held_out_captions, _avatar_wanted, "avatars-judge", "AvatarJudge", "balanced_accuracy")
_MODELS: dict[str, _Model] = {
    "avatars-sd": _AVATARS,
    "avatars-flow": _AVATARS,
    "fashion-dit": _Model(_classes, lambda labels: {_CLASS: list(labels)}, "fashion-judge", "FashionJudge", "recall"),
    "fashion-ddpm": _Model(_nothing),
}


def _model(name: str) -> _Model:
    if name not in _MODELS:
        raise ValueError(f"`name` is {name!r}; allowed are {', '.join(_MODELS)}.")
    return _MODELS[name]


@functools.cache
def weights(name: str) -> dict[str, str]:
    """Hashes of the weights of a checkpoint and of its judge: what pictures and verdicts follow from.

    Raises:
        ValueError: there is no such checkpoint here, or benchmarks cannot use it.
    """
    found = {}
    for part in filter(None, (name, _model(name).judge)):
        digest = hashlib.sha256()
        for file in sorted(dx.zoo_path(part).rglob("*.safetensors")):
            digest.update(file.read_bytes())
        found[part] = digest.hexdigest()[:16]
    return found


def scheduler_name(name: str) -> str:
    """Class of the scheduler that a checkpoint comes with."""
    return json.loads((dx.zoo_path(name) / "model_index.json").read_text(encoding="utf-8"))["scheduler"][1]


class ZooModel:
    """A checkpoint of the zoo, in float32 on the CPU.

    Args:
        name: of the checkpoint.
        pipe: take this pipeline instead of the checkpoint's own.

    Raises:
        ValueError: there is no such checkpoint here, or benchmarks cannot use it.
    """

    def __init__(self, name: str, pipe: DiffusionPipeline | None = None) -> None:
        self.name, self.model = name, _model(name)
        self.pipe = self.load(dx.zoo_path(name)) if pipe is None else pipe
        if type(self.pipe).__name__ not in _CALLS:
            raise ValueError(f"`pipe` is a {type(self.pipe).__name__}; allowed are {', '.join(_CALLS)}.")
        self.pipe.set_progress_bar_config(disable=True)

    @staticmethod
    def load(folder: Path) -> DiffusionPipeline:
        """A pipeline as benchmarks use it; the bars about loading, which takes a second, are off from then on."""
        for library in (diffusers.utils, transformers.utils):
            library.logging.disable_progress_bar()
        return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)

    def conditions(self, count: int) -> list[Any]:
        """Prompts or classes of `count` pictures, the same at each call; None each for an unconditional model."""
        return self.model.conditions(count)

    def generate(
        self,
        pipe: DiffusionPipeline,
        conditions: Sequence[Any],
        seeds: Iterable[int],
        steps: int,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Pictures, each from a generator of its own seed, so that it is the same in every batch up to rounding.

        A scheduler that draws noise on the way has to draw it from that generator. `DiTPipeline` hands none to it.

        Args:
            pipe: this model's pipeline, or one made from it.
            conditions: of the pictures, as `conditions` gives them.
            seeds: of the pictures.
            steps: denoising steps.
            guidance_scale: of classifier-free guidance; None for an unconditional model.
            options: more arguments of the call.

        Returns:
            `(n, height, width, channels)` in [0, 1].
        """
        seeds, call = list(seeds), _CALLS[type(self.pipe).__name__]
        pictures = []
        for start in range(0, len(seeds), BATCH):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]]
            arguments = call(conditions[start : start + BATCH], guidance_scale)
            arguments |= {"num_inference_steps": steps, "generator": generators, "output_type": "np", **options}
            pictures.append(pipe(**arguments).images)
        return np.concatenate(pictures)

    def denoiser(self, pipe: DiffusionPipeline) -> torch.nn.Module:
        """The network that is called at each step."""
        return pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    @functools.cached_property
    def _judge(self) -> Any:
        return getattr(dx, self.model.judge_class).from_pretrained(dx.zoo_path(self.model.judge)).eval()

    def accuracy(self, pictures: np.ndarray, conditions: Sequence[Any], units: Sequence[int]) -> np.ndarray | None:
        """Shares `(len(units),)` of pictures in the judge's balanced accuracy; see `accuracy_shares`.

        Args:
            pictures: as `generate` gives them, for `units`.
            conditions: of all pictures.
            units: numbers of the pictures among all.

        Returns:
            The shares, or None where no condition says what a picture should show.
        """
        if self.model.wanted is None:
            return None
        found = self._judge(pictures)
        return accuracy_shares(
            self.model.wanted(conditions), found if isinstance(found, dict) else {_CLASS: found}, units
        )

    @property
    def ceiling(self) -> float | None:
        """Balanced accuracy of the judge on real pictures, the mean over the attributes, or None without a judge."""
        if self.model.wanted is None:
            return None
        content = json.loads((dx.zoo_path(self.model.judge) / "accuracy.json").read_text(encoding="utf-8"))
        return float(np.mean(list(content[self.model.ceiling].values())))
