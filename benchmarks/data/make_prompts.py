"""Choose the captions of the demo from the reference split, and write `diffusers_ext/zoo/avatars-sd/prompts.json`.

The rule: of the distinct captions of the reference split, in the order of their first picture, take again and again the
one whose attribute values were taken least so far, each value weighted by the number of classes of its attribute; the
first of equals. Their seeds are 0, 1, 2, ... in that order. The file is committed; this script reproduces it byte for
byte.

    python -m benchmarks.data.make_prompts
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from diffusers_ext.metrics.attributes import ATTRIBUTES, CLASSES, parse_caption

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "diffusers_ext" / "zoo" / "avatars-sd" / "prompts.json"
NUM_PROMPTS = 24
GUIDANCE_SCALE = 3.0
NUM_INFERENCE_STEPS = 30


def choose(captions: list[str], count: int) -> list[str]:
    """`count` of the captions, by the rule above."""
    attributes = {caption: parse_caption(caption) for caption in captions}
    taken: Counter[tuple] = Counter()
    chosen: list[str] = []
    for _ in range(count):
        left = [caption for caption in attributes if caption not in chosen]
        costs = [sum(taken[name, attributes[c][name]] * len(CLASSES[name]) for name in ATTRIBUTES) for c in left]
        caption = left[costs.index(min(costs))]
        chosen.append(caption)
        taken.update((name, attributes[caption][name]) for name in ATTRIBUTES)
    return chosen


def make() -> str:
    """The content of the file."""
    rows = json.loads((HERE / "avatars_splits.json").read_text())["reference"]
    with np.load(HERE / "avatars.npz", allow_pickle=False) as data:
        captions = list(dict.fromkeys(data["caption"][rows].tolist()))
    prompts = [{"caption": caption, "seed": seed} for seed, caption in enumerate(choose(captions, NUM_PROMPTS))]
    content = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": NUM_INFERENCE_STEPS, "prompts": prompts}
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(make(), encoding="utf-8")
    print(OUTPUT)
