"""Image and caption data for the training scripts, and the order in which every sample is drawn.

Order and noise are pure functions of `(seed, global sample number)`. The global sample number counts samples over all
processes and accumulation steps, so a resumed run continues bit for bit, and two processes see together exactly what
one process with the doubled batch sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

_FLIP, _CROP = 0x466C6970, 0x43726F70  # seeds of their own: the noise of a sample does not depend on augmentation
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageCaptionDataset(Dataset):
    """Pictures with captions or class labels, as `{"pixel_values": (3, resolution, resolution) in [-1, 1], "caption":
    str, "label": int}`; grey pictures have one channel.

    Args:
        images: `uint8` array of shape `(n, height, width, 3)` or, grey, `(n, height, width)`, list of paths, or list of
            PIL images.
        captions: one caption a picture, or None: all empty.
        labels: one class a picture, or None: all 0.
        resolution: side of the square pictures in pixels. Other sizes are resized (bicubic) and cropped.
        center_crop, random_flip: as in the diffusers training scripts; a flip is drawn from the sample's own generator.
    """

    def __init__(
        self, images, captions, resolution: int, center_crop: bool = True, random_flip: bool = False, labels=None
    ):
        for name, given in (("captions", captions), ("labels", labels)):
            if given is not None and len(images) != len(given):
                raise ValueError(
                    f"`{name}` has {len(given)} entries for {len(images)} pictures; one a picture is needed."
                )
        if len(images) == 0:
            raise ValueError("The training data holds no picture.")
        self.images = images
        self.captions = [""] * len(images) if captions is None else [str(caption) for caption in captions]
        self.labels = [0] * len(images) if labels is None else [int(label) for label in labels]
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, sample_id = item if isinstance(item, tuple) else (item, item)
        image = self.images[index]
        if not isinstance(image, np.ndarray):
            image = np.asarray(self._load(image, sample_id))
        pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1.0
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
        if self.random_flip and torch.rand((), generator=generator_for(_FLIP, sample_id)) < 0.5:
            pixels = pixels.flip(-1)
        return {
            "pixel_values": pixels, "caption": self.captions[index], "label": self.labels[index], "index": index,
            "sample_id": sample_id,
        }  # fmt: skip

    def _load(self, image, sample_id: int) -> Image.Image:
        image = Image.open(image) if isinstance(image, (str, Path)) else image
        if image.mode != "L":
            image = image.convert("RGB")
        side = self.resolution
        if image.size == (side, side):
            return image
        scale = side / min(image.size)
        size = tuple(max(side, round(length * scale)) for length in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        if not self.center_crop:
            generator = generator_for(_CROP, sample_id)
            left, top = (
                int(torch.randint(slack + 1, (), generator=generator)) for slack in (size[0] - side, size[1] - side)
            )
        return image.crop((left, top, left + side, top + side))


def load_dataset(args, annotations: tuple[str, ...] = ("caption",)) -> ImageCaptionDataset:
    """The dataset that `--train_data_dir` (folder of pictures, or an `.npz`) or `--dataset_name` names.

    A folder has a `metadata.jsonl`, or captions in `.txt` files beside the pictures and classes by subfolder.

    Args:
        args: the parsed arguments.
        annotations: which of `caption` and `label` the task reads: `--caption_column` and `--label_column` have to
            exist for those only.
    """
    if args.dataset_name is not None:
        return _load_datasets(args, annotations)
    path = Path(args.train_data_dir)
    if path.suffix == ".npz":
        return _load_npz(path, args, annotations)
    if not path.is_dir():
        raise ValueError(
            f"`--train_data_dir` is {str(path)!r}, which is neither a folder of pictures nor an .npz file."
        )
    return _load_folder(path, args, annotations)


def _dataset(args, images, found: dict[str, Any]) -> ImageCaptionDataset:
    return ImageCaptionDataset(
        images, found.get("caption"), args.resolution, args.center_crop, args.random_flip, found.get("label")
    )


def _columns(args, annotations: tuple[str, ...], there: Iterable[str], where: str) -> dict[str, str]:
    """Names of the columns by what they hold, `image` first.

    Raises:
        ValueError: a column is not there.
    """
    names = {name: getattr(args, f"{name}_column") for name in ("image", *annotations)}
    for name, column in names.items():
        if column not in there:
            raise ValueError(f"`--{name}_column` is {column!r}, which is none of {sorted(there)} in {where}.")
    return names


def _load_datasets(args, annotations: tuple[str, ...]) -> ImageCaptionDataset:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "`--dataset_name` needs the `datasets` package: pip install 'diffusers_ext[train]'"
        ) from error
    rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, split="train")
    names = _columns(args, annotations, rows.column_names, args.dataset_name)
    return _dataset(args, rows[names.pop("image")], {name: rows[column] for name, column in names.items()})


def _load_npz(path: Path, args, annotations: tuple[str, ...]) -> ImageCaptionDataset:
    if not path.is_file():
        raise ValueError(f"`--train_data_dir` is {str(path)!r}, and there is no such file.")
    with np.load(path, allow_pickle=False) as data:
        found = {name: data[column] for name, column in _columns(args, annotations, data.files, path.name).items()}
    if args.split_file is not None:
        splits = json.loads(Path(args.split_file).read_text())
        if args.split not in splits:
            raise ValueError(f"`--split` is {args.split!r}, which is none of {sorted(splits)} in {args.split_file}.")
        rows = splits[args.split]
        rows = slice(rows["start"], rows["stop"]) if isinstance(rows, dict) else rows
        found = {name: values[rows] for name, values in found.items()}
    images = found.pop("image")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3):
        raise ValueError(
            f"`--image_column` {args.image_column!r} must hold uint8 of shape (n, height, width, 3) or (n, height, "
            f"width), not {images.dtype} {images.shape}."
        )
    if images.shape[1:3] != (args.resolution, args.resolution):
        images = [Image.fromarray(image) for image in images]
    return _dataset(args, images, found)


def _load_folder(path: Path, args, annotations: tuple[str, ...]) -> ImageCaptionDataset:
    metadata = path / "metadata.jsonl"
    found: dict[str, Any] = {}
    if metadata.is_file():
        rows = [json.loads(line) for line in metadata.read_text().splitlines() if line.strip()]
        names = {name: getattr(args, f"{name}_column") for name in annotations}
        for column in ("file_name", *names.values()):
            if any(column not in row for row in rows):
                raise ValueError(f"Every line of {metadata} needs {column!r}; at least one has none.")
        images = [path / row["file_name"] for row in rows]
        found = {name: [row[column] for row in rows] for name, column in names.items()}
    else:
        images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if "caption" in annotations:  # beside each picture, or none
            texts = [file.with_suffix(".txt") for file in images]
            found["caption"] = [text.read_text().strip() if text.is_file() else "" for text in texts]
        if "label" in annotations:
            classes = sorted({file.relative_to(path).parts[0] for file in images if file.parent != path})
            if any(file.parent == path for file in images):
                raise ValueError(f"{path} has pictures outside its class folders ({', '.join(classes) or 'none'}).")
            found["label"] = [classes.index(file.relative_to(path).parts[0]) for file in images]
    missing = [str(image) for image in images if not image.is_file()]
    if missing:
        raise ValueError(
            f"`--train_data_dir` names {len(missing)} pictures that are not there, the first is {missing[0]}."
        )
    return _dataset(args, images, found)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as a batch: tensors stacked, integers as one tensor, texts as a list."""
    batch: dict[str, Any] = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.tensor(values) if isinstance(first, int) else values
    return batch


class GlobalBatches(Sampler):
    """Batches of `(index, global sample number)` for one process, from any global batch on.

    Args:
        num_samples: size of the dataset. Each epoch is a fresh permutation of it, drawn from `(seed, epoch)`.
        batch_size: samples a process takes at once.
        first_batch, last_batch: half-open range of micro-batch numbers to yield.
        rank, world_size: this process and how many there are. Micro-batch `m` of rank `r` holds the global samples
            `(m * world_size + r) * batch_size` and the following.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        first_batch: int,
        last_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.first_batch, self.last_batch = first_batch, last_batch
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.last_batch - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = -1, None
        for micro_batch in range(self.first_batch, self.last_batch):
            start = (micro_batch * self.world_size + self.rank) * self.batch_size
            batch = []
            for sample_id in range(start, start + self.batch_size):
                if sample_id // self.num_samples != epoch or permutation is None:
                    epoch = sample_id // self.num_samples
                    permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
                batch.append((int(permutation[sample_id % self.num_samples]), sample_id))
            yield batch


def generator_for(seed: int, sample_id: int) -> torch.Generator:
    """CPU generator of one sample. Seed and number are mixed (splitmix64), so that neighbours are independent."""
    mask = (1 << 64) - 1
    state = (seed * 0x9E3779B97F4A7C15 + sample_id * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = ((state ^ (state >> shift)) * factor) & mask
    return torch.Generator().manual_seed((state ^ (state >> 31)) >> 1)


class SampleNoise:
    """Random numbers for one batch, each sample drawing from its own generator.

    Drawn on the CPU, then moved, so that devices and process counts do not change them. Calls draw one after another:
    keep their order fixed in a loss.
    """

    def __init__(self, seed: int, sample_ids: torch.Tensor, device: torch.device | str = "cpu"):
        self.generators = [generator_for(seed, int(sample_id)) for sample_id in sample_ids]
        self.device = device

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal of shape `(batch, *shape)`."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform on [0, 1) of shape `(batch, *shape)`."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(self.device)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Integers from 0 to `high - 1` of shape `(batch, *shape)`."""
        return torch.stack([torch.randint(high, shape, generator=g) for g in self.generators]).to(self.device)
