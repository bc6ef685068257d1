"""AutoDiffusion, its search over timesteps, by the five proofs."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusers_ext as dx
from benchmarks._search import OracleObjective
from diffusers_ext.oracles import GaussianMixtureDenoiser
from diffusers_ext.schedulers.unified_solver import UnifiedSolverScheduler
from diffusers_ext.search import PictureObjective, TimestepSearch, TimestepSpace

LISTS = {"four": [926, 690, 424, 97], "late": [999, 500, 420, 130, 60, 12]}
DDIM_ON_A_LIST = [{"timestep": time} for time in LISTS["four"]]

exact = pytest.mark.proof("exact")


def network(x: torch.Tensor, n: float) -> torch.Tensor:
    """A noise prediction at timestep `n`."""
    return 0.7 * torch.tanh(x) * (0.5 + n / 1000) + 0.1 * math.cos(n / 100)


def start_state() -> torch.Tensor:
    return 1.3 * torch.sin(torch.arange(1, 9, dtype=torch.float64)).reshape(2, 1, 2, 2)


def run(scheduler, num_steps: int | None = None, **options) -> torch.Tensor:
    scheduler.set_timesteps(num_steps, **options)
    x = start_state()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x).prev_sample
    return x


def oracle(**options) -> OracleObjective:
    scheduler = UnifiedSolverScheduler(timestep_spacing="trailing", **options)
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser.from_components(means, torch.tensor([0.05, 0.2, 0.1]), scheduler)
    start = torch.randn((4, 1, 2, 2), generator=generator, dtype=torch.float64)
    return OracleObjective(denoiser, scheduler, start)


# --- the schedule ----------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++2m-midpoint", "unipc3"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_the_uniform_list_is_bit_equal_to_the_scheduler_without_a_list(solver, spacing):
    plain = UnifiedSolverScheduler(solver_schedule=solver, timestep_spacing=spacing)
    expected = run(plain, 6)
    objective = oracle()
    search = TimestepSearch(objective, 6, solver=solver, population=1, epochs=0)
    listed = search.scheduler(search.steps(plain.timesteps.tolist()))
    assert torch.equal(run(listed, 6), expected)


@exact
def test_a_list_does_in_the_known_solvers_what_it_does_in_those_of_diffusers():
    for times in LISTS.values():
        ours = run(UnifiedSolverScheduler(solver_schedule="dpmsolver++2m-midpoint"), timesteps=times)
        theirs = run(DPMSolverMultistepScheduler(), timesteps=times)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    uniform = [999, 799, 599, 399, 199]
    stock = run(DDIMScheduler(timestep_spacing="trailing", clip_sample=False), 5)
    listed = UnifiedSolverScheduler(solver_schedule=[{"timestep": time} for time in uniform])
    torch.testing.assert_close(run(listed, 5), stock, rtol=1e-5, atol=1e-5)


# --- the search ------------------------------------------------------------------------------------------------------


@exact
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12))
def test_candidates_are_distinct_and_sorted(seed, n):
    """In the authors' code a crossover can give a timestep twice, and one set is kept under many orders."""
    rng, space = Random(seed), TimestepSpace(n, range(20))
    one, other = space.random(rng), space.random(rng)
    for candidate in (one, other, space.mutate(one, rng, 0.5), space.cross(one, other, rng)):
        assert len(candidate) == n and all(a > b for a, b in itertools.pairwise(candidate))
        assert set(candidate) <= set(range(20))
    assert space.mutate(one, rng, 0.0) == one == space.cross(one, one, rng)


@exact
def test_a_mutation_replaces_the_asked_share():
    rng, space = Random(0), TimestepSpace(10, range(1000))
    start = space.random(rng)
    kept = [len({*start} & {*space.mutate(start, rng, 0.25)}) for _ in range(400)]
    assert np.mean(kept) == pytest.approx(7.5, abs=0.4)


@exact
def test_a_search_is_deterministic_resumes_and_never_gets_worse(tmp_path):
    objective, settings = oracle(), {"population": 10, "epochs": 2}
    search = TimestepSearch(objective, 4, **settings)
    result = search.run(tmp_path / "search.json")
    assert TimestepSearch(objective, 4, **settings).run().evolved == result.evolved
    assert all(later <= earlier for earlier, later in itertools.pairwise(result.evolved.incumbents))
    assert objective(result.scheduler, 4) == result.evolved.score
    uniform = min(objective(search.scheduler(search.steps(times)), 4) for times in search.grids())
    assert result.evolved.score <= uniform
    for other in (
        TimestepSearch(objective, 5, **settings),
        TimestepSearch(objective, 4, solver="unipc2", **settings),
        TimestepSearch(oracle(beta_schedule="scaled_linear"), 4, **settings),
    ):
        with pytest.raises(ValueError, match="of another search"):
            other.run(tmp_path / "search.json")


@exact
def test_of_flows_the_search_knows_that_timestep_0_is_clean_data():
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    search = TimestepSearch(oracle(**flow), 4, population=4, epochs=1)
    assert search.times == range(1, 1000)
    result = search.run()
    assert result.scheduler.config.use_flow_sigmas and math.isfinite(result.evolved.score)


@exact
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: PictureObjective(pipe, []), "`seeds` is empty"),
        (lambda pipe: PictureObjective(pipe, [0, 1], prompt=["one"]), "`prompt` has 1 values; one for each of the 2"),
        (lambda pipe: PictureObjective(pipe, [0], reference_steps=0), "`reference_steps` is 0"),
        (lambda pipe: PictureObjective(pipe, [0], batch_size=2.5), "`batch_size` is 2.5"),
        (lambda pipe: TimestepSearch(PictureObjective(pipe, [0]), 0), "`num_steps` is 0"),
        (lambda pipe: TimestepSearch(PictureObjective(pipe, [0]), 4, solver="best"), "`name` is 'best'"),
        (lambda pipe: TimestepSearch(PictureObjective(pipe, [0]), 4, epochs=-1), "`stages` is"),
    ],
)
def test_bad_input(call, message, avatars_sd):
    with pytest.raises(ValueError, match=message):
        call(avatars_sd)


@exact
def test_pictures_are_the_pipelines_own_and_it_is_left_as_it_is(avatars_sd):
    """The fixture itself checks that the shared pipeline is unchanged."""
    prompts = ["a person with tan skin", "a person with pale skin", "a person with brown hair"]
    objective = PictureObjective(avatars_sd, seeds=[3, 4, 5], batch_size=2, prompt=prompts, guidance_scale=2.0)
    scheduler = UnifiedSolverScheduler.from_config(avatars_sd.scheduler.config)
    found = objective.pictures(scheduler, 3)
    assert found.shape == (3, 32, 32, 3) and type(avatars_sd.scheduler) is not UnifiedSolverScheduler
    import copy

    pipe = copy.copy(avatars_sd)
    pipe.scheduler = scheduler
    for i, seed in enumerate((3, 4, 5)):
        generator = torch.Generator().manual_seed(seed)
        alone = pipe(
            prompts[i], num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="np"
        ).images[0]
        assert np.abs(alone - found[i]).max() < 1e-4
    metric = PictureObjective(avatars_sd, seeds=[3], metric=lambda pictures: pictures.mean(), prompt="a person")
    assert 0 < metric(scheduler, 2) < 1 and metric.identity["metric"] != objective.identity["metric"]


@exact
def test_unconditional_pipelines_are_asked_for_as_many_pictures_as_there_are_seeds():
    from diffusers import DDPMPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    objective = PictureObjective(DDPMPipeline(unet, DDIMScheduler()), seeds=range(5), batch_size=2, reference_steps=6)
    result = TimestepSearch(objective, 2, population=4, epochs=1).run()
    assert len(result.evolved.evaluated) == 8 and objective.pictures(result.scheduler, 2).shape == (5, 8, 8, 1)


# --- reference, claim, loads, card -----------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", LISTS)
def test_ddim_on_a_list_is_that_of_the_authors(name):
    golden = json.loads((Path(__file__).parents[1] / "golden" / "autodiffusion.json").read_text(encoding="utf-8"))
    listed = UnifiedSolverScheduler(solver_schedule=[{"timestep": time} for time in LISTS[name]])
    expected = torch.tensor(golden["final"][name], dtype=torch.float64)
    torch.testing.assert_close(run(listed, len(LISTS[name])).flatten(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.proof("loads")
def test_the_timesteps_travel_in_the_config(tmp_path):
    scheduler = UnifiedSolverScheduler(solver_schedule=DDIM_ON_A_LIST)
    expected = run(scheduler, 4)
    scheduler.save_pretrained(tmp_path)
    loaded = UnifiedSolverScheduler.from_pretrained(tmp_path)
    assert [step["timestep"] for step in loaded.config.solver_schedule] == LISTS["four"]
    assert torch.equal(run(loaded, 4), expected)


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    from diffusers_ext.cards import method_card

    snippet = re.findall(r"```python\n(.*?)```", method_card("autodiffusion"), flags=re.DOTALL)[0]
    namespace: dict = {}
    exec(compile(snippet, "card", "exec"), namespace)
    times = [step["timestep"] for step in namespace["pipe"].scheduler.config.solver_schedule]
    assert len(times) == 4 and times == sorted(times, reverse=True) and namespace["image"].size == (32, 32)
    assert isinstance(namespace["result"].scheduler, dx.UnifiedSolverScheduler)
