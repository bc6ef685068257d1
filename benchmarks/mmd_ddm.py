"""What fine-tuning by the maximum mean discrepancy is worth at 5 steps: in other features than those that it was tuned in.

    diffusers-ext bench mmd_ddm            # records diffusers_ext/results/mmd_ddm.json

Three trainings in the features of the Fashion-MNIST judge, each about five minutes on an idle core; one that is broken off goes
on, and one that is finished is kept. They are measured in the features of EfficientNet and by pixels, on new noise and held-out
pictures. The batch is half the paper's, and the learning rate twenty times its own, since the training is short; neither was tuned.
"""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._short_runs import COLUMNS, MODEL, PICTURES, SEEDS, Found, ddim_pipeline, dpm_solver_pipeline, trained
from benchmarks._zoo import weights
from diffusers_ext.training.train_mmd_ddm import main as train_mmd

STEPS, MANY = 5, 20
TRAINING: dict[str, Any] = {
    "num_inference_steps": STEPS, "train_batch_size": 32, "keep_graph": True, "max_train_steps": 60, "learning_rate": 1e-4, "num_validation_images": 8,
}  # fmt: skip
BENCHMARK = Benchmark(
    "mmd_ddm",
    settings={
        "model": MODEL, "weights": weights(MODEL), "training": TRAINING, "extractor": "fashion-judge", "pictures": PICTURES,
        "seeds": list(SEEDS),
    },
)  # fmt: skip
MEASURES = {
    "efficientnet": ("Fréchet distance (EfficientNet)", lambda found: found.frechet["efficientnet"]),
    "pixels": ("sliced Wasserstein distance of pixels", lambda found: found.sliced),
}
RIVALS = {"untuned": "the same steps untuned", "dpm": "DPM-Solver++ of as many calls"}


@BENCHMARK.part(*(f"{measure}_over_{rival}" for measure in MEASURES for rival in RIVALS), "variety", minutes=30)
def measure(recorder: Recorder) -> None:
    untuned = Found(ddim_pipeline(timestep_spacing="leading", steps_offset=0), STEPS)
    theirs = {"untuned": untuned, "dpm": Found(dpm_solver_pipeline(), STEPS)}
    many = Found(ddim_pipeline(timestep_spacing="leading", steps_offset=0), MANY)
    values = {**TRAINING, "feature_extractor": str(dx.zoo_path("fashion-judge"))}
    ours = [Found(trained("mmd_ddm", train_mmd, seed, values), STEPS) for seed in tqdm(SEEDS, desc="Trainings")]
    for name, (title, of) in MEASURES.items():
        for rival, rival_title in RIVALS.items():
            recorder.paired(
                f"{name}_over_{rival}",
                f"{title} to held-out pictures of {STEPS} tuned steps less that of {rival_title}, {MODEL}",
                Samples("difference", {"ours": [of(each) for each in ours], "theirs": [of(theirs[rival])] * len(SEEDS)}, 1.0),
                "", ("<=", 0.0),
            )  # fmt: skip
    recorder.paired(
        "variety", f"distance of a picture to its nearest neighbour over that at {MANY} steps, {MODEL}",
        Samples("value", {"ours": [each.variety / many.variety for each in ours]}, 1.0), "", (">=", 0.8),
    )  # fmt: skip
    rows = [each.row(f"MMD-DDM, seed {seed}") for seed, each in zip(SEEDS, ours, strict=True)]
    rows += [untuned.row("DDIM"), theirs["dpm"].row("DPM-Solver++ 2M"), many.row("DDIM")]
    recorder.table("distances to held-out pictures", COLUMNS, rows)


if __name__ == "__main__":
    BENCHMARK.main()
