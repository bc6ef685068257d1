"""ASCED, by the five proofs."""

from __future__ import annotations

import json
import re
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
from diffusers.callbacks import MultiPipelineCallbacks
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusers_ext as dx
from diffusers_ext.hooks.asced import (
    ASCEDCallback,
    connected_components,
    detect_artifacts,
    dilate,
    erode,
    gaussian_smooth,
)
from tests.common import arguments
from tests.common.suite import Case, CommonCase

_CALLBACK = "a callback that is passed to a call: nothing is switched on and off"
COMMON = CommonCase(skips={"entry": _CALLBACK})
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "asced.json").read_text())

exact = pytest.mark.proof("exact")
NEVER, ALWAYS = {"mad_scale": 1e30}, {"mad_scale": 0.5, "min_area": 0.0, "max_area": 1e9, "min_width": 1.0}


def masks(batch: int = 2, height: int = 9, width: int = 7):
    size = batch * height * width
    bits = st.integers(0, 2**size - 1)
    return bits.map(
        lambda number: torch.tensor([bool(number >> i & 1) for i in range(size)]).reshape(batch, height, width)
    )


# --- image processing ------------------------------------------------------------------------------------------------


def flooded(mask: torch.Tensor) -> list[set[tuple[int, int, int]]]:
    """Regions by flooding, pixel by pixel."""
    left = {tuple(place) for place in mask.nonzero().tolist()}
    regions = []
    while left:
        queue = deque([left.pop()])
        region = set(queue)
        while queue:
            b, y, x = queue.popleft()
            for place in ((b, y - 1, x), (b, y + 1, x), (b, y, x - 1), (b, y, x + 1)):
                if place in left:
                    left.remove(place)
                    region.add(place)
                    queue.append(place)
        regions.append(region)
    return regions


@exact
@settings(max_examples=60, deadline=None)
@given(mask=masks())
def test_connected_components_are_those_of_flooding(mask):
    labels = connected_components(mask)
    assert torch.equal(labels > 0, mask)
    found: dict[int, set] = {}
    for place in mask.nonzero().tolist():
        found.setdefault(int(labels[tuple(place)]), set()).add(tuple(place))
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, flooded(mask)))


@exact
def test_connected_components_of_a_spiral_and_of_nothing():
    """A long winding region, diagonal neighbours that do not touch, and regions at the borders of two pictures."""
    size, mask = 41, torch.zeros(2, 41, 41, dtype=torch.bool)
    y = x = 0
    steps, direction = size, (0, 1)
    mask[0, 0, :] = True
    y, x = 0, size - 1
    for length in [size - 1, size - 1, *[size - 1 - 2 * (k // 2 + 1) for k in range(2 * (size // 4))]]:
        direction = (direction[1], -direction[0])
        for _ in range(max(length, 0)):
            y, x = y + direction[0], x + direction[1]
            mask[0, y, x] = True
    mask[1] = torch.eye(size, dtype=torch.bool)
    labels = connected_components(mask)
    assert steps == size and len(labels[0].unique()) == 2 and len(labels[1].unique()) == size + 1
    assert not connected_components(torch.zeros(1, 5, 5, dtype=torch.bool)).any()


@exact
@settings(max_examples=40, deadline=None)
@given(mask=masks(), reach=st.integers(0, 3), width=st.integers(1, 5))
def test_dilation_and_erosion_are_what_they_say(mask, reach, width):
    grown, shrunk = dilate(mask, reach), erode(mask, width)
    batch, height, length = mask.shape
    for b in range(batch):
        for y in range(height):
            for x in range(length):
                near = mask[b, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
                assert grown[b, y, x] == near.any()
                top, left = y - width // 2, x - width // 2
                inside = top >= 0 and left >= 0 and top + width <= height and left + width <= length
                assert shrunk[b, y, x] == (inside and bool(mask[b, top : top + width, left : left + width].all()))


@exact
@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.6, 2.0, 4.0])
def test_smoothing_is_a_sum_over_mirrored_pixels(sigma):
    picture = torch.randn(2, 3, 9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = int(4 * sigma + 0.5)
    weights = [np.exp(-0.5 * (k / sigma) ** 2) if sigma else 1.0 for k in range(-radius, radius + 1)]

    def mirrored(place: int, size: int) -> int:
        while not 0 <= place < size:
            place = -1 - place if place < 0 else 2 * size - 1 - place
        return place

    expected = torch.zeros_like(picture)
    for y in range(9):
        for x in range(6):
            for j, v in enumerate(weights, -radius):
                for k, w in enumerate(weights, -radius):
                    expected[..., y, x] += v * w * picture[..., mirrored(y + j, 9), mirrored(x + k, 6)]
    expected /= sum(weights) ** 2
    torch.testing.assert_close(gaussian_smooth(picture, sigma), expected, rtol=0, atol=1e-12)


# --- detection -------------------------------------------------------------------------------------------------------


def scene(case: dict) -> list[torch.Tensor]:
    """The pictures of the golden numbers, `(1, channels, height, width)` each, whole numbers from 0 to 255."""
    height, width, seed = case["height"], case["width"], case["seed"]
    y, x = np.mgrid[0:height, 0:width].astype(float)
    frames = []
    for k in range(case["frames"]):
        colours = []
        for c in range(case["channels"]):
            wave = 127 + 60 * np.sin(0.05 * x + 0.3 * c + 0.11 * seed) * np.cos(0.04 * y - 0.2 * seed)
            wave = wave + (6.0 / (k + 1)) * np.sin(1.7 * x + 2.3 * y + 0.9 * k + c + seed)
            for cy, cx, ry, rx, strength, start in case["spots"]:
                if k >= start:
                    wave = wave + ((abs(y - cy) <= ry) & (abs(x - cx) <= rx)) * strength * (-1) ** (k + c)
            colours.append(np.clip(np.floor(wave), 0, 255))
        frames.append(torch.from_numpy(np.stack(colours))[None])
    return frames


@pytest.mark.proof("reference")
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_finds_the_regions_of_the_authors(case):
    """Not taken over: their smoothing also runs over the colours of a picture (`blur` says which of the two was run)."""
    expected = torch.zeros(case["height"], case["width"], dtype=torch.bool)
    for row, first, end in case["runs"]:
        expected[row, first:end] = True
    assert torch.equal(detect_artifacts(scene(case), **case["settings"])[0], expected)


@exact
def test_samples_of_a_batch_are_judged_by_themselves():
    one, two = (scene({**GOLDEN["cases"][0], "seed": seed}) for seed in (1, 6))
    both = detect_artifacts([torch.cat(pair) for pair in zip(one, two, strict=True)])
    assert torch.equal(both[:1], detect_artifacts(one)) and torch.equal(both[1:], detect_artifacts(two))
    louder = detect_artifacts([torch.cat([a, 100 * b]) for a, b in zip(one, two, strict=True)])
    assert torch.equal(both, louder), "thresholds are relative to the picture's own changes"


@exact
def test_areas_are_between_and_widths_are_held():
    flat = torch.zeros(1, 1, 40, 40)
    spots = flat.clone()
    spots[..., 2:12, 2:12] = 1  # 100
    spots[..., 20:24, 2:32] = 1  # 120, of width 4
    spots[..., 28:38, 20:31] = 1  # 110
    options = {"sigma": 0.0, "min_area": 100, "max_area": 200}
    found = detect_artifacts([flat, spots], min_width=5, **options)
    assert found.sum() == 110 and found[0, 30, 25]
    assert detect_artifacts([flat, spots], min_width=4, **options).sum() == 230
    assert detect_artifacts([flat, spots], min_width=5, sigma=0.0, min_area=99, max_area=110).sum() == 100
    assert not detect_artifacts([flat, flat]).any()
    with pytest.raises(ValueError, match="`predictions`"):
        detect_artifacts([flat])


# --- a run -----------------------------------------------------------------------------------------------------------


def smooth_data(scheduler, size: int = 32) -> dx.GaussianDenoiser:
    """Pictures with soft outlines: a Gaussian process."""
    y, x = (grid.flatten().double() for grid in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    distance = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    covariance = 0.3 * torch.exp(-distance / (2 * 4.0**2)) + 1e-3 * torch.eye(size**2)
    return dx.GaussianDenoiser.from_moments(torch.zeros(1, size, size), covariance, scheduler)


def run(denoiser, x, steps=25, callback=None, disturb=None):
    """A DDIM loop that calls back as stock pipelines do; the states, and the predictions of the scheduler itself."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    pipe = SimpleNamespace(scheduler=scheduler, num_timesteps=steps)
    states, predictions = [x], []
    for i, t in enumerate(scheduler.timesteps):
        output = denoiser(states[-1], t).sample
        output = output if disturb is None else disturb(i, output)
        made = scheduler.step(output, t, states[-1])
        x = made.prev_sample if callback is None else callback(pipe, i, t, {"latents": made.prev_sample})["latents"]
        states.append(x)
        predictions.append(made.pred_original_sample)
    return states, predictions


def noise(batch: int, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 1, size, size, generator=torch.Generator().manual_seed(0))


@exact
def test_predictions_follow_from_the_states():
    denoiser, seen = smooth_data(DDIMScheduler(), 8), []
    asced = ASCEDCallback(detect_step=20, **NEVER)
    asced._corrected = lambda latents, level: seen.extend(asced._predictions) or latents
    _, predictions = run(denoiser, noise(3, 8), callback=asced)
    assert len(seen) == 19
    for found, expected in zip(seen, predictions[1:20], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@exact
def test_the_search_sees_the_clipped_predictions_from_history_start_on(monkeypatch):
    seen: list[torch.Tensor] = []

    def search(predictions, *rest):
        seen.extend(predictions)
        return torch.zeros(3, 8, 8, dtype=torch.bool)

    monkeypatch.setattr("diffusers_ext.hooks.asced.detect_artifacts", search)
    denoiser = smooth_data(DDIMScheduler(), 8)
    _, predictions = run(denoiser, noise(3, 8), callback=ASCEDCallback(detect_step=20, history_start=7, clip_range=0.1))
    assert len(seen) == 13
    for found, expected in zip(seen, predictions[7:20], strict=True):
        torch.testing.assert_close(found, expected.clamp(-0.1, 0.1), rtol=0, atol=2e-4)


@exact
def test_without_a_region_a_run_is_bit_equal_and_draws_nothing(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    call = {"prompt": ["a person with tan skin"] * 2, "num_inference_steps": 8, "output_type": "latent"}
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    before = torch.get_rng_state()
    asced = ASCEDCallback(detect_step=5, history_start=2, **NEVER)
    watched = pipe(**call, generator=torch.Generator().manual_seed(0), callback_on_step_end=asced).images
    assert torch.equal(plain, watched) and torch.equal(torch.get_rng_state(), before)
    assert asced.mask.shape == (2, *plain.shape[-2:]) and not asced.mask.any()
    fresh = torch.Generator().manual_seed(asced.config.seed)
    assert torch.equal(asced._generator.get_state(), fresh.get_state())


@exact
def test_only_regions_change_at_the_step_of_correction(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    states: dict[str, list] = {"plain": [], "corrected": []}
    asced = ASCEDCallback(detect_step=5, history_start=2, expand=0.0, **ALWAYS)
    for name in states:

        def note(_pipe, _i, _t, kwargs, name=name):
            states[name].append(kwargs["latents"].clone())
            return kwargs

        note.tensor_inputs = ["latents"]
        callback = MultiPipelineCallbacks([asced, note]) if name == "corrected" else note
        pipe("a person with tan skin", num_inference_steps=8, generator=torch.Generator().manual_seed(0),
             output_type="latent", callback_on_step_end=callback)  # fmt: skip
    region = asced.mask[:, None].expand_as(states["plain"][0])
    assert 0 < region.sum() < region.numel()
    for step in range(8):
        same = states["plain"][step] == states["corrected"][step]
        if step < 4:
            assert same.all()
        elif step == 4:  # the end of the step before k*
            assert same[~region].all() and not same[region].any()


@exact
@pytest.mark.parametrize(("eta", "noise_scale", "reverse_step"), [(1.0, 0.0, 1), (0.5, 0.2, 3), (0.0, 0.0, 2)])
def test_the_correction_is_that_of_the_paper(eta, noise_scale, reverse_step):
    """Against the formulas with the scheduler's own predictions and its own step with eta, the noise drawn in order."""
    denoiser, x = smooth_data(DDIMScheduler(), 16), noise(2, 16)
    asced = ASCEDCallback(
        detect_step=12, history_start=6, eta=eta, noise_scale=noise_scale, reverse_step=reverse_step, expand=1.0,
        reference_size=None, seed=3, **ALWAYS,
    )  # fmt: skip
    states, predictions = run(denoiser, x, callback=asced)
    region = dilate(asced.mask, 1)[:, None]
    assert 0 < region.sum() < region.numel()
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(25)
    generator = torch.Generator().manual_seed(3)
    plain, _ = run(denoiser, x)
    clean = predictions[12 - reverse_step]
    if noise_scale:
        clean = clean + noise_scale * torch.randn(clean.shape, generator=generator)
    t = scheduler.timesteps[12]
    noised = scheduler.add_noise(clean, torch.randn(clean.shape, generator=generator), t)
    torch.testing.assert_close(states[12], torch.where(region, noised, plain[12]), rtol=0, atol=1e-3)
    output = denoiser(states[12], t).sample
    still = scheduler.step(output, t, states[12]).prev_sample
    moved = scheduler.step(output, t, states[12], eta=eta, generator=generator).prev_sample if eta else still
    torch.testing.assert_close(states[13], torch.where(region, moved, still), rtol=0, atol=1e-3)


@exact
def test_samples_without_a_region_are_bit_equal_to_their_plain_run():
    denoiser, x = smooth_data(DDIMScheduler(), 16), noise(3, 16)
    asced = ASCEDCallback(detect_step=12, history_start=6, reference_size=None, **ALWAYS)
    only = lambda predictions, *rest: torch.stack([torch.zeros(16, 16).bool(), torch.eye(16).bool(), torch.zeros(16, 16).bool()])  # noqa: E731  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers_ext.hooks.asced.detect_artifacts", only)
        corrected = run(denoiser, x, callback=asced)[0][-1]
    plain = run(denoiser, x)[0][-1]
    assert torch.equal(corrected[[0, 2]], plain[[0, 2]]) and not torch.equal(corrected[1], plain[1])


@exact
def test_a_disturbance_of_some_steps_is_found_where_it_is_and_clean_runs_are_left_alone():
    """The check of the paper's idea on an exact denoiser: intersection over union, and false alarms."""
    denoiser, x = smooth_data(DDIMScheduler()), noise(12)
    patch = torch.zeros(32, 32, dtype=torch.bool)
    patch[10:17, 18:26] = True

    def disturb(i, output):
        flicker = 0.25 if i % 2 else -0.25
        return output + flicker * patch if 8 <= i < 14 else output

    settings = {"detect_step": 14, "history_start": 8, "mad_scale": 6.0, "reference_size": 32, "min_area": 8.0,
                "max_area": 300.0, "min_width": 3.0, "sigma": 0.5, "expand": 1.0}  # fmt: skip
    clean_asced, asced = ASCEDCallback(**settings), ASCEDCallback(**settings)
    clean = run(denoiser, x)[0][-1]
    run(denoiser, x, callback=clean_asced)
    disturbed = run(denoiser, x, disturb=disturb)[0][-1]
    corrected = run(denoiser, x, callback=asced, disturb=disturb)[0][-1]
    overlap = (asced.mask & patch).flatten(1).sum(1) / (asced.mask | patch).flatten(1).sum(1)
    assert overlap.mean() > 0.6
    assert clean_asced.mask.float().mean() < 0.05
    change = (corrected - disturbed).abs().amax(1)
    assert change[:, patch].mean() > 3 * change[:, ~patch].mean() and clean.isfinite().all()


@exact
def test_each_run_begins_anew(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    asced = ASCEDCallback(detect_step=5, history_start=2, **ALWAYS)

    def picture(steps=8, batch=1):
        return pipe(["a person with tan skin"] * batch, num_inference_steps=steps, output_type="latent",
                    generator=torch.Generator().manual_seed(0), callback_on_step_end=asced).images  # fmt: skip

    expected = picture()
    picture(9, batch=2)
    assert torch.equal(picture(), expected)
    step, calls = pipe.scheduler.step, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    pipe.scheduler.step = failing
    with pytest.raises(KeyboardInterrupt):
        picture()
    del pipe.scheduler.step
    assert torch.equal(picture(), expected) and asced._predictions == []
    late = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    result = late("a person", image=image, strength=0.7, num_inference_steps=12, output_type="latent",
                  generator=torch.Generator().manual_seed(0), callback_on_step_end=asced).images  # fmt: skip
    assert result.isfinite().all() and asced.mask is not None


@exact
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_of_its_kind(dtype):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    pipe, asced = SimpleNamespace(scheduler=scheduler), ASCEDCallback(reference_size=None, **ALWAYS)
    for i, t in enumerate(scheduler.timesteps):
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)).to(dtype)
        found = asced(pipe, i, t, {"latents": latents})["latents"]
        assert found.dtype == dtype and found.isfinite().all()
    assert asced.mask.any()


# --- arguments -------------------------------------------------------------------------------------------------------


def case() -> Case:
    return Case(dx.get_method("asced"), ASCEDCallback, (ASCEDCallback,), CommonCase(), "asced")


@exact
def test_wrong_arguments_are_refused_by_name():
    arguments.check_wrong_values(case())
    for name, value in (("history_start", 13), ("reverse_step", 14), ("eta", 1.5), ("sigma", -1.0)):
        with pytest.raises(ValueError, match=f"`{name}` is {value}"):
            ASCEDCallback(**{name: value})


@exact
@pytest.mark.parametrize(
    ("scheduler", "steps", "words"),
    [
        (DPMSolverMultistepScheduler(), 20, "DPMSolverMultistepScheduler"),
        (DDIMScheduler(), 20, "clip_sample"),
        (DDIMScheduler(clip_sample=False, thresholding=True), 20, "thresholding"),
        (DDIMScheduler(clip_sample=False), 14, "`detect_step` is 14"),
    ],
    ids=["another scheduler", "clipping", "thresholding", "a short run"],
)
def test_runs_that_cannot_be_watched_are_refused(scheduler, steps, words):
    scheduler.set_timesteps(steps)
    pipe = SimpleNamespace(scheduler=scheduler, num_timesteps=steps)
    with pytest.raises(ValueError, match=words):
        ASCEDCallback()(pipe, 0, scheduler.timesteps[0], {"latents": torch.zeros(1, 4, 8, 8)})


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_its_config_is_saved_and_loaded(tmp_path):
    asced = ASCEDCallback(detect_step=9, history_start=3, mad_scale=4.5, clip_range=1.0, reference_size=None, seed=7)
    asced.save_config(tmp_path)
    loaded = ASCEDCallback.from_config(ASCEDCallback.load_config(tmp_path))
    assert arguments.public_config(loaded) == arguments.public_config(asced)
    denoiser, x = smooth_data(DDIMScheduler(), 8), noise(2, 8)
    pair = [run(denoiser, x, callback=ASCEDCallback.from_config(it.config, **ALWAYS))[0][-1] for it in (asced, loaded)]
    assert torch.equal(*pair) and not torch.equal(pair[0], run(denoiser, x)[0][-1])


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card

    card = method_card("asced")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    for snippet in snippets:
        names: dict = {}
        exec(compile(snippet, "card", "exec"), names)
        assert names["asced"].mask is not None
    assert "2503.16218" in card and "Apache-2.0" in card
