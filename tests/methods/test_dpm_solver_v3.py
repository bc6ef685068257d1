"""DPM-Solver-v3, by the five proofs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.oracles import sampler_error
from diffusers_ext.schedulers._model_statistics import same_marks, weight_marks
from diffusers_ext.schedulers._statistics import GuideScheduler, lead
from tests.common.suite import CommonCase
from tests.golden import make_dpm_solver_v3 as reference
from tests.multistep import MultistepScheduler


def of_noise_prediction() -> dx.DPMSolverV3Statistics:
    """For any shape and process."""
    values = [torch.full((2, 1), value) for value in (0.0, -1.0, 0.0)]
    return dx.DPMSolverV3Statistics.from_tensors(*values, -20.0, 20.0)


# Those of data prediction would magnify rounding: random networks at nearly pure noise mean data of hundreds.
COMMON = CommonCase(
    settings=[{"solver_order": 2, "pseudo_corrector": True}, {"use_corrector": False, "pseudo_predictor": True}],
    extras=lambda: {"statistics": of_noise_prediction()},
    upstream_skips=dict.fromkeys(
        ("test_add_noise_device", "test_from_save_pretrained", "test_scheduler_outputs_equivalence", "test_step_shape"),
        "it needs statistics, which diffusers' suite does not give it",
    ),
)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dpm_solver_v3.json").read_text())
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

exact = pytest.mark.proof("exact")


def constant(l, s, b, points: int = 2, low: float = -3.0, high: float = 4.0) -> dx.DPMSolverV3Statistics:  # noqa: E741
    values = [torch.full((points, 1), float(value), dtype=torch.float64) for value in (l, s, b)]
    return dx.DPMSolverV3Statistics.from_tensors(*values, low, high)


def sample(scheduler, steps: int, network=None, x=None, **grid) -> torch.Tensor:
    """A run in float64; `network(x, point) -> noise`."""
    network = network or (lambda x, point: 0.6 * x + 0.4 * torch.tanh(2 * x + 0.3 * point.lambda_))
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3) if x is None else x
    scheduler.set_timesteps(**({"num_inference_steps": steps} | grid))
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, scheduler.points[i]), t, x).prev_sample
    return x


def sampler(statistics, **options) -> dx.DPMSolverV3Scheduler:
    made = dx.DPMSolverV3Scheduler(**{**SD, "final_sigmas_type": "sigma_min", **options})
    made.use_statistics(statistics)
    return made


# --- a step ----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("kind, l, s", [("data", 1, 0), ("noise", 0, -1)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_data_and_noise_prediction_are_special_cases(kind, l, s, order):  # noqa: E741
    """Of every order; of order 1 both are DDIM."""
    options = {**SD, "final_sigmas_type": "sigma_min", "solver_order": order}
    for steps in (1, 2, 7, 40):
        expected = sample(MultistepScheduler(**options, kind=kind), steps)
        ours = sampler(constant(l, s, 0), solver_order=order, use_corrector=False, lower_order_final=False)
        torch.testing.assert_close(sample(ours, steps), expected, rtol=1e-6, atol=1e-6)
        if order == 1:
            ddim = sample(MultistepScheduler(**options, kind="noise"), steps)
            torch.testing.assert_close(sample(ours, steps), ddim, rtol=1e-6, atol=1e-6)


@exact
def test_neither_l_nor_s_is_not_ddim():
    ours = sample(sampler(constant(0, 0, 0), solver_order=1, use_corrector=False), 5)
    ddim = sample(MultistepScheduler(**SD, final_sigmas_type="sigma_min", solver_order=1), 5)
    assert (ours - ddim).abs().max() > 0.1


@exact
def test_integrals_of_constants():
    l, s, b, h = 0.7, -0.4, 0.3, 1.3  # noqa: E741
    found = constant(l, s, b).integrals(0.2, 0.2 + h, 2)
    a = l + s
    growth = math.expm1(a * h) / a
    closed = {
        "L": l * h,
        "S": s * h,
        "B": b / s * -math.expm1(-s * h),
        "C": b / s * (growth - math.expm1(l * h) / l),
    }
    for name, value in closed.items():
        assert float(getattr(found, name)) == pytest.approx(value, rel=1e-6), name
    moments = [growth, (h * math.exp(a * h) - growth) / a]
    moments.append((h * h / 2 * math.exp(a * h) - moments[1]) / a)
    for k, value in enumerate(moments):
        assert float(found.E[k]) == pytest.approx(value, rel=1e-6), k


@exact
def test_integrals_between_points_of_the_grid_and_beyond_it():
    """Slowly, by midpoints, of l, s and b that are linear between points and constant beyond."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64).float().double()
    statistics = dx.DPMSolverV3Statistics.from_tensors(*values, -1.0, 1.5)
    start, end, n = -1.4, 1.1, 20000
    edges = np.linspace(start, end, n + 1)
    grid, middle, h = np.linspace(-1.0, 1.5, 6), (edges[1:] + edges[:-1]) / 2, (end - start) / n
    l, s, b = (np.stack([np.interp(middle, grid, v[:, j]) for j in range(2)], 1) for v in values.numpy())  # noqa: E741
    L, S = (np.cumsum(v, 0) * h - v * h / 2 for v in (l, s))
    u = np.exp(-S) * b
    B = np.cumsum(u, 0) * h - u * h / 2
    w = np.exp(L + S)
    slow = {"L": l.sum(0) * h, "S": s.sum(0) * h, "B": u.sum(0) * h, "C": (w * B).sum(0) * h}
    found = statistics.integrals(start, end, 3)
    for name, value in slow.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=2e-3, err_msg=name)
    for k in range(4):
        moment = (w * ((middle - start) ** k / math.factorial(k))[:, None]).sum(0) * h
        np.testing.assert_allclose(found.E[k], moment, rtol=2e-3, err_msg=str(k))


@exact
@pytest.mark.parametrize("options", [{}, {"solver_order": 2, "pseudo_corrector": True}, {"pseudo_predictor": True},
                                     {"solver_order": 1, "use_corrector": False}])  # fmt: skip
@pytest.mark.parametrize("final", ["sigma_min", "zero"])
def test_exact_at_any_step_size_where_f_follows_its_model(options, final):
    """f' = s f + b whatever the state: then one step is as good as thirty."""
    l, s, b = 0.6, 0.5, -0.8  # noqa: E741
    statistics = constant(l, s, b, points=1601)

    def network(x, point):
        f = torch.tensor([1.0, -0.5, 0.2], dtype=x.dtype) * math.exp(s * point.lambda_) - b / s
        return (point.alpha * f + l * x) / point.sigma

    ends = [sample(sampler(statistics, final_sigmas_type=final, **options), n, network) for n in (1, 2, 5, 30)]
    for end in ends[:-1]:
        torch.testing.assert_close(end, ends[-1], rtol=2e-5, atol=2e-5)


@exact
def test_the_corrector_leaves_f_and_comes_before_the_next_prediction():
    """By hand, for two steps of data prediction, where g is minus the data: Simpson's weights do not come into it."""
    scheduler = sampler(constant(1, 0, 0), solver_order=2, lower_order_final=False)
    scheduler.set_timesteps(3)
    x = x0 = torch.linspace(-2, 2, 6, dtype=torch.float64)
    (p0, p1, p2, *_), data, states = scheduler.points, [], []
    for i, t in enumerate(scheduler.timesteps[:3]):
        noise = 0.5 * torch.tanh(x)
        data.append((x - scheduler.points[i].sigma * noise) / scheduler.points[i].alpha)
        states.append(x)
        x = scheduler.step(noise, t, x).prev_sample
    from diffusers_ext.schedulers._exponential import combine, step_weights

    h1, h2 = p1.lambda_ - p0.lambda_, p2.lambda_ - p1.lambda_
    first = combine(step_weights("data", p0, p1), x0, data[:1])
    torch.testing.assert_close(states[1], first)  # predicted with order 1, so not corrected
    second = combine(step_weights("data", p1, p2, [-h1]), first, [data[1], data[0]])
    torch.testing.assert_close(states[2], second, rtol=1e-6, atol=1e-6)
    corrected = combine(step_weights("data", p1, p2, [h2]), first, [data[1], data[2]])
    third = combine(
        step_weights("data", p2, scheduler.points[3], [-h2]), corrected,
        [data[2], data[1]],
    )  # fmt: skip
    torch.testing.assert_close(x, third, rtol=1e-6, atol=1e-6)


@exact
@pytest.mark.parametrize("order, least", [(1, 0.9), (2, 1.9), (3, 2.0)])
def test_order_of_convergence(order, least):
    """The very first step can only be of order 1, which leaves an error of order 2."""
    l, s, b = reference.statistics()  # noqa: E741
    statistics = dx.DPMSolverV3Statistics.from_tensors(l[::40], s[::40], b[::40], reference.LOW, reference.HIGH)
    made = {
        n: sample(
            sampler(statistics, solver_order=order, use_corrector=False, lower_order_final=False, use_exponential_sigmas=True),
            n, lambda x, point: reference.network(x, point.lambda_), reference.start(),
        )
        for n in (40, 80, 400)
    }  # fmt: skip
    errors = [float((made[n] - made[400]).square().mean().sqrt()) for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) > least


# --- the statistics --------------------------------------------------------------------------------------------------


def gaussian(**process) -> DDPMPipeline:
    scheduler = DDIMScheduler(**{**SD, "clip_sample": False, **process})
    mean = torch.linspace(-1, 1, 4).view(1, 2, 2)
    return DDPMPipeline(dx.GaussianDenoiser.from_moments(mean, (0.1 + mean**2), scheduler), scheduler)


@exact
def test_on_a_gaussian_f_is_known_and_every_step_size_exact():
    pipe = gaussian()
    statistics = dx.collect_statistics(pipe, 4, samples=pipe.unet.sample(4), num_lambdas=241, batch_size=4)
    mean, variance = pipe.unet.means.view(1, 2, 2), pipe.unet.covariances.variances.view(1, 2, 2)
    lambdas = torch.linspace(statistics.config.lambda_min, statistics.config.lambda_max, 241, dtype=torch.float64)
    ratio = torch.exp(-2 * lambdas).view(-1, 1, 1, 1)
    l = ratio / (variance + ratio)  # noqa: E741
    torch.testing.assert_close(statistics.l.double(), l, rtol=1e-5, atol=1e-5)
    assert float(statistics.s.abs().max()) == 0  # f = -l m, whatever x is
    torch.testing.assert_close(statistics.b.double()[1:-1], (2 * l * (1 - l) * mean)[1:-1], rtol=1e-3, atol=1e-3)
    x = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in (1, 2, 5):
        error = {}
        for name, options in {"ours": {}, "order 1": {"solver_order": 1, "use_corrector": False}}.items():
            scheduler = dx.DPMSolverV3Scheduler.from_config(pipe.scheduler.config, statistics=statistics, **options)
            error[name] = sampler_error(scheduler, pipe.unet, steps, x).rmse
        scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        theirs = sampler_error(scheduler, pipe.unet, steps, x).rmse
        assert max(error.values()) < 2e-3 and theirs > 20 * max(error.values()), (steps, error, theirs)


def mixture(**process) -> DDPMPipeline:
    scheduler = DDIMScheduler(**{**SD, "clip_sample": False, "timestep_spacing": "trailing", **process})
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 1, 2, 2, generator=generator)
    variances = 0.05 + 0.2 * torch.rand(4, 1, 2, 2, generator=generator)
    return DDPMPipeline(dx.GaussianMixtureDenoiser.from_components(means, variances, scheduler), scheduler)


@exact
def test_statistics_of_a_mixture_by_finite_differences():
    """l from the whole Jacobian, and the regression of f' on f with f' from steps along the exact solution."""
    pipe = mixture()
    n = 1000
    samples = pipe.unet.sample(n, generator=torch.Generator().manual_seed(1))
    statistics = dx.collect_statistics(pipe, n, samples=samples, num_lambdas=31, batch_size=n)
    guide = GuideScheduler.from_config(pipe.scheduler.config)
    grid = np.linspace(statistics.config.lambda_min, statistics.config.lambda_max, 31)
    j, h = 15, 1e-3
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0), dtype=samples.dtype)

    def at(lambda_):
        guide.lay(np.exp([-lambda_]))
        return guide.levels[0], float(guide.times[0])

    def noise_of(x, lambda_):
        return pipe.unet(x, at(lambda_)[1]).sample

    point, time = at(grid[j])
    x = point.alpha * samples + point.sigma * noise
    columns = []
    for k in range(4):
        unit = torch.zeros(1, 1, 2, 2, dtype=x.dtype)
        unit.view(-1)[k] = 1e-5
        jacobian = (noise_of(x + unit, grid[j]) - noise_of(x - unit, grid[j])) / 2e-5
        columns.append(point.sigma * jacobian.flatten(1)[:, k].mean())
    assert torch.stack(columns).view(1, 2, 2).numpy() == pytest.approx(statistics.l[j].numpy(), abs=0.04)

    def f(lambda_):
        moved = pipe.unet.exact_ode_solution(x, time, at(lambda_)[1])
        here = at(lambda_)[0]
        l = statistics.coefficient_l(lambda_)  # noqa: E741
        return (here.sigma * noise_of(moved, lambda_) - l * moved) / here.alpha

    before, now, after = (f(grid[j] + side * h) for side in (-1, 0, 1))
    slope = (after - before) / (2 * h)
    s = ((now * slope).mean(0) - now.mean(0) * slope.mean(0)) / now.var(0, unbiased=False)
    b = slope.mean(0) - s * now.mean(0)
    assert s.numpy() == pytest.approx(statistics.s[j].numpy(), rel=0.1, abs=0.1)
    assert b.numpy() == pytest.approx(statistics.b[j].numpy(), rel=0.1, abs=0.1)


@exact
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_the_prediction_type_does_not_matter(kind):
    found = []
    for name in ("epsilon", kind):
        pipe = mixture(prediction_type=name)
        samples = pipe.unet.sample(8, generator=torch.Generator().manual_seed(1))
        found.append(dx.collect_statistics(pipe, 8, samples=samples, num_lambdas=12, batch_size=8))
    for name in ("l", "s", "b"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=2e-3, atol=2e-3)


@exact
def test_three_times_nearer_than_dpm_solver_pp_at_ten_calls():
    pipe = mixture()
    samples = pipe.unet.sample(256, generator=torch.Generator().manual_seed(1))
    statistics = dx.collect_statistics(pipe, 256, samples=samples, num_lambdas=80, batch_size=256)
    x = torch.randn(32, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = dx.DPMSolverV3Scheduler.from_config(pipe.scheduler.config, statistics=statistics, model=pipe.unet)
    theirs = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert 3 * sampler_error(ours, pipe.unet, 10, x).rmse < sampler_error(theirs, pipe.unet, 10, x).rmse


@pytest.fixture(scope="module")
def avatars():
    return StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"), dtype=torch.float32)


PROMPTS = ["a person with tan skin", "a person with pale skin and blond hair", "a person with black hair"]


@exact
def test_a_guided_pipeline_is_led_where_the_walk_goes(avatars):
    """The answer is the guided prediction there, at that timestep, with these prompts."""
    guide = GuideScheduler.from_config(avatars.scheduler.config)
    guide.lay(np.exp([1.0, -0.5]))
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    seen, answers = [], []
    handle = avatars.unet.register_forward_hook(
        lambda _m, args, kwargs, _o: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )

    def walk():
        for _ in range(2):
            answers.append((yield x))

    call = {"prompt": PROMPTS[:2], "guidance_scale": 4.0, "output_type": "latent"}
    lead(avatars, guide, walk(), [0, 1], call, 2)
    handle.remove()
    for level, answer in enumerate(answers):
        with torch.no_grad():
            halves = avatars.unet(
                torch.cat([x, x]), float(guide.times[level]), encoder_hidden_states=seen[0]
            ).sample.chunk(2)
        torch.testing.assert_close(answer, halves[0] + 4.0 * (halves[1] - halves[0]), rtol=1e-4, atol=1e-4)


@exact
def test_an_interrupted_collection_goes_on_and_guidance_matters(avatars, tmp_path):
    file = tmp_path / "statistics.safetensors"
    call = {"num_lambdas": 3, "batch_size": 2, "sample_steps": 1, "guidance_scale": 3.0}
    before = {name: avatars.__dict__[name] for name in ("scheduler", "_internal_dict")}
    whole = dx.collect_statistics(avatars, PROMPTS, **call)
    assert {name: avatars.__dict__[name] for name in before} == before
    assert (whole.config.num_samples, whole.config.guidance_scale, whole.l.shape) == (3, 3.0, (3, 4, 16, 16))
    whole.check_model(avatars.unet)
    forward, calls = avatars.unet.forward, []

    def broken(*args, **kwargs):
        calls.append(0)
        if len(calls) > 19:  # in the second batch
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    avatars.unet.forward = broken
    with pytest.raises(KeyboardInterrupt):
        dx.collect_statistics(avatars, PROMPTS, **call, checkpoint=file)
    del avatars.unet.forward
    assert file.exists()
    resumed = dx.collect_statistics(avatars, PROMPTS, **call, checkpoint=file)
    assert all(torch.equal(getattr(whole, name), getattr(resumed, name)) for name in ("l", "s", "b"))
    with pytest.raises(ValueError, match="other settings"):
        dx.collect_statistics(avatars, PROMPTS, **{**call, "guidance_scale": 1.0}, checkpoint=file)
    unguided = dx.collect_statistics(avatars, PROMPTS, **{**call, "guidance_scale": 1.0})
    assert not torch.allclose(unguided.l, whole.l, atol=1e-2)


@exact
def test_wrong_arguments_of_the_collection(avatars):
    with pytest.raises(ValueError, match="`conditions`"):
        dx.collect_statistics(avatars, 3)
    with pytest.raises(ValueError, match="`num_lambdas`"):
        dx.collect_statistics(avatars, PROMPTS, num_lambdas=2)
    with pytest.raises(ValueError, match="`samples`"):
        dx.collect_statistics(avatars, PROMPTS, samples=torch.zeros(2, 4, 16, 16))


# --- whose statistics they are ---------------------------------------------------------------------------------------


@exact
def test_no_statistics_or_those_of_another_model_are_refused():
    pipe, other = gaussian(), mixture()
    statistics = dx.collect_statistics(pipe, 2, samples=pipe.unet.sample(2), num_lambdas=4)
    scheduler = dx.DPMSolverV3Scheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="`statistics` is None"):
        scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="belong to another model"):
        dx.DPMSolverV3Scheduler.from_config(pipe.scheduler.config, statistics=statistics, model=other.unet)
    with pytest.raises(ValueError, match="no fingerprint"):
        dx.DPMSolverV3Scheduler.from_config(
            pipe.scheduler.config, statistics=dx.DPMSolverV3Statistics(), model=pipe.unet
        )
    with pytest.raises(ValueError, match="`statistics` is dict"):
        scheduler.use_statistics({})
    flow = dx.DPMSolverV3Scheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    flow.use_statistics(statistics)
    with pytest.raises(ValueError, match="belong to another model"):
        flow.set_timesteps(5)
    scheduler.use_statistics(statistics)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="samples of shape"):
        scheduler.step(torch.zeros(1, 1, 4, 4), scheduler.timesteps[0], torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="has shape"):
        dx.DPMSolverV3Statistics.from_tensors(torch.zeros(3, 1), torch.zeros(4, 1), torch.zeros(3, 1), -1, 1)
    with pytest.raises(ValueError, match="`num_lambdas`"):
        dx.DPMSolverV3Statistics(num_lambdas=1)


@exact
def test_the_fingerprint_knows_weights_in_any_precision_and_tells_a_fine_tuned_model():
    import copy

    from tests.unets import unconditional

    model = unconditional(1)
    marks = weight_marks(model)
    for dtype in (torch.float16, torch.bfloat16):
        assert same_marks(marks, weight_marks(copy.deepcopy(model).to(dtype)))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert not same_marks(marks, weight_marks(tuned))
    assert torch.equal(marks, weight_marks(torch.compile(model)))
    with pytest.raises(ValueError, match="offloaded"):
        weight_marks(copy.deepcopy(model).to("meta"))


# --- the other proofs ------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
def test_ends_where_the_authors_solver_ends():
    """Of every combination of options. They sum trapezoids over points of a grid, which must be fine for their numbers to
    mean anything: 600 cells a step."""
    statistics = dx.DPMSolverV3Statistics.from_tensors(*reference.statistics(), reference.LOW, reference.HIGH)
    ratios = np.exp(-np.linspace(reference.LOW, reference.HIGH, reference.STEPS + 1))[:-1]
    for run in GOLDEN["runs"]:
        scheduler = sampler(
            statistics, solver_order=run["order"], use_corrector=run["corrector"], pseudo_predictor=run["p_pseudo"],
            pseudo_corrector=run["c_pseudo"], lower_order_final=run["lower_order_final"],
        )  # fmt: skip
        end = sample(
            scheduler, 0, lambda x, point: reference.network(x, point.lambda_), reference.start(),
            num_inference_steps=None, sigmas=ratios.tolist(),
        )  # fmt: skip
        np.testing.assert_allclose(end.flatten(), run["end"], rtol=2e-4, atol=2e-4, err_msg=str(run))


@pytest.mark.proof("loads")
def test_statistics_are_saved_beside_the_config_and_come_back(tmp_path):
    pipe = mixture()
    statistics = dx.collect_statistics(pipe, 4, num_lambdas=5)
    pipe.scheduler = dx.DPMSolverV3Scheduler.from_config(
        pipe.scheduler.config, statistics=statistics, model=pipe.unet, solver_order=2
    )
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    assert (tmp_path / "scheduler" / "statistics" / "diffusion_pytorch_model.safetensors").is_file()
    for folder, subfolder in ((tmp_path / "scheduler", None), (tmp_path, "scheduler")):
        loaded = dx.DPMSolverV3Scheduler.from_pretrained(folder, subfolder=subfolder)
        assert loaded.config.solver_order == 2
        for name in ("l", "s", "b", "marks"):
            assert torch.equal(getattr(loaded.statistics, name), getattr(statistics, name)), name
        loaded.statistics.check_model(pipe.unet)
        with pytest.raises(ValueError, match="belong to another model"):
            dx.DPMSolverV3Scheduler.from_pretrained(folder, subfolder=subfolder, model=gaussian().unet)
    other = dx.DPMSolverV3Scheduler.from_pretrained(tmp_path / "scheduler", statistics=dx.DPMSolverV3Statistics())
    assert other.statistics.config.num_samples == 0
    again = dx.DPMSolverV3Scheduler.from_config(loaded.config)  # statistics are no part of a config
    with pytest.raises(ValueError, match="`statistics` is None"):
        again.set_timesteps(3)


@pytest.mark.proof("card")
def test_the_snippets_of_the_card_run(avatars):
    from diffusers_ext.cards import method_card

    card = method_card("dpm_solver_v3")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets and "2310.13268" in card
    names = {"pipe": avatars, "prompts": PROMPTS, "prompt": PROMPTS[0]}
    before = avatars.scheduler
    try:
        for snippet in snippets:
            code = snippet.replace("num_lambdas=120", "num_lambdas=3")
            exec(compile(code, "card", "exec"), names)
        assert isinstance(names["pipe"].scheduler, dx.DPMSolverV3Scheduler)
    finally:
        avatars.scheduler = before
