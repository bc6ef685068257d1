"""Time-shift sampling, by the five proofs."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusers_ext as dx
from diffusers_ext.hooks.time_shift_sampler import TimeShiftConfig, shifted_timesteps
from diffusers_ext.oracles.solvers import sampler_error
from tests.common.suite import CommonCase
from tests.unets import conditional, inputs, spatio_temporal, unconditional

COMMON = CommonCase(
    settings=[
        {"window": 200, "cutoff": 100, "beta_schedule": "scaled_linear"},
        {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.4]},
    ]
)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "time_shift_sampler.json").read_text())

exact = pytest.mark.proof("exact")
LEVELS = TimeShiftConfig().levels()


def of_variance(*variances: float) -> torch.Tensor:
    """Samples `(n, 3, 8, 8)` in float64 with exactly these unbiased variances."""
    x = torch.randn(len(variances), 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return (0.3 + x * torch.tensor(variances, dtype=torch.float64)[:, None].sqrt()).reshape(-1, 3, 8, 8)


def small_data(scheduler, n: int = 3, size: int = 8, width: float = 0.1) -> dx.GaussianMixtureDenoiser:
    """The exact denoiser of a mixture whose variance over pixels is small, as the method wants it."""
    means = 0.3 * torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return dx.GaussianMixtureDenoiser.from_components(means, width**2, scheduler)


def ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")


def noise(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def asked(module) -> list:
    """Timesteps that the forward of a denoiser really gets, as it is called."""
    seen, forward = [], module.forward

    def recording(*args, **kwargs):
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        seen.append(torch.as_tensor(t).clone())
        return forward(*args, **kwargs)

    module.forward = recording
    return seen


# --- the rule --------------------------------------------------------------------------------------------------------


@exact
@settings(max_examples=100, deadline=None)
@given(data=st.data(), w=st.integers(0, 80), t=st.integers(201, 999))
def test_the_level_of_the_variance_is_found_inside_the_window(data, w, t):
    tau = data.draw(st.integers(max(t - w // 2, 0), min(t + w // 2, 999)))
    low, high = float(LEVELS[max(t - w // 2, 0)]), float(LEVELS[min(t + w // 2, 999)])
    x = of_variance(float(LEVELS[tau]), 1.5, low / 2)
    found = shifted_timesteps(x, torch.tensor(t), LEVELS, w, 200)
    assert found.tolist() == [tau, min(t + w // 2, 999), max(t - w // 2, 0)]
    assert found.dtype == torch.int64 and low <= high


@exact
def test_up_to_the_cutoff_the_timestep_stays():
    x = of_variance(1.0, 1.0)
    assert shifted_timesteps(x, torch.tensor([200, 201]), LEVELS, 40, 200).tolist() == [200, 221]
    assert shifted_timesteps(x, torch.tensor(999), LEVELS, 40, 999).tolist() == [999, 999]


@exact
def test_each_sample_has_its_own_timestep():
    x = of_variance(*torch.linspace(0.1, 1.1, 7).tolist())
    whole = shifted_timesteps(x, torch.tensor(400), LEVELS, 300, 200)
    single = [shifted_timesteps(row[None], torch.tensor(400), LEVELS, 300, 200).item() for row in x]
    assert whole.tolist() == single and len(set(single)) > 3
    mixed = shifted_timesteps(x[:2], torch.tensor([300, 900]), LEVELS, 40, 200)
    alone = [shifted_timesteps(x[i : i + 1], torch.tensor(t), LEVELS, 40, 200).item() for i, t in ((0, 300), (1, 900))]
    assert mixed.tolist() == alone


@exact
def test_real_timesteps_move_by_whole_steps_and_keep_their_dtype():
    t = torch.tensor(400.25)
    level = 0.75 * LEVELS[405] + 0.25 * LEVELS[406]
    found = shifted_timesteps(of_variance(float(level), 2.0), t, LEVELS, 20, 200)
    assert found.tolist() == [405.25, 410.25] and found.dtype == torch.float32
    assert shifted_timesteps(of_variance(0.01), t, LEVELS, 1, 200).tolist() == [400.25]


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_picks_a_level_as_near(dtype):
    x = of_variance(*torch.linspace(0.2, 0.9, 8).tolist())
    v = x.to(dtype).double().flatten(1).var(1)
    found = shifted_timesteps(x.to(dtype), torch.tensor(500), LEVELS, 700, 0)
    best = (v[:, None] - LEVELS[150:851]).abs().min(1).values
    torch.testing.assert_close((v - LEVELS[found]).abs(), best, rtol=0, atol=1e-6)


# --- the hook --------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("config", [{"window": 0}, {"window": 1}, {"cutoff": 1000}, {"cutoff": 999}], ids=str)
@pytest.mark.parametrize("make", [unconditional, conditional])
def test_without_a_window_or_above_the_cutoff_it_is_bit_equal(make, config):
    plain, hooked = make(1), make(1)
    dx.enable(hooked, TimeShiftConfig(**config))
    for step in range(3):
        call = inputs(plain, step)
        with torch.no_grad():
            assert torch.equal(plain(**call).sample, hooked(**call).sample)


@exact
def test_a_run_is_the_sampler_with_the_network_asked_at_the_shifted_timesteps():
    """Against a slow loop: each sample by itself, each timestep of the window tried in turn."""
    denoiser, scheduler = small_data(ddim()), ddim()
    bar = scheduler.alphas_cumprod.double()
    x = noise(4)
    hooked = copy.deepcopy(denoiser)
    dx.enable(hooked, TimeShiftConfig(window=60, cutoff=250))
    scheduler.set_timesteps(10)
    seen, state = asked(hooked), x
    for t in scheduler.timesteps:
        state = scheduler.step(hooked(state, t).sample, t, state).prev_sample

    slow, times = x.clone(), scheduler.timesteps.tolist()
    for i, t in enumerate(times):
        chosen = []
        for row in slow:
            v = ((row - row.mean()) ** 2).sum() / (row.numel() - 1)
            tried = range(max(t - 30, 0), min(t + 30, 999) + 1)
            chosen.append(min(tried, key=lambda tau, v=v: abs(float(v) - 1 + float(bar[tau]))) if i and t > 250 else t)
        assert seen[i].reshape(-1).expand(4).tolist() == chosen
        eps = denoiser(slow, torch.tensor(chosen)).sample
        a, b = bar[t], bar[times[i + 1]] if i + 1 < len(times) else torch.tensor(1.0, dtype=torch.float64)
        slow = b.sqrt() * (slow - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    torch.testing.assert_close(state, slow, rtol=0, atol=1e-5)
    assert any(len(set(row.tolist())) > 1 for row in seen[1:] if row.ndim)


@exact
def test_positional_keyword_and_plain_number_timesteps_are_all_shifted():
    calls = []
    for how in range(3):
        denoiser = small_data(ddim())
        dx.enable(denoiser, TimeShiftConfig())
        seen = asked(denoiser)
        for t in (900, 700):
            x = noise(2) * 0.5
            args = [(x, torch.tensor(t)), (x,), (x, t)][how]
            denoiser(*args, **({"timestep": torch.tensor(t)} if how == 1 else {}))
        calls.append([row.reshape(-1).expand(2).tolist() for row in seen])
    assert calls[0] == calls[1] == calls[2] == [[900, 900], [680, 680]]


@exact
def test_the_variance_is_that_of_the_noisy_channels():
    """Inpainting networks get conditions behind the latents, and DiT learns a variance beside the mean."""
    torch.manual_seed(0)
    inpainting = UNet2DConditionModel(
        in_channels=9, out_channels=4, sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=8, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    dit = DiTTransformer2DModel(2, 4, in_channels=4, out_channels=8, num_layers=1, sample_size=8, norm_num_groups=4)
    low = 0.5 * torch.randn(2, 4, 8, 8)
    extra = 5 * torch.randn(2, 5, 8, 8)
    for model, sample, more in (
        (inpainting, torch.cat([low, extra], 1), {"encoder_hidden_states": torch.zeros(2, 3, 8)}),
        (dit, low, {"class_labels": torch.tensor([1, 2])}),
    ):
        dx.enable(model, TimeShiftConfig())
        seen = asked(model)
        with torch.no_grad():
            for t in (900, 700):
                model(sample, timestep=torch.tensor([t, t]), **more)
        assert seen[1].tolist() == [680, 680]


@exact
@pytest.mark.parametrize(("window", "cutoff"), [(10, 200), (40, 200), (40, 600)])
def test_with_an_exact_score_it_does_not_help(window, cutoff):
    """There is no exposure bias to correct, and asking at another timestep is an error.

    The solver has to be accurate for that to show: where it is not, as DDIM with few steps, its own bias is corrected a
    little, by up to some percent.
    """
    denoiser, x = small_data(ddim(), width=0.3), noise(4)
    stock = sampler_error(DPMSolverMultistepScheduler(timestep_spacing="trailing"), denoiser, 100, x)
    with dx.enabled(denoiser, TimeShiftConfig(window=window, cutoff=cutoff)):
        shifted = sampler_error(DPMSolverMultistepScheduler(timestep_spacing="trailing"), denoiser, 100, x)
    assert shifted.rmse > 4 * stock.rmse and shifted.calls == stock.calls == 100


@exact
def test_a_sample_of_another_noise_level_is_understood_better_at_the_shifted_timestep():
    """Exposure bias by construction: samples of the level at 430 arrive where the grid says 400, and reverse."""
    denoiser = small_data(ddim(), width=0.02, size=16)
    for true, nominal in ((430, 400), (400, 430)):
        x0 = denoiser.sample(32, generator=torch.Generator().manual_seed(0))
        bar = ddim().alphas_cumprod.double()[true]
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        x = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
        t = shifted_timesteps(x, torch.tensor(nominal), LEVELS, 100, 200)
        errors = [(denoiser(x, time).sample - eps).square().mean() for time in (torch.tensor(nominal), t)]
        assert errors[1] < errors[0]


@exact
def test_a_second_run_begins_unshifted_whoever_announces_it():
    pipe = DDPMPipeline(small_data(ddim()), ddim())
    pipe.set_progress_bar_config(disable=True)
    dx.enable(pipe, TimeShiftConfig(window=100))
    seen = asked(pipe.unet)
    for _ in range(2):
        pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
    assert [row.ndim for row in seen] == 2 * [0, 1, 1, 1]
    bare = small_data(ddim())
    dx.enable(bare, TimeShiftConfig(window=100))
    seen = asked(bare)
    for t in (900, 600, 800, 500):  # it goes up: a new run
        bare(noise(2), torch.tensor(t))
    assert [row.ndim for row in seen] == [0, 1, 0, 1]


@exact
def test_it_warns_where_the_data_have_unit_variance_and_only_there():
    latents = dx.GaussianDenoiser.from_moments(torch.zeros(3, 16, 16), torch.ones(3, 16, 16), ddim())
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for denoiser, warned in ((latents, True), (small_data(ddim(), size=16), False)):
        dx.enable(denoiser, TimeShiftConfig())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                sampler_error(ddim(), denoiser, 20, x)
        assert [("variance of the data" in str(w.message)) for w in caught] == [True] * warned  # once
        dx.disable(denoiser)


# --- the process -----------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("cls", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_the_process_comes_from_any_scheduler_of_a_beta_schedule(cls, schedule):
    scheduler = cls(beta_schedule=schedule, beta_start=0.0005, beta_end=0.015, num_train_timesteps=500)
    config = TimeShiftConfig.from_scheduler(scheduler, window=30, cutoff=100)
    assert (config.window, config.cutoff, config.num_train_timesteps) == (30, 100, 500)
    torch.testing.assert_close(config.levels(), 1 - scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6)


@exact
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        "ddim",
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_another_process_or_prediction_is_refused(scheduler):
    with pytest.raises(ValueError, match="`scheduler` "):
        TimeShiftConfig.from_scheduler(scheduler)


@exact
def test_networks_that_are_no_denoisers_of_a_beta_schedule_are_refused():
    for module in (spatio_temporal(1), ControlNetModel.from_unet(conditional(1))):
        with pytest.raises(ValueError, match="time_shift_sampler"):
            dx.enable(module, TimeShiftConfig())


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
def test_picks_the_timesteps_of_the_authors():
    """Their `apply_time_shift` of the DEIS sampler, whose window is to either side.

    Not taken over from there: it shifts the first step of a run as well. Their DPM-Solver takes the variance of the
    network's output in place of the sample's, and it and their PNDM fail where the window reaches the last timestep.
    """
    for run in GOLDEN["runs"]:
        scales = torch.tensor(run["scales"], dtype=torch.float64)
        x = torch.sin(torch.arange(len(scales) * 192, dtype=torch.float64) * 0.37) + 0.2
        x = x.reshape(-1, 3, 8, 8) * scales[:, None, None, None]
        found = shifted_timesteps(x.float(), torch.tensor(run["t"]), LEVELS, 2 * run["window"], run["cutoff"])
        assert found.tolist() == run["chosen"], run


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_process_travels_in_the_recipe(tmp_path):
    betas = torch.linspace(0.0002, 0.03, 1000).tolist()
    config = TimeShiftConfig.from_scheduler(DDIMScheduler(trained_betas=betas), window=50)
    pipe = DDPMPipeline(unconditional(1), ddim())
    dx.enable(pipe, config)
    dx.save_pretrained(pipe, tmp_path)
    loaded = dx.Pipeline.from_pretrained(tmp_path)
    (entry,) = dx.status(loaded)
    assert entry.config == config and dataclasses.asdict(entry.config)["trained_betas"] == betas
    torch.testing.assert_close(entry.config.levels(), config.levels(), rtol=0, atol=0)


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card

    card = method_card("time_shift_sampler")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    for snippet in snippets:
        names: dict = {}
        exec(compile(snippet, "card", "exec"), names)
        assert dx.status(names["pipe"]) == [] and len(names["images"]) == 4
    assert "2305.15583" in card and "Apache-2.0" in card
