"""What FlowTurbo is worth: its sampler against Euler and Heun at equal calls, its refiner against fewer steps.

    diffusers-ext bench flowturbo            # records diffusers_ext/results/flowturbo.json

Settings were fixed before measuring: one Heun step, which costs no extra call, and for comparison two. Heun is the same
sampler with Heun steps only, and so takes half as many steps. The refiner is trained here, and makes the last 4 of 12 calls;
8 calls without it are as many of the transformer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT, Benchmark
from benchmarks._quality import RMSE_TOLERANCE, Variant
from benchmarks._record import Recorder, Samples
from benchmarks._sampler_peers import FLOW_ORACLE_PEERS, FLOW_PEERS, fitting, reference_run
from benchmarks._samplers import OracleStudy, TrajectoryStudy
from benchmarks._zoo import ZooModel
from benchmarks.zoo import _avatars
from diffusers_ext.metrics import rmse
from diffusers_ext.training.train_velocity_refiner import main as train_refiner

MODEL = "avatars-flow"
REFINER: dict[str, Any] = {"calls": 12, "refined": 4, "guidance_scale": 3.0, "pictures": 64, "reference_steps": 200}
TRAINING = (
    *_avatars.DATA, "--max_sequence_length=32", "--cache_latents", "--center_crop", "--train_batch_size=32",
    "--max_train_steps=1000", "--learning_rate=1e-3", "--lr_scheduler=cosine", "--use_ema", "--ema_decay=0.99",
    "--checkpointing_steps=1000",
)  # fmt: skip
SCHEDULER = fitting(dx.FlowMatchPseudoCorrectorScheduler)
BENCHMARK = Benchmark("flowturbo", settings={"refiner": REFINER, "training": list(TRAINING[len(_avatars.DATA) :])})
VARIANTS = {
    "h1": Variant("pseudo-corrector", scheduler=SCHEDULER),
    "h2": Variant("pseudo-corrector, 2 Heun steps", scheduler=SCHEDULER, scheduler_options={"n_heun": 2}),
}
HEUN = {"heun": Variant("Heun", scheduler=SCHEDULER, scheduler_options={"n_heun": 1000})}
RIVALS = ("euler", "heun", "dpm_solver_pp_2m")
BENCHMARK.add(OracleStudy(VARIANTS, FLOW_ORACLE_PEERS | HEUN, problems=("flow",), over=RIVALS))
for scale in (1.0, 3.0):
    BENCHMARK.add(TrajectoryStudy(MODEL, scale, VARIANTS, FLOW_PEERS | HEUN, over=RIVALS, minutes=9))


def refiners(zoo: ZooModel, folder: Path, training: tuple[str, ...] = TRAINING) -> dict[str, Path]:
    """Folders of an untrained refiner, which carries the velocity on, and of a trained one."""
    untrained = dx.VelocityRefiner(**dx.VelocityRefiner.config_for(zoo.pipe.transformer))
    untrained.save_pretrained(folder / "untrained")
    start = f"--pretrained_model_name_or_path={dx.zoo_path(MODEL)}"
    train_refiner([start, f"--output_dir={folder / 'trained'}", *training])
    return {"carried": folder / "untrained", "refined": folder / "trained"}


@BENCHMARK.part("refined_over_fewer_steps", "refined_over_carried", "refined_over_full", minutes=20)
def refined_steps(recorder: Recorder, training: tuple[str, ...] = TRAINING, settings: dict[str, Any] = REFINER) -> None:
    """Distance to the reference run with the last calls refined, carried on, left out, or made in full."""
    zoo, count, calls = ZooModel(MODEL), settings["pictures"], settings["calls"]
    folders = refiners(zoo, OUTPUT / "flowturbo-refiner", training)
    conditions, scale = zoo.conditions(count), settings["guidance_scale"]

    def draw(variant: Variant, steps: int) -> np.ndarray:
        with variant.on(zoo.pipe) as pipe:
            return zoo.generate(pipe, conditions, range(count), steps, scale)

    def with_refiner(name: str) -> Variant:
        return Variant(scheduler=SCHEDULER, configs=[dx.FlowTurboConfig(str(folders[name]), settings["refined"])])

    plain = VARIANTS["h1"]
    runs = {
        "refined": (with_refiner("refined"), calls),
        "carried": (with_refiner("carried"), calls),
        "fewer_steps": (plain, calls - settings["refined"]),
        "full": (plain, calls),
    }
    reference = draw(reference_run(True, settings["reference_steps"]), settings["reference_steps"])
    errors = {name: rmse(draw(*run), reference).tolist() for name, run in tqdm(runs.items(), desc="refined steps")}
    for other, said, goal in (
        ("fewer_steps", f"{runs['fewer_steps'][1]} calls without a refiner", ("<=", 0.0)),
        ("carried", "carrying the velocity on", ("<=", 0.0)),
        ("full", f"{calls} calls of the transformer", None),
    ):
        recorder.paired(
            f"refined_over_{other}",
            f"RMSE to the reference run less that of {said}; the refiner makes {settings['refined']} of {calls} calls, "
            f"{MODEL}, guidance {scale:g}",
            Samples("difference", {"ours": errors["refined"], "theirs": errors[other]}, RMSE_TOLERANCE), "", goal,
        )  # fmt: skip
    rows = [[name, runs[name][1], float(np.mean(values))] for name, values in errors.items()]
    recorder.table("refined steps", ["last calls", "calls", "mean RMSE"], rows)


if __name__ == "__main__":
    BENCHMARK.main()
