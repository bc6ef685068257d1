"""The grid that all our schedulers share, against diffusers' DPM-Solver++ and by itself."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import is_scipy_available
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.schedulers._grid import PREDICTION_TYPES, GridScheduler, with_grid_arguments

from .multistep import MultistepScheduler

PROCESS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SPACINGS = ("linspace", "leading", "trailing")
needs_scipy = pytest.mark.skipif(not is_scipy_available(), reason="`use_beta_sigmas` needs scipy")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(scheduler, steps: int | None, x: torch.Tensor, begin: int = 0, **grid) -> torch.Tensor:
    """A sampling loop with any smooth prediction, which moves little."""
    scheduler.set_timesteps(steps, **grid)
    if begin:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(torch.tanh(0.7 * x + float(t) / 1000).to(x.dtype), t, x).prev_sample
    return x


def pair(**options):
    """Ours of order 2, which makes the same steps as upstream's, and that."""
    return MultistepScheduler(midpoint=True, **options), DPMSolverMultistepScheduler(lower_order_final=False, **options)


# --- against upstream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999])
def test_plain_grids_are_those_of_upstream(spacing, final, steps):
    ours, theirs = pair(**PROCESS, timestep_spacing=spacing, final_sigmas_type=final, steps_offset=1 if spacing == "leading" else 0)  # fmt: skip
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert ours.timesteps.dtype == theirs.timesteps.dtype == torch.int64
    beyond = int((theirs.timesteps[0] - 999).clamp(min=0))  # an offset that leads out of the training timesteps
    assert torch.equal(ours.timesteps, theirs.timesteps - beyond) and ours.num_inference_steps == steps
    if beyond:
        return
    # Upstream interpolates sigma itself between whole timesteps, and timesteps are whole: the same but for rounding.
    last_is_clean = float(theirs.sigmas[-2]) <= float(theirs.sigmas[-1])  # upstream would then stand still or go back
    count = steps if last_is_clean else steps + 1
    assert torch.allclose(ours.sigmas[:count], theirs.sigmas[:count], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 10, 40])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_steps_are_those_of_upstream(spacing, steps, kind):
    x = noise(2, 3, 4, 4)
    ours, theirs = pair(**PROCESS, timestep_spacing=spacing, prediction_type=kind)
    wanted = run(theirs, steps, x)
    assert (run(ours, steps, x) - wanted).abs().max() < 1e-5 * (1 + wanted.abs().max())


@pytest.mark.parametrize("grid", ["karras", "exponential", pytest.param("beta", marks=needs_scipy)])
@pytest.mark.parametrize("steps", [2, 7, 30])
def test_other_grids_have_upstream_s_levels_and_real_timesteps(grid, steps):
    ours, theirs = pair(**PROCESS, **{f"use_{grid}_sigmas": True})
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-7)
    # Upstream cuts or rounds them, so that the model is told another level than that of its input.
    assert (ours.timesteps - theirs.timesteps).abs().max() <= 1.0
    levels = ((1 - ours.alphas_cumprod) / ours.alphas_cumprod).double().sqrt().numpy()
    at = np.exp(np.interp(ours.timesteps.numpy(), np.arange(1000), np.log(levels)))
    assert at == pytest.approx(ours.sigmas[:-1].numpy(), rel=1e-3)
    assert float(ours.timesteps[0]) == pytest.approx(999, abs=1e-3)
    assert float(ours.timesteps[-1]) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_flow_grid_is_that_of_flow_match_euler_but_for_pure_noise(shift, steps):
    ours = MultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=shift).config)
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert ours.config.use_flow_sigmas and ours.config.prediction_type == "flow_prediction"
    ours.set_timesteps(steps)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))  # as the pipelines call it
    assert torch.allclose(ours.sigmas[1:], theirs.sigmas[1:], atol=1e-6)
    assert torch.allclose(ours.timesteps[1:], theirs.timesteps[1:], atol=1e-3)
    assert 1 - shift / 1000 - 1e-6 < float(ours.sigmas[0]) < 1.0 == float(theirs.sigmas[0])
    assert float(ours.timesteps[0]) == pytest.approx(1000 * float(ours.sigmas[0]), abs=1e-3)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_dynamic_shift_is_that_of_flow_match_euler(kind):
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    ours = MultistepScheduler.from_config(theirs.config)
    ours.set_timesteps(8, mu=0.9)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=0.9)
    assert torch.allclose(ours.sigmas[1:], theirs.sigmas[1:], atol=1e-6)


def test_a_shift_that_a_pipeline_gives_is_ignored_without_dynamic_shifting():
    """FluxPipeline passes `mu` whatever the config says, and FlowMatchEuler then leaves it."""
    ours = MultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=1.0).config)
    ours.set_timesteps(8)
    plain = ours.sigmas
    ours.set_timesteps(8, mu=0.9)
    assert torch.equal(ours.sigmas, plain)


def test_euler_is_order_1_of_flow():
    """On rectified flow the first-order step is a straight line along the velocity."""
    ours = MultistepScheduler(solver_order=1, **FLOW)
    x = noise(2, 3, 4, 4)
    ours.set_timesteps(6)
    for i, t in enumerate(ours.timesteps):
        velocity = torch.tanh(x + float(t) / 1000)
        wanted = x + (ours.sigmas[i + 1] - ours.sigmas[i]) * velocity
        x = ours.step(velocity, t, x).prev_sample
        assert torch.allclose(x, wanted, atol=1e-5)


@pytest.mark.parametrize("timesteps", [[999, 750, 500, 250], [999], [800, 799, 3, 1]])
def test_timesteps_of_ones_own_are_those_of_upstream(timesteps):
    ours, theirs = pair(**PROCESS)
    ours.set_timesteps(timesteps=timesteps)
    theirs.set_timesteps(timesteps=timesteps)
    assert ours.timesteps.tolist() == timesteps and torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-5)
    x = noise(1, 3, 4, 4)
    assert torch.allclose(run(ours, None, x, timesteps=timesteps), run(theirs, None, x, timesteps=timesteps), atol=2e-3)


def test_levels_of_ones_own():
    ours = MultistepScheduler(**PROCESS)
    ours.set_timesteps(sigmas=[10.0, 2.0, 0.5])
    assert ours.sigmas.tolist() == [10.0, 2.0, 0.5, 0.0]
    levels = ((1 - ours.alphas_cumprod) / ours.alphas_cumprod).double().sqrt().numpy()
    assert ours.timesteps.numpy() == pytest.approx(
        np.interp(np.log([10.0, 2.0, 0.5]), np.log(levels), np.arange(1000)), rel=1e-5
    )
    flow = MultistepScheduler(**FLOW, flow_shift=3.0)
    flow.set_timesteps(sigmas=[0.75, 0.5])
    assert flow.sigmas.tolist() == pytest.approx([0.9, 0.75, 0.0]) and flow.timesteps.tolist() == pytest.approx(
        [900, 750]
    )


@pytest.mark.parametrize("begin", [1, 5, 9])
def test_a_start_in_the_middle_is_that_of_upstream(begin):
    ours, theirs = pair(**PROCESS, timestep_spacing="trailing")
    x = noise(2, 3, 4, 4)
    assert torch.allclose(run(ours, 10, x, begin), run(theirs, 10, x, begin), atol=1e-5)
    assert ours.begin_index == begin and ours.step_index == 10
    ours.set_timesteps(10)  # and without being told, by the timestep
    ours.step(x, ours.timesteps[begin], x)
    assert ours.step_index == begin + 1


@pytest.mark.parametrize("ratio", [0.9, 0.995])
def test_thresholding_is_that_of_upstream(ratio):
    options = {**PROCESS, "thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": 2.0}
    ours, theirs = pair(**options)
    ours.set_timesteps(10)
    data = 3 * noise(3, 3, 8, 8)
    assert torch.allclose(ours._thresholded(data), theirs._threshold_sample(data), atol=1e-6)
    epsilon = ours.to_noise(data, data, 4)
    point = ours.points[4]
    assert torch.allclose(point.alpha * ours.to_data(data, data, 4) + point.sigma * epsilon, data, atol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_betas_are_those_that_models_are_trained_with(schedule, rescale):
    options = {"beta_start": 0.0005, "beta_end": 0.015, "beta_schedule": schedule, "rescale_betas_zero_snr": rescale}
    ours, theirs = MultistepScheduler(**options), DDPMScheduler(**options)
    last = 999 if rescale else 1000  # upstream's trainer has pure noise there, its samplers and ours nearly
    assert torch.allclose(ours.alphas_cumprod[:last], theirs.alphas_cumprod[:last], rtol=2e-4, atol=1e-7)
    theirs = DPMSolverMultistepScheduler(**options)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)
    given = MultistepScheduler(trained_betas=ours.betas.tolist())
    assert torch.equal(given.alphas_cumprod, ours.alphas_cumprod) or rescale


# --- by itself -------------------------------------------------------------------------------------------------------


def any_grid(data) -> tuple[GridScheduler, int, dict]:
    """A scheduler of any configuration, a number of steps, and what `set_timesteps` needs besides."""
    flow = data.draw(st.booleans())
    grids = ["", "use_karras_sigmas", "use_exponential_sigmas"]
    options = {name: True for name in [data.draw(st.sampled_from(grids))] if name}
    options["final_sigmas_type"] = data.draw(st.sampled_from(["zero", "sigma_min"]))
    more = {}
    if flow:
        options |= FLOW | {"flow_shift": data.draw(st.floats(0.2, 12.0))}
        if data.draw(st.booleans()):
            options["use_dynamic_shifting"], more["mu"] = True, data.draw(st.floats(-1.0, 3.0))
    else:
        options["prediction_type"] = data.draw(st.sampled_from(["epsilon", "v_prediction", "sample"]))
        options["beta_schedule"] = data.draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]))
        options["timestep_spacing"] = data.draw(st.sampled_from(SPACINGS))
        options["steps_offset"] = data.draw(st.integers(0, 2))
        options["rescale_betas_zero_snr"] = data.draw(st.booleans())
    number = data.draw(st.one_of(st.integers(1, 30), st.sampled_from([333, 499, 500, 501, 999, 1000])))
    return MultistepScheduler(**options), number, more


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_grid_falls_from_noise_to_data_and_gives_no_nan(data):
    scheduler, number, more = any_grid(data)
    scheduler.set_timesteps(number, **more)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == len(scheduler.points) - 1 <= number
    assert len(scheduler.sigmas) == len(scheduler.points)
    lambdas = [point.lambda_ for point in scheduler.points]
    assert all(a < b for a, b in itertools.pairwise(lambdas)) and np.isfinite(lambdas[:-1]).all()
    for alpha, sigma in scheduler.points:
        if scheduler.config.use_flow_sigmas:
            assert alpha + sigma == pytest.approx(1, abs=1e-12)
        else:
            assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)
    if number <= 30:
        result = run(scheduler, number, noise(1, 1, 2, 2), **more)
        assert result.isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": 1}, FLOW]
)
@pytest.mark.parametrize("steps", [1, 2, 3, 999, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_to_a_thousand_steps(options, steps, dtype):
    result = run(MultistepScheduler(**options), steps, noise(1, 1, 2, 2).to(dtype))
    assert result.dtype == dtype and result.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_conversions_invert_each_other(data):
    scheduler, number, more = any_grid(data)
    scheduler.set_timesteps(min(number, 30), **more)
    i = data.draw(st.integers(0, scheduler.num_inference_steps - 1))
    x0, epsilon = noise(1, 1, 2, 2, dtype=torch.float64), noise(1, 1, 2, 2, seed=1, dtype=torch.float64)
    alpha, sigma = scheduler.points[i]
    sample = alpha * x0 + sigma * epsilon
    output = {
        "epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0, "flow_prediction": epsilon - x0,
    }[scheduler.config.prediction_type]  # fmt: skip
    slack = 1e-12 / min(alpha, sigma)
    assert torch.allclose(scheduler.to_data(output, sample, i), x0, rtol=0, atol=1e-9 + slack)
    assert torch.allclose(scheduler.to_noise(output, sample, i), epsilon, rtol=0, atol=1e-9 + slack)


def test_bfloat16_states_are_stepped_in_float32():
    x = noise(2, 3, 4, 4)
    low = run(MultistepScheduler(**PROCESS), 10, x.bfloat16())
    full = run(MultistepScheduler(**PROCESS), 10, x)
    assert low.dtype == torch.bfloat16 and (low.float() - full).abs().max() < 0.05 * full.abs().max()
    scheduler = MultistepScheduler(**PROCESS)
    scheduler.set_timesteps(10)
    one = scheduler.step(x.bfloat16(), scheduler.timesteps[0], x.bfloat16()).prev_sample
    scheduler.set_timesteps(10)
    other = scheduler.step(x.bfloat16().float(), scheduler.timesteps[0], x.bfloat16().float()).prev_sample
    assert torch.equal(one, other.bfloat16())


def test_a_step_leaves_its_inputs_alone():
    scheduler = MultistepScheduler(**PROCESS)
    scheduler.set_timesteps(4)
    x, output = noise(1, 3, 4, 4), noise(1, 3, 4, 4, seed=1)
    kept, told = x.clone(), output.clone()
    for t in scheduler.timesteps:
        found = scheduler.step(output, t, x, return_dict=False)
        assert isinstance(found, tuple) and torch.equal(x, kept) and torch.equal(output, told)


@pytest.mark.parametrize("steps", [5, 1000])
def test_noise_is_added_as_in_training(steps):
    ours, theirs = MultistepScheduler(**PROCESS), DDPMScheduler(**PROCESS)
    ours.set_timesteps(steps)
    x0, epsilon, times = noise(4, 3, 4, 4), noise(4, 3, 4, 4, seed=1), torch.tensor([0, 10, 500, 999])
    assert torch.allclose(ours.add_noise(x0, epsilon, times), theirs.add_noise(x0, epsilon, times), atol=1e-5)
    flow = MultistepScheduler(**FLOW)
    euler = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(10)
    euler.set_timesteps(sigmas=np.append(1 - 1 / 1000, np.linspace(0.9, 0.1, 9)))
    t = flow.timesteps[3:4]
    assert torch.allclose(
        flow.scale_noise(x0, t, epsilon), euler.scale_noise(x0, euler.timesteps[3:4], epsilon), atol=1e-5
    )
    assert torch.equal(flow.scale_noise(x0, t, epsilon), flow.add_noise(x0, epsilon, t))


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        DDIMScheduler(**PROCESS, steps_offset=1, timestep_spacing="leading"),
        PNDMScheduler(**PROCESS, prediction_type="v_prediction"),
        EulerDiscreteScheduler(**PROCESS, use_karras_sigmas=True),
        DPMSolverMultistepScheduler(**PROCESS, final_sigmas_type="sigma_min", thresholding=True),
        UniPCMultistepScheduler(**FLOW, flow_shift=2.0),
    ],
    ids=lambda made: type(made).__name__,
)
def test_the_config_of_another_class_is_taken_over_and_given_back(made):
    ours = MultistepScheduler.from_config(made.config, solver_order=3)
    shared = inspect.signature(GridScheduler.__init__).parameters.keys() & inspect.signature(type(made).__init__).parameters.keys()  # fmt: skip
    given = set(made.config) - set(made.config["_use_default_values"])
    for name in shared & given - {"self"}:
        assert ours.config[name] == made.config[name], name
    assert ours.config.solver_order == 3
    back = type(made).from_config(ours.config)
    for name in shared & given - {"self"}:
        assert back.config[name] == made.config[name], name


def test_saved_and_loaded(tmp_path):
    made = MultistepScheduler(solver_order=3, kind="noise", **PROCESS, use_karras_sigmas=True, final_sigmas_type="sigma_min")  # fmt: skip
    made.save_pretrained(tmp_path)
    loaded = MultistepScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in made.config.items() if k[0] != "_"
    }
    x = noise(1, 3, 4, 4)
    assert torch.equal(run(made, 6, x), run(loaded, 6, x))


def test_the_arguments_of_the_grid_come_after_those_of_the_subclass():
    class Own(GridScheduler):
        @register_to_config
        @with_grid_arguments
        def __init__(self, own: int = 7, timestep_spacing: str = "trailing") -> None:
            self.twice = 2 * own
            self.seen = self.alphas_cumprod.shape  # the grid is set up before

    names = list(inspect.signature(Own.__init__).parameters)
    grid = list(inspect.signature(GridScheduler.__init__).parameters)[1:]
    assert names[:3] == ["self", "own", "timestep_spacing"] and set(names) == {"self", "own", *grid}
    assert len(names) == len(set(names)), "a default of one's own replaces that of the grid"
    made = Own(own=3, beta_end=0.01)
    assert made.twice == 6 and made.seen == (1000,)
    assert made.config.own == 3 and made.config.timestep_spacing == "trailing" and made.config.beta_end == 0.01
    assert set(grid) <= set(made.config)
    with pytest.raises(TypeError, match="positional"):
        Own(4)  # diffusers would note it as a default, and `from_config` drop it
    with pytest.raises(TypeError, match="unknown"):
        Own(unknown=1)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "score"}, "`prediction_type` is 'score'; allowed are 'epsilon'"),
        ({"timestep_spacing": "random"}, "`timestep_spacing` is 'random'"),
        ({"final_sigmas_type": "one"}, "`final_sigmas_type` is 'one'"),
        ({"time_shift_type": "cubic"}, "`time_shift_type` is 'cubic'"),
        ({"beta_schedule": "exp"}, "`beta_schedule` is 'exp'"),
        ({"num_train_timesteps": 1}, "`num_train_timesteps` is 1"),
        ({"num_train_timesteps": 10.0}, "`num_train_timesteps` is 10.0"),
        ({"flow_shift": 0.0}, "`flow_shift` is 0.0"),
        ({"dynamic_thresholding_ratio": 0.0}, "`dynamic_thresholding_ratio` is 0.0"),
        ({"sample_max_value": -1.0}, "`sample_max_value` is -1.0"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "Only one of `use_karras_sigmas`"),
        ({"use_flow_sigmas": True}, "'epsilon' with `use_flow_sigmas` True"),
        ({"prediction_type": "flow_prediction"}, "'flow_prediction' with `use_flow_sigmas` False"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        MultistepScheduler(**options)


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({}, {}, "Give one of"),
        ({}, {"timesteps": [5, 1], "sigmas": [2.0, 1.0]}, "Give one of"),
        ({}, {"num_inference_steps": 3, "timesteps": [5, 1]}, "`num_inference_steps` is 3, and the list has 2"),
        ({}, {"num_inference_steps": 0}, "`num_inference_steps` is 0; allowed are integers from 1 to 1000"),
        ({}, {"num_inference_steps": 1001}, "`num_inference_steps` is 1001"),
        ({}, {"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5"),
        ({}, {"timesteps": [1, 5]}, "`timesteps` is .* strictly falling"),
        ({}, {"timesteps": [5, 5]}, "strictly falling"),
        ({}, {"timesteps": []}, "strictly falling"),
        ({}, {"timesteps": [float("nan")]}, "strictly falling"),
        ({}, {"timesteps": [1000, 1]}, "allowed are values from 0 to 999"),
        ({}, {"timesteps": [10, -1]}, "allowed are values from 0 to 999"),
        (FLOW, {"sigmas": [1.5, 0.5]}, "noise levels"),
        (FLOW, {"sigmas": [0.5, 0.0]}, "noise levels"),
        (FLOW | {"use_dynamic_shifting": True}, {"num_inference_steps": 4}, "`mu` is None"),
    ],
)
def test_bad_grids_leave_the_last_one(options, grid, message):
    scheduler = MultistepScheduler(**options)
    more = {"mu": 0.5} if options.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(4, **more)
    before = scheduler.timesteps.tolist(), scheduler.points
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**grid)
    assert (scheduler.timesteps.tolist(), scheduler.points) == before


@pytest.mark.parametrize("name", ["invert_sigmas", "shift_terminal", "stochastic_sampling"])
def test_flow_configs_that_mean_something_else_are_refused(name):
    config = dict(FlowMatchEulerDiscreteScheduler().config) | {name: 0.1}
    with pytest.raises(ValueError, match=f"`{name}` is 0.1"):
        MultistepScheduler.from_config(config)


def test_steps_out_of_order_are_refused():
    scheduler, x = MultistepScheduler(), noise(1, 1, 2, 2)
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="`timestep` is 7; the grid has"):
        scheduler.step(x, 7, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="All 2 steps are done"):
        scheduler.step(x, 0, x)
    assert PREDICTION_TYPES == ("epsilon", "v_prediction", "sample", "flow_prediction") and len(scheduler) == 1000
