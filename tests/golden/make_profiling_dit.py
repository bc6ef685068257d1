"""Make `profiling_dit.json`: numbers of the authors' cache on a tiny Wan with weights and inputs given by formula.

    python -m tests.golden.make_profiling_dit .../ProfilingDiT/Wan2.1/wan/cache.py

Repository GeekGuru123/ProfilingDiT at a9b21bcc2d758519a8af7a0568fbcf2952684cb6, file Wan2.1/wan/cache.py, class `DitCache`.
Its loop hands it each block with the number of the step (`forward_single`), and so does this. It fails on a list with a
run that starts at block 0; the lists here have none.
"""

import functools
import importlib.util
import json
import sys
from pathlib import Path

from tests.methods.test_profiling_dit import INTERVAL, LISTS, STEPS, WARMUP, golden_run, wan


def main(file: str) -> None:
    spec = importlib.util.spec_from_file_location("reference_cache", file)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    runs = []
    for blocks in LISTS:
        model = wan()
        cache = reference.DitCache(
            step_start=WARMUP, step_interval=INTERVAL, block_start=0, num_blocks=len(model.blocks),
            block_cache_list_background=blocks, block_cache_list_foreground=[],
        )  # fmt: skip
        now = {"step": -1}
        for number, block in enumerate(model.blocks):

            def forward(hidden_states, *args, plain, number, cache=cache, now=now):
                return cache.forward_single(plain, now["step"], number, hidden_states, *args)

            block.forward = functools.partial(forward, plain=block.forward, number=number)
        runs.append(golden_run(model, lambda step, now=now: now.update(step=step)))
    source = {
        "repository": "https://github.com/GeekGuru123/ProfilingDiT",
        "commit": "a9b21bcc2d758519a8af7a0568fbcf2952684cb6",
        "file": "Wan2.1/wan/cache.py",
        "how": f"python -m tests.golden.make_profiling_dit: {STEPS} Euler steps of a tiny Wan, step_start {WARMUP}, "
        f"step_interval {INTERVAL}, block_cache_list_background as in the test; per step the mean, the standard deviation "
        "and the first three values of the latents",
    }
    Path(__file__).with_name("profiling_dit.json").write_text(
        json.dumps({"source": source, "runs": runs}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1])
