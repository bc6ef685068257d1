"""What FreeCache is worth.

    diffusers-ext bench freecache            # records diffusers_ext/results/freecache.json

Settings were fixed before measuring: blocks of 32 as the authors freeze them, blocks computed once more when finished, and
the 32 tokens before the first mask. `_lm_caches` says what is decoded.
"""

from __future__ import annotations

import functools

import diffusers_ext as dx
from benchmarks import _lm_caches
from benchmarks._bench import Benchmark
from benchmarks._lm_caches import Variant

VARIANTS = {
    "stale": Variant(functools.partial(dx.FreeCacheConfig, block_length=_lm_caches.BLOCK)),
    "finished": Variant(functools.partial(dx.FreeCacheConfig, block_length=_lm_caches.BLOCK, recompute_finished=True)),
    "window_32": Variant(functools.partial(dx.FreeCacheConfig, window=32)),
}
BENCHMARK = Benchmark("freecache", settings=_lm_caches.SETTINGS)
_lm_caches.add_parts(BENCHMARK, VARIANTS, goal_variant="finished")

if __name__ == "__main__":
    BENCHMARK.main()
