"""What the first-hitting sampler is worth: its law, its time against ancestral sampling, and what float32 does to the latter.

    diffusers-ext bench first_hitting_sampler            # records diffusers_ext/results/first_hitting_sampler.json

Settings were fixed before measuring. Ancestral sampling takes 20 steps a token without a step cache, as the paper's baseline;
with it (RADD) the difference is small, which the table shows.
"""

from __future__ import annotations

from typing import Any

import torch

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import COLUMNS, MODEL, Decoder, decode, pipeline
from diffusers_ext.metrics.text import tokens_per_second
from diffusers_ext.oracles import EnumerableLanguage, EnumerableLanguageModel, total_variation
from diffusers_ext.schedulers._unmasking import UnmaskingStep, without_mask

LAW: dict[str, Any] = {"length": 5, "samples": 200_000, "batch": 20_000}
TIME: dict[str, Any] = {"length": 64, "steps": 1280, "repeats": 3}
FLOAT32: dict[str, Any] = {"texts": 64, "length": 96, "steps": 1024}
BENCHMARK = Benchmark("first_hitting_sampler", settings={"model": MODEL, "law": LAW, "time": TIME, "float32": FLOAT32})


class GumbelFloat32(dx.AbsorbingDiffusionScheduler):
    """Ancestral sampling as it was published: one Gumbel-max over all tokens and the mask, in float32."""

    revises = True

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        return torch.zeros_like(now.masked)

    def revise(self, now: UnmaskingStep, after: torch.Tensor) -> torch.Tensor:
        if not bool(now.masked.any()):
            return after
        logits = without_mask(now.logits, now.mask_token_id)
        probabilities = torch.softmax(logits, -1) * self.rates[min(now.step, len(self.rates) - 1)]
        stay = 1 - probabilities.sum(-1, keepdim=True).clamp(max=1)
        probabilities = probabilities.scatter(-1, torch.full_like(after, now.mask_token_id)[..., None], stay).float()
        generator = now.generator[0] if isinstance(now.generator, list) else now.generator
        uniform = torch.rand(probabilities.shape, generator=generator)
        drawn = (probabilities.log() - torch.log(-torch.log(uniform))).argmax(-1)
        return torch.where(now.masked, drawn, after)


@BENCHMARK.part("law", minutes=2, quick=False)
def law(recorder: Recorder) -> None:
    """Total variation distance to a language of 243 strings, over that of as many exact draws."""
    generator = torch.Generator().manual_seed(0)
    start, step = torch.rand(3, generator=generator), torch.rand(3, 3, generator=generator) ** 2
    language = EnumerableLanguage.markov(start, step, LAW["length"])
    model = EnumerableLanguageModel.from_language(language)
    rows, ratio = [], 0.0
    for title, scheduler, steps in (
        ("first hitting", dx.FirstHittingScheduler(), LAW["length"]),
        ("ancestral, 5 steps", dx.AbsorbingDiffusionScheduler(), 5),
        ("ancestral, 50 steps", dx.AbsorbingDiffusionScheduler(), 50),
        ("surest first", dx.UnmaskingScheduler(), LAW["length"]),
    ):
        pipe = dx.MaskedDiffusionPipeline(model, scheduler)
        pipe.set_progress_bar_config(disable=True)
        parts, calls = [], 0
        for first in range(0, LAW["samples"], LAW["batch"]):
            found = pipe(
                gen_length=LAW["length"], num_inference_steps=steps, num_texts_per_prompt=LAW["batch"], output_type="seq",
                generator=torch.Generator().manual_seed(first),
            )  # fmt: skip
            parts.append(found.sequences)
            calls += sum(found.num_calls)
        distance = total_variation(torch.cat(parts), language)
        rows.append([title, distance.value, distance.noise, calls / LAW["samples"] / LAW["length"]])
        if title == "first hitting":
            ratio = distance.value / distance.noise
    recorder.claim(
        "law",
        f"distance of {LAW['samples']:,} samples to an enumerable language, over that of exact draws",
        ratio, "x", None, ("<=", 1.3),
    )  # fmt: skip
    recorder.table("distance to the language", ["sampler", "total variation", "of exact draws", "calls a token"], rows)


@BENCHMARK.part("time_over_ancestral", minutes=3)
def time(recorder: Recorder) -> None:
    """One text at a time."""

    def run(scheduler: Any, steps: int | None, cached: bool) -> Any:
        return pipeline(scheduler)(
            gen_length=TIME["length"], num_inference_steps=steps, step_cache=cached, stop_at_eos=False,
            output_type="seq", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    found = tokens_per_second(
        {
            "first hitting": lambda: run(dx.FirstHittingScheduler(), None, True),
            "ancestral": lambda: run(dx.AbsorbingDiffusionScheduler(), TIME["steps"], False),
            "ancestral with the step cache": lambda: run(dx.AbsorbingDiffusionScheduler(), TIME["steps"], True),
        },
        TIME["length"], "ancestral", TIME["repeats"],
    )  # fmt: skip
    ratio = found.times.ratios["first hitting"]
    recorder.claim(
        "time_over_ancestral",
        f"time over that of ancestral sampling in {TIME['steps']} steps, {TIME['length']} tokens, {MODEL}",
        ratio.median, "x", ratio.interval, ("<=", 0.1),
    )  # fmt: skip
    recorder.table("tokens a second", ["sampler", "tokens a second"], [list(item) for item in found.rates.items()])


@BENCHMARK.part("float32_entropy", "entropy_over_ancestral", minutes=18)
def float32(recorder: Recorder) -> None:
    """Ancestral sampling by Gumbel-max in float32 against exact draws in as many steps: the entropy of its texts."""
    steps = {"num_inference_steps": FLOAT32["steps"]}
    decoders = {
        "first hitting": Decoder(dx.FirstHittingScheduler()),
        "ancestral, exact draws": Decoder(dx.AbsorbingDiffusionScheduler(), steps),
        "ancestral, Gumbel-max in float32": Decoder(GumbelFloat32(), steps),
    }
    found = {name: decode(name, decoder, FLOAT32["texts"], FLOAT32["length"]) for name, decoder in decoders.items()}
    exact = found["ancestral, exact draws"].entropy
    for claim, what, name, goal in (
        (
            "float32_entropy",
            "ancestral sampling by Gumbel-max in float32",
            "ancestral, Gumbel-max in float32",
            ("<", 0.0),
        ),
        ("entropy_over_ancestral", "first hitting", "first hitting", None),
    ):
        recorder.paired(
            claim,
            f"entropy of the tokens of a text by {what}, less that of ancestral sampling by exact draws in {FLOAT32['steps']} "
            f"steps, {MODEL}",
            Samples("difference", {"ours": found[name].entropy, "theirs": exact}, 1e-2), "nats", goal=goal,
        )  # fmt: skip
    recorder.table("texts", ["sampler", *COLUMNS], [[name, *one.row] for name, one in found.items()])


if __name__ == "__main__":
    BENCHMARK.main()
