"""Train the avatar judge on the `judge` split, measure it on the `reference` split, and write its model card.

    python -m benchmarks.judges.train_avatars

About three minutes on one core. Writes `config.json`, weights, `accuracy.json` and `README.md` into
`diffusers_ext/zoo/avatars-judge`. On one machine, with one number of threads, the weights come out the same bit for bit.
Settings were chosen on the `generator` split, which the judge is not trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch.nn import functional as F
from tqdm.auto import tqdm

from diffusers_ext.metrics.attributes import ATTRIBUTES, CLASSES, balanced_accuracy, hair_shows, parse_caption
from diffusers_ext.metrics.distances import to_tensor
from diffusers_ext.metrics.judge import AvatarJudge

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "benchmarks" / "data"
OUTPUT = ROOT / "diffusers_ext" / "zoo" / "avatars-judge"


def load_split(name: str) -> tuple[torch.Tensor, list[str]]:
    """Pictures `(n, 3, 32, 32)` in [0, 1] and captions of one split."""
    rows = json.loads((DATA / "avatars_splits.json").read_text())[name]
    with np.load(DATA / "avatars.npz", allow_pickle=False) as data:
        return to_tensor(data["image"][rows]), data["caption"][rows].tolist()


def make_targets(captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Class numbers by attribute; -100, which the loss skips, for the colour of hair that a hat may cover."""
    targets = {}
    parsed = [parse_caption(caption) for caption in captions]
    for name in ATTRIBUTES:
        targets[name] = torch.tensor([CLASSES[name].index(attributes[name]) for attributes in parsed])
    targets["hair_color"][[not hair_shows(attributes) for attributes in parsed]] = -100
    return targets


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Changes that keep every label, so that the judge also reads the blurred and noisy pictures of a generator.

    Mirror; shift by at most one pixel of the 16x16 drawing; blend with a blurred copy; change of brightness and white
    balance well below the distance of the closest classes (brown and auburn hair: 10 of 255); noise.
    """
    count, _, height, width = pixels.shape

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator)

    def shifts(size: int) -> torch.Tensor:
        offset = 2 * torch.randint(3, (count, 1), generator=generator)
        return torch.arange(size) + offset

    mirrored = uniform(1, 1, 1) < 0.5
    pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    padded = F.pad(pixels, (2, 2, 2, 2), mode="replicate").permute(0, 2, 3, 1)
    rows, columns = shifts(height), shifts(width)
    picture = torch.arange(count)[:, None, None]
    pixels = padded[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), kernel_size=3, stride=1)
    pixels = pixels.lerp(blurred, 0.5 * uniform(1, 1, 1))
    pixels = pixels * (1 + 0.01 * (2 * uniform(1, 1, 1) - 1)) + 0.005 * (2 * uniform(3, 1, 1) - 1)
    noise = torch.randn(pixels.shape, generator=generator)
    return (pixels + 0.03 * uniform(1, 1, 1) * noise).clamp(0, 1)


def train(pixels: torch.Tensor, captions: Sequence[str], epochs: int, batch_size: int, seed: int) -> AvatarJudge:
    """A judge trained from scratch with AdamW and a one-cycle learning rate."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = AvatarJudge().train()
    targets = make_targets(captions)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    steps = len(pixels) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * steps)
    with tqdm(range(epochs), desc="Training", unit="epoch") as bar:
        for _ in bar:
            total = 0.0
            for rows in torch.randperm(len(pixels), generator=generator)[: steps * batch_size].split(batch_size):
                logits = judge.logits(augment(pixels[rows], generator))
                loss = sum(F.cross_entropy(logits[name], targets[name][rows]) for name in ATTRIBUTES)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            bar.set_postfix(loss=f"{total / steps:.3f}")
    return judge.eval()


def measure(judge: AvatarJudge, pixels: torch.Tensor, captions: Sequence[str], seed: int) -> dict:
    """What `accuracy.json` holds: the judge's own accuracy on real pictures, and how it stands up to damage."""
    parsed = [parse_caption(caption) for caption in captions]
    seen = judge(pixels)
    hidden = [row for row, attributes in enumerate(parsed) if not hair_shows(attributes)]
    under_hat = balanced_accuracy(
        [seen["hair_color"][row] for row in hidden], [parsed[row]["hair_color"] for row in hidden]
    )
    beards = [found for found, attributes in zip(seen["beard"], parsed, strict=True) if attributes["beard"]]
    damaged = augment(pixels, torch.Generator().manual_seed(seed))
    return {
        "split": "reference",
        "pictures": len(captions),
        "captions": len(set(captions)),
        "balanced_accuracy": judge.score(pixels, captions),
        "balanced_accuracy_damaged": judge.score(damaged, captions),
        "beards_found": {"pictures": len(beards), "share": sum(beards) / len(beards)},
        "hair_color_pictures": len(captions) - len(hidden),
        "hair_color_under_hat": {"pictures": len(hidden), "balanced_accuracy": under_hat},
    }


def model_card(accuracy: dict, trained_on: int, parameters: int, size: int) -> ModelCard:
    """The model card; every number in it comes from the arguments."""
    rows = "\n".join(
        f"| `{name}` | {len(CLASSES[name])} | {accuracy['balanced_accuracy'][name]:.3f} "
        f"| {accuracy['balanced_accuracy_damaged'][name]:.3f} |"
        for name in ATTRIBUTES
    )
    classes = "\n".join(f"- `{name}`: {', '.join(map(str, CLASSES[name]))}" for name in ATTRIBUTES)
    hidden, beards = accuracy["hair_color_under_hat"], accuracy["beards_found"]
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="image-classification",
        tags=["diffusers_ext", "pixel-art", "attributes", "evaluation"],
    )
    text = f"""---
{data.to_yaml()}
---

# avatars-judge

Reads eight attributes off 32x32 pixel-art portraits. It scores how well the pictures of a text-to-image model follow
their captions. A convolutional network of {parameters:,} parameters ({size / 1000:.0f} kB).

```python
import diffusers_ext as dx

judge = dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge"))
judge(pictures)  # {{"hat": [True, ...], ..., "skin": ["tan", ...]}}
judge.score(pictures, captions)  # {{"hat": 0.98, ...}}: balanced accuracy by attribute
```

`pictures` is a float tensor `(n, 3, 32, 32)` in [0, 1], an array `(n, 32, 32, 3)` (uint8, or float in [0, 1]) or a list
of PIL images. Captions follow one grammar, for example "a person with tan skin and long red hair, a blue hat, dark
sunglasses, a beard, a happy smile, navy clothes".

## Accuracy on real pictures

Balanced accuracy (mean recall over the classes) on the {accuracy["pictures"]:,} pictures of the reference split, whose {accuracy["captions"]} captions
occur neither in training this judge nor in training the generators. Read a generator's score beside it. "Damaged" is
the same pictures mirrored, shifted, blurred, tinted and noisy, as in training.

| attribute | classes | real | damaged |
|---|---|---|---|
{rows}

The same numbers are in `accuracy.json`.

{classes}

## Limits

- `beard`: it finds {beards["share"]:.0%} of the {beards["pictures"]} beards. It misses those of a few pixels, and those
  in a blend of hair and skin colour that it has hardly seen, such as red on brown skin.
- `hair_color` is scored where hair can be seen: on {accuracy["hair_color_pictures"]:,} of the {accuracy["pictures"]:,} pictures. A hat covers short
  hair, in part or wholly, and the caption names its colour all the same: on the other {hidden["pictures"]} pictures the judge
  gets {hidden["balanced_accuracy"]:.3f}.
- It knows avatars in this style only. On other pictures its answers mean nothing, and it gives no confidence.
- It reads attributes, not quality: a blurred picture with the right attributes scores as well as a sharp one.
- Attributes are those of drawings. It must not be used on pictures of people.

## Data and training

Pixel-art portraits made with DiceBear's [pixel-art](https://www.dicebear.com/styles/pixel-art/) style, whose design is
[CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/). The 10,000 pictures are split by caption: generators are
trained on one part, the judge on another ({trained_on:,} pictures), and both are measured on the third. Trained by
`benchmarks/judges/train_avatars.py`, from a fixed seed.

## Licence

The weights are under Apache-2.0.
"""
    return ModelCard(text)


def record(folder: Path, seed: int) -> dict:
    """Measure the saved judge, and write `accuracy.json` and the card beside it."""
    judge = AvatarJudge.from_pretrained(folder)
    accuracy = measure(judge, *load_split("reference"), seed=seed)
    (folder / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parameters = sum(parameter.numel() for parameter in judge.parameters())
    model_card(accuracy, len(load_split("judge")[1]), parameters, size).save(folder / "README.md")
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for weights, accuracy.json and README.md")
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.use_deterministic_algorithms(True)
    judge = train(*load_split("judge"), args.epochs, args.batch_size, args.seed)
    judge.save_pretrained(args.output)
    for file in args.output.glob("*.safetensors"):
        file.chmod(0o644)  # written for the owner alone; it ships in the package
    print(json.dumps(record(args.output, args.seed), indent=2))


if __name__ == "__main__":
    main()
