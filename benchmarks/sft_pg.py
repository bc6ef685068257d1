"""What fine-tuning by policy gradient is worth at 10 stochastic steps.

    diffusers-ext bench sft_pg            # records diffusers_ext/results/sft_pg.json

Three trainings, each about five minutes on an idle core, which is far less than the authors take; one that is broken off goes
on, and one that is finished is kept. The critic sees pixels, and pictures are measured in two feature nets that it knows nothing
of, on new noise and held-out pictures. The learning rate is ten times the paper's, since the training is short; it was not tuned.
"""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._short_runs import COLUMNS, MODEL, PICTURES, SEEDS, Found, ddim_pipeline, trained
from benchmarks._zoo import weights
from diffusers_ext.training.train_sft_pg import main as train_sft

STEPS, MANY = 10, 50
TRAINING: dict[str, Any] = {
    "num_inference_steps": STEPS, "train_batch_size": 32, "max_train_steps": 100, "learning_rate": 1e-5, "n_critic": 5,
    "n_generator": 10, "critic_channels": 16, "value_width": 256, "num_validation_images": 8,
}  # fmt: skip
BENCHMARK = Benchmark(
    "sft_pg",
    settings={
        "model": MODEL, "weights": weights(MODEL), "training": TRAINING, "pictures": PICTURES, "seeds": list(SEEDS),
    },
)  # fmt: skip
MEASURES = {
    "judge": ("Fréchet distance (judge)", lambda found: found.frechet["judge"]),
    "efficientnet": ("Fréchet distance (EfficientNet)", lambda found: found.frechet["efficientnet"]),
    "pixels": ("sliced Wasserstein distance of pixels", lambda found: found.sliced),
}


@BENCHMARK.part(
    *(f"{measure}_over_untuned" for measure in MEASURES), *(f"{measure}_over_many" for measure in MEASURES), "variety", minutes=35
)  # fmt: skip
def measure(recorder: Recorder) -> None:
    config = {"timestep_spacing": "trailing"}
    untuned = Found(ddim_pipeline(**config), STEPS, eta=1.0)
    many = Found(ddim_pipeline(**config), MANY, eta=1.0)
    ours = [
        Found(trained("sft_pg", train_sft, seed, TRAINING), STEPS, eta=1.0) for seed in tqdm(SEEDS, desc="Trainings")
    ]
    for name, (title, of) in MEASURES.items():
        for rival, other, rival_title in (
            ("untuned", untuned, "the same steps untuned"), ("many", many, f"{MANY} untuned steps"),
        ):  # fmt: skip
            recorder.paired(
                f"{name}_over_{rival}",
                f"{title} to held-out pictures of {STEPS} tuned steps less that of {rival_title}, {MODEL}",
                Samples("difference", {"ours": [of(each) for each in ours], "theirs": [of(other)] * len(SEEDS)}, 1.0),
                "", ("<=", 0.0),
            )  # fmt: skip
    recorder.paired(
        "variety", f"distance of a picture to its nearest neighbour over that at {MANY} steps, {MODEL}",
        Samples("value", {"ours": [each.variety / many.variety for each in ours]}, 1.0), "", (">=", 0.8),
    )  # fmt: skip
    rows = [each.row(f"SFT-PG, seed {seed}") for seed, each in zip(SEEDS, ours, strict=True)]
    rows += [untuned.row("DDPM"), many.row("DDPM")]
    recorder.table("distances to held-out pictures", COLUMNS, rows)


if __name__ == "__main__":
    BENCHMARK.main()
