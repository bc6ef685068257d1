"""The machinery of the benchmarks: closed forms, what contradicts a record, and a whole benchmark on a tiny pipeline."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import diffusers_ext as dx
from benchmarks import _bench, _plot
from benchmarks._bench import Benchmark, Selection, contradictions
from benchmarks._quality import RMSE_TOLERANCE, Cost, QualityCost, Variant, denoiser_cost, equal_cost_steps
from benchmarks._record import Samples
from benchmarks._zoo import ZooModel, accuracy_shares, held_out_captions
from diffusers_ext import bench, proofs, registry
from diffusers_ext.metrics import AvatarJudge, balanced_accuracy, count_macs, psnr, rmse

from .fresh import ROOT

# --- numbers of each picture, and the claim that follows -------------------------------------------------------------


def test_a_claim_is_the_mean_over_pairs_with_a_bootstrap_over_pairs():
    # Two pictures: a mean of two draws is 0, 1/2 or 1, the ends with probability 1/4 each, more than 2.5 %.
    assert Samples("value", {"ours": [0.0, 1.0]}, 0).claim() == (0.5, (0.0, 1.0))
    # Four, one of them 1: more than two of four draws are that one with probability 5 %, all four with 0.4 %.
    assert Samples("value", {"ours": [0.0, 0.0, 0.0, 1.0]}, 0).claim() == (0.25, (0.0, 0.75))
    # Pictures differ a thousand times more than the two ways to make them, and the pairs all by the same.
    hard = [1.0, 1000.0, 30.0, 7.0]
    value, interval = Samples("difference", {"ours": [x + 0.25 for x in hard], "theirs": hard}, 0).claim()
    assert value == pytest.approx(0.25) and interval == pytest.approx((0.25, 0.25))
    value, interval = Samples("psnr_gain", {"ours": [x / 2 for x in hard], "theirs": hard}, 0).claim()
    assert value == pytest.approx(20 * math.log10(2)) and interval == pytest.approx((value, value))


def test_psnr_gain_is_the_difference_of_psnr():
    full, ours, theirs = torch.rand((3, 5, 3, 8, 8)).unbind()
    columns = {"ours": rmse(ours, full).tolist(), "theirs": rmse(theirs, full).tolist()}
    gain = (psnr(ours, full) - psnr(theirs, full)).mean().item()
    assert Samples("psnr_gain", columns, 0).claim()[0] == pytest.approx(gain, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20))
def test_the_claim_follows_from_what_is_recorded(numbers):
    samples = Samples("psnr_gain", {"ours": numbers, "theirs": numbers[::-1]}, 0, counts={"ours": 3})
    read = json.loads(json.dumps(samples.to_dict()))
    assert Samples.from_dict(read).claim() == samples.claim()
    assert Samples.from_dict(read, [len(numbers) - 1]).columns["ours"] == [float(f"{numbers[-1]:.7g}")]


@pytest.mark.parametrize(
    ("formula", "columns", "named"),
    [
        ("ratio", {"ours": [1.0]}, "`formula` is 'ratio'"),
        ("value", {"ours": [1.0], "theirs": [1.0]}, "`columns`"),
        ("difference", {"ours": [1.0], "theirs": [1.0, 2.0]}, "`columns`"),
        ("value", {"ours": []}, "`columns`"),
        ("psnr_gain", {"ours": [0.1, 0.0], "theirs": [0.1, 0.1]}, "unit 1"),  # equal to the reference
        ("value", {"ours": [float("nan")]}, "unit 0"),
    ],
)
def test_numbers_that_make_no_claim_are_refused(formula, columns, named):
    with pytest.raises(ValueError, match=named):
        Samples(formula, columns, 0)


# --- equal cost ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "measured", "steps"),
    [
        (7.48, {3: 3 * 0.37, 6: 6 * 0.37}, 20),  # one call a step
        (19, {3: 5, 6: 11}, 10),  # 2 n - 1 calls, as Heun's method
        (11, {3: 4, 6: 7}, 10),  # n + 1 calls, as PNDM
        (10.5, {1: 1, 2: 2}, 11),  # halfway: in favour of the baseline
        (10.4, {1: 1, 2: 2}, 10),
        (0.1, {1: 1, 2: 2}, 1),
    ],
)
def test_steps_of_equal_cost(cost, measured, steps):
    assert equal_cost_steps(cost, measured) == steps


@given(st.integers(1, 10**12), st.integers(-(10**11), 10**12), st.integers(1, 200), st.floats(-0.499, 0.499))
def test_no_other_number_of_steps_costs_nearer(per_step, fixed, steps, off):
    cost = per_step * (steps + off) + fixed
    assert equal_cost_steps(cost, {n: per_step * n + fixed for n in (3, 6)}) == steps


def test_costs_that_tell_nothing_are_refused():
    for measured in ({3: 1.0}, {3: 1.0, 6: 1.0}, {1: 1, 2: 2, 3: 3}):
        with pytest.raises(ValueError, match="`measured`"):
            equal_cost_steps(1.0, measured)


def test_cost_counts_calls_and_macs_of_the_denoiser_alone():
    denoiser, other = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(8, 8)
    inputs = torch.ones(5, 8)
    assert denoiser_cost(denoiser, lambda: (other(inputs), denoiser(inputs), denoiser(inputs))) == Cost(2, 2 * 5 * 128)
    assert "forward" not in vars(denoiser)
    hooked = lambda x: x  # noqa: E731
    denoiser.forward = hooked
    with pytest.raises(KeyError):
        denoiser_cost(denoiser, lambda: {}[denoiser(inputs)])
    assert denoiser.forward is hooked


# --- accuracy --------------------------------------------------------------------------------------------------------

LABELS = st.sampled_from(["a", "b", "c", None])


@settings(deadline=None)
@given(st.lists(st.tuples(LABELS, LABELS, LABELS, LABELS), min_size=1, max_size=30), st.data())
def test_shares_add_up_to_balanced_accuracy_and_do_not_depend_on_the_others(rows, data):
    wanted = {"one": [row[0] for row in rows], "two": [row[1] for row in rows]}
    found = {"one": [row[2] for row in rows], "two": [row[3] for row in rows]}
    scores = []
    for name in wanted:
        pairs = [(seen, label) for seen, label in zip(found[name], wanted[name], strict=True) if label is not None]
        if pairs:
            scores.append(balanced_accuracy(*zip(*pairs, strict=True)))
    if not scores:
        with pytest.raises(ValueError, match="`wanted`"):
            accuracy_shares(wanted, found, range(len(rows)))
        return
    shares = accuracy_shares(wanted, found, range(len(rows)))
    assert shares.mean() == pytest.approx(np.mean(scores)) and shares.max() <= 1
    some = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    seen = {name: [labels[unit] for unit in some] for name, labels in found.items()}
    assert accuracy_shares(wanted, seen, some).tolist() == shares[some].tolist()


def test_shares_agree_with_the_judge_of_avatars(tiny):
    with np.load(ROOT / "benchmarks" / "data" / "avatars.npz") as data:
        pictures, captions = data["image"][:40].astype(np.float32) / 255, data["caption"][:40].tolist()
    judge, zoo = AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge")), ZooModel("avatars-sd", tiny)
    for asked in (captions, captions[20:] + captions[:20]):
        expected = np.nanmean(list(judge.score(pictures, asked).values()))
        assert zoo.accuracy(pictures, asked, range(40)).mean() == pytest.approx(expected)
    assert 0.9 < zoo.ceiling <= 1.0


# --- pipelines -------------------------------------------------------------------------------------------------------


def test_held_out_captions_are_distinct_and_of_no_trained_picture():
    splits = json.loads((ROOT / "benchmarks" / "data" / "avatars_splits.json").read_text())
    with np.load(ROOT / "benchmarks" / "data" / "avatars.npz") as data:
        everything = data["caption"].tolist()
    trained = {everything[row] for name in ("generator", "judge") for row in splits[name]}
    captions = held_out_captions(64)
    assert len(set(captions)) == 64 and not trained & set(captions)
    assert held_out_captions(8) == captions[:8]
    with pytest.raises(ValueError, match="`count` is 100000"):
        held_out_captions(100000)


@pytest.mark.parametrize(
    ("name", "guidance"), [("avatars-sd", 3.0), ("avatars-flow", 3.0), ("fashion-dit", 3.0), ("fashion-ddpm", None)]
)
def test_a_picture_is_of_its_own_seed_and_condition_in_every_pipeline(name, guidance, tiny, tmp_path):
    """In the layouts of the zoo, untrained: the same picture alone as in a batch, another one with another seed."""
    if name != "avatars-sd":
        import importlib

        make = importlib.import_module(f"benchmarks.zoo.make_{name.replace('-', '_')}")
        make.start(tmp_path)
        zoo = ZooModel(name, ZooModel.load(tmp_path))
    else:
        zoo = ZooModel(name, tiny)
    conditions = zoo.conditions(4)
    pictures = zoo.generate(zoo.pipe, conditions, range(4), 3, guidance)
    side = 32 if name.startswith("avatars") else 28
    assert pictures.shape == (4, side, side, 3 if side == 32 else 1)
    assert 0 <= pictures.min() < pictures.max() <= 1
    alone = zoo.generate(zoo.pipe, [conditions[2]], [2], 3, guidance)
    assert rmse(alone, pictures[2:3]).item() < RMSE_TOLERANCE
    assert rmse(zoo.generate(zoo.pipe, [conditions[2]], [3], 3, guidance), pictures[2:3]).item() > 0.01
    cost = denoiser_cost(zoo.denoiser(zoo.pipe), lambda: zoo.generate(zoo.pipe, conditions[:1], [0], 3, guidance))
    assert cost.calls == (6 if name == "avatars-flow" else 3) and cost.macs > 0  # true guidance calls twice


def test_models_and_pipelines_that_benchmarks_do_not_know_are_refused():
    with pytest.raises(ValueError, match=r"'cats'.*avatars-sd"):
        ZooModel("cats")
    with pytest.raises(ValueError, match="`pipe` is a dict"):
        ZooModel("avatars-sd", {})


def test_a_variant_is_on_inside_and_leaves_the_pipeline_as_it_was(tiny):
    scheduler, config = tiny.scheduler, dx.DeepCacheConfig(interval=2)
    made = []

    def prepare(pipe):
        made.append(pipe)
        return pipe

    variant = Variant("all", [config], HeunDiscreteScheduler, {"beta_end": 0.03}, prepare=prepare)
    with pytest.raises(KeyError), variant.on(tiny) as pipe:
        assert pipe is made[0] and pipe.unet is not tiny.unet
        assert isinstance(pipe.scheduler, HeunDiscreteScheduler) and pipe.scheduler.config.beta_end == 0.03
        assert [entry.config for entry in dx.status(pipe)] == [config]
        raise KeyError
    with pytest.raises(KeyError), Variant("", [config], DDIMScheduler).on(tiny) as pipe:
        assert pipe is tiny and dx.status(tiny)
        raise KeyError
    assert tiny.scheduler is scheduler and dx.status(tiny) == []
    assert variant.settings() == {
        "title": "all",
        "configs": [{"method": "deepcache", **vars(config)}],
        "scheduler": {"class": "HeunDiscreteScheduler", "beta_end": 0.03},
        "prepare": prepare.__qualname__,
    }


# --- a study and a benchmark, on a tiny pipeline ---------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(_bench, "OUTPUT", tmp_path / "bench")
    return tmp_path / "results"


def study(tiny, **options) -> QualityCost:
    defaults = {
        "variants": {f"N{n}": Variant(f"interval {n}", [dx.DeepCacheConfig(interval=n)]) for n in (2, 3)},
        "pictures": 5, "guidance_scale": 2.0, "minutes": 0.1, "measures": ("psnr", "rmse", "accuracy"),
        "zoo": lambda name: ZooModel(name, tiny),
    }  # fmt: skip
    return QualityCost("avatars-sd", 8, **defaults | options)


def benchmark(*parts) -> Benchmark:
    made = Benchmark("deepcache", settings={"branch": 0}, threads=1)
    for part in parts:
        made.add(part)
    return made


def printed(call, *arguments):
    """What a call with a console returns, and what it prints."""
    stream = io.StringIO()
    found = call(Console(file=stream, width=200), *arguments)
    return found, stream.getvalue()


def forge(key: str, edit) -> None:
    """Edit a recorded result and make its digest fit."""
    result = proofs.read_result(key)
    edit({entry["name"]: entry for entry in result["claims"]})
    proofs._save(result)


def test_a_study_measures_variants_against_fewer_steps_of_equal_cost(tiny, results, tmp_path):
    made = benchmark(study(tiny))
    file, text = printed(made.run)
    assert file == results / "deepcache.json" and "about 0.1 minutes" in text
    result = proofs.read_result("deepcache")
    claims = {entry["name"]: entry for entry in result["claims"]}
    assert list(claims) == made.claims
    assert list(claims)[:4] == [f"equal_macs_{m}_N2" for m in ("psnr", "rmse", "accuracy")] + ["equal_macs_psnr_N3"]
    assert result["seeds"] == {"pictures": list(range(5))}
    assert result["settings"]["variants"]["N3"]["configs"][0]["interval"] == 3
    assert result["settings"]["scheduler"] == "DDIMScheduler" and result["settings"]["branch"] == 0

    # The same by hand.
    captions = held_out_captions(5)

    def pictures(steps: int) -> np.ndarray:
        return np.concatenate(
            [tiny(caption, num_inference_steps=steps, guidance_scale=2.0, output_type="np",
                  generator=torch.Generator().manual_seed(seed)).images for seed, caption in enumerate(captions)]
        )  # fmt: skip

    def macs(steps: int) -> int:
        """Of the denoiser, for one guided picture."""
        shape = (2, tiny.unet.config.in_channels, tiny.unet.config.sample_size, tiny.unet.config.sample_size)
        states = torch.zeros(2, tiny.tokenizer.model_max_length, tiny.unet.config.cross_attention_dim)
        calls = [torch.tensor(900 - step) for step in range(steps)]
        with torch.no_grad():
            return count_macs(lambda: [tiny.unet(torch.zeros(shape), t, states) for t in calls])

    full, per_step = pictures(8), macs(1)
    with dx.enabled(tiny, dx.DeepCacheConfig(interval=3)):
        ours, cost = pictures(8), macs(8)
    steps = round(cost / per_step)
    counts = claims["equal_macs_psnr_N3"]["samples"]["counts"]
    assert counts == {"ours": cost, "theirs": per_step * steps} and abs(cost - per_step * steps) <= per_step / 2
    theirs = pictures(steps)
    gain = psnr(ours, full) - psnr(theirs, full)
    entry = claims["equal_macs_psnr_N3"]
    assert entry["statement"] == f"PSNR to the full run above that of {steps} steps, which cost as much, interval 3"
    assert entry["value"] == pytest.approx(gain.mean().item(), abs=1e-3) and entry["unit"] == "dB"
    assert np.allclose(entry["samples"]["ours"], rmse(ours, full), atol=1e-6)
    assert entry["goal"] == {"op": ">=", "value": 0.0} and entry["quick"] is True
    judge = AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge"))
    scores = [np.nanmean(list(judge.score(made, captions).values())) for made in (ours, theirs)]
    assert claims["equal_macs_accuracy_N3"]["value"] == pytest.approx(scores[0] - scores[1])
    rows = {row[0]: row for row in result["tables"]["quality"]["rows"]}
    assert rows["8 steps"][1:5] == [8, 8 * per_step / 1e9, 1.0, "inf"]
    assert rows["DeepCache, interval 3"][4] == pytest.approx(psnr(ours, full).mean().item(), abs=1e-3)
    assert rows["DeepCache, interval 3"][8] == pytest.approx(scores[0])
    assert dx.status(tiny) == []
    assert (tmp_path / "bench" / "deepcache.png").read_bytes().startswith(b"\x89PNG")

    # Measured again on some of the pictures: it agrees, until the record says something else.
    agrees, text = printed(made.check, Selection(frozenset(["equal_macs_rmse_N2"]), 3, "b"))
    assert agrees and "equal_macs_rmse_N2" in text and "equal_macs_psnr_N3" in text.partition("Not measured again")[2]
    forge("deepcache", lambda claims: claims["equal_macs_rmse_N2"].update(better(claims["equal_macs_rmse_N2"])))
    agrees, text = printed(made.check, Selection(frozenset(["equal_macs_rmse_N2"]), 3, "b"))
    assert not agrees and "equal_macs_rmse_N2: ours of unit" in text
    agrees, text = printed(made.check, Selection(pictures=2, draw="c"))
    assert not agrees and text.count("contradicts") == 1 and text.count("agrees") == 5


def better(entry: dict) -> dict:
    """A claim with all its own errors a tenth smaller, and all that follows from them."""
    content = entry["samples"] | {"ours": [number * 0.9 for number in entry["samples"]["ours"]]}
    samples = Samples.from_dict(content)
    goal = entry["goal"]["op"], entry["goal"]["value"]
    return proofs.claim(entry["name"], "", *_value(samples), goal, samples.to_dict(), True)


def _value(samples: Samples):
    value, interval = samples.claim()
    return value, "dB", interval


def test_several_baselines_and_studies_have_names_of_their_own(tiny):
    heun = {"euler": Variant(), "heun": Variant("Heun", scheduler=HeunDiscreteScheduler)}
    one, two = study(tiny), study(tiny, name="small", baselines=heun, measures=["psnr"])
    made = benchmark(one, two)
    assert made.claims[-4:] == [
        f"small_equal_macs_psnr_N{n}_over_{baseline}" for n in (2, 3) for baseline in ("euler", "heun")
    ]
    assert made.settings["small"]["baselines"]["heun"]["scheduler"] == {"class": "HeunDiscreteScheduler"}
    assert set(made.seeds) == {"pictures", "small_pictures"}
    with pytest.raises(ValueError, match="equal_macs_psnr_N2"):
        benchmark(one, study(tiny))
    for wrong, named in (({"variants": {}}, "`variants`"), ({"measures": ["fid"]}, "'fid'")):
        with pytest.raises(ValueError, match=named):
            study(tiny, **wrong)


def test_a_baseline_with_two_calls_a_step_gets_half_the_steps(tiny, results):
    heun = {"heun": Variant("Heun", scheduler=HeunDiscreteScheduler)}
    variants = {"N2": Variant("interval 2", [dx.DeepCacheConfig(interval=2)])}
    made = benchmark(study(tiny, baselines=heun, measures=["psnr"], pictures=2, variants=variants))
    printed(made.run)
    rows = {row[0]: row[1:3] for row in proofs.read_result("deepcache")["tables"]["quality"]["rows"]}
    full, ours = rows["8 steps"][1], rows["DeepCache, interval 2"][1]
    [(title, calls, cost)] = [(title, *row) for title, row in rows.items() if title.startswith("Heun")]
    assert calls % 2 == 1 and title == f"Heun, {(calls + 1) // 2} steps"  # its last step takes one call
    assert cost == pytest.approx(full * calls / 8) and abs(cost - ours) <= full / 8


# --- a benchmark without a pipeline ----------------------------------------------------------------------------------


def quick_benchmark(numbers=(0.01, 0.02, 0.04), count=7, **other) -> Benchmark:
    made = Benchmark("deepcache", settings={"steps": 3} | other, threads=1)

    @made.part("gain", "count", minutes=0.5, quick=True)
    def measure(recorder):
        columns = {"ours": numbers, "theirs": [0.03, 0.03, 0.03]}
        recorder.paired("gain", "nearer", Samples("psnr_gain", columns, 1e-5), "dB", (">=", 0.0))
        recorder.claim("count", "calls", count, "calls")

    @made.part("time", minutes=1.5)
    def timed(recorder):
        recorder.claim("time", "twice as fast", 0.5, "x", (0.4, 0.6), ("<=", 0.6))

    return made


def test_a_quick_run_compares_what_is_no_time(results):
    _, text = printed(quick_benchmark().run)
    assert "about 2 minutes" in text
    assert printed(quick_benchmark().check, Selection())[0]
    for wrong, told in [
        (quick_benchmark(numbers=(0.01, 0.02002, 0.04)), "gain: ours of unit 1 is 0.02002, recorded 0.02"),
        (quick_benchmark(count=8), "count: it is 8, recorded 7"),
        (quick_benchmark(steps=4), "Setting 'steps' is 4, recorded 3"),
    ]:
        agrees, text = printed(wrong.check, Selection())
        assert not agrees and told in text, text
    _, text = printed(quick_benchmark().check, Selection())
    assert "time" in text.partition("Not measured again")[2] and "twice" not in text


def test_a_quick_run_without_a_record_says_so(results):
    agrees, text = printed(quick_benchmark().check, Selection())
    assert agrees and "no record" in text and "gain" in text
    assert not results.exists()


def test_a_forged_record_is_noticed_from_itself(results):
    printed(quick_benchmark().run)
    for edit, told in [
        (lambda claims: claims["gain"].update(value=9.0), "gain: its recorded numbers give"),
        (lambda claims: claims["gain"].update(interval=[0.1, 9.0]), "gain: its recorded numbers give"),
        (lambda claims: claims["gain"].update(holds=True), "gain: recorded is that it holds"),
        (lambda claims: claims["gain"]["samples"].update(formula="difference"), "gain: "),
        (lambda claims: claims["time"].update(name="tempo"), "tempo: the benchmark measures no such claim"),
    ]:
        printed(quick_benchmark().run)
        forge("deepcache", edit)
        agrees, text = printed(quick_benchmark().check, Selection())
        assert not agrees and told in text, text


def test_what_was_declared_has_to_be_measured(results):
    for found in ([], ["other"], ["gain", "other"]):
        made = Benchmark("deepcache", threads=1)

        @made.part("gain", minutes=0.1)
        def measure(recorder, found=found):
            for name in found:
                recorder.claim(name, "", 1.0, "x")

        with pytest.raises(ValueError, match="just what it declares"):
            printed(made.run)
    assert not results.exists()
    with pytest.raises(ValueError, match="gain"):
        made.part("gain", minutes=0.1)(lambda recorder: None)


def test_main(results, capsys):
    made = quick_benchmark()
    made.main([])
    made.main(["--quick"])
    made.main(["--quick", "--claim", "gain", "--draw", "abc"])
    with pytest.raises(SystemExit) as left:
        quick_benchmark(count=8).main(["--quick"])
    assert left.value.code == 1
    for wrong, told in ((["--claim", "gain"], "--quick"), (["--quick", "--claim", "time"], "'time'; allowed are gain")):
        with pytest.raises(SystemExit) as left:
            made.main(wrong)
        assert left.value.code == 2 and told in capsys.readouterr().err


@given(st.text(max_size=20), st.integers(1, 80), st.integers(1, 12))
def test_a_selection_is_of_different_pictures_and_always_the_same(draw, total, pictures):
    units = Selection(None, pictures, draw).units(total)
    assert units == sorted(set(units)) == Selection(None, pictures, draw).units(total)
    assert len(units) == min(pictures, total) and units[0] >= 0 and units[-1] < total


def test_another_commit_looks_at_other_pictures():
    assert len({tuple(Selection(draw=str(i)).units(64)) for i in range(20)}) == 20


# --- what contradicts a record ---------------------------------------------------------------------------------------

ERRORS = st.lists(st.floats(1e-4, 1e-1), min_size=1, max_size=12)


def recorded(samples: Samples) -> dict:
    value, interval = samples.claim()
    entry = proofs.claim("gain", "", value, "dB", interval, (">=", 0.0), samples.to_dict(), True)
    return json.loads(json.dumps(entry))


@settings(deadline=None, max_examples=60)
@given(ERRORS, st.data())
def test_the_same_up_to_rounding_agrees_and_more_does_not(errors, data):
    units = sorted(data.draw(st.lists(st.sampled_from(range(len(errors))), min_size=1, unique=True)))
    entry = recorded(Samples("psnr_gain", {"ours": errors, "theirs": [0.05] * len(errors)}, RMSE_TOLERANCE))
    shift = st.floats(-0.9 * RMSE_TOLERANCE, 0.9 * RMSE_TOLERANCE)
    now = [errors[unit] + data.draw(shift) for unit in units]

    def measured(numbers):
        return Samples("psnr_gain", {"ours": numbers, "theirs": [0.05] * len(units)}, RMSE_TOLERANCE, units=units)

    again = measured(now)
    assert contradictions(entry, recorded(again), again) == []
    place = data.draw(st.sampled_from(range(len(units))))
    now[place] += data.draw(st.sampled_from([-1, 1])) * data.draw(st.floats(2 * RMSE_TOLERANCE, 5e-5))
    again = measured(now)
    [reason] = contradictions(entry, recorded(again), again)
    assert f"ours of unit {units[place]} " in reason


def test_verdicts_that_jump_are_compared_by_their_mean():
    entry = recorded(Samples("difference", {"ours": [1.0, 0.0, 1.0], "theirs": [0.5] * 3}, 0.4, False))
    once, twice = ([1.0, 1.0, 1.0], [0.0, 1.0, 1.0]), ([0.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    for ours in once:
        assert contradictions(entry, {}, Samples("difference", {"ours": ours, "theirs": [0.5] * 3}, 0.4, False)) == []
    samples = Samples("difference", {"ours": twice[0], "theirs": [0.5] * 3}, 0.4, False)
    assert "the mean of ours" in contradictions(entry, {}, samples)[0]


def test_another_count_or_unit_contradicts():
    columns = {"ours": [0.01, 0.02], "theirs": [0.02, 0.03]}
    entry = recorded(Samples("psnr_gain", columns, 1e-5, counts={"ours": 10**9}))
    for samples, told in [
        (Samples("psnr_gain", columns, 1e-5, counts={"ours": 10**9 + 10**4}), "count 'ours'"),
        (Samples("psnr_gain", columns, 1e-5), "count 'ours' is None"),
        (Samples("difference", columns, 1e-5, counts={"ours": 10**9}), "'difference'"),
        (Samples("psnr_gain", columns, 1e-5, counts={"ours": 10**9}, units=[1, 2]), "unit 2"),
    ]:
        assert any(told in reason for reason in contradictions(entry, {}, samples))


ENDS = st.lists(st.floats(-10, 10), min_size=2, max_size=2).map(sorted)


@given(ENDS, ENDS)
def test_without_numbers_of_each_picture_intervals_have_to_meet(then, now):
    old = proofs.claim("gain", "", sum(then) / 2, "dB", then)
    new = proofs.claim("gain", "", sum(now) / 2, "dB", now)
    reasons = contradictions(old, new, None)
    if then[0] == then[1] and now[0] == now[1]:
        assert bool(reasons) == (abs(then[0] - now[0]) > 1e-6 * max(abs(then[0]), abs(now[0])) + 1e-12)
    else:
        assert bool(reasons) == (min(then[1], now[1]) < max(then[0], now[0]))
    assert bool(contradictions(new, old, None)) == bool(reasons)


def test_the_recorded_results_follow_from_their_numbers():
    for path in proofs.RESULTS.glob("*.json"):
        for entry in proofs.read_result(path.stem)["claims"]:
            assert _bench._inconsistencies(entry) == [], (path.stem, entry["name"])


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_a_drawing_has_all_that_was_measured(tmp_path):
    def points(shift: float) -> list[_plot.Point]:
        return [_plot.Point(2.0**i, i + shift, (i + shift - 1, i + shift + 2), f"N{i}") for i in range(3)]

    panels = [
        _plot.Panel("PSNR (dB)", {"ours": points(0), "fewer steps": points(1)}),
        _plot.Panel("accuracy", {"ours": points(0)}, {"ceiling": 3.0}),
    ]
    figure = _plot.quality_against_cost("A method", "GMACs", panels)
    assert [axes.get_ylabel() for axes in figure.axes] == ["PSNR (dB)", "accuracy"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"GMACs"} and figure.get_suptitle() == "A method"
    assert [text.get_text() for text in figure.axes[0].texts] == ["N0", "N1", "N2"] * 2
    assert not figure.axes[1].texts  # the same points, at the same costs
    for axes, panel in zip(figure.axes, panels, strict=True):
        assert len(axes.containers) == len(panel.series)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [*panel.lines, *panel.series]
        for container, made in zip(axes.containers, panel.series.values(), strict=True):
            line, _, (bars,) = container
            assert line.get_ydata().tolist() == [point.value for point in made]
            assert line.get_xdata() == pytest.approx([point.cost for point in made], rel=0.01)
            ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
            assert ends == [pytest.approx(point.interval) for point in made]
    places = [container[0].get_xdata()[0] for container in figure.axes[0].containers]
    assert places[0] != places[1]  # intervals of equal costs do not hide each other
    assert list(figure.axes[0].get_xticks()) == [1.0, 2.0, 5.0]
    file = _plot.save(figure, tmp_path / "new" / "drawing.png")
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


@given(st.floats(1e-3, 1e6), st.floats(1, 1e4))
def test_an_axis_has_ticks_whatever_the_costs(low, ratio):
    ticks = _plot._ticks(low, low * ratio)
    assert ticks == sorted(set(ticks)) and 1 <= len(ticks) <= 20
    assert low / 1.26 <= ticks[0] and ticks[-1] <= low * ratio * 1.26


# --- which benchmark, which claim ------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, results, monkeypatch):
    """A checkout with benchmarks of two methods, whose records have two quick claims each."""
    rows = {
        "deepcache": registry.get_method("deepcache"),
        "other": registry.Method("other", "Other", "samplers", "hook", entry=("DeepCacheConfig",)),
        "third": registry.Method("third", "Third", "samplers", "hook"),
    }
    monkeypatch.setattr(registry, "_all", lambda: rows)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for name in ("_record", "__init__", "deepcache", "other", "helper"):
        (tmp_path / "benchmarks" / f"{name}.py").touch()
    for key in ("deepcache", "other"):
        claims = [proofs.claim(name, "", 1.0, "x", quick=name != "time") for name in ("a", "b", "time")]
        proofs.write_result(
            key, method_version=1, source_hash=proofs.source_hash(rows[key].module), machine={}, versions={},
            settings={}, seeds={}, claims=claims, tables={},
        )  # fmt: skip
    return tmp_path


def test_benchmarks_by_key_and_area(checkout):
    assert bench.keys() == ["deepcache", "other"]
    assert bench.chosen("deepcache") == bench.chosen("acceleration") == ["deepcache"]
    assert bench.chosen("samplers") == ["other"]
    for unknown in ("third", "cooking", "_record", "helper"):
        with pytest.raises(ValueError, match=rf"{unknown}.*deepcache \(area acceleration\), other \(area samplers\)"):
            bench.chosen(unknown)


def test_each_claim_is_chosen_by_some_commit_and_always_by_the_same(checkout):
    commits = [f"{i:040x}" for i in range(100)]
    chosen = [bench.claim_of(commit) for commit in commits]
    assert set(chosen) == {(key, name) for key in ("deepcache", "other") for name in ("a", "b")}
    assert chosen == [bench.claim_of(commit) for commit in commits]
    assert all(chosen.count(claim) > 10 for claim in set(chosen))
    for wrong in ("", "abc", "HEAD", "g" * 40, "a" * 41, "A" * 40):
        with pytest.raises(ValueError, match="`commit`"):
            bench.claim_of(wrong)


def test_stale_records_are_left_out_and_edited_ones_are_errors(checkout):
    row = registry.get_method("other")
    registry._all()["other"] = registry.Method(**vars(row) | {"version": 2})
    assert bench.claims() == ([("deepcache", "a"), ("deepcache", "b")], ["other"])
    edited = proofs.result_path("other")
    edited.write_text(edited.read_text().replace("1.0", "2.0"))
    with pytest.raises(ValueError, match=r"other\.json was edited"):
        bench.claim_of("0" * 40)
    edited.unlink()
    proofs.result_path("deepcache").unlink()
    with pytest.raises(ValueError, match="no recorded claim"):
        bench.claim_of("0" * 40)


def git(*arguments: str, at: Path) -> str:
    if shutil.which("git") is None:
        pytest.skip("there is no program git")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    return subprocess.run(["git", *who, *arguments], cwd=at, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_a_shallow_clone(tmp_path, monkeypatch):
    origin = tmp_path / "origin"
    origin.mkdir()
    git("init", "--quiet", at=origin)
    for text in ("one", "two"):
        (origin / "file").write_text(text)
        git("add", ".", at=origin)
        git("commit", "--quiet", "-m", text, at=origin)
    git("clone", "--quiet", "--depth", "1", origin.as_uri(), str(tmp_path / "clone"), at=tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path / "clone")
    assert bench.head() == git("rev-parse", "HEAD", at=origin)


def test_without_git_the_commit_has_to_be_given(tmp_path, monkeypatch):
    git("init", "--quiet", at=tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="--commit HASH"):  # no commit yet
        bench.head()
    inside = tmp_path / "unpacked"
    inside.mkdir()
    monkeypatch.setattr(bench, "ROOT", inside)
    with pytest.raises(ValueError, match=r"no \.git.*--commit HASH"):  # another project's repository is around it
        bench.head()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"no program git.*--commit HASH"):
        bench.head()


def test_a_benchmark_runs_with_the_package_of_this_checkout(checkout, monkeypatch):
    (checkout / "benchmarks" / "other.py").write_text("import sys; sys.exit(len(sys.argv) + 40)\n")
    assert bench.run("other", ["--quick", "x"]) == 43
    called = []
    monkeypatch.setattr(subprocess, "call", lambda command, **options: called.append((command, options)) or 3)
    assert bench.run("other") == 3
    [(command, options)] = called
    assert command == [sys.executable, "-m", "benchmarks.other"] and options["cwd"] == checkout
    assert options["env"]["PYTHONPATH"].split(":")[0] == str(checkout)


def test_benchmarks_need_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()  # another package's
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    for call in (bench.keys, lambda: bench.chosen("deepcache"), lambda: bench.claim_of("0" * 40)):
        with pytest.raises(ValueError, match="source checkout"):
            call()
