"""What repeated updates are worth: cost to the same held-out loss with Fast Forward and without, for a LoRA and for a whole U-Net.

    diffusers-ext bench fast_forward_lora            # records diffusers_ext/results/fast_forward_lora.json

A LoRA of rank 4 learns a new style of the zoo's model by Adam, at the rate that diffusers' scripts have by default and at ten
times that, with a stage every 6 steps and without; the U-Net likewise, at a tenth of it. Costs are forward passes of a picture, a
backward pass counted as two, validations included. The loss to reach is the lowest that both of a pair reached. Settings were
fixed before measuring. The paper's claim is about language models.
"""

from __future__ import annotations

import numpy as np
from tqdm.auto import tqdm

from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._style import BATCH, HELD_OUT, MODEL, STEPS, TRAINED, VALIDATED, curve

SEEDS, INTERVAL = (0, 1, 2), 6
# Label -> title, learning rate, whether the whole U-Net is trained.
RUNS = {
    "lora": ("LoRA at rate 1e-4", 1e-4, False),
    "lora_fast": ("LoRA at rate 1e-3", 1e-3, False),
    "full": ("whole U-Net at rate 1e-5", 1e-5, True),
}
BENCHMARK = Benchmark(
    "fast_forward_lora",
    settings={
        "model": MODEL, "steps": STEPS, "batch": BATCH, "pictures": TRAINED, "validated": VALIDATED, "held_out": HELD_OUT,
        "interval": INTERVAL, "runs": {label: list(run) for label, run in RUNS.items()}, "seeds": list(SEEDS),
    },
)  # fmt: skip


@BENCHMARK.part(*(f"cost_{label}" for label in RUNS), minutes=60)
def cost(recorder: Recorder) -> None:
    rows = []
    for label, (title, rate, full) in tqdm(RUNS.items(), desc="Trainings"):
        ratios = []
        for seed in SEEDS:
            plain, forward = (curve(seed, rate, interval, full) for interval in (float("inf"), INTERVAL))
            target = max(min(plain.losses), min(forward.losses))
            spent = [each.cost_to(target) for each in (forward, plain)]
            ratios.append(spent[0] / spent[1])
            rows.append([title, seed, target, *spent, plain.losses[0], plain.losses[-1], forward.losses[-1]])
        recorder.paired(
            f"cost_{label}",
            f"cost to the same held-out loss with Fast Forward over that of Adam alone, {title}, {MODEL}",
            Samples("value", {"ours": np.array(ratios).tolist()}, 1.0), "x", None if full else ("<=", 1.0),
        )  # fmt: skip
    recorder.table(
        "cost",
        [
            "training",
            "seed",
            "loss to reach",
            "cost with",
            "cost without",
            "first loss",
            "last loss without",
            "last loss with",
        ],
        rows,
    )


if __name__ == "__main__":
    BENCHMARK.main()
