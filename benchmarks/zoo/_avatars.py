"""How well a pipeline that draws avatars follows captions: measured by the judge, shown as a table of its card."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.data import FOLDER
from diffusers_ext import AvatarJudge, zoo_path
from diffusers_ext.metrics import ATTRIBUTES

VALIDATION_PROMPTS = (
    "a person with tan skin and short brown hair, a green hat, dark sunglasses, a happy smile, navy clothes",
    "a person with dark brown skin and long blue hair, a beard, a sad mouth, yellow clothes",
    "a person with pale skin and long red hair, clear glasses, a happy smile, mint clothes",
    "a person with brown skin and short black hair, a purple hat, a sad mouth, coral clothes",
)
# The pictures of 70 % of the captions.
DATA = (
    "--train_data_dir", str(FOLDER / "avatars.npz"), "--caption_column", "caption", "--split_file",
    str(FOLDER / "avatars_splits.json"), "--split", "generator", "--resolution", "32",
)  # fmt: skip
# Balanced accuracy with guidance on unseen captions: what checkpoints are held to, fixed before they were trained.
GOALS = {"hat": 0.95, "glasses": 0.95, "long_hair": 0.95, "clothes_color": 0.93, "skin": 0.85}
STEPS, GUIDANCE = 20, 3.0

Draw = Callable[[Sequence[str], list[torch.Generator], float], np.ndarray]


def captions(split: str) -> list[str]:
    """Captions of a split of the avatars, one a picture."""
    rows = json.loads((FOLDER / "avatars_splits.json").read_text())[split]
    return np.load(FOLDER / "avatars.npz")["caption"][rows].tolist()


def follows_captions(draw: Draw) -> dict[str, Any]:
    """Balanced accuracy by attribute on every caption of the reference split, with guidance and without.

    Args:
        draw: takes captions, one generator each and the guidance scale (1: none), and returns pictures
            `(n, 32, 32, 3)` in [0, 1].
    """
    judge = AvatarJudge.from_pretrained(zoo_path("avatars-judge"))
    unseen = list(dict.fromkeys(captions("reference")))
    scores: dict[str, Any] = {"captions": len(unseen)}
    for name, guidance in (("guided", GUIDANCE), ("unguided", 1.0)):
        pictures = []
        for first in tqdm(range(0, len(unseen), 32), desc=f"Pictures, {name}"):
            batch = unseen[first : first + 32]
            pictures.append(
                draw(batch, [torch.Generator().manual_seed(first + i) for i in range(len(batch))], guidance)
            )
        stack = torch.from_numpy(np.concatenate(pictures).transpose(0, 3, 1, 2))
        scores[name] = judge.score(stack, unseen)
        if name == "guided":  # the interval: captions drawn again
            drawn = np.random.default_rng(0).integers(len(unseen), size=(200, len(unseen)))
            samples = [judge.score(stack[index], [unseen[i] for i in index]) for index in drawn[:40]]
            scores["interval"] = {
                key: [float(np.quantile([s[key] for s in samples], q)) for q in (0.025, 0.975)] for key in scores[name]
            }
    return scores


def table(scores: dict[str, Any]) -> str:
    """The rows of a card's table, with the judge on real pictures beside them."""
    judge = json.loads((zoo_path("avatars-judge") / "accuracy.json").read_text())
    rows = [
        f"| attribute | guidance {GUIDANCE:g} | interval | no guidance | judge on real pictures | goal |",
        "|---" * 6 + "|",
    ]
    for name in ATTRIBUTES:
        low, high = scores["interval"][name]
        rows.append(
            f"| {name} | {scores['guided'][name]:.3f} | {low:.3f} to {high:.3f} | {scores['unguided'][name]:.3f} | "
            f"{judge['balanced_accuracy'][name]:.3f} | {GOALS.get(name, '')} |"
        )
    return "\n".join(rows)


def missed(scores: dict[str, Any]) -> str:
    """A sentence on the attributes that the model does not draw as asked, or nothing."""
    names = [f"`{name}`" for name in ATTRIBUTES if scores["guided"][name] < 0.75]
    return f"It does not follow {', '.join(names)}. " if names else ""
