"""AdaptiveDiffusion, by the five proofs."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn

import diffusers_ext as dx
from diffusers_ext.hooks import _unets
from diffusers_ext.hooks._plan import find_run
from tests import tiny_sd
from tests.card_snippets import run_card
from tests.common import models
from tests.common.suite import CommonCase
from tests.unets import fill

ALWAYS = 1e9  # a threshold that skips whatever the cap lets through


class LongModel(models.Model):
    """A model of which one step is three calls, so that runs of a few steps get past the warm-up."""

    def predict(self, model, step=0, batch=2, seed=0):
        return [super(LongModel, self).predict(model, 3 * step + i, batch, seed) for i in range(3)][-1]


def _small_unet() -> UNet2DConditionModel:
    return fill(
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
            attention_head_dim=2, down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"), mid_block_type=None,
        )
    )  # fmt: skip


COMMON = CommonCase(
    settings=[{"threshold": ALWAYS}, {"threshold": ALWAYS, "max_skip_steps": 2, "cap": "reference"}],
    models=[
        LongModel("long UNet2DConditionModel", _small_unet, models.MODELS["UNet2DConditionModel"].inputs),
        LongModel("long FluxTransformer2DModel", models.flux, models.MODELS["FluxTransformer2DModel"].inputs),
    ],
)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "adaptive_diffusion.json").read_text())
SCHEDULER = {"steps_offset": 1, "clip_sample": False}
# name -> scheduler, steps, threshold, max_skip_steps
RUNS = {
    "ddim": ("ddim", 30, 0.01, 4),
    "ddim, everything": ("ddim", 20, ALWAYS, 4),
    "euler": ("euler", 30, 0.05, 6),
}
SUPPORTED = [model for name, model in models.MODELS.items() if name != "BertForMaskedLM"]

exact = pytest.mark.proof("exact")
on_all = pytest.mark.parametrize("model", SUPPORTED, ids=lambda model: model.name)


def scheduler(name: str):
    return {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[name].from_config(SCHEDULER)


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@on_all
def test_a_negative_threshold_is_bit_equal(model):
    bare = model.make()
    plain = model.run(bare, 8)
    dx.apply_adaptive_diffusion(bare, dx.AdaptiveDiffusionConfig(threshold=-1.0))
    assert all(torch.equal(a, b) for a, b in zip(model.run(bare, 8), plain, strict=True))
    assert dx.adaptive_diffusion_stats(bare) == dx.AdaptiveDiffusionStats(8, ())


@exact
@on_all
def test_a_skipped_call_gives_the_last_prediction_and_runs_no_block(model):
    """The first call of a run may differ from the others only in what was computed."""
    plain, bare = model.make(), model.make()
    dx.enable(bare, dx.AdaptiveDiffusionConfig(threshold=ALWAYS))
    ran = []
    blocks = [m for m in bare.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear))]
    for module in blocks:
        module.register_forward_hook(lambda *_: ran.append(1))
    counts, last = [], None
    for step in range(12):
        ran.clear()
        output = model.predict(bare, step)
        counts.append(len(ran))
        if step in (0, 1, 2, 3, 8):
            last = model.predict(plain, step)
        assert torch.equal(output, last), step
    full = counts[0]
    assert [count == full for count in counts] == [step in (0, 1, 2, 3, 8) for step in range(12)]
    assert all(count <= 0.45 * full for count in counts if count != full), counts  # embeddings of these tiny models


@exact
@pytest.mark.parametrize(
    ("cap", "most", "runs"),
    [
        ("strict", 4, [4, 4, 4]), ("strict", 6, [6, 6, 6]), ("strict", 2, [2, 2, 2]), ("strict", 1, [1, 1, 1]),
        ("reference", 4, [5, 4, 4]), ("reference", 6, [5, 6, 6]), ("reference", 2, [5, 2, 2]),
    ],
)  # fmt: skip
def test_runs_of_skips_are_as_long_as_the_cap_lets_them(cap, most, runs):
    model = SUPPORTED[0]
    bare = dx.enable(model.make(), dx.AdaptiveDiffusionConfig(ALWAYS, max_skip_steps=most, cap=cap))
    steps = 4 + sum(runs) + len(runs)
    model.run(bare, min(steps, 22))
    expected = "cccc" + "".join("s" * run + "c" for run in runs)
    skipped = dx.adaptive_diffusion_stats(bare).skipped
    found = "".join("s" if step in skipped else "c" for step in range(min(steps, 22)))
    assert found == expected[:22]


def by_hand(name: str, steps: int, threshold: float, cap: int) -> tuple[list[torch.Tensor], list[int]]:
    """Slow derivation: a pipeline's loop with the rule of the paper on the latents themselves."""
    pipe = tiny_sd.make(scheduler(name))
    given = tiny_sd.inputs()
    states = torch.cat([given["negative_prompt_embeds"], given["prompt_embeds"]])
    pipe.scheduler.set_timesteps(steps)
    x = given["latents"] * pipe.scheduler.init_noise_sigma
    y, skipped, since = [], [], 0
    for k, t in enumerate(pipe.scheduler.timesteps):
        skip = False
        if k >= 4:
            d = {j: (y[j] - y[j - 1]).abs().mean() for j in (k - 1, k - 2, k - 3)}
            skip = since < cap and bool(abs((d[k - 1] + d[k - 3]) / 2 - d[k - 2]) <= threshold * d[k - 2])
        scaled = pipe.scheduler.scale_model_input(torch.cat([x, x]), t)
        if skip:
            skipped.append(k)
            since += 1
        else:
            with torch.no_grad():
                noise = pipe.unet(scaled, t, encoder_hidden_states=states, return_dict=False)[0]
            since = 0
        uncond, cond = noise.chunk(2)
        x = pipe.scheduler.step(uncond + tiny_sd.GUIDANCE * (cond - uncond), t, x, return_dict=False)[0]
        y.append(x)
    return y, skipped


@exact
@pytest.mark.parametrize(("name", "threshold", "cap"), [("ddim", 0.02, 4), ("ddim", 0.1, 2), ("euler", 0.05, 4)])
def test_the_hook_equals_the_rule_in_the_loop_of_the_pipeline(name, threshold, cap):
    expected, skipped = by_hand(name, 24, threshold, cap)
    pipe = dx.enable(tiny_sd.make(scheduler(name)), dx.AdaptiveDiffusionConfig(threshold, cap))
    found = tiny_sd.draw(pipe, 24)
    assert dx.adaptive_diffusion_stats(pipe).skipped == tuple(skipped)
    assert 0 < len(skipped) < 16, "the test would say nothing"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@exact
def test_the_scaling_of_the_scheduler_is_undone_without_a_trace():
    euler = EulerDiscreteScheduler()
    euler.set_timesteps(10)
    assert _unets.input_scale(euler) == 1.0, "the pipeline did not scale"
    for t in euler.timesteps[:3]:
        before = None
        x = torch.ones(3)
        scaled = euler.scale_model_input(x, t)
        before = dict(euler.__dict__)
        assert _unets.input_scale(euler) == pytest.approx(scaled[0].item())
        assert euler.__dict__ == before
        euler.step(x, t, x)
    assert _unets.input_scale(DDIMScheduler()) == _unets.input_scale(None) == 1.0


@exact
def test_without_undoing_it_another_rule_would_come_out():
    """A bare model with Euler's scaled inputs decides otherwise: the scheduler of the pipeline matters."""
    pipe = dx.enable(tiny_sd.make(scheduler("euler")), dx.AdaptiveDiffusionConfig(0.05))
    tiny_sd.draw(pipe, 24)
    right = dx.adaptive_diffusion_stats(pipe).skipped
    dx.disable(pipe)
    dx.enable(pipe.unet, dx.AdaptiveDiffusionConfig(0.05))
    tiny_sd.draw(pipe, 24)
    assert dx.adaptive_diffusion_stats(pipe.unet).skipped != right


@exact
def test_channels_that_are_conditions_do_not_count():
    """In inpainting the mask and the masked picture come with the latents, unscaled."""
    make = functools.partial(
        UNet2DConditionModel, sample_size=8, out_channels=4, block_out_channels=(4,), layers_per_block=1,
        norm_num_groups=2, cross_attention_dim=8, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )  # fmt: skip
    plain, inpaint = fill(make(in_channels=4)), fill(make(in_channels=9))
    found = []
    for unet in (plain, inpaint):
        dx.enable(unet, dx.AdaptiveDiffusionConfig(0.05))
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            latents = torch.randn((1, 4, 8, 8), generator=generator)
            more = 100 * torch.randn((1, 5, 8, 8), generator=generator)
            sample = latents if unet is plain else torch.cat([latents, more], 1)
            with torch.no_grad():
                unet(sample, 900 - 40 * step, encoder_hidden_states=torch.zeros(1, 2, 8))
        found.append(dx.adaptive_diffusion_stats(unet).skipped)
    assert found[0] == found[1] != ()


@exact
def test_separate_calls_of_guidance_decide_alike():
    stock = models.STOCKS["tiny-flux"]
    call = {
        "true_cfg_scale": 2.0, "negative_prompt_embeds": torch.zeros(1, 3, 8),
        "negative_pooled_prompt_embeds": torch.zeros(1, 8),
    }  # fmt: skip
    pipe = dx.enable(stock.make(), dx.AdaptiveDiffusionConfig(threshold=0.5, max_skip_steps=2))
    run = find_run(pipe.transformer, "adaptive_diffusion")
    modes, tick = [], run.tick

    def noted(sample):
        tick(sample)
        modes.append(run.state.mode)

    run.tick = noted
    stock.draw(pipe, 14, **call)
    assert len(modes) == 28 and modes[::2] == modes[1::2]
    skipped = dx.adaptive_diffusion_stats(pipe).skipped
    assert 0 < len(skipped) < 10 and [i for i, mode in enumerate(modes[::2]) if mode == "skip"] == list(skipped)


@exact
def test_stats_are_of_the_last_run_and_nothing_else_is_kept():
    pipe = dx.enable(tiny_sd.make(scheduler("ddim")), dx.AdaptiveDiffusionConfig(ALWAYS))
    first = tiny_sd.draw(pipe, 12)
    assert dx.adaptive_diffusion_stats(pipe) == dx.AdaptiveDiffusionStats(12, (4, 5, 6, 7, 9, 10, 11))

    def abort(pipe, step, timestep, kwargs):
        if step == 6:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        tiny_sd.draw(pipe, 12, abort)
    assert dx.adaptive_diffusion_stats(pipe) == dx.AdaptiveDiffusionStats(7, (4, 5, 6))
    run = find_run(pipe.unet, "adaptive_diffusion")
    assert run.state.slots == [] and run.state.memory == {} and run.manager._state_cache == {}
    assert run.plan.sample is None
    assert all(torch.equal(a, b) for a, b in zip(tiny_sd.draw(pipe, 12), first, strict=True))
    with dx.enabled(pipe, dx.AdaptiveDiffusionConfig(-1.0)):
        tiny_sd.draw(pipe, 5)
        assert dx.adaptive_diffusion_stats(pipe) == dx.AdaptiveDiffusionStats(5, ())
    dx.disable(pipe)
    with pytest.raises(ValueError, match=r"AdaptiveDiffusion on \[\]"):
        dx.adaptive_diffusion_stats(pipe)


@exact
def test_a_run_of_another_pipeline_of_the_same_model_is_a_new_one():
    """A bare transformer tells a new run by its timestep, though its sample comes in before that."""
    model = models.MODELS["FluxTransformer2DModel"]
    bare = dx.enable(model.make(), dx.AdaptiveDiffusionConfig(ALWAYS))
    first = model.run(bare, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.run(bare, 7), first, strict=True))


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": float("nan")}, "`threshold` is nan"),
        ({"threshold": True}, "`threshold` is True"),
        ({"max_skip_steps": 0}, "`max_skip_steps` is 0"),
        ({"warmup_steps": 3}, "`warmup_steps` is 3"),
        ({"cap": "loose"}, "`cap` is 'loose'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        dx.AdaptiveDiffusionConfig(**options)


@exact
def test_warm_up_is_as_long_as_told():
    model = SUPPORTED[0]
    bare = dx.enable(model.make(), dx.AdaptiveDiffusionConfig(ALWAYS, warmup_steps=7))
    model.run(bare, 9)
    assert dx.adaptive_diffusion_stats(bare).skipped == (7, 8)


@exact
def test_models_whose_structure_it_does_not_know_are_refused():
    blocks = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    skip = UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, **blocks)
    with pytest.raises(ValueError, match="does not work on UNet2DModel: its block SkipDownBlock2D takes other inputs"):
        dx.enable(skip, dx.AdaptiveDiffusionConfig())
    with pytest.raises(ValueError, match="does not work on AutoencoderKL: it is no U-Net"):
        dx.enable(models.vae(), dx.AdaptiveDiffusionConfig())
    flux = models.flux()
    flux.renamed, flux.proj_out, flux.norm_out = flux.proj_out, None, None
    with pytest.raises(ValueError, match="which of its parts makes the output"):
        dx.enable(flux, dx.AdaptiveDiffusionConfig())


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", RUNS)
def test_equals_the_authors_pipeline(name):
    kind, steps, threshold, most = RUNS[name]
    config = dx.AdaptiveDiffusionConfig(threshold, most, cap="reference")
    pipe = dx.enable(tiny_sd.make(scheduler(kind)), config)
    found = torch.tensor([tiny_sd.numbers(latents) for latents in tiny_sd.draw(pipe, steps)], dtype=torch.float64)
    assert list(dx.adaptive_diffusion_stats(pipe).skipped) == GOLDEN["runs"][name]["skipped"]
    expected = torch.tensor(GOLDEN["runs"][name]["latents"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# --- loads, card -----------------------------------------------------------------------------------------------------


def picture(pipe, steps=12):
    generator = torch.Generator().manual_seed(0)
    return pipe("a person with tan skin", num_inference_steps=steps, generator=generator, output_type="np").images


@pytest.mark.proof("loads")
def test_the_recipe_brings_it_back(pipe, tmp_path):
    config = dx.AdaptiveDiffusionConfig(0.3, max_skip_steps=2, cap="reference")
    plain = picture(pipe)
    dx.enable(pipe, copy.deepcopy(config))
    expected = picture(pipe)
    skipped = dx.adaptive_diffusion_stats(pipe)
    assert skipped.skipped and not (expected == plain).all()
    dx.save_pretrained(pipe, tmp_path)
    loaded = dx.Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert [entry.config for entry in dx.status(loaded)] == [config]
    assert (picture(loaded) == expected).all() and dx.adaptive_diffusion_stats(loaded) == skipped


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    card, names = run_card("adaptive_diffusion")
    assert names["image"].size == (32, 32)
    assert "2410.09873" in card and "Apache-2.0" in card
