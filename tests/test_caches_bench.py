"""The overview of caches: what it collects, its table, times and drawings; and what peers are told."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers.hooks import SeaCacheConfig

import diffusers_ext as dx
from benchmarks import _cache_peers, caches
from benchmarks._cache_peers import _latents, _upstream, peers
from benchmarks._frontier import MacCounter, Runs
from benchmarks._quality import Variant, called_by
from benchmarks._zoo import ZooModel


def test_it_collects_what_the_benchmarks_of_caches_declare():
    assert {"deepcache", "faster_diffusion", "delta_dit", "profiling_dit", "harmonica", "cat_pruning"} <= set(
        caches.cache_keys()
    )
    assert "calibrated_dpm" not in caches.cache_keys()
    unet, dit = caches.declared("avatars-sd"), caches.declared("fashion-dit")
    assert set(unet) == {"adaptive_diffusion", "deepcache", "faster_diffusion"}
    assert {"delta_dit", "profiling_dit", "harmonica", "adaptive_diffusion", "cat_pruning"} <= set(dit)
    assert len(dit["delta_dit"]) == 3, "a setting of two parts is one"


@pytest.fixture
def small(tiny, tmp_path, monkeypatch):
    """A random U-Net of the avatars, two caches, and fewer steps as the only peer."""
    few = {"fewer steps": {f"{n}": Variant(f"{n}", steps=n) for n in (1, 2)}}
    zoo = ZooModel("avatars-sd", tiny)

    def missing(pipe):
        raise FileNotFoundError("There is no router.")

    ours = {
        "deepcache": {"interval 2": Variant("interval 2", [dx.DeepCacheConfig(2)])},
        "faster_diffusion": {"all": Variant("all", [dx.FasterDiffusionConfig(1)])},
        "harmonica": {"threshold 0.1": Variant("threshold 0.1", prepare=missing)},
    }
    monkeypatch.setattr(_cache_peers, "peers", lambda *args: few)
    monkeypatch.setattr(caches, "peers", lambda *args: few)
    monkeypatch.setattr(caches, "declared", lambda model: ours)
    monkeypatch.setattr(caches, "RECORD", tmp_path / "caches.json")
    monkeypatch.setattr(caches, "PAGE", tmp_path / "caches_measured.md")
    monkeypatch.setattr(caches, "STEPS", 4)
    monkeypatch.setattr(caches, "ROUNDS", 1)
    monkeypatch.setattr(caches, "PICTURES", 2)
    monkeypatch.setattr(caches, "DRAWN", 5)
    monkeypatch.setattr(caches, "MOST", 0.9)
    real = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        caches, "nets", lambda model: {"a net": (lambda of: torch.from_numpy(of[:, 0, 0, :1] * [1, 2, 3, 4]), real)}
    )
    monkeypatch.setattr(caches, "Runs", lambda *args: Runs(*args, zoo=lambda name: zoo, cache=tmp_path / "cache"))
    return tmp_path


def test_the_overview(small, capsys):
    caches.main(["--model", "avatars-sd", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "harmonica, threshold 0.1: left out. There is no router." in printed.replace("\n", " ")
    content = json.loads((small / "caches.json").read_text())["models"]["avatars-sd"]
    rows = {tuple(row[:2]): row[2:] for row in content["rows"]}
    assert set(rows) == {
        ("DeepCache", "interval 2"),
        ("Faster Diffusion", "all"),
        ("fewer steps", "1"),
        ("fewer steps", "2"),
    }
    macs, time, low, high, psnr, *ends = rows["DeepCache", "interval 2"]
    assert 0 < macs < 1 and low <= time <= high and 0 < psnr < 200 and ends[0] <= psnr <= ends[1]
    assert rows["fewer steps", "1"][0] == pytest.approx(1 / 4)
    assert rows["Faster Diffusion", "all"][4] == float("inf"), "a cache that computes everything"
    page = (small / "caches_measured.md").read_text()
    assert f"| DeepCache | interval 2 | {macs:.2f} | {time:.2f}, {low:.2f} to {high:.2f} | {psnr:.1f}, " in page
    assert re.search(r"\| Faster Diffusion \| all \| 1.00 \| [^|]+ \| equal \|", page)
    assert f"]({next(small.glob('*.png')).name})" in page
    apart = {row[0]: row[2:] for row in content["distances"]}
    assert set(apart) == {"the plain run", "DeepCache, interval 2", "fewer steps, 2"}, (
        "Faster Diffusion computes everything"
    )
    value, more, low, high = apart["fewer steps, 2"]
    assert low <= more <= high and more == pytest.approx(value - apart["the plain run"][0], rel=1e-3)
    assert f"| fewer steps, 2 | a net | {value:.4g} | {more:+.3g}, {low:+.3g} to {high:+.3g} |" in page
    kept = len(list((small / "cache").glob("*.npz")))
    assert kept == 4
    caches.main(["--model", "avatars-sd", "--threads", "1", "--part", "quality"])
    again = json.loads((small / "caches.json").read_text())["models"]["avatars-sd"]
    assert again == content, "times are those of the last time"
    (small / "caches_measured.md").unlink()
    caches.main(["--render"])
    assert (small / "caches_measured.md").read_text() == page
    record = json.loads((small / "caches.json").read_text())
    (small / "caches.json").write_text(json.dumps({**record, "versions": {"torch": "0"}}))
    caches.main(["--model", "avatars-sd", "--threads", "1", "--part", "quality"])
    mixed = json.loads((small / "caches.json").read_text())["models"]["avatars-sd"]
    assert not mixed["times"] and not mixed["distances"], "what other versions measured is not kept"


def test_seacache_looks_at_the_latents_and_skips():
    """Fail-open, it would compute everything: `avatars-flow`, guided, in 8 steps."""
    zoo = ZooModel("avatars-flow")
    seen: list[torch.Size] = []
    loose = _upstream("0.5", SeaCacheConfig(threshold=0.5, raw_vision_callback=_latents))

    def macs(variant: Variant) -> int:
        counter = MacCounter()

        def counted(forward, *args, **kwargs):
            seen.append(kwargs["hidden_states"].shape)
            with counter:
                return forward(*args, **kwargs)

        with variant.on(zoo.pipe) as pipe, called_by(zoo.denoiser(pipe), counted):
            zoo.generate(pipe, zoo.conditions(1), [0], 8, 3.0)
        return counter.total

    full, cached = macs(Variant()), macs(loose)
    assert len(seen) == 2 * 16, "two calls a step"
    assert 0.3 * full < cached < 0.9 * full


def test_latents_are_films_of_one_frame():
    pixels = torch.arange(2 * 3 * 16.0).reshape(2, 3, 4, 4)
    packed = pixels.flatten(2).mT
    found = _latents(torch.nn.Identity(), (), {"hidden_states": packed})
    assert [one.shape for one in found] == [(3, 1, 4, 4)] * 2
    assert torch.equal(torch.stack(found)[:, :, 0], pixels)


def test_a_unet_meets_the_package_and_fewer_steps():
    curves = peers("avatars-sd", 20, 3.0)
    assert set(curves) == {"DeepCache package", "fewer steps"}
    assert [variant.steps for variant in curves["fewer steps"].values()] == [4, 6, 8, 10, 12, 15, 18]
