"""Caches beside those of other people, at equal cost: interpolation, counting, and claims."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import diffusers_ext as dx
from benchmarks import _cache_peers
from benchmarks._frontier import Frontier, MacCounter, Made, at_cost
from benchmarks._quality import Variant, denoiser_cost
from benchmarks._record import Recorder
from benchmarks._zoo import ZooModel
from diffusers_ext.metrics import count_macs, rmse


def test_errors_at_a_cost_between_two_settings():
    curve = [Made(10.0, np.array([1.0, 4.0])), Made(30.0, np.array([0.01, 1.0])), Made(50.0, np.array([0.5, 0.5]))]
    assert at_cost(curve, 20.0) == pytest.approx([0.1, 2.0])
    assert at_cost(curve[::-1], 25.0) == pytest.approx([10**-1.5, 2**0.5])
    assert at_cost(curve, 30.0) == pytest.approx([0.01, 1.0]), "a setting itself"
    assert at_cost([curve[0], Made(10.0, np.array([2.0, 2.0]))], 10.0) is not None
    same = [curve[0], Made(60.0, np.array([0.0, 1.0]))]
    assert at_cost(same, 20.0) == pytest.approx([1.0, 4.0]), (
        "nothing lies between a setting and one that changes nothing"
    )
    assert at_cost(curve, 9.0) is None, "all cost more"
    assert at_cost(curve, 51.0) == pytest.approx([0.5, 0.5]), "what costs less may be taken"
    worse = [curve[1], Made(50.0, np.array([3.0, 9.0]))]
    assert at_cost(worse, 45.0) == pytest.approx([0.01, 1.0]), "of a curve that turns, the better setting"


def test_the_counter_counts_as_the_metric_and_modules_that_hold_each_other():
    layer, x = torch.nn.Linear(3, 5), torch.ones(7, 3)
    outer = torch.nn.Sequential(layer)
    layer.outer = outer
    with torch.no_grad(), MacCounter() as counter:
        layer.forward(x)
    assert counter.total == 3 * 5 * 7
    del layer.outer
    attention = lambda: torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 2, 4, 8))  # noqa: E731
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), MacCounter() as counter:
        attention()
    assert counter.total == count_macs(attention)


@pytest.fixture
def study(tiny, tmp_path, monkeypatch):
    """DeepCache on a random U-Net of the avatars, with fewer steps as the only peer."""
    same = functools.partial(lambda keep, pipe: pipe, True)  # as peers have it: a function without a name
    peers = {"fewer steps": {f"{n}": Variant(f"{n}", steps=n, prepare=same) for n in (2, 3, 5)}}
    monkeypatch.setattr(_cache_peers, "peers", lambda *args: peers)
    zoo = ZooModel("avatars-sd", tiny)

    def make(**settings):
        return Frontier(
            "avatars-sd", 6, {"N2": Variant("interval 2", [dx.DeepCacheConfig(**{"interval": 2, **settings})])},
            guidance_scale=2.0, pictures=2, minutes=1, zoo=lambda name: zoo, cache=tmp_path,
        )  # fmt: skip

    make.zoo = zoo
    return make


def test_a_claim_is_the_gain_on_the_peer_at_equal_cost(study, tmp_path):
    part, zoo = study(), study.zoo
    recorder = Recorder("deepcache", part.settings, part.seeds)
    part.measure(recorder, None)
    (entry,) = recorder.claims
    assert [entry["name"]] == part.claims

    def made(steps: int) -> np.ndarray:
        return zoo.generate(zoo.pipe, zoo.conditions(2), [0, 1], steps, 2.0)

    full = made(6)
    macs = {n: denoiser_cost(zoo.denoiser(zoo.pipe), lambda n=n: made(n)).macs / 2 for n in (2, 3, 5)}
    with dx.enabled(zoo.pipe, dx.DeepCacheConfig(interval=2)):
        ours = rmse(made(6), full).double().numpy()
        cost = denoiser_cost(zoo.denoiser(zoo.pipe), lambda: made(6)).macs / 2
    theirs = at_cost([Made(macs[n], rmse(made(n), full).double().numpy()) for n in macs], cost)
    assert theirs is not None
    assert entry["samples"]["ours"] == pytest.approx(ours.tolist(), abs=1e-6)
    assert entry["samples"]["theirs"] == pytest.approx(theirs.tolist(), rel=1e-3)
    assert entry["samples"]["counts"]["macs"] == pytest.approx(cost)
    assert entry["value"] == pytest.approx(20 * np.log10(theirs / ours).mean(), abs=0.05)
    (file,) = part.draw("DeepCache: a title", tmp_path / "drawn")
    assert file.is_file()


def test_runs_of_peers_are_made_once(study, tmp_path, monkeypatch):
    part = study()
    part.measure(Recorder("deepcache", part.settings, part.seeds), None)
    assert len(list(tmp_path.glob("frontier-*.npz"))) == 3
    asked = []
    generate = ZooModel.generate
    monkeypatch.setattr(
        ZooModel, "generate", lambda self, *args, **more: asked.append(args[3]) or generate(self, *args, **more)
    )
    again = Recorder("deepcache", part.settings, part.seeds)
    part.measure(again, None)
    assert asked == [6, 6], "the plain run and ours"


def test_what_costs_less_than_all_peers_is_refused(study, monkeypatch):
    part = study(interval=3)
    dear = {"fewer steps": {"5": _cache_peers.peers()["fewer steps"]["5"]}}
    monkeypatch.setattr(_cache_peers, "peers", lambda *args: dear)
    with pytest.raises(ValueError, match=r"'N2' costs .* no peer"):
        part.measure(Recorder("deepcache", part.settings, part.seeds), None)
