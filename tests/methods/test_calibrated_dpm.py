"""Calibrated diffusion models, by the five proofs."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, StableDiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.schedulers._statistics import GuideScheduler
from tests.common import models
from tests.common.suite import CommonCase
from tests.unets import unconditional


def small(parts: int = 1) -> dx.CalibratedDPMConfig:
    table = torch.linspace(-0.1, 0.2, 2 * parts).view(parts, 2, 1)
    return dx.CalibratedDPMConfig.from_tensor(table, [0.0, 1000.0])


COMMON = CommonCase(
    settings=[{"table": small().table, "shape": [1], "timesteps": [0.0, 1000.0]}], make=lambda _model: small()
)
exact = pytest.mark.proof("exact")
SHAPE = (3, 8, 8)


def pipeline(**process) -> DDPMPipeline:
    return DDPMPipeline(unconditional(1), DDIMScheduler(clip_sample=False, **process))


def data(n: int, seed: int = 0) -> torch.Tensor:
    mean = torch.linspace(-0.5, 1, 192).view(SHAPE)
    return mean + 0.5 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def losses(pipe, clean, noise, level: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Score-matching loss on antithetic noise in the target of the model, and the mean error there."""
    guide = GuideScheduler.from_config(pipe.scheduler.config)
    guide.lay_times(levels)
    (alpha, sigma), kind, errors = guide.levels[level], pipe.scheduler.config.prediction_type, []
    for n in (noise, -noise):
        target = {"epsilon": n, "sample": clean, "v_prediction": alpha * n - sigma * clean}[kind]
        found = pipe.unet(alpha * clean + sigma * n, torch.tensor(guide.times[level])).sample
        errors.append((found - target).double())
    both = torch.cat(errors)
    return both.square().flatten(1).sum(1).mean(), both.mean(0)


@exact
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_falls_by_the_square_of_the_mean_error(kind):
    """On the data of the table, with each noise and its negative; per timestep of the table, exactly."""
    pipe, clean = pipeline(prediction_type=kind), data(24)
    config = dx.calibrate(pipe, 24, samples=clean, num_levels=3, batch_size=24, seed=5)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    for level in range(3):
        before, mean = losses(pipe, clean, noise, level, 3)
        torch.testing.assert_close(config.tensor()[0, 2 - level].double(), mean, rtol=1e-4, atol=1e-6)
        with dx.enabled(pipe, config):
            after, rest = losses(pipe, clean, noise, level, 3)
        drop = float(mean.square().sum())
        assert float(before - after) == pytest.approx(drop, rel=1e-4) and drop > 0
        assert float(rest.abs().max()) < 1e-5


@exact
def test_the_loss_falls_on_data_that_the_table_has_not_seen():
    pipe = pipeline()
    config = dx.calibrate(pipe, 64, samples=data(64), num_levels=4, batch_size=64)
    clean = data(64, seed=1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    for level in range(4):
        before, _ = losses(pipe, clean, noise, level, 4)
        with dx.enabled(pipe, config):
            assert float(losses(pipe, clean, noise, level, 4)[0]) < float(before), level


@exact
def test_a_model_of_exact_scores_has_nothing_to_calibrate():
    scheduler = DDIMScheduler(clip_sample=False)
    mean = torch.linspace(-1, 1, 4).view(1, 2, 2)
    pipe = DDPMPipeline(dx.GaussianDenoiser.from_moments(mean, torch.ones(1, 2, 2), scheduler), scheduler)
    samples = pipe.unet.sample(4000, generator=torch.Generator().manual_seed(0))
    samples = torch.cat([samples, 2 * mean - samples])  # their mean is that of the distribution
    with pytest.warns(UserWarning, match="noise of its estimate"):
        config = dx.calibrate(pipe, 8000, samples=samples, num_levels=3, batch_size=8000)
    assert float(config.tensor().abs().max()) < 1e-6


@exact
def test_a_zero_table_changes_nothing_and_the_table_is_linear_between_timesteps():
    model = unconditional(1)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = {t: model(x, t).sample for t in (0, 250, 700, 999)}
        zero = dx.CalibratedDPMConfig.from_tensor(torch.zeros(1, 2, *SHAPE), [0, 500])
        table = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
        for config, expected in (
            (zero, {t: 0 for t in plain}),
            (
                dx.CalibratedDPMConfig.from_tensor(table, [0, 500]),
                {0: table[0, 0], 250: (table[0, 0] + table[0, 1]) / 2, 700: table[0, 1], 999: table[0, 1]},
            ),
            (dx.CalibratedDPMConfig.from_tensor(table[:, :1], [300]), {t: table[0, 0] for t in plain}),
        ):
            with dx.enabled(model, config):
                for t, error in expected.items():
                    torch.testing.assert_close(model(x, t).sample, plain[t] - error, rtol=0, atol=1e-6)
                both = model(x, torch.tensor([0, 250]), return_dict=False)[0]  # a timestep a sample
                for i, t in enumerate((0, 250)):
                    one = model(x, t).sample[i]
                    torch.testing.assert_close(both[i], one, rtol=0, atol=1e-5)


@exact
def test_halves_of_a_guided_batch_have_tables_of_their_own():
    pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"), dtype=torch.float32)
    prompts = ["a person with tan skin", "a person with pale skin"]
    options = {"samples": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), "num_levels": 2}
    guided = dx.calibrate(pipe, prompts, **options, guidance_scale=3.0)
    plain = dx.calibrate(pipe, prompts, **options, guidance_scale=1.0)
    assert (guided.parts, plain.parts) == (2, 1)
    # The second half is the one with prompts.
    torch.testing.assert_close(guided.tensor()[1], plain.tensor()[0], rtol=1e-3, atol=1e-4)
    dx.enable(pipe.unet, guided)
    with pytest.raises(ValueError, match="3 samples"):
        pipe.unet(torch.zeros(3, 4, 16, 16), 10, encoder_hidden_states=torch.zeros(3, 77, 64))


@exact
def test_a_learned_variance_is_left_alone():
    dit = models.dit()
    inputs = models.MODELS["DiTTransformer2DModel"].call(dit)
    channels = inputs["hidden_states"].shape[1]
    config = dx.CalibratedDPMConfig.from_tensor(torch.ones(1, 1, channels - 1, 8, 8), [0])
    with torch.no_grad():
        plain = dit(**inputs).sample
        with dx.enabled(dit, config):
            found = dit(**inputs).sample
    torch.testing.assert_close(found[:, : channels - 1], plain[:, : channels - 1] - 1)
    assert torch.equal(found[:, channels - 1 :], plain[:, channels - 1 :])


@exact
def test_on_transformers():
    """Flux takes timesteps between 0 and 1; a second call for the negative prompt is refused."""
    stock = models.STOCKS["tiny-dit"]
    dit = stock.make()
    samples = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = dx.calibrate(dit, [3, 4, 3], samples=samples, num_levels=3, guidance_scale=1.0)
    assert (config.shape, config.parts, config.timesteps) == ([4, 8, 8], 1, [0.0, 499.5, 999.0])
    plain = stock.draw(dit)
    assert not torch.equal(stock.draw(dx.enable(dit, config)), plain)

    stock = models.STOCKS["avatars-flow"]
    flux = stock.make()
    call = {"height": 32, "width": 32, "max_sequence_length": 32}
    samples = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    config = dx.calibrate(flux, ["a smile", "a hat"], samples=samples, num_levels=2, **call)
    assert (config.shape, config.parts) == ([64, 16], 1)
    assert config.timesteps == pytest.approx([0.001, 0.999])
    with pytest.raises(ValueError, match="2 times a step"):
        dx.calibrate(flux, ["a", "b"], samples=samples, num_levels=2, **call, true_cfg_scale=2.0, negative_prompt="")
    assert not flux.transformer._forward_hooks


@exact
def test_an_interrupted_calibration_goes_on(tmp_path):
    pipe, clean = pipeline(), data(6)
    file, call = tmp_path / "calibration.safetensors", {"samples": clean, "num_levels": 2, "batch_size": 2}
    whole = dx.calibrate(pipe, 6, **call)
    forward, count = pipe.unet.forward, []

    def broken(*args, **kwargs):
        count.append(0)
        if len(count) > 7:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    pipe.unet.forward = broken
    with pytest.raises(KeyboardInterrupt):
        dx.calibrate(pipe, 6, **call, checkpoint=file)
    del pipe.unet.forward
    assert not pipe.unet._forward_hooks and file.exists()
    for _ in range(2):  # the second time all is there
        assert dx.calibrate(pipe, 6, **call, checkpoint=file) == whole
    with pytest.raises(ValueError, match="other settings"):
        dx.calibrate(pipe, 6, **{**call, "num_levels": 3}, checkpoint=file)


@exact
def test_wrong_arguments():
    table = torch.zeros(1, 2, 3)
    text = dx.CalibratedDPMConfig.from_tensor(table, [0, 1]).table
    for name, values in {
        "table": (text + "A", text[:-4], "no base64!"),
        "shape": ([], [3.0], [0], "3"),
        "timesteps": ([1, 0], [0, float("nan")], []),
        "parts": (0, 1.5, True),
    }.items():
        for value in values:
            given = {"table": text, "shape": [3], "timesteps": [0.0, 1.0], "parts": 1, name: value}
            with pytest.raises(ValueError, match=f"`{name}`"):
                dx.CalibratedDPMConfig(**given)
    with pytest.raises(ValueError, match="`num_levels`"):
        dx.calibrate(pipeline(), 2, num_levels=0)
    with pytest.raises(ValueError, match="`samples`"):
        dx.calibrate(pipeline(), 2, samples=data(3))
    with pytest.raises(ValueError, match="`conditions`"):
        dx.calibrate(pipeline(), 1, samples=data(1))


@pytest.mark.proof("reference")
def test_against_an_independent_slow_derivation():
    """The authors' code keeps mean noise predictions and subtracts them (v and flow are not in it); here it is done again
    sample by sample, in float64, with a generator of its own for another set of noises, on which both must agree."""
    pipe, clean = pipeline(), data(400)
    config = dx.calibrate(pipe, 400, samples=clean, num_levels=2, batch_size=200)
    alphas = pipe.scheduler.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for row, t in enumerate((0, 999)):
            total = torch.zeros(SHAPE, dtype=torch.float64)
            for chunk in clean.split(100):
                noise = torch.randn(chunk.shape, generator=generator)
                for side in (noise, -noise):
                    state = alphas[t].sqrt() * chunk + (1 - alphas[t]).sqrt() * side
                    total += pipe.unet(state.float(), t).sample.double().sum(0)
            difference = total / 800 - config.tensor()[0, row]
            assert float(difference.norm() / (total / 800).norm()) < 0.05, t


@pytest.mark.proof("loads")
def test_the_config_is_json():
    import dataclasses
    import json

    config = small(2)
    again = dx.CalibratedDPMConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and torch.equal(again.tensor(), config.tensor())


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card

    card = method_card("calibrated_dpm")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets and "2302.10688" in card
    pipe = pipeline()
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), {"pipe": pipe, "pictures": data(8)})
    assert dx.status(pipe) == []
