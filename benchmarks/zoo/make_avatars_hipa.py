"""Make the zoo's `avatars-hipa`: a LoRA file with which `avatars-sd` draws in one step.

    python -m benchmarks.zoo.make_avatars_hipa          # trains it as `bench hipa` does, or takes what that has trained
    python -m benchmarks.zoo.make_avatars_hipa --card   # writes the card again

It is the first of the three trainings that the benchmark of HiPA measures, and its card says what was recorded of that one.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

import diffusers_ext as dx
from benchmarks import hipa
from diffusers_ext import proofs
from diffusers_ext.cards import table
from diffusers_ext.demo import load_prompts

FOLDER = Path(__file__).parent / "avatars-hipa"
BASE, SEED = "avatars-sd", 0
PICTURES, SCALE, LABEL = 6, 3, 110  # of the sheet: columns, how much larger than they are, width of the labels
ROWS = {"base, 20 guided steps": (20, 3.0, False), "base, 1 step": (1, 0.0, False), "HiPA, 1 step": (1, 0.0, True)}


def embed(trained: Path) -> None:
    """Copy what a training made."""
    (FOLDER / "scheduler").mkdir(parents=True, exist_ok=True)
    for name in ("pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"):
        shutil.copyfile(trained / name, FOLDER / name)


def draw() -> None:
    """Write `pictures.png`: the same captions and seeds in each row, by stock diffusers."""
    prompts = load_prompts()
    pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path(BASE))
    many = pipe.scheduler
    side = 32 * SCALE
    sheet = Image.new("RGB", (LABEL + PICTURES * (side + 4), len(ROWS) * (side + 4)), "white")
    text = ImageDraw.Draw(sheet)
    for row, (label, (steps, scale, with_lora)) in enumerate(ROWS.items()):
        pipe.scheduler = many if steps > 1 else DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
        if with_lora:
            pipe.load_lora_weights(FOLDER)
        text.multiline_text(
            (4, row * (side + 4) + side // 2 - 14), label.replace(", ", ",\n"), "black", ImageFont.load_default(13)
        )
        for i in range(PICTURES):
            image = pipe(
                prompts.captions[i], num_inference_steps=steps, guidance_scale=scale, output_type="np",
                generator=torch.Generator().manual_seed(prompts.seeds[i]),
            ).images[0]  # fmt: skip
            picture = Image.fromarray((image * 255).round().astype(np.uint8)).resize(
                (side, side), Image.Resampling.NEAREST
            )
            sheet.paste(picture, (LABEL + i * (side + 4), row * (side + 4)))
    sheet.save(FOLDER / "pictures.png", optimize=True)


def recorded() -> dict[str, Any]:
    """The recorded result of HiPA."""
    record = proofs.read_result("hipa")
    assert record is not None, "measured before it is embedded"
    return record


def card(record: Mapping[str, Any]) -> str:
    """The card, with what `bench hipa` recorded of this training."""
    found = record["tables"]["one step"]
    ours = f"HiPA, seed {SEED}"
    rows = [row for row in found["rows"] if row[0].startswith("base") or row[0] == ours]
    columns = [i for i, name in enumerate(found["columns"]) if name not in ("trained parameters", "share")]
    trained = next(row for row in found["rows"] if row[0] == ours)
    shown = table([found["columns"][i] for i in columns], [[row[i] for i in columns] for row in rows])
    return f"""---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
base_model: {BASE}
tags:
- diffusers_ext
- lora
- hipa
---

# avatars-hipa

A LoRA file with which [`{BASE}`](../../../diffusers_ext/zoo/{BASE}/README.md) draws in one step, trained by HiPA. It has
{trained[1]:,} parameters, {100 * trained[2]:.1f} % of the U-Net's. Stock diffusers loads it:

```python
import diffusers_ext as dx
from diffusers import DDIMScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path("{BASE}"))
pipe.scheduler = DDIMScheduler.from_pretrained(dx.zoo_path("avatars-hipa"), subfolder="scheduler")
pipe.load_lora_weights(dx.zoo_path("avatars-hipa"))
image = pipe("a person with tan skin and long red hair", num_inference_steps=1, guidance_scale=0).images[0]
```

![The same captions and seeds by the base in 20 steps, in one, and with the LoRA in one](pictures.png)

## What it is worth

{record["settings"]["pictures"]:,} pictures of captions that neither was trained with. The method's card has the other losses and seeds.

{shown}

## Training

The first of three trainings of `diffusers-ext bench hipa`; `python -m benchmarks.zoo.make_avatars_hipa` makes it again. It saw
pictures of the base alone. Licence: Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="store_true", help="write the card and the pictures alone")
    if not parser.parse_args().card:
        embed(hipa.trained("hipa", SEED))
    draw()
    (FOLDER / "README.md").write_text(card(recorded()), encoding="utf-8")


if __name__ == "__main__":
    main()
