"""What benchmarks of samplers share: peers at equal ends and equal calls, errors, claims, and runs kept on disk."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from diffusers.configuration_utils import FrozenDict
from rich.console import Console

import diffusers_ext as dx
from benchmarks import _bench, _grounds, _samplers
from benchmarks._bench import Benchmark, Selection
from benchmarks._grounds import PROBLEMS, OracleGround, PictureGround
from benchmarks._quality import Variant
from benchmarks._record import Recorder
from benchmarks._sampler_peers import FLOW_ORACLE_PEERS, FLOW_PEERS, ORACLE_PEERS, PEERS, fitting, peers_of
from benchmarks._samplers import BEST, OracleStudy, TrajectoryStudy, error_against_calls
from benchmarks._step_overhead import StepOverhead
from benchmarks._zoo import ZooModel
from diffusers_ext import proofs
from diffusers_ext.metrics import CallCounter, rmse
from diffusers_ext.oracles import sampler_error

from .common import models
from .common.scheduler import scaled

OURS = Variant("order 3", scheduler=DPMSolverMultistepScheduler, scheduler_options={"solver_order": 3})


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(_bench, "OUTPUT", tmp_path / "bench")
    return tmp_path / "results"


def benchmark(*parts) -> Benchmark:
    made = Benchmark("deepcache", threads=1)  # any method that has a module
    for part in parts:
        made.add(part)
    return made


def printed(call, *arguments):
    stream = io.StringIO()
    found = call(Console(file=stream, width=200), *arguments)
    return found, stream.getvalue()


# --- peers -----------------------------------------------------------------------------------------------------------


PICTURES = {
    False: DDIMScheduler(beta_end=0.012, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False),
    True: FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("steps", [4, 5, 20])
def test_peers_start_and_end_where_the_others_do(flow, oracle, steps):
    ground = OracleGround(PROBLEMS["flow" if flow else "mixture"], 1)
    peers = [[PEERS, ORACLE_PEERS], [FLOW_PEERS, FLOW_ORACLE_PEERS]][flow][oracle]
    ground.pipe.scheduler = ground.pipe.scheduler if oracle else PICTURES[flow]
    for name, peer in peers.items():
        with peer.on(ground.pipe) as pipe:
            scheduler = pipe.scheduler
            scheduler.set_timesteps(steps)
            assert int(scheduler.timesteps[0]) == 999, name
            scale = float(scaled(scheduler, torch.ones(()), scheduler.timesteps[0]))
            assert scale * float(scheduler.init_noise_sigma) == pytest.approx(1, abs=1e-6), name
            if name == "pndm" or (name == "ddim" and not oracle):
                assert scheduler.final_alpha_cumprod == (scheduler.alphas_cumprod[0] if oracle else 1.0)
            elif name != "deis":  # it ends at the first training timestep, and cannot otherwise
                assert float(scheduler.sigmas[-1]) == 0.0, name
            if flow:
                assert float(scheduler.sigmas[0]) == pytest.approx(0.999, abs=1e-6), name
            if oracle and name not in ("pndm", "heun"):  # the model is told the level of its state
                alphas, levels = pipe.unet.noise_process(scheduler.timesteps, len(scheduler.timesteps), "cpu")
                wanted = scheduler.sigmas[:-1].double() / (1 - scheduler.sigmas[:-1].double() if flow else 1)
                assert (levels / alphas).numpy() == pytest.approx(wanted.numpy(), rel=1e-3), name


def test_peers_are_what_they_are_called_and_fit_every_pipeline():
    assert [peer.scheduler.__name__ for peer in PEERS.values()] == [
        "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
        "PNDMScheduler", "HeunDiscreteScheduler",
    ]  # fmt: skip
    assert issubclass(fitting(DPMSolverMultistepScheduler), DPMSolverMultistepScheduler)
    assert (
        set(PEERS) - set(peers_of("DDPMPipeline", False)) == {"heun"} and peers_of("FluxPipeline", True) == FLOW_PEERS
    )
    pixels = models.STOCKS["tiny-ddpm"].make()
    flux = models.STOCKS["tiny-flux"].make()
    flux.scheduler = FlowMatchEulerDiscreteScheduler()  # without dynamic shifting, and still given `mu`
    assert isinstance(flux, FluxPipeline)
    for stock, pipe in (("tiny-ddpm", pixels), ("tiny-flux", flux)):
        for name, peer in peers_of(type(pipe).__name__, stock == "tiny-flux").items():
            with peer.on(pipe) as made:
                assert models.STOCKS[stock].draw(made).isfinite().all(), name


@pytest.mark.parametrize(
    ("peer", "budget", "steps", "calls"),
    [("ddim", 8, 8, 8), ("pndm", 8, 7, 8), ("heun", 8, 5, 9), ("heun", 15, 8, 15), ("unipc", 5, 5, 5)],
)
def test_a_budget_is_of_calls(peer, budget, steps, calls):
    """Of two numbers of calls equally near, the larger: in favour of the peer."""
    ground = OracleGround(PROBLEMS["guided"], 2)
    run = ground.run(peer, ORACLE_PEERS[peer], budget)
    with CallCounter(ground.pipe.unet) as counter:
        ground.solve(ORACLE_PEERS[peer], steps)
    assert (run.steps, run.calls, counter.calls[""]) == (steps, calls, calls)


def test_a_sampler_may_be_another_one_for_every_budget():
    asked = []

    def sampler(calls):
        asked.append(calls)
        return Variant(f"plan {calls}", scheduler=DPMSolverMultistepScheduler, steps=calls)

    ground = OracleGround(PROBLEMS["mixture"], 2)
    assert [ground.run("searched", sampler, calls).calls for calls in (5, 8)] == [5, 8] and asked == [5, 8]
    study = OracleStudy({"searched": sampler}, calls=(5, 8), claim_calls=(5,))
    assert study.settings["oracle"]["variants"]["searched"]["8"]["title"] == "plan 8"


# --- exact scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
def test_errors_are_to_the_exact_solution_from_the_same_noise(problem):
    ground = OracleGround(PROBLEMS[problem], 6)
    few, scale = OracleGround(PROBLEMS[problem], 6, [1, 4]), PROBLEMS[problem].guidance_scale
    peer = (FLOW_ORACLE_PEERS if problem == "flow" else ORACLE_PEERS)["dpm_solver_pp_2m"]
    run = ground.run("ours", peer, 10)
    with peer.on(ground.pipe) as pipe:
        noise = torch.randn(6, *pipe.unet.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        labels = torch.arange(6) % pipe.unet.config.num_classes if scale != 1 else None
        exact = pipe.unet.exact_ode_solution(noise, 999.0, None, labels, scale, tolerance=1e-11)
        result = sampler_error(pipe.scheduler, pipe.unet, 10, noise, labels, scale, exact=exact)
    assert run.errors == pytest.approx(result.per_sample.numpy(), abs=1e-6)
    assert few.run("ours", peer, 10).errors == pytest.approx(run.errors[[1, 4]], abs=1e-6)


@pytest.mark.parametrize("peer", ["deis", "pndm"])
def test_the_sampler_that_ends_early_is_compared_with_the_solution_there(peer):
    ground = OracleGround(PROBLEMS["mixture"], 4)
    start = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with ORACLE_PEERS[peer].on(ground.pipe) as pipe:
        wanted, clean = (
            sampler_error(pipe.scheduler, pipe.unet, 10, start, t_end=end).per_sample for end in (0.0, None)
        )
    found = ground.solve(ORACLE_PEERS[peer], 10)[0]
    assert found == pytest.approx(wanted.numpy(), abs=1e-7) and abs(found - clean.numpy()).max() > 1e-6


def test_more_calls_lead_nearer_and_the_table_shows_the_order():
    study = OracleStudy({"ours": OURS}, problems=["mixture"], calls=(20, 25, 40, 50), claim_calls=(20,), samples=4)
    recorder = Recorder("deepcache", {}, {})
    study.measure(recorder, None)
    table = recorder.tables["Gaussian mixture in 16 dimensions: error by calls"]
    assert table["columns"] == ["sampler", "calls made", "error", *(f"{n} calls" for n in study.calls), "order"]
    orders = {row[0]: row[-1] for row in table["rows"] if row[2] == "median"}
    assert orders["DDIM"] == pytest.approx(1, abs=0.3)
    assert orders["DPM-Solver++ 2M"] == pytest.approx(2, abs=0.5)
    made = {row[0]: row[1] for row in table["rows"]}
    assert made["DDIM"] == "as asked" and made["Heun"] == "21, 25, 41, 51"
    against = recorder.tables["Gaussian mixture in 16 dimensions: against each peer"]["rows"]
    assert len(against) == len(ORACLE_PEERS) * 4 and all(low <= mean <= high for *_, mean, low, high, _ in against)


def test_a_study_is_recorded_and_measured_again(results, tmp_path):
    upstream = fitting(DPMSolverMultistepScheduler, unrounded=True)
    study = OracleStudy(
        {"ours": Variant("the same", scheduler=upstream)},
        {name: ORACLE_PEERS[name] for name in ("dpm_solver_pp_2m", "unipc")},
        problems=["mixture"], calls=(5, 10), claim_calls=(10,), samples=10, over=("dpm_solver_pp_2m", BEST),
    )  # fmt: skip
    made = benchmark(study)
    names = ["oracle_mixture_ours_at_10_over_dpm_solver_pp_2m", "oracle_mixture_ours_at_10_over_best"]
    assert made.claims == names
    printed(made.run)
    claims = {entry["name"]: entry for entry in proofs.read_result("deepcache")["claims"]}
    same = claims[names[0]]
    assert same["value"] == pytest.approx(0, abs=1e-9) and same["samples"]["counts"] == {"ours": 10, "theirs": 10}
    errors = {name: np.mean(OracleGround(PROBLEMS["mixture"], 10).run(name, ORACLE_PEERS[name], 10).errors) for name in ("dpm_solver_pp_2m", "unipc")}  # fmt: skip
    best = min(errors, key=errors.get)
    assert claims[names[1]]["samples"]["counts"]["best"] == ["dpm_solver_pp_2m", "unipc"].index(best)
    assert f"{ORACLE_PEERS[best].title}, the best peer, at 10 calls" in claims[names[1]]["statement"]
    assert (tmp_path / "bench" / "deepcache-oracle.png").stat().st_size > 1000

    agrees, text = printed(made.check, Selection(pictures=3, draw="a"))
    assert agrees and text.count("agrees") == 2
    agrees, text = printed(made.check, Selection(frozenset(names[1:]), pictures=3, draw="b"))
    assert agrees and text.count("agrees") == 1
    study.variants["ours"] = Variant("the same", scheduler=upstream, steps=9)
    agrees, text = printed(made.check, Selection(pictures=3, draw="a"))
    assert not agrees and "count 'ours' is 9, recorded 10" in text.replace("\n", " ")


def test_the_best_peer_of_a_few_pictures_is_that_of_the_record(results, monkeypatch):
    study = OracleStudy({"ours": OURS}, problems=["mixture"], calls=(5,), claim_calls=(5,), samples=4, over=(BEST,))
    recorder = Recorder("deepcache", {}, {})
    monkeypatch.setattr(_samplers, "_recorded_peer", lambda key, claim, peers: "ddim")
    study.measure(recorder, Selection(pictures=2))
    assert recorder.samples["oracle_mixture_ours_at_5_over_best"].counts["best"] == 0
    with pytest.raises(ValueError, match="`over` has 'euler'"):
        OracleStudy({"ours": OURS}, problems=["mixture"], calls=(5,), claim_calls=(5,), samples=2, over=("euler",)).measure(
            Recorder("deepcache", {}, {}), None
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"variants": {}}, "`variants`"),
        ({"problems": ["moons"]}, "`problems` has 'moons'"),
        ({"claim_calls": (7,)}, "`claim_calls`"),
        ({"peers": {"ours": OURS}}, "`peers` has"),
        ({"peers": {BEST: OURS}}, "`peers` has"),
    ],
)
def test_studies_of_nothing_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        OracleStudy(**{"variants": {"ours": OURS}, **options})


# --- pictures --------------------------------------------------------------------------------------------------------


def trajectories(tiny, cache=None, **options) -> TrajectoryStudy:
    defaults = {
        "variants": {"ours": OURS}, "calls": (4, 6), "pictures": 2, "reference_steps": 8, "minutes": 0.1,
        "peers": {name: PEERS[name] for name in ("ddim", "pndm")}, "zoo": lambda name: ZooModel(name, tiny),
        "cache": cache,
    }  # fmt: skip
    return TrajectoryStudy("avatars-sd", 2.0, **{**defaults, **options})


def test_pictures_are_compared_with_a_long_run_of_the_same_seeds(tiny, results, tmp_path):
    scheduler = tiny.scheduler
    made = benchmark(trajectories(tiny))
    assert made.claims == [f"avatars-sd_w2_ours_at_{calls}_over_best" for calls in (4, 6)]
    printed(made.run)
    assert tiny.scheduler is scheduler and (tmp_path / "bench" / "deepcache-avatars-sd_w2.png").is_file()
    result = proofs.read_result("deepcache")
    entry = {entry["name"]: entry for entry in result["claims"]}[made.claims[1]]

    # The same by hand.
    zoo = ZooModel("avatars-sd", tiny)
    config = dict(scheduler.config) | {"timestep_spacing": "trailing", "set_alpha_to_one": True}

    def pictures(steps, cls, **options):
        tiny.scheduler = cls.from_config(config, **options)
        return zoo.generate(tiny, zoo.conditions(2), range(2), steps, 2.0)

    full = pictures(8, DPMSolverMultistepScheduler)
    ours = rmse(pictures(6, DPMSolverMultistepScheduler, solver_order=3), full)
    assert entry["samples"]["ours"] == pytest.approx(ours.tolist(), abs=1e-6)
    peer = ["ddim", "pndm"][int(entry["samples"]["counts"]["best"])]
    steps = {"ddim": 6, "pndm": 5}[peer]
    theirs = rmse(pictures(steps, PEERS[peer].scheduler, **PEERS[peer].scheduler_options), full)
    assert entry["samples"]["theirs"] == pytest.approx(theirs.tolist(), abs=1e-6)
    assert entry["samples"]["counts"]["theirs"] == 6
    tiny.scheduler = scheduler

    agrees, text = printed(made.check, Selection(pictures=1, draw="a"))
    assert agrees and text.count("agrees") == 2, text


def _with_reversed_defaults(scheduler) -> dict:
    config = scheduler._internal_dict
    return FrozenDict({**config, "_use_default_values": list(config.get("_use_default_values", []))[::-1]})


def test_runs_are_kept_on_disk_by_all_that_they_follow_from(tiny, tmp_path, monkeypatch):
    def ground(**options):
        return PictureGround(ZooModel("avatars-sd", tiny), **{"guidance_scale": 2.0, "pictures": 2, "reference_steps": 6, "cache": tmp_path, **options})  # fmt: skip

    def files() -> int:
        return len(list(tmp_path.glob("*.npz")))

    errors, calls = ground().solve(PEERS["ddim"], 4)
    assert files() == 2 and calls == 4
    with monkeypatch.context() as patch:
        patch.setattr(ZooModel, "generate", None)
        # Written by diffusers, from a set: another process has the names in another order.
        patch.setattr(PEERS["ddim"].scheduler, "config", property(_with_reversed_defaults))
        again, calls = ground().solve(PEERS["ddim"], 4)
    assert (again == errors).all() and calls == 4
    for number, (options, variant, steps) in enumerate(
        [
            ({}, PEERS["ddim"], 3),
            ({}, Variant(scheduler=PEERS["ddim"].scheduler, scheduler_options={"beta_end": 0.01}), 4),
            ({}, Variant(scheduler=PEERS["ddim"].scheduler, options={"eta": 0.5}), 4),
            ({}, PEERS["unipc"], 4),
        ]
    ):
        ground(**options).solve(variant, steps)
        assert files() == 3 + number, (options, variant, steps)
    for options in ({"guidance_scale": 3.0}, {"units": [1]}, {"reference_steps": 7}):
        before = files()
        ground(**options).solve(PEERS["ddim"], 4)
        assert files() == before + 2, options
    monkeypatch.setattr(_grounds, "weights", lambda name: {"avatars-sd": "retrained"})
    before = files()
    ground().solve(PEERS["ddim"], 4)
    assert files() == before + 2
    ground().solve(Variant(configs=[dx.DeepCacheConfig()]), 4)
    ground().solve(Variant(prepare=lambda pipe: pipe), 4)
    assert files() == before + 2, "what is more than a scheduler is not kept"


def test_a_quick_run_takes_nothing_from_the_disk(tiny, tmp_path, results):
    trajectories(tiny, tmp_path).measure(Recorder("deepcache", {}, {}), Selection(pictures=1))
    assert not list(tmp_path.glob("*.npz"))


def test_two_forward_passes_of_one_guided_call_count_once():
    flux = models.STOCKS["tiny-flux"].make()
    flux.scheduler = FlowMatchEulerDiscreteScheduler()

    class Zoo:
        """As `ZooModel`, of a pipeline that guides by a second forward pass."""

        pipe, name = flux, "tiny"

        def conditions(self, count):
            return [None] * count

        def denoiser(self, pipe):
            return pipe.transformer

        def generate(self, pipe, conditions, seeds, steps, guidance_scale):
            call = models.STOCKS["tiny-flux"].call(steps)
            negative = {f"negative_{name}": call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
            drawn = models.draw(pipe, {**call, **negative, "true_cfg_scale": guidance_scale})
            return drawn.float().numpy()[..., None].clip(0, 1)

    ground = PictureGround(Zoo(), 2.0, 1, reference_steps=8)
    assert ground.run("dpm", FLOW_PEERS["dpm_solver_pp_2m"], 6).calls == 6 and ground._forwards_a_step == 2


def test_a_drawing_needs_no_display(tmp_path):
    study = OracleStudy({"ours": OURS}, problems=["mixture"], calls=(5, 8), claim_calls=(5,), samples=3)
    assert study.draw("A title: of a paper", tmp_path / "x") == []
    study.measure(Recorder("deepcache", {}, {}), None)
    assert [file.name for file in study.draw("A title: of a paper", tmp_path / "x")] == ["x-oracle.png"]
    figure = error_against_calls("A title", study._drawn, bold=1)
    assert figure.axes[0].get_yscale() == "log" and len(figure.axes[0].lines) == 7


# --- time ------------------------------------------------------------------------------------------------------------


def test_only_steps_are_timed_and_each_on_a_scheduler_that_is_ready():
    study = StepOverhead({"same": OURS}, rows=2, steps=3, rounds=2)
    recorder = Recorder("deepcache", {}, {})
    study.measure(recorder, None)
    assert [entry["name"] for entry in recorder.claims] == study.claims == ["step_time_same", "step_not_slower_same"]
    assert 0.1 < recorder.claims[0]["value"] < 10 and recorder.tables["step: time"]["rows"][0][0] == "order 3"
    run = study._run(OURS)
    for _ in range(8):  # twice the rounds and the two that warm up
        run()
    with pytest.raises(IndexError):
        run()


# --- all together ----------------------------------------------------------------------------------------------------


def test_the_overview_runs_what_the_benchmarks_declare_side_by_side(tiny, tmp_path, monkeypatch):
    from benchmarks import samplers

    plan = {5: OURS, 8: OURS}.__getitem__  # knows no other budgets
    declared = {
        OracleStudy: [
            (
                "dpm_solver_v3",
                OracleStudy({"a": OURS}, problems=["mixture"], calls=(5, 8, 10), claim_calls=(5,), samples=2),
            ),
            ("evodiff", OracleStudy({"a": plan}, problems=["mixture"], calls=(5, 8), claim_calls=(5,), samples=3)),
        ],
        TrajectoryStudy: [("evodiff", trajectories(tiny, pictures=1, peers=None, calls=(4,)))],
    }
    monkeypatch.setattr(samplers, "declared", declared.__getitem__)
    monkeypatch.setattr(samplers, "OUTPUT", tmp_path)
    samplers.main(["--part", "oracles", "--part", "pictures", "--threads", "1"])
    tables = json.loads((tmp_path / "samplers.json").read_text())["tables"]
    table = tables["Gaussian mixture in 16 dimensions: error by calls"]
    assert [row[0] for row in table["rows"][:4:2]] == ["DPM-Solver-v3, order 3", "EVODiff, order 3"]
    assert table["columns"][3:-1] == ["5 calls", "8 calls"]
    assert "avatars-sd, guidance 2: error by calls" in tables
    assert {file.name for file in tmp_path.glob("*.png")} == {"samplers-oracles.png", "samplers-avatars-sd_w2.png"}
    samplers.main(["--part", "pictures", "--model", "fashion-ddpm", "--threads", "1"])
    assert json.loads((tmp_path / "samplers.json").read_text())["tables"] == tables, "what was measured before is kept"
