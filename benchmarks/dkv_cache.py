"""What dKV-Cache is worth, and whether waiting a step before storing matters.

    diffusers-ext bench dkv_cache            # records diffusers_ext/results/dkv_cache.json

Settings were fixed before measuring: "decode" and "greedy" with refreshes every 8 steps, "greedy" on masks from the left of
each block, which is known beforehand, and the prompt alone ("prefix"). `_lm_caches` says what is decoded. "delay": agreement with greedy decoding without a cache, with the paper's delay of one step less that
with none, at refreshes every 8 steps.
"""

from __future__ import annotations

import functools

import numpy as np

import diffusers_ext as dx
from benchmarks import _lm_caches
from benchmarks._bench import Benchmark
from benchmarks._lm_caches import Variant
from benchmarks._record import Recorder
from diffusers_ext.metrics import bootstrap_interval

VARIANTS = {
    "decode": Variant(functools.partial(dx.DKVCacheConfig, refresh_interval=8)),
    "prefix": Variant(functools.partial(dx.DKVCacheConfig, variant="prefix")),
    "greedy": Variant(functools.partial(dx.DKVCacheConfig, variant="greedy", refresh_interval=8), order="left"),
}
BENCHMARK = Benchmark("dkv_cache", settings=_lm_caches.SETTINGS)
_lm_caches.add_parts(BENCHMARK, VARIANTS, goal_variant="greedy")


@BENCHMARK.part("delay", minutes=4)
def delay(recorder: Recorder) -> None:
    """The paper's claim: tokens stored one step after their decoding agree more than those stored at once."""
    model, mask = _lm_caches.grounds()[_lm_caches.ZOO]
    prompts = _lm_caches.beginnings()
    texts = {}
    for name, config in {
        "none": None,
        **{str(d): dx.DKVCacheConfig(mask_token_id=mask, refresh_interval=8, delay=d) for d in (0, 1)},
    }.items():
        texts[name] = _lm_caches.decode(model, mask, prompts, _lm_caches.LENGTH, config, temperature=0.0)
    same = {name: (texts[name] == texts["none"]).double().mean(1).numpy() for name in ("0", "1")}
    gain = same["1"] - same["0"]
    recorder.claim(
        "delay", "greedy agreement with a delay of one step less that without", float(gain.mean()), "",
        bootstrap_interval(gain, np.mean), goal=(">=", 0.0),
    )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
