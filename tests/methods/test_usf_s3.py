"""The unified solver framework and S^3, by the five proofs."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks._search import OracleObjective
from diffusers_ext.oracles import GaussianMixtureDenoiser, convergence_order, sampler_error
from diffusers_ext.schedulers._exponential import combine, step_weights
from diffusers_ext.schedulers.unified_solver import (
    NAMED,
    UnifiedSolverScheduler,
    derivative_scale,
    named_schedule,
    read_schedule,
)
from diffusers_ext.solver_search import SolverPredictor, SolverSearch, SolverSpace
from tests.common.suite import CommonCase

# Every decision at least once; ends at timestep 0.
RUNS = {
    "multistep": [
        {"timestep": 999, "order": 1, "prediction": "noise"},
        {"timestep": 800, "order": 2, "scaling": 0.07},
        {"timestep": 610, "order": 3, "points": [1, 2], "prediction": "noise", "scaling": "exp"},
        {"timestep": 400, "order": 4, "points": [2, 3, 3], "scaling": "bh1"},
        {"timestep": 220, "order": 2, "prediction": "noise", "scaling": "midpoint"},
        {"timestep": 90, "order": 3, "scaling": "-exp"},
        {"timestep": 30, "order": 4, "prediction": "noise", "scaling": -0.2},
    ],
    "corrected": [
        {"timestep": 999, "order": 1, "corrector": 2},
        {"timestep": 850, "order": 2, "prediction": "noise", "corrector": 3},
        {"timestep": 640, "order": 3, "corrector": 4},
        {"timestep": 430, "order": 3, "prediction": "noise", "scaling": "midpoint"},
        {"timestep": 200, "order": 1, "corrector": 2},
        {"timestep": 70, "order": 2},
    ],
    "singlestep": [
        {"timestep": 999, "order": 1},
        {"timestep": 820, "order": 2, "start": -2, "scaling": "midpoint"},
        {"timestep": 600, "order": 1, "prediction": "noise"},
        {"timestep": 420, "order": 2, "start": -2, "prediction": "noise", "scaling": "bh1"},
        {"timestep": 240, "order": 3, "start": -3},
        {"timestep": 80, "order": 2, "start": -2, "corrector": 3},
        {"timestep": 20, "order": 3},
    ],
}
SHORT = [
    {"timestep": 999, "order": 1, "prediction": "noise", "corrector": 2},
    {"timestep": 700, "order": 2, "scaling": 0.03},
    {"timestep": 420, "order": 3, "points": [1, 2], "corrector": 4},
    {"timestep": 160, "order": 2, "start": -2, "scaling": "bh1", "prediction": "noise"},
    {"timestep": 60, "order": 1},
]
COMMON = CommonCase(settings=[{"solver_schedule": "dpmsolver++2s"}, {"solver_schedule": SHORT}])

exact = pytest.mark.proof("exact")


def network(x: torch.Tensor, n: float) -> torch.Tensor:
    """A noise prediction at timestep `n`."""
    return 0.7 * torch.tanh(x) * (0.5 + n / 1000) + 0.1 * math.cos(n / 100)


def start_state() -> torch.Tensor:
    return 1.3 * torch.sin(torch.arange(1, 9, dtype=torch.float64)).reshape(2, 1, 2, 2)


def mixture(scheduler) -> GaussianMixtureDenoiser:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    return GaussianMixtureDenoiser.from_components(means, torch.tensor([0.05, 0.2, 0.1]), scheduler)


def noise(n: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn((n, 1, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(scheduler, num_steps: int) -> torch.Tensor:
    denoiser, x = mixture(scheduler), noise()
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t).sample, t, x, return_dict=False)[0]
    return x


# --- known solvers ---------------------------------------------------------------------------------------------------

THEIRS = {
    "ddim": lambda: DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
    "dpmsolver++2m-midpoint": lambda: DPMSolverMultistepScheduler(timestep_spacing="trailing"),
    "dpmsolver++2m-heun": lambda: DPMSolverMultistepScheduler(timestep_spacing="trailing", solver_type="heun"),
    "taylor2": lambda: DPMSolverMultistepScheduler(timestep_spacing="trailing", solver_type="heun"),
    "dpmsolver++3m-compat": lambda: DPMSolverMultistepScheduler(timestep_spacing="trailing", solver_order=3),
    "unipc2": lambda: UniPCMultistepScheduler(timestep_spacing="trailing"),
    "unipc3": lambda: UniPCMultistepScheduler(timestep_spacing="trailing", solver_order=3),
    "dpmsolver++2s": lambda: DPMSolverSinglestepScheduler(),
}


@exact
@pytest.mark.parametrize("num_steps", [2, 5, 10, 20])
@pytest.mark.parametrize("name", THEIRS)
def test_named_solvers_are_those_of_diffusers(name, num_steps):
    spacing = "linspace" if name == "dpmsolver++2s" else "trailing"  # the only one that it has
    ours = run(UnifiedSolverScheduler(solver_schedule=name, timestep_spacing=spacing), num_steps)
    # Their grid is in float32.
    torch.testing.assert_close(ours, run(THEIRS[name](), num_steps), rtol=0, atol=2e-6)


@exact
def test_unipc_with_bh1_and_noise_prediction():
    """Decisions that have no name of their own, against diffusers."""
    n = 8
    for prediction in ("data", "noise"):
        steps = []
        for i in range(n):
            order = min(2, i + 1, n - i)
            steps.append({"order": order, "prediction": prediction})
            steps[-1] |= {"scaling": "bh1"} if order == 2 else {}
            if i + 1 < n:
                steps[-1] |= {"corrector": order + 1} | ({"corrector_scaling": "bh1"} if order == 1 else {})
        theirs = UniPCMultistepScheduler(
            timestep_spacing="trailing",
            solver_type="bh1",
            predict_x0=prediction == "data",
            final_sigmas_type="sigma_min",
        )
        ours = UnifiedSolverScheduler(solver_schedule=steps, timestep_spacing="trailing", final_sigmas_type="sigma_min")
        torch.testing.assert_close(run(ours, n), run(theirs, n), rtol=0, atol=2e-6)


@exact
@pytest.mark.parametrize("num_steps", [1, 6, 20])
def test_a_name_and_its_steps_written_out_are_bit_equal(num_steps):
    for name in NAMED:
        named = UnifiedSolverScheduler(solver_schedule=name)
        named.set_timesteps(num_steps)
        lengths = [there.lambda_ - here.lambda_ for here, there in itertools.pairwise(named.points)]
        steps = [step.to_dict() for step in named_schedule(name, num_steps, lengths)]
        assert [step.to_dict() for step in read_schedule(json.loads(json.dumps(steps)))] == steps
        written = UnifiedSolverScheduler(solver_schedule=steps)
        assert torch.equal(run(written, num_steps), run(named, num_steps))


@exact
def test_the_default_takes_order_2_for_steps_that_are_too_long_for_3():
    short, long = [0.5] * 7, [1.5] * 7
    assert named_schedule("taylor3-corrected", 7, long) == named_schedule("unipc2", 7)
    assert named_schedule("taylor3-corrected", 7, short) == named_schedule("taylor3-corrected", 7)
    mixed = [0.5, 0.5, 0.5, 1.5, 0.5, 0.5, math.inf]
    assert [step.order for step in named_schedule("taylor3-corrected", 7, mixed)] == [1, 2, 3, 2, 3, 2, 1]


@exact
def test_the_third_order_of_diffusers_is_not_taylor():
    ours = run(UnifiedSolverScheduler(solver_schedule="taylor3", timestep_spacing="trailing"), 10)
    assert (ours - run(THEIRS["dpmsolver++3m-compat"](), 10)).abs().max() > 1e-3


# --- order of convergence --------------------------------------------------------------------------------------------


def mixed(order: int, n: int) -> list[dict]:
    """Noise and data prediction in turn."""
    return [{"order": min(order, i + 1), "prediction": ("data", "noise")[i % 2]} for i in range(n)]


def scaled(order: int, n: int, scaling) -> list[dict]:
    """Factors 1 + O(h) on the first derivative leave order 2."""
    return [{"order": min(order, i + 1), "scaling": scaling} for i in range(n)]


def corrected(order: int, n: int) -> list[dict]:
    return [{"order": min(order, i + 1), "corrector": min(order, i + 1) + 1 if i + 1 < n else 0} for i in range(n)]


@exact
@pytest.mark.parametrize(
    ("schedule", "order", "numbers"),
    [
        (lambda n: mixed(2, n), 2, (80, 160)),
        (lambda n: mixed(3, n), 3, (120, 240)),
        (lambda n: scaled(2, n, "exp"), 2, (80, 160)),
        (lambda n: scaled(2, n, "-exp"), 2, (80, 160)),
        (lambda n: scaled(2, n, 0.5), 2, (80, 160)),
        (lambda n: corrected(1, n), 2, (80, 160)),  # a corrector adds an order
        (lambda n: corrected(2, n), 3, (120, 240)),
        (lambda n: "dpmsolver++2s", 2, (80, 160)),
        (lambda n: "dpmsolver++3m-compat", 2, (120, 240)),  # half of the second derivative
        (lambda n: "taylor3", 3, (120, 240)),
    ],
)
def test_order_of_convergence(schedule, order, numbers):
    grid = {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}
    bare = UnifiedSolverScheduler(**grid)
    denoiser, x = mixture(bare), noise()
    bare.set_timesteps(numbers[0])
    solution = denoiser.exact_ode_solution(x, float(bare.timesteps[0]), 0.0)
    errors = [
        sampler_error(
            UnifiedSolverScheduler(solver_schedule=schedule(n), **grid), denoiser, n, x, t_end=0.0, exact=solution
        ).rmse
        for n in numbers
    ]
    assert abs(convergence_order(errors, numbers) - order) < 0.4, errors


@exact
@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(["data", "noise"]), h=st.floats(1e-6, 5))
def test_scalings_are_the_formulas_of_the_paper(kind, h):
    z = h if kind == "noise" else -h
    rest = math.fsum(z**k / math.factorial(k) for k in range(2, 40))  # e^z - 1 - z
    assert derivative_scale("bh1", kind, h) == pytest.approx(z * z / (2 * rest), rel=1e-9)
    assert derivative_scale("midpoint", kind, h) == pytest.approx(z * math.expm1(z) / (2 * rest), rel=1e-9)
    assert derivative_scale("exp", kind, h) == pytest.approx(1 + math.expm1(z) / 2)
    assert derivative_scale("-exp", kind, h) == pytest.approx(1 - math.expm1(z) / 2)
    assert derivative_scale(0.3, kind, h) == pytest.approx(1 + 0.3 * h) and derivative_scale(0, kind, h) == 1


# --- the schedule and the run ----------------------------------------------------------------------------------------


@exact
def test_a_run_that_starts_in_the_middle_is_the_run_of_a_schedule_that_starts_there():
    whole = UnifiedSolverScheduler(solver_schedule="taylor3")
    denoiser, x = mixture(whole), noise()
    whole.set_timesteps(20)
    times = whole.timesteps[8:].tolist()
    whole.set_begin_index(8)
    late = UnifiedSolverScheduler(
        solver_schedule=[{"timestep": t, "order": min(3, i + 1)} for i, t in enumerate(times)]
    )
    late.set_timesteps(12)
    assert late.timesteps.tolist() == times
    y = x
    for t in times:
        x = whole.step(denoiser(x, t).sample, t, x).prev_sample
        y = late.step(denoiser(y, t).sample, t, y).prev_sample
        assert torch.equal(x, y)


@exact
def test_differences_take_the_nearest_points_and_a_corrector_the_end_of_its_step():
    schedule = [{}, {"order": 2}, {"order": 2, "start": -3, "points": [1], "corrector": 2}, {}]
    scheduler = UnifiedSolverScheduler(solver_schedule=schedule, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(4)
    x, points = noise(), scheduler.points
    data, states = [], []
    for i, t in enumerate(scheduler.timesteps):
        output = network(x, float(t))
        states.append(x)
        data.append(scheduler.to_data(output, x, i))
        x = scheduler.step(output, t, x).prev_sample

    def step(start, end, other, state):
        offset = points[other].lambda_ - points[start].lambda_
        return combine(step_weights("data", points[start], points[end], [offset]), state, [data[start], data[other]])

    torch.testing.assert_close(states[3], step(0, 3, 1, states[0]))
    corrected = step(0, 3, 3, states[0])
    torch.testing.assert_close(x, combine(step_weights("data", points[3], points[4]), corrected, [data[3]]))


@exact
def test_whatever_is_decided_for_the_step_to_clean_data_it_is_the_data_prediction():
    for last in ({"order": 3}, {"prediction": "noise"}, {"order": 2, "start": -3, "scaling": 4.0}):
        scheduler = UnifiedSolverScheduler(solver_schedule=[{}, {"order": 2}, {"order": 3}, last])
        scheduler.set_timesteps(4)
        x = noise()
        for i, t in enumerate(scheduler.timesteps):
            output = network(x, float(t))
            data = scheduler.to_data(output, x, i)
            x = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(x, data)


@exact
def test_its_own_timesteps_hold_unless_others_are_given():
    scheduler = UnifiedSolverScheduler(solver_schedule=SHORT)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 700, 420, 160, 60]
    scheduler.set_timesteps(timesteps=[900, 800, 700, 600, 500])
    assert scheduler.timesteps.tolist() == [900, 800, 700, 600, 500]
    for call in ({"num_inference_steps": 6}, {"timesteps": [900, 500]}):
        with pytest.raises(ValueError, match=r"`num_inference_steps` is .*; this `solver_schedule` is for 5 steps"):
            scheduler.set_timesteps(**call)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = UnifiedSolverScheduler(solver_schedule=SHORT, use_dynamic_shifting=True, **flow)
    scheduler.set_timesteps(5, mu=1.2)
    assert scheduler.timesteps.tolist() == [999, 700, 420, 160, 60], "they are after any shift"


@exact
@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("taylor9", "`solver_schedule` is 'taylor9'"),
        ([], "`solver_schedule` is []"),
        ({"order": 1}, "`solver_schedule` is {'order': 1}"),
        ([{"order": 2}], "there it has 1 points, its start among them, and needs more"),
        ([{}, {"start": -3}], "there it has 2 points"),
        ([{}, {"order": 2, "points": [2]}], "there it has 2 points"),
        ([{"corrector": 3}], "has `corrector` 3; allowed are 2 to 2"),
        ([{"steps": 1}], "a dict of corrector, "),
        ([{"order": 5}], "`order` is 5"),
        ([{"order": True}], "`order` is True"),
        ([{}, {}, {"order": 3, "points": [1, 1]}], "the k-th from k to 4"),
        ([{}, {"order": 2, "points": 1}], "`points` is 1"),
        ([{"scaling": "bh3"}], "`scaling` is 'bh3'"),
        ([{"scaling": math.nan}], "`scaling` is nan"),
        ([{"second_scale": None}], "`second_scale` is None"),
        ([{"prediction": "epsilon"}], "`prediction` is 'epsilon'"),
        ([{"start": 0}], "`start` is 0"),
        ([{"corrector": 1}], "`corrector` is 1"),
        ([{"timestep": "9"}], "`timestep` is '9'"),
        ([{"timestep": 9}, {}], "none is needed, or all, strictly falling"),
        ([{"timestep": 9}, {"timestep": 9}], "none is needed, or all, strictly falling"),
    ],
)
def test_bad_schedules(schedule, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        UnifiedSolverScheduler(solver_schedule=schedule)


@exact
def test_it_keeps_no_more_than_it_needs():
    for name, kept in (("ddim", 0), ("taylor2", 1), ("taylor4", 3), ("dpmsolver++2s", 1), ("unipc3", 3)):
        scheduler = UnifiedSolverScheduler(solver_schedule=name)
        run(scheduler, 12)
        assert len(scheduler._kept) == kept, name


# --- S^3 -------------------------------------------------------------------------------------------------------------


@exact
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), to_clean=st.booleans(), fine=st.booleans())
def test_all_candidates_are_schedules_and_equal_ones_are_equal_as_json(seed, n, to_clean, fine):
    rng, space = Random(seed), SolverSpace(n, range(1000), to_clean, fine)
    one, other = space.random(rng), space.random(rng)
    for candidate in (one, other, space.mutate(one, rng, 0.5), space.cross(one, other, rng)):
        steps = read_schedule(candidate)
        assert len(steps) == n and all(0 <= step.timestep <= 999 for step in steps)
        assert [step.to_dict() for step in steps] == candidate == json.loads(json.dumps(candidate))
        assert space.fit([step.timestep for step in steps], steps) == candidate, "nothing in it is without effect"
    assert space.mutate(one, rng, 0.0) == one == space.cross(one, one, rng)


def planted(candidate) -> float:
    """A score that a good ranking should find out: high orders and late timesteps are good."""
    return sum(step["timestep"] / 1000 - step["order"] for step in candidate)


@exact
def test_the_predictor_ranks_unseen_schedules_and_leaves_the_global_generator_alone():
    rng, space = Random(0), SolverSpace(5, range(1000))
    known, new = ([space.random(rng) for _ in range(60)] for _ in range(2))
    rank = SolverPredictor.ranking(1000, seed=0)
    state = torch.random.get_rng_state()
    order = rank([(candidate, planted(candidate)) for candidate in known], new)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(order) == list(range(60)) and order == rank([(c, planted(c)) for c in known], new)
    scores = [planted(new[i]) for i in order]
    assert sum(scores[:20]) / 20 < sum(scores[20:40]) / 20 < sum(scores[40:]) / 20


def small_search(**options) -> SolverSearch:
    scheduler = UnifiedSolverScheduler(timestep_spacing="trailing")
    objective = OracleObjective(mixture(scheduler), scheduler, noise(4, seed=1))
    return SolverSearch(objective, 4, **{"population": 30, "epochs": (0, 1), "pool": 4, **options})


@exact
def test_a_search_is_no_worse_than_the_known_solvers_and_its_result_has_the_score(tmp_path):
    search = small_search()
    result = search.run(tmp_path / "search.json")
    assert result.evolved == small_search().run(tmp_path / "search.json").evolved == small_search().run().evolved
    for name in ("taylor3", "unipc2", "unipc3", "dpmsolver++2m-midpoint", "ddim", "taylor3-corrected"):
        known = UnifiedSolverScheduler(solver_schedule=name, timestep_spacing="trailing")
        assert result.evolved.score <= search.objective(known, 4) + 1e-9, name
    assert search.objective(result.scheduler, 4) == result.evolved.score
    again = UnifiedSolverScheduler.from_config(json.loads(result.scheduler.to_json_string()))
    assert search.objective(again, 4) == result.evolved.score


@exact
@pytest.mark.parametrize("value", [0, 1000, 2.0, True, "5"])
def test_bad_numbers_of_steps(value):
    scheduler = UnifiedSolverScheduler()
    with pytest.raises(ValueError, match="`num_steps` is"):
        SolverSearch(OracleObjective(mixture(scheduler), scheduler, noise()), value)


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", RUNS)
def test_equals_the_authors_sampler(name):
    golden = json.loads((Path(__file__).parents[1] / "golden" / "usf_s3.json").read_text(encoding="utf-8"))
    scheduler = UnifiedSolverScheduler(solver_schedule=RUNS[name], final_sigmas_type="sigma_min")
    scheduler.set_timesteps(len(RUNS[name]))
    x = start_state()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x).prev_sample
    torch.testing.assert_close(
        x.flatten(), torch.tensor(golden["final"][name], dtype=torch.float64), rtol=1e-11, atol=1e-11
    )


# --- claim, loads, card ----------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_a_schedule_travels_in_the_config(tmp_path, pipe):
    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, solver_schedule=SHORT)
    call = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    expected = pipe("a person", **call).images
    pipe.scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text(encoding="utf-8"))
    assert written["solver_schedule"] == SHORT
    pipe.scheduler = UnifiedSolverScheduler.from_pretrained(tmp_path)
    call["generator"] = torch.Generator().manual_seed(0)
    assert (pipe("a person", **call).images == expected).all()


@pytest.mark.proof("card")
def test_the_card_is_true():
    from diffusers_ext.cards import method_card

    card = method_card("usf_s3")
    snippet = re.search(r"```python\n(.*?)```", card.partition("## How to call it")[2], re.DOTALL).group(1)
    namespace: dict = {}
    exec(snippet, namespace)
    assert namespace["image"].size == (32, 32)
    assert isinstance(namespace["pipe"].scheduler, UnifiedSolverScheduler)
