"""Stream frames through a Stable Diffusion model, report frames per second, and write what came out.

    python examples/stream_frames.py                                    # a moving picture made here, a small model
    python examples/stream_frames.py --source folder_of_pictures --output stream.png
    python examples/stream_frames.py --source video.mp4 --model your/sd-turbo --places 32 45 --cfg-type none

A video is read by imageio (`pip install imageio[ffmpeg]`), an animated GIF without it. The output is a GIF with every
frame above what the stream made of it, or, with another ending, a contact sheet of them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageSequence
from tqdm.auto import tqdm

import diffusers_ext as dx
from diffusers_ext.pipelines.stream_batch import CFG_TYPES

PROMPT = "a person with brown skin and long black hair, a happy smile, blue clothes"
_COLUMNS = 12  # of a contact sheet
_PICTURES = (".jpeg", ".jpg", ".png", ".webp")


def synthetic(size: int) -> Iterator[Image.Image]:
    """A head that sways, and stands still for half of the time."""
    for k in itertools.count():
        phase = min(k % 24, 12) / 12
        x = size * (0.5 + 0.15 * math.sin(2 * math.pi * phase))
        picture = Image.new("RGB", (size, size), "white")
        draw = ImageDraw.Draw(picture)
        draw.ellipse((x - 0.3 * size, 0.2 * size, x + 0.3 * size, 0.8 * size), fill=(224, 172, 105))
        draw.rectangle((x - 0.4 * size, 0.82 * size, x + 0.4 * size, size), fill=(240, 200, 60))
        for side in (-0.12, 0.12):
            eye = x + side * size
            draw.ellipse((eye - 0.05 * size, 0.4 * size, eye + 0.05 * size, 0.5 * size), fill="black")
        yield picture


def read(source: Path) -> Iterator[Image.Image]:
    """Pictures of a folder in the order of their names, of a GIF, or of a video.

    Raises:
        ValueError: there is nothing to read.
    """
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in _PICTURES)
        if not files:
            raise ValueError(f"`source` is {source}; this folder has none of {', '.join(_PICTURES)}.")
        for file in files:
            with Image.open(file) as picture:
                yield picture.convert("RGB")
    elif not source.is_file():
        raise ValueError(f"`source` is {source}; there is no such file or folder.")
    elif source.suffix.lower() == ".gif":
        with Image.open(source) as movie:
            for picture in ImageSequence.Iterator(movie):
                yield picture.convert("RGB")
    else:
        try:
            import imageio.v3 as imageio
        except ImportError as error:
            raise ValueError(f"`source` is {source}; a video needs `pip install imageio[ffmpeg]`.") from error
        yield from map(Image.fromarray, imageio.imiter(source))


def run(pipe: dx.StreamBatchPipeline, frames: Iterator[Image.Image], count: int) -> tuple[list, list, float]:
    """Frames, as many pictures, and frames per second once the slots are full.

    Picture k is that of frame k. Where frames are skipped, pictures come later, and the first one stands in for the start.
    """
    taken, shown, seconds = [], [], []
    for frame in tqdm(itertools.islice(frames, count), total=count, unit="frame", delay=2.0):
        began = time.perf_counter()
        picture = pipe.stream(frame)
        taken.append(frame)
        if picture is not None:
            shown.append(picture)
            seconds.append(time.perf_counter() - began)
    shown += pipe.flush()
    return taken, shown[:1] * (len(taken) - len(shown)) + shown, len(seconds) / sum(seconds) if seconds else 0.0


def write(output: Path, frames: Sequence[Image.Image], shown: Sequence[Image.Image], side: int = 128) -> None:
    """A GIF of frames above results, or a contact sheet of them."""
    pairs = []
    for pair in zip(frames, shown, strict=True):
        sheet = Image.new("RGB", (side, 2 * side))
        for row, picture in enumerate(pair):
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (0, row * side))
        pairs.append(sheet)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() == ".gif":
        pairs[0].save(output, save_all=True, append_images=pairs[1:], duration=100, loop=0)
        return
    rows = [pairs[start : start + _COLUMNS] for start in range(0, len(pairs), _COLUMNS)]
    sheet = Image.new("RGB", (side * len(rows[0]), 2 * side * len(rows)), "white")
    for down, row in enumerate(rows):
        for across, pair in enumerate(row):
            sheet.paste(pair, (across * side, down * 2 * side))
    sheet.save(output)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Stream frames through a Stable Diffusion model.")
    parser.add_argument("--source", type=Path, help="Folder, GIF or video; left out, a moving picture made here.")
    parser.add_argument(
        "--model", default=str(dx.zoo_path("avatars-sd")), help="Folder or Hub name of a Stable Diffusion."
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--frames", type=int, default=48, help="How many at most.")
    parser.add_argument("--places", type=int, nargs="+", default=[20, 30, 40], help="`t_index_list`.")
    parser.add_argument("--cfg-type", choices=CFG_TYPES, default="self")
    parser.add_argument("--guidance-scale", type=float, default=1.2)
    parser.add_argument("--similarity", type=float, default=1.0, help="Skip frames more alike than this; 1 skips none.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/stream_frames.gif"))
    args = parser.parse_args(argv)
    if args.frames <= len(args.places):
        parser.error(f"--frames is {args.frames}; more than the {len(args.places)} of --places are needed")

    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    options = {"t_index_list": args.places, "cfg_type": args.cfg_type}
    pipe = dx.StreamBatchPipeline.from_pretrained(args.model, dtype=dtype, **options).to(args.device)
    pipe.enable_similar_image_filter(args.similarity)
    pipe.prepare(args.prompt, guidance_scale=args.guidance_scale, generator=torch.Generator().manual_seed(0))
    frames = (
        synthetic(pipe.unet.config.sample_size * pipe.vae_scale_factor) if args.source is None else read(args.source)
    )
    taken, shown, rate = run(pipe, frames, args.frames)
    write(args.output, taken, shown)
    print(f"{len(taken)} frames, {rate:.2f} frames per second on {args.device}; see {args.output}")


if __name__ == "__main__":
    main()
