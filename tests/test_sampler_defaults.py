"""The page of samplers with their defaults says what its record holds."""

from __future__ import annotations

import json

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
    models = {
        "better": {"guidance_scale": 3.0, "errors": _errors(0.25, -0.5, -0.125), "distances": [own, peer]},
        "level": {"guidance_scale": None, "errors": _errors(0.5, -0.25, 0.25), "distances": []},
    }
    return {**about, "models": models}


def test_below_means_the_whole_interval():
    assert sampler_defaults.below(_record(), "NewScheduler", 5) == {"better": True, "level": False}


def test_the_page_in_the_docs_is_that_of_the_record():
    record = json.loads(sampler_defaults.RECORD.read_text(encoding="utf-8"))
    page = (sampler_defaults.ROOT / sampler_defaults.PAGE).read_text(encoding="utf-8")
    assert page == sampler_defaults.page(record), "write it again: python -m benchmarks.sampler_defaults --render"
    assert (sampler_defaults.ROOT / sampler_defaults.DRAWING).is_file()


def test_equal_up_to_rounding_is_not_below():
    record = _record()
    record["models"]["better"]["errors"] = _errors(0.5, -2e-6, -1e-6)
    assert not any(sampler_defaults.below(record, "NewScheduler", 5).values())


def test_the_page_and_the_drawing(tmp_path):
    page = sampler_defaults.page(_record())
    assert "| `NewScheduler` | 1 of 2 | 1 of 2 | 1 of 2 | 1 of 2 | better |" in page
    assert "## better, guidance 3" in page and "## level\n" in page
    assert "0.2500 (-0.3125, -0.5000 to -0.1250, on unipc)" in page and "-1 to +0.25" in page
    sampler_defaults.draw(_record(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
