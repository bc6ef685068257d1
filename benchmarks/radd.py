"""What RADD's sampler saves: network calls against the formula, time against sampling without the step cache, and its losses.

    diffusers-ext bench radd            # records diffusers_ext/results/radd.json

Settings were fixed before measuring. The paper's "up to 3.5 times faster" is against another method (SEDD) that cannot reuse
outputs; here it is the same sampler with a call in every step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, Decoder, decode, pipeline, unseen, verses
from diffusers_ext.metrics.text import tokens_per_second
from diffusers_ext.training.train_masked_diffusion_lm import any_order_loss, masked_diffusion_loss

CALLS: dict[str, Any] = {"texts": 256, "length": 64, "steps": [16, 64, 256]}
TIME: dict[str, Any] = {"length": 64, "steps": 256, "repeats": 5}
LOSSES: dict[str, Any] = {"windows": 128, "length": 128, "draws": 16, "batch": 32}
BENCHMARK = Benchmark("radd", settings={"model": MODEL, "calls": CALLS, "time": TIME, "losses": LOSSES})


@BENCHMARK.part(*(f"calls_{steps}" for steps in CALLS["steps"]), minutes=9)
def calls(recorder: Recorder) -> None:
    """Counted calls over expected ones; and what the texts are worth as steps grow."""
    rows = []
    for steps in CALLS["steps"]:
        scheduler = dx.AbsorbingDiffusionScheduler()
        expected = scheduler.expected_calls(steps, CALLS["length"])
        found = decode(
            f"{steps} steps", Decoder(scheduler, {"num_inference_steps": steps}), CALLS["texts"], CALLS["length"]
        )
        counted = np.array(found.calls)
        error = counted.mean() / expected - 1
        half = 1.96 * counted.std(ddof=1) / math.sqrt(len(counted)) / expected
        low = 0.0 if abs(error) < half else abs(error) - half
        recorder.claim(
            f"calls_{steps}",
            f"how far the network calls of a text of {CALLS['length']} tokens are from the {expected:.2f} of the formula, "
            f"in {steps} steps, {MODEL}",
            abs(error), "", (low, abs(error) + half), ("<=", 0.02),
        )  # fmt: skip
        rows.append([steps, expected, *found.row])
    recorder.table("by steps", ["steps", "calls by the formula", *COLUMNS], rows)


@BENCHMARK.part("time_over_uncached", minutes=2)
def time(recorder: Recorder) -> None:
    """One text at a time."""
    pipe = pipeline(dx.AbsorbingDiffusionScheduler())

    def run(cached: bool) -> Any:
        return pipe(
            gen_length=TIME["length"], num_inference_steps=TIME["steps"], step_cache=cached, stop_at_eos=False,
            output_type="seq", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    found = tokens_per_second(
        {"cached": lambda: run(True), "a call a step": lambda: run(False)},
        TIME["length"],
        "a call a step",
        TIME["repeats"],
    )
    ratio = found.times.ratios["cached"]
    recorder.claim(
        "time_over_uncached",
        f"time over that with a network call in each of {TIME['steps']} steps, {TIME['length']} tokens, {MODEL}",
        ratio.median, "x", ratio.interval, ("<=", 1 / 3.5),
    )  # fmt: skip
    recorder.table("tokens a second", ["sampler", "tokens a second"], [list(item) for item in found.rates.items()])


@BENCHMARK.part("losses_agree", minutes=4)
@torch.no_grad()
def losses(recorder: Recorder) -> None:
    """Two estimates of one bound on unseen chapters; the same uniform numbers for both."""
    model, tokenizer = verses()
    windows = unseen(LOSSES["length"])
    windows = windows[torch.linspace(0, len(windows) - 1, LOSSES["windows"]).long()]
    generator, kept = torch.Generator().manual_seed(0), torch.ones(1, LOSSES["length"], dtype=torch.long)
    values: dict[str, list[float]] = {"rate": [], "number": []}
    for window in tqdm(windows, desc="losses"):
        draws = LOSSES["draws"]
        u = torch.rand(draws, LOSSES["length"], generator=generator)
        level = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws  # one in each stratum
        ids, mask = window.expand(draws, -1), kept.expand(draws, -1)
        k = (level * LOSSES["length"]).long() + 1
        values["rate"].append(
            float(masked_diffusion_loss(model, ids, mask, tokenizer.mask_token_id, level.clamp(min=1e-3), u))
        )
        values["number"].append(float(any_order_loss(model, ids, mask, tokenizer.mask_token_id, k, u)))
    rate, number = (np.array(values[name]) for name in ("rate", "number"))
    samples = Samples("difference", {"ours": number.tolist(), "theirs": rate.tolist()}, 1e-3)
    difference, (low, high) = samples.claim()
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    scale = float(rate.mean())
    recorder.claim(
        "losses_agree",
        f"relative distance of the k-DCE from the lambda-DCE on {LOSSES['windows']} unseen windows, {MODEL}",
        abs(difference) / scale, "", (least / scale, max(abs(low), abs(high)) / scale), ("<=", 0.01),
    )  # fmt: skip
    recorder.table(
        "losses",
        ["loss", "nats a token", "deviation over windows"],
        [["lambda-DCE", scale, float(rate.std())], ["k-DCE", float(number.mean()), float(number.std())]],
    )


if __name__ == "__main__":
    BENCHMARK.main()
