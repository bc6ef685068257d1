"""The demo, with few pictures and steps: what it writes, what it refuses, and that what it measures is so."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

import diffusers_ext as dx
from diffusers_ext import cli, demo
from diffusers_ext.metrics import count_macs

from .fresh import ROOT

STEPS, PICTURES, ROUNDS = 7, 4, 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run of the demo: its folder, what it returned and what it printed."""
    console = Console(record=True, width=80, file=io.StringIO())
    output = tmp_path_factory.mktemp("demo") / "new"
    variants = demo.run_demo(
        output, seed=5, num_inference_steps=STEPS, num_pictures=PICTURES, rounds=ROUNDS, console=console
    )
    return output, variants, console.export_text()


def test_measures_each_way(made):
    _, (plain, *cached), _ = made
    assert plain.interval is None and plain.psnr is None
    assert [variant.interval for variant in cached] == list(demo.INTERVALS)
    assert plain.macs > cached[0].macs > cached[1].macs > cached[2].macs > 0
    for variant in cached:
        assert 0 < variant.psnr < 80
        assert variant.time_interval[0] <= variant.time_ratio <= variant.time_interval[1]
    for variant in (plain, *cached):
        assert variant.seconds > 0
        assert 0 <= variant.accuracy <= 1


def test_counted_work_is_that_of_a_whole_run(made, pipe):
    _, variants, _ = made
    embeds, negative = pipe.encode_prompt("a person", pipe.device, 1, do_classifier_free_guidance=True)
    for variant in variants:
        if variant.interval is not None:
            dx.enable(pipe, dx.DeepCacheConfig(interval=variant.interval))
        assert variant.macs == count_macs(
            pipe, prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=STEPS,
            guidance_scale=demo.load_prompts().guidance_scale, output_type="latent",
        )  # fmt: skip


def test_sheet_shows_the_pictures_pixel_by_pixel(made, avatars_sd):
    output, _, _ = made
    prompts = demo.load_prompts()
    expected = avatars_sd(
        list(prompts.captions[:2]), generator=[torch.Generator().manual_seed(5 + s) for s in prompts.seeds[:2]],
        num_inference_steps=STEPS, guidance_scale=prompts.guidance_scale,
    ).images  # fmt: skip
    sheet = Image.open(output / "contact_sheet.png")
    side, cell = 32 * demo._SCALE, 32 * demo._SCALE + demo._GAP
    top = demo._MARGIN + demo._TITLE_HEIGHT
    for i, picture in enumerate(expected):  # the plain row
        left = demo._MARGIN + demo._LABEL_WIDTH + i * cell
        shown = sheet.crop((left, top, left + side, top + side))
        assert np.array_equal(shown, np.asarray(picture).repeat(demo._SCALE, axis=0).repeat(demo._SCALE, axis=1))


def test_saved_pipeline_has_the_cache_on(made):
    output, _, _ = made
    pipe = dx.Pipeline.from_pretrained(output / "pipeline")
    [entry] = dx.status(pipe)
    assert entry.config == dx.DeepCacheConfig(interval=demo.SAVED_INTERVAL)


def test_numbers_are_written_and_printed(made):
    output, variants, text = made
    results = json.loads((output / "demo.json").read_text())
    assert [row["macs"] for row in results["variants"]] == [variant.macs for variant in variants]
    assert results["settings"]["seeds"] == [5 + seed for seed in demo.load_prompts().seeds[:PICTURES]]
    assert "diffusers" in results["versions"]
    for variant in variants:
        assert f"{variant.seconds:.3f} s" in text
        assert f"{variant.macs / 1e9:.2f} G" in text
    assert "on real pictures" in text
    for name in ("contact_sheet.png", "pipeline", "demo.json"):
        assert name in text


def test_folder_of_an_earlier_demo_is_used_again_and_no_other(made, tmp_path, capsys):
    output, _, _ = made
    demo._check(output, STEPS, PICTURES, PICTURES, ROUNDS)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", "--output", str(tmp_path)])
    assert left.value.code == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_inference_steps": 5}, "num_inference_steps"),
        ({"num_pictures": 0}, "num_pictures"),
        ({"num_pictures": 100}, "num_pictures"),
        ({"num_pictures": 4, "rounds": 3}, "rounds"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_is_written(tmp_path, arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        demo.run_demo(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_clock_counts_time_inside_the_module_only():
    class Sleeper(torch.nn.Module):
        def forward(self, seconds):
            demo.time.sleep(seconds)

    module = Sleeper()
    with demo._DenoiserClock(module) as clock:
        module(0.05)
        demo.time.sleep(0.2)
        module(0.05)
        assert 0.1 <= clock.seconds < 0.2
    module(0.05)
    assert clock.seconds < 0.2


@pytest.mark.parametrize("width", [80, 128, 400])
def test_captions_stay_within_their_column(width):
    font = ImageFont.load_default(size=12)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for caption in demo.load_prompts().captions:
        lines = demo._wrap(demo._short(caption), font, width)
        assert " ".join(lines) == demo._short(caption)
        assert all(draw.textlength(line, font=font) <= width for line in lines)


# --- the captions ----------------------------------------------------------------------------------------------------


def test_captions_are_those_of_the_rule():
    from benchmarks.data import make_prompts

    assert make_prompts.OUTPUT.read_text(encoding="utf-8") == make_prompts.make()


def test_captions_are_held_out():
    folder = ROOT / "benchmarks" / "data"
    splits = json.loads((folder / "avatars_splits.json").read_text())
    with np.load(folder / "avatars.npz", allow_pickle=False) as data:
        seen = {name: set(data["caption"][splits[name]].tolist()) for name in splits}
    captions = set(demo.load_prompts().captions)
    assert captions <= seen["reference"]
    assert not captions & (seen["generator"] | seen["judge"])
    assert len(captions) == len(demo.load_prompts().captions)
