"""`diffusers-ext demo`: the same pictures with and without DeepCache, from the embedded checkpoint, in under a minute.

It measures what it shows: time and work of the denoiser, likeness to the plain pictures, and how well the pictures
follow captions that the model never saw. It then saves the accelerated pipeline and loads it back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.table import Table

from . import __version__
from .enabling import enabled
from .hooks.deepcache import DeepCacheConfig
from .hub import save_pretrained
from .loading import Pipeline
from .metrics import AvatarJudge, TimeRatios, count_macs, psnr, time_ratio
from .registry import zoo_path

CHECKPOINT, JUDGE = "avatars-sd", "avatars-judge"
INTERVALS = (2, 3, 5)
SAVED_INTERVAL = 3
ROUNDS = 4  # each makes its share of the pictures in every way
_PLAIN = "plain"
_RESULTS = "demo.json"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Captions that the checkpoint was not trained on, with the settings that its pictures are made with.

    Attributes:
        captions: chosen by the rule in `benchmarks/data/make_prompts.py`.
        seeds: one a caption.
        guidance_scale: of classifier-free guidance.
        num_inference_steps: denoising steps of a picture.
    """

    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance_scale: float
    num_inference_steps: int


def load_prompts() -> Prompts:
    """The held-out captions that ship with the embedded checkpoint."""
    content = json.loads((zoo_path(CHECKPOINT) / "prompts.json").read_text(encoding="utf-8"))
    captions, seeds = zip(*((row["caption"], row["seed"]) for row in content["prompts"]), strict=True)
    return Prompts(captions, seeds, content["guidance_scale"], content["num_inference_steps"])


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to make the pictures, and what was measured of it.

    Attributes:
        name: "plain" or "interval N".
        interval: of DeepCache, or None.
        seconds: time inside the denoiser for one picture, median over the rounds.
        time_ratio: that time against the plain one in the same round, median over the rounds. For plain itself: a
            second run in each round against the first, which shows the noise of the machine.
        time_interval: ends of the 95 % bootstrap interval of the ratio.
        macs: multiply-accumulates of the denoiser for one picture.
        psnr: mean over the pictures, in dB, to the plain pictures of the same seeds; None for those themselves.
        accuracy: share of attributes that the judge finds as the captions say: balanced accuracy, mean over attributes.
    """

    name: str
    interval: int | None
    seconds: float
    time_ratio: float
    time_interval: tuple[float, float]
    macs: int
    psnr: float | None
    accuracy: float


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    num_inference_steps: int | None = None,
    num_pictures: int | None = None,
    rounds: int = ROUNDS,
    console: Console | None = None,
) -> list[Variant]:
    """Make the pictures plain and with DeepCache, measure, draw the contact sheet, save the pipeline and load it back.

    Args:
        output: folder for `contact_sheet.png`, `demo.json` and `pipeline/`; new, empty, or of an earlier demo.
        seed: added to the seed of each picture.
        num_inference_steps: denoising steps of a picture; None takes the checkpoint's own number.
        num_pictures: take only so many of the captions.
        rounds: in how many rounds the pictures are made and timed; it divides the number of pictures.
        console: where to print; None is standard output.

    Returns:
        What was measured, the plain pictures first.

    Raises:
        ValueError: `output` holds files of others, or a number is out of range. Nothing has run then.
        RuntimeError: the pipeline, saved and loaded, made other pictures.
    """
    console = console or Console()
    prompts = load_prompts()
    steps = prompts.num_inference_steps if num_inference_steps is None else num_inference_steps
    count = len(prompts.captions) if num_pictures is None else num_pictures
    _check(output, steps, count, len(prompts.captions), rounds)
    began = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    _write_results(output, {})  # first of all, so that what an interrupted demo leaves is known to be its own

    console.print(f"Loading {CHECKPOINT} and its judge ...", highlight=False)
    pipe = StableDiffusionPipeline.from_pretrained(zoo_path(CHECKPOINT), dtype=torch.float32)
    judge = AvatarJudge.from_pretrained(zoo_path(JUDGE))
    captions = prompts.captions[:count]
    studio = _Studio(
        captions, [seed + s for s in prompts.seeds[:count]], steps, prompts.guidance_scale, count // rounds
    )
    configs = {_PLAIN: None} | {f"interval {n}": DeepCacheConfig(interval=n) for n in INTERVALS}

    console.print(
        f"Making {count} pictures of unseen captions in {len(configs)} ways: {steps} steps of "
        f"{type(pipe.scheduler).__name__}, guidance {prompts.guidance_scale:g}.",
        highlight=False,
    )
    macs = _count_macs(pipe, studio)  # also warms up
    pictures, times = _make_pictures(pipe, studio, configs, rounds)
    variants = [_measure(name, config, times, macs, pictures, judge, studio) for name, config in configs.items()]
    title = (
        f"{count} captions that {CHECKPOINT} was not trained on, the same seeds in every row "
        f"({type(pipe.scheduler).__name__}, {steps} steps, guidance {prompts.guidance_scale:g})"
    )
    _draw_sheet(pictures, variants, captions, title).save(output / "contact_sheet.png")
    with enabled(pipe, DeepCacheConfig(interval=SAVED_INTERVAL)):
        save_pretrained(pipe, output / "pipeline")
    _check_round_trip(output / "pipeline", studio, pictures[f"interval {SAVED_INTERVAL}"])
    _write_results(output, _results(variants, times, studio))

    console.print(_table(variants, _ceiling()))
    console.print(
        f"The pipeline with interval {SAVED_INTERVAL}, saved and loaded back, makes the same pictures bit for bit.",
        highlight=False,
    )
    for what, path in (
        ("pictures", output / "contact_sheet.png"),
        ("pipeline", output / "pipeline"),
        ("numbers", output / _RESULTS),
    ):
        console.print(f"  {what:<9} {path}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"{time.perf_counter() - began:.0f} seconds.", style="dim", highlight=False)
    return variants


def _check(output: Path, steps: int, count: int, available: int, rounds: int) -> None:
    if steps <= max(INTERVALS):
        raise ValueError(f"`num_inference_steps` is {steps}; it must be greater than the interval {max(INTERVALS)}.")
    if not 1 <= count <= available:
        raise ValueError(f"`num_pictures` is {count}; allowed are 1 to {available}.")
    if rounds < 1 or count % rounds:
        raise ValueError(f"`rounds` is {rounds}; it must divide the number of pictures, {count}.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` is {str(output)!r}, which is a file.")
    if output.is_dir() and any(output.iterdir()) and not (output / _RESULTS).is_file():
        raise ValueError(f"`output` is {str(output)!r}, which holds other files; give a new folder or one of a demo.")


@dataclasses.dataclass(frozen=True)
class _Studio:
    """What all the ways to make the pictures share."""

    captions: Sequence[str]
    seeds: Sequence[int]
    steps: int
    guidance_scale: float
    batch_size: int

    def make(self, pipe: StableDiffusionPipeline, batch: int) -> list[Image.Image]:
        """The pictures of one batch, counted from 0."""
        part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds[part]]
        return pipe(
            list(self.captions[part]), generator=generators, num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
        ).images  # fmt: skip


class _DenoiserClock:
    """Seconds spent inside calls of a module; time outside, such as text encoding and decoding, does not count."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._began = math.nan
        self._handles = [module.register_forward_pre_hook(self._start), module.register_forward_hook(self._stop)]

    def _start(self, module: torch.nn.Module, args: Any) -> None:
        self._began = time.perf_counter()

    def _stop(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.seconds += time.perf_counter() - self._began

    def __enter__(self) -> _DenoiserClock:
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()


def _count_macs(pipe: StableDiffusionPipeline, studio: _Studio) -> dict[int | None, int]:
    """Multiply-accumulates of the denoiser for one picture, by interval; None is plain.

    Counting is slow, so one full step and one cached step are counted; of T steps, ceil(T / interval) are full.
    """
    embeds, negative = pipe.encode_prompt(studio.captions[0], pipe.device, 1, do_classifier_free_guidance=True)

    def count(steps: int) -> int:  # given text states and no decoding, nothing but the denoiser counts
        return count_macs(
            pipe, prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=steps,
            guidance_scale=studio.guidance_scale, output_type="latent",
        )  # fmt: skip

    pipe.set_progress_bar_config(desc="Counting operations", leave=False)
    full = count(1)
    with enabled(pipe, DeepCacheConfig(interval=2)):
        cached = count(2) - full
    macs: dict[int | None, int] = {None: studio.steps * full}
    for interval in INTERVALS:
        num_full = -(-studio.steps // interval)
        macs[interval] = num_full * full + (studio.steps - num_full) * cached
    return macs


def _make_pictures(
    pipe: StableDiffusionPipeline, studio: _Studio, configs: dict[str, DeepCacheConfig | None], rounds: int
) -> tuple[dict[str, list[Image.Image]], TimeRatios]:
    """All pictures by way, and the time of their making; each round makes the next batch in all ways."""
    pictures: dict[str, list[Image.Image]] = {name: [] for name in configs}
    calls = dict.fromkeys(configs, 0)

    def maker(name: str) -> Callable[[], None]:
        def make() -> None:
            calls_a_round = 2 if name == _PLAIN else 1  # the baseline also runs against itself
            batch, again = divmod(calls[name], calls_a_round)
            calls[name] += 1
            pipe.set_progress_bar_config(desc=name, leave=False)
            config = configs[name]
            with contextlib.nullcontext() if config is None else enabled(pipe, config):
                images = studio.make(pipe, batch)
            if not again:
                pictures[name] += images

        return make

    with _DenoiserClock(pipe.unet) as clock:
        fns = {name: maker(name) for name in configs}
        times = time_ratio(fns, _PLAIN, repeats=rounds, warmup=0, clock=lambda: clock.seconds)
    return pictures, times


def _measure(
    name: str,
    config: DeepCacheConfig | None,
    times: TimeRatios,
    macs: dict[int | None, int],
    pictures: dict[str, list[Image.Image]],
    judge: AvatarJudge,
    studio: _Studio,
) -> Variant:
    scores = judge.score(pictures[name], studio.captions)
    ratio = times.noise if config is None else times[name]
    interval = None if config is None else config.interval
    return Variant(
        name=name,
        interval=interval,
        seconds=times.seconds[name] / studio.batch_size,
        time_ratio=ratio.median,
        time_interval=ratio.interval,
        macs=macs[interval],
        psnr=None if config is None else psnr(pictures[name], pictures[_PLAIN]).mean().item(),
        accuracy=statistics.fmean(score for score in scores.values() if not math.isnan(score)),
    )


def _ceiling() -> float:
    """What the judge reaches on real pictures: mean over the attributes of its recorded balanced accuracy."""
    recorded = json.loads((zoo_path(JUDGE) / "accuracy.json").read_text(encoding="utf-8"))
    return statistics.fmean(recorded["balanced_accuracy"].values())


def _check_round_trip(folder: Path, studio: _Studio, before: list[Image.Image]) -> None:
    pipe = Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(desc="Loaded back", leave=False)
    after = studio.make(pipe, 0)
    if any(not np.array_equal(a, b) for a, b in zip(after, before[: len(after)], strict=True)):
        raise RuntimeError(f"The pipeline saved in {str(folder)!r}, loaded back, made other pictures than before.")


def _results(variants: list[Variant], times: TimeRatios, studio: _Studio) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(studio),
        "variants": [dataclasses.asdict(variant) for variant in variants],
        "times": times.to_dict(),
    }


def _write_results(output: Path, results: dict[str, Any]) -> None:
    versions = {"diffusers_ext": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
    content = {"made_by": "diffusers-ext demo", "versions": versions, **results}
    (output / _RESULTS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _table(variants: list[Variant], ceiling: float) -> Table:
    table = Table(
        title="For one picture; the seeds are the same in every row",
        caption="Ratio: time against plain in the same round, median over the rounds [95 % interval]; the plain pipeline "
        "against itself shows the noise of the machine. PSNR: likeness to the plain pictures. Attributes: as captioned, "
        f"balanced accuracy by a judge that reaches {ceiling:.0%} on real pictures of unseen captions.",
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("DeepCache", no_wrap=True)
    for heading in ("time", "ratio", "MACs", "PSNR", "attributes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for variant in variants:
        table.add_row(
            "off" if variant.interval is None else f"N = {variant.interval}",
            f"{variant.seconds:.3f} s",
            "{:.3f} [{:.3f}, {:.3f}]".format(variant.time_ratio, *variant.time_interval),
            f"{variant.macs / 1e9:.2f} G",
            "" if variant.psnr is None else f"{variant.psnr:.1f} dB",
            f"{variant.accuracy:.0%}",
        )
    return table


# --- the contact sheet -----------------------------------------------------------------------------------------------

_SCALE = 4  # pixels of the sheet for one of a picture
_GAP = 10
_MARGIN = 24
_LABEL_WIDTH = 170
_TITLE_HEIGHT = 34
_COLUMNS = 12  # pictures in one line; further ones go into the next band
_PAPER, _INK, _FAINT = "#ffffff", "#1c1c1c", "#6b6b6b"


def _draw_sheet(
    pictures: dict[str, list[Image.Image]], variants: list[Variant], captions: Sequence[str], title: str
) -> Image.Image:
    """One row a way, one column a caption; pixels stay sharp."""
    large, small = ImageFont.load_default(size=17), ImageFont.load_default(size=12)
    side = pictures[_PLAIN][0].width * _SCALE
    cell = side + _GAP
    columns = min(_COLUMNS, len(captions))
    bands = -(-len(captions) // columns)
    texts = ["\n".join(_wrap(_short(caption), small, side)) for caption in captions]
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_height = max(int(probe.multiline_textbbox((0, 0), text, font=small)[3]) for text in texts)
    band_height = len(variants) * cell + text_height + 2 * _GAP
    width = 2 * _MARGIN + _LABEL_WIDTH + columns * cell - _GAP
    height = 2 * _MARGIN + _TITLE_HEIGHT + bands * band_height + (bands - 1) * _MARGIN - 2 * _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), title, fill=_INK, font=large)
    for i in range(len(captions)):
        band, column = divmod(i, columns)
        x = _MARGIN + _LABEL_WIDTH + column * cell
        top = _MARGIN + _TITLE_HEIGHT + band * (band_height + _MARGIN)
        for row, variant in enumerate(variants):
            y = top + row * cell
            sheet.paste(pictures[variant.name][i].resize((side, side), Image.Resampling.NEAREST), (x, y))
            if column == 0:
                name, details = _label(variant)
                draw.text((_MARGIN, y + 4), name, fill=_INK, font=large)
                draw.multiline_text((_MARGIN, y + 32), details, fill=_FAINT, font=small, spacing=5)
        draw.multiline_text((x, top + len(variants) * cell), texts[i], fill=_FAINT, font=small)
    return sheet


def _label(variant: Variant) -> tuple[str, str]:
    seconds = f"{variant.seconds:.2f} s a picture"
    if variant.interval is None:
        return "plain diffusers", seconds
    speed_up = f"{1 / variant.time_ratio:.2f}x as fast"
    return f"DeepCache, N = {variant.interval}", f"{speed_up}\n{seconds}\nPSNR {variant.psnr:.1f} dB"


def _short(caption: str) -> str:
    return caption.removeprefix("a person with ")


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most `width` pixels; a longer word gets a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
