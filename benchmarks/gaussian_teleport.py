"""What it is worth to skip the first steps in closed form: against stock samplers that spend calls on them.

    diffusers-ext bench gaussian_teleport            # records diffusers_ext/results/gaussian_teleport.json

All start from the same noise and make equally many calls; errors are to the reference run of 200 steps from that noise.
Settings were fixed before measuring: the default `t_stop` of 700, which skips 30% of the timesteps, and 500 and 900 beside
it on the model whose statistics are those of its own training data. With prompts the statistics are of what the model
itself makes for other captions, at the same guidance.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._quality import Variant
from benchmarks._record import Recorder
from benchmarks._samplers import TrajectoryStudy
from benchmarks._zoo import BATCH, ZooModel
from benchmarks.data import load_fashion_mnist
from benchmarks.zoo import _avatars, _fashion
from diffusers_ext.metrics import distance_difference

FEW, PICTURES, REAL = 5, 1000, 2000
RANK, FASHION_SAMPLES, AVATAR_SAMPLES, AVATAR_STEPS = 128, 5000, 512, 12
RIVALS = ("dpm_solver_pp_2m",)
BENCHMARK = Benchmark(
    "gaussian_teleport",
    settings={"rank": RANK, "samples": {"fashion-ddpm": FASHION_SAMPLES, "avatars-sd": AVATAR_SAMPLES}, "avatar_steps": AVATAR_STEPS,
              "distances": {"calls": FEW, "pictures": PICTURES, "reference": REAL, "t_stop": 700}},
)  # fmt: skip


@functools.cache
def fashion_statistics() -> dx.GaussianTeleport:
    """Of training pictures."""
    pictures = torch.from_numpy(load_fashion_mnist("generator")[0][:FASHION_SAMPLES, None]).float()
    return dx.GaussianTeleport.fit(pictures / 127.5 - 1, RANK)


@functools.cache
def avatar_statistics(guidance_scale: float) -> dx.GaussianTeleport:
    """Of what the model makes for captions that it was trained with."""
    pipe = ZooModel("avatars-sd").pipe
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    captions, made = _avatars.captions("generator")[:AVATAR_SAMPLES], []
    for start in tqdm(range(0, AVATAR_SAMPLES, BATCH), desc="Latents for statistics", leave=False):
        generators = [torch.Generator().manual_seed(10**6 + start + i) for i in range(BATCH)]
        call = {"num_inference_steps": AVATAR_STEPS, "guidance_scale": guidance_scale, "generator": generators}
        made.append(pipe(captions[start : start + BATCH], **call, output_type="latent").images)
    return dx.GaussianTeleport.fit(torch.cat(made), RANK)


def teleported(pipe: Any, statistics: dx.GaussianTeleport, t_stop: int) -> Any:
    scheduler = dx.GaussianTeleportScheduler.from_config(pipe.scheduler.config, statistics=statistics, t_stop=t_stop)
    pipe.scheduler = scheduler
    if type(pipe).__name__ == "DDPMPipeline":  # it does not call `scale_model_input` itself
        pipe.unet.register_forward_pre_hook(lambda _, args: (scheduler.scale_model_input(args[0], args[1]), *args[1:]))
    return pipe


def fashion_700(pipe: Any) -> Any:
    return teleported(pipe, fashion_statistics(), 700)


def fashion_500(pipe: Any) -> Any:
    return teleported(pipe, fashion_statistics(), 500)


def fashion_900(pipe: Any) -> Any:
    return teleported(pipe, fashion_statistics(), 900)


def avatars_w1(pipe: Any) -> Any:
    return teleported(pipe, avatar_statistics(1.0), 700)


def avatars_w3(pipe: Any) -> Any:
    return teleported(pipe, avatar_statistics(3.0), 700)


FASHION = {
    "t700": Variant("teleport to 700", prepare=fashion_700),
    "t500": Variant("teleport to 500", prepare=fashion_500),
    "t900": Variant("teleport to 900", prepare=fashion_900),
}
BENCHMARK.add(TrajectoryStudy("fashion-ddpm", None, FASHION, over=RIVALS, minutes=8))
for scale, prepare in ((1.0, avatars_w1), (3.0, avatars_w3)):
    variants = {"t700": Variant("teleport to 700", prepare=prepare)}
    BENCHMARK.add(TrajectoryStudy("avatars-sd", scale, variants, over=RIVALS, minutes=8))


@BENCHMARK.part(*(f"{kind}_at_{FEW}" for kind in ("frechet", "kernel")), minutes=4)
def distances(recorder: Recorder) -> None:
    """To real pictures, which may be as good from another path."""
    zoo, judge, features = ZooModel("fashion-ddpm"), _fashion.judge(), {}
    stock = DPMSolverMultistepScheduler.from_config(zoo.pipe.scheduler.config, timestep_spacing="trailing")
    for name in tqdm(("stock", "teleported"), desc=f"{FEW} calls", leave=False):
        zoo.pipe.scheduler = stock
        pipe = fashion_700(zoo.pipe) if name == "teleported" else zoo.pipe
        features[name] = judge.features(zoo.generate(pipe, zoo.conditions(PICTURES), range(PICTURES), FEW))
    real = judge.features(load_fashion_mnist("reference")[0][:REAL, :, :, None])
    for kind, title in (("frechet", "Fréchet"), ("kernel", "kernel")):
        found = distance_difference(features["teleported"], features["stock"], real, kind)
        recorder.claim(
            f"{kind}_at_{FEW}",
            f"fashion-ddpm: {title} distance to real pictures less that of DPM-Solver++ 2M, at {FEW} calls, teleport to 700",
            found.value, "", found.interval, ("<=", 0.0),
        )  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.main()
