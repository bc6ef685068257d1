"""The page of samplers with their defaults says what its record holds."""

from __future__ import annotations

import json

import numpy as np

from benchmarks import sampler_defaults


def _errors(ours: float, low: float, high: float) -> list[dict]:
    rows = []
    for calls in sampler_defaults.CALLS:
        row = {"calls": calls, "made": calls, "median": ours, "interval": [ours / 2, ours * 2]}
        own = {"over": "unipc", "difference": (low + high) / 2, "difference_interval": [low, high]}
        rows.append({**row, **own, "sampler": "NewScheduler", "ours": True, "mean": ours})
        rows.append({**row, "sampler": "unipc", "ours": False, "mean": 0.5})
    return rows


def _record() -> dict:
    distance = {"calls": 5, "net": "judge", "distance": 3.0}
    peer, own = {**distance, "sampler": "unipc"}, {**distance, "sampler": "NewScheduler", "over": "unipc"}
    own |= {"difference": -0.5, "difference_interval": [-1.0, 0.25]}
    about = {
        "machine": {"cpu": "a processor", "threads": 1}, "versions": {"torch": "2"}, "pictures": 4, "reference_steps": 9
    }  # fmt: skip

    def best(low: float, high: float) -> list[dict]:
        interval = {"difference": (low + high) / 2, "difference_interval": [low, high]}
        pairs = [["NewScheduler", "unipc"], ["NewScheduler", "ddim"]]
        return [{"calls": calls, "compared": pairs, **interval} for calls in sampler_defaults.CALLS]

    better, level = (-0.5, -0.125), (-0.25, 0.25)
    models = {
        "better": {
            "guidance_scale": 3.0, "errors": _errors(0.25, *better), "best": best(*better), "distances": [own, peer],
        },
        "level": {"guidance_scale": None, "errors": _errors(0.5, *level), "best": best(*level), "distances": []},
    }  # fmt: skip
    return {**about, "models": models}


def test_below_means_the_whole_interval():
    assert sampler_defaults.below(_record(), "NewScheduler", 5) == {"better": True, "level": False}


def test_the_page_in_the_docs_is_that_of_the_record():
    record = json.loads(sampler_defaults.RECORD.read_text(encoding="utf-8"))
    page = (sampler_defaults.ROOT / sampler_defaults.PAGE).read_text(encoding="utf-8")
    assert page == sampler_defaults.page(record), "write it again: python -m benchmarks.sampler_defaults --render"
    assert (sampler_defaults.ROOT / sampler_defaults.DRAWING).is_file()


def test_the_best_of_each_half_is_chosen_by_the_other():
    ours = {"a": np.array([0.0, 9.0, 0.0, 9.0]), "b": np.array([5.0, 2.0, 6.0, 2.0])}
    theirs = {"c": np.array([1.0, 1.0, 1.0, 1.0]), "d": np.array([3.0, 3.0, 3.0, 3.0])}
    differences, chosen = sampler_defaults.best_against_best(ours, theirs)
    assert chosen == [["b", "c"], ["a", "c"]]
    assert differences.tolist() == [4.0, 8.0, 5.0, 8.0], "the choice is not by what it is judged by"


def test_equal_up_to_rounding_is_not_below():
    record = _record()
    record["models"]["better"]["errors"] = _errors(0.5, -2e-6, -1e-6)
    assert not any(sampler_defaults.below(record, "NewScheduler", 5).values())


def test_the_time_of_a_step_is_shown():
    row = {"sampler": "USF, Taylor 2", "microseconds": 90.0, "over": "DPM-Solver++, order 2", "ratio": 0.5}
    rows = [{**row, "interval": [0.4, 0.6], "again": [0.9, 1.1]}]
    page = sampler_defaults.page({**_record(), "step": {"machine": {"threads": 1}, "versions": {}, "rows": rows}})
    assert "| USF, Taylor 2 | 90 | DPM-Solver++, order 2 | 0.50 (0.40 to 0.60) | 0.90 to 1.10 |" in page


def test_what_was_measured_without_guidance_has_a_part_of_its_own():
    record = _record()
    unguided = {"better": {**record["models"]["better"], "guidance_scale": 1.0}}
    page = sampler_defaults.page({**record, "unguided": unguided})
    first, _, second = page.partition("## Without guidance")
    assert "### better, without guidance" in second and "| better | **-0.3125" in second
    assert "| `NewScheduler` | 1 of 2 |" in first, "these are not counted there"


def test_the_page_and_the_drawing(tmp_path):
    page = sampler_defaults.page(_record())
    assert "| `NewScheduler` | 1 of 2 | 1 of 2 | 1 of 2 | 1 of 2 | better |" in page
    assert "| better | **-0.3125, -0.5000 to -0.1250 (New on unipc or New on ddim)** |" in page
    assert "| level | +0.0000, -0.2500 to +0.2500 (New on unipc or New on ddim) |" in page
    assert "## better, guidance 3" in page and "## level\n" in page
    assert "0.2500 (-0.3125, -0.5000 to -0.1250, on unipc)" in page and "-1 to +0.25" in page
    sampler_defaults.draw(_record(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
