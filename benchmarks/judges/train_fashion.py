"""Train the Fashion-MNIST judge on the `judge` split, measure it on the `reference` split, and write its model card.

    python -m benchmarks.data.fetch fashion-mnist
    python -m benchmarks.judges.train_fashion

About three minutes on one core. Writes `config.json`, weights, `accuracy.json` and `README.md` into
`benchmarks/zoo/fashion-judge`. On one machine, with one number of threads, the weights come out the same bit for bit.
Settings were chosen on the `generator` split, which the judge is not trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.data import FASHION_CLASSES, load_fashion_mnist
from diffusers_ext.metrics.distances import to_tensor
from diffusers_ext.metrics.judge import FashionJudge

OUTPUT = Path(__file__).resolve().parents[1] / "zoo" / "fashion-judge"


def load_split(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures `(n, 1, 28, 28)` in [0, 1] and labels `(n,)` of one split."""
    images, labels = load_fashion_mnist(name)
    return to_tensor(images[..., None])[:, :1], torch.from_numpy(labels)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Changes that keep the class, so that the judge also reads the blurred and noisy pictures of a generator.

    Mirror; shift by at most one pixel; blend with a blurred copy; change of contrast; noise.
    """
    count, _, height, width = pixels.shape

    def uniform() -> torch.Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator)

    def shifts(size: int) -> torch.Tensor:
        return torch.arange(size) + torch.randint(3, (count, 1), generator=generator)

    pixels = torch.where(uniform() < 0.5, pixels.flip(-1), pixels)
    padded = F.pad(pixels, (1, 1, 1, 1))[:, 0]
    rows, columns = shifts(height), shifts(width)
    picture = torch.arange(count)[:, None, None]
    pixels = padded[picture, rows[:, :, None], columns[:, None, :]][:, None]
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1)), kernel_size=3, stride=1)
    pixels = pixels.lerp(blurred, 0.4 * uniform().square())
    noise = torch.randn(pixels.shape, generator=generator)
    return ((0.9 + 0.2 * uniform()) * pixels + 0.06 * uniform().square() * noise).clamp(0, 1)


def train(pixels: torch.Tensor, labels: torch.Tensor, epochs: int, batch_size: int, seed: int) -> FashionJudge:
    """A judge trained from scratch with AdamW and a one-cycle learning rate, its weights rounded to float16."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = FashionJudge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    steps = len(pixels) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * steps)
    with tqdm(total=epochs * steps, desc="Training", unit="step") as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(pixels), generator=generator)[: steps * batch_size].split(batch_size):
                loss = F.cross_entropy(judge.logits(augment(pixels[rows], generator)), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return judge.half().eval()


def measure(judge: FashionJudge, pixels: torch.Tensor, labels: torch.Tensor, seed: int) -> dict:
    """What `accuracy.json` holds: the judge's own accuracy on real pictures, and how it stands up to damage."""
    damaged = augment(pixels, torch.Generator().manual_seed(seed))
    return {
        "split": "reference",
        "pictures": len(labels),
        "accuracy": judge.accuracy(pixels, labels),
        "accuracy_damaged": judge.accuracy(damaged, labels),
        "recall": {
            name: judge.accuracy(pixels[labels == label], labels[labels == label])
            for label, name in enumerate(FASHION_CLASSES)
        },
    }


def model_card(accuracy: dict, trained_on: int, judge: FashionJudge, size: int) -> ModelCard:
    """The model card; every number in it comes from the arguments."""
    rows = "\n".join(
        f"| {label} | {name} | {accuracy['recall'][name]:.3f} |" for label, name in enumerate(FASHION_CLASSES)
    )
    parameters = sum(parameter.numel() for parameter in judge.parameters())
    worst, second = sorted(accuracy["recall"], key=accuracy["recall"].__getitem__)[:2]
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="image-classification",
        tags=["diffusers_ext", "fashion-mnist", "evaluation"],
    )
    text = f"""---
{data.to_yaml()}
---

# fashion-judge

Tells the ten classes of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) apart, on 28x28 grey pictures.
It scores how well the pictures of a class-conditional model show the class asked for, and its features serve to measure
how far a set of generated pictures is from the real ones. A convolutional network of {parameters:,} parameters
({size / 1000:.0f} kB).

```python
import diffusers_ext as dx
from diffusers_ext.metrics import FashionJudge, frechet_distance

judge = FashionJudge.from_pretrained(dx.zoo_path("fashion-judge"))
judge(pictures)  # [9, 2, 1, ...]
judge.accuracy(pictures, labels)  # {accuracy["accuracy"]:.2f} on real pictures
frechet_distance(judge.features(pictures), judge.features(real))  # {judge.config.width} features a picture
```

`pictures` is a float tensor `(n, 1, 28, 28)` in [0, 1], an array `(n, 28, 28, 1)` (uint8, or float in [0, 1]) or a list
of PIL images; three equal channels will do as well.

## Accuracy on real pictures

{accuracy["accuracy"]:.3f} of the {accuracy["pictures"]:,} pictures of the reference split, the test set of Fashion-MNIST, and {accuracy["accuracy_damaged"]:.3f} of the
same pictures mirrored, shifted, blurred and noisy, as in training. Read a generator's score beside it: more than that
it cannot be seen to reach, unless it draws only clear cases. The same numbers are in `accuracy.json`.

| label | class | recall |
|---|---|---|
{rows}

## Limits

- It is worst at {worst} and {second}, which overlap with other classes in the data.
- It knows Fashion-MNIST only. On other pictures its answers mean nothing, and it gives no confidence.
- It reads the class, not the quality: a blurred picture of the right class scores as well as a sharp one.

## Data and training

Fashion-MNIST (MIT licence). Generators are trained on the first 30,000 training pictures, this judge on the other
{trained_on:,}, and both are measured on the test set. Trained by `benchmarks/judges/train_fashion.py`, from a fixed seed.

## Licence

The weights are under Apache-2.0.
"""
    return ModelCard(text)


def record(folder: Path, seed: int) -> dict:
    """Measure the saved judge, and write `accuracy.json` and the card beside it."""
    judge = FashionJudge.from_pretrained(folder, dtype=torch.float32)
    accuracy = measure(judge, *load_split("reference"), seed=seed)
    (folder / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    model_card(accuracy, len(load_split("judge")[1]), judge, size).save(folder / "README.md")
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for weights, accuracy.json and README.md")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    judge = train(*load_split("judge"), args.epochs, args.batch_size, args.seed)
    judge.save_pretrained(args.output)
    for file in args.output.glob("*.safetensors"):
        file.chmod(0o644)  # written for the owner alone; it ships in the source
    print(json.dumps(record(args.output, args.seed), indent=2))


if __name__ == "__main__":
    main()
