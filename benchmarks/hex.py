"""What a vote over block lengths is worth: against the single lengths, and against as many votes of one length.

    diffusers-ext bench hex            # records diffusers_ext/results/hex.json

The task has an answer that is known: the likeliest completion of a prompt in an enumerable language of brackets, asked of a
model whose conditionals are off by random errors. Settings were fixed before measuring. The paper's large gains are over one
block length that fails; the fair rival is the vote of equally many samples of one length, of which the best and the mean are
shown.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from diffusers_ext.oracles import EnumerableLanguage, EnumerableLanguageModel
from diffusers_ext.pipelines.hex import vote

SETTINGS: dict[str, Any] = {
    "length": 6, "given": 3, "problems": 200, "block_lengths": [1, 2, 3], "seeds_per_block": 5, "perturbation": 0.5,
    "temperature": 1.0, "models": [0, 1, 2],
}  # fmt: skip
BENCHMARK = Benchmark("hex", settings=SETTINGS)


def problems(language: EnumerableLanguage) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Prompts drawn from the language, and the likeliest completion of each."""
    given = SETTINGS["given"]
    starts = language.sample(SETTINGS["problems"], torch.Generator().manual_seed(0))[:, :given]
    strings, log_p = language.strings()
    best = []
    for start in starts:
        fits = (strings[:, :given] == start).all(1)
        best.append(tuple(strings[fits][log_p[fits].argmax(), given:].tolist()))
    return starts, best


def by_problem(values: list[float]) -> list[float]:
    """Means over the models; those of a problem are not independent of each other."""
    return torch.tensor(values, dtype=torch.float64).view(len(SETTINGS["models"]), -1).mean(0).tolist()


@BENCHMARK.part("over_mean_expert", "over_equal_budget", minutes=5)
def accuracy(recorder: Recorder) -> None:
    """Share of right answers; each problem is a unit, of which the mean over three models counts."""
    language = EnumerableLanguage.brackets(length=SETTINGS["length"], depth=2, letters=2)
    starts, right = problems(language)
    lengths, seeds = SETTINGS["block_lengths"], SETTINGS["seeds_per_block"]
    budget = seeds * len(lengths)
    ours, experts = [], []
    one_length: dict[int, list[Any]] = {length: [] for length in lengths}
    for number in tqdm(SETTINGS["models"], desc="models"):
        model = EnumerableLanguageModel.from_language(language, perturbation=SETTINGS["perturbation"], seed=number)
        pipe = dx.HEXPipeline(model, dx.UnmaskingScheduler())
        pipe.set_progress_bar_config(disable=True)
        common = {"gen_length": SETTINGS["length"] - SETTINGS["given"], "temperature": SETTINGS["temperature"]}
        for i, length in enumerate(lengths):
            found = pipe(
                input_ids=starts, block_lengths=(length,), seeds_per_block=budget,
                generator=torch.Generator().manual_seed(1000 * number + i), **common,
            )  # fmt: skip
            one_length[length].append([[tuple(row) for row in rows] for rows in found.sequences.tolist()])
    for number in range(len(SETTINGS["models"])):
        for problem, answer in enumerate(right):
            samples = {length: one_length[length][number][problem] for length in lengths}
            mixed = [one for length in lengths for one in samples[length][:seeds]]
            ours.append(float(vote(mixed, [length for length in lengths for _ in range(seeds)]) == answer))
            singles = [one == answer for length in lengths for one in samples[length]]
            experts.append([sum(singles) / len(singles)])
            experts[-1] += [float(vote(samples[length], [length] * budget) == answer) for length in lengths]
    mean_expert = [row[0] for row in experts]
    equal = [sum(row[1:]) / len(lengths) for row in experts]
    for name, what, rival in (
        ("over_mean_expert", "the mean single answer", mean_expert),
        ("over_equal_budget", f"the mean vote of {budget} samples of one block length", equal),
    ):
        recorder.paired(
            name, f"accuracy of a vote of {budget} samples over {len(lengths)} block lengths less that of {what}",
            Samples("difference", {"ours": by_problem(ours), "theirs": by_problem(rival)}, 0.2, each=False), "", (">=", 0.0),
        )  # fmt: skip
    count = len(ours)
    recorder.table(
        "accuracy",
        ["decoder", "share right"],
        [
            ["HEX", sum(ours) / count],
            ["a single answer, all block lengths", sum(mean_expert) / count],
            *(
                [f"vote of {budget}, blocks of {length}", sum(row[1 + i] for row in experts) / count]
                for i, length in enumerate(lengths)
            ),
        ],
    )


if __name__ == "__main__":
    BENCHMARK.main()
