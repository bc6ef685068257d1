"""Pictures of few-step models against those of DPM-Solver++ with as many calls, over several trainings of each model.

    study = FewSteps("avatars-sd", guidance_scale=3.0, pictures=128)
    study.compare(recorder, "K4", "PeRFlow, 4 windows", steps=4, pipelines=[of each training seed])

The baseline is the base model with guidance on the grid that suits few steps ("trailing"): a call of it is of a doubled batch,
so it costs twice as much as one of a student with guidance in its weights. Three claims a comparison: the Fréchet distance to
real pictures, the balanced accuracy by the judge, and the distance to the pictures of the teacher from the same noise.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from tqdm.auto import tqdm

import diffusers_ext as dx
from benchmarks._bench import OUTPUT
from benchmarks._quality import ACCURACY_TOLERANCE, RMSE_TOLERANCE
from benchmarks._record import Recorder, Samples
from benchmarks._trainings import trained_once, training_folder, write_lines
from benchmarks._zoo import ZooModel
from benchmarks.data import FOLDER
from benchmarks.zoo import _avatars
from diffusers_ext.metrics import frechet_distance, rmse
from diffusers_ext.training._loop import picture_grid

MEASURES = ("frechet", "accuracy", "rmse")
REAL = 2000  # held-out pictures
_FRECHET_TOLERANCE = 1e-3


def claims_of(name: str) -> list[str]:
    """Names of the claims of one comparison."""
    return [f"{measure}_{name}" for measure in MEASURES]


def trained(script: Callable[[list[str]], None], name: str, flags: Iterable[str]) -> Path:
    """Folder of a finished training; trains first, or goes on, where these sources have not finished it.

    Args:
        script: `main` of a training script.
        name: of the training, for example `perflow/K4-seed0`.
        flags: its arguments without the output folder.
    """
    flags = list(flags)
    return trained_once(script, training_folder(name, script.__module__, flags), {}, flags)


def prompts_file() -> Path:
    """A text file with the captions that the generator was trained on, each once."""
    return write_lines(OUTPUT / "cache" / "avatars-prompts.txt", list(dict.fromkeys(_avatars.captions("generator"))))


class FewSteps:
    """See the module.

    Args:
        model: checkpoint of the zoo, with a judge for avatars.
        guidance_scale: of the base model, in the baseline and in the teacher's pictures.
        pictures: how many, each under a held-out caption of its own.
        teacher_steps: of DPM-Solver++ for the teacher's pictures.
        style: what is done to real 8-bit pictures before they are compared with.
    """

    def __init__(
        self,
        model: str,
        guidance_scale: float,
        pictures: int = 128,
        teacher_steps: int = 20,
        style: Callable[[np.ndarray], np.ndarray] = lambda pictures: pictures,
    ) -> None:
        self.model, self.guidance_scale = model, guidance_scale
        self.pictures, self.teacher_steps, self.style = pictures, teacher_steps, style
        self.sheet: dict[str, np.ndarray] = {}

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model": self.model, "guidance_scale": self.guidance_scale, "pictures": self.pictures,
            "teacher_steps": self.teacher_steps, "real_pictures": REAL,
        }  # fmt: skip

    @functools.cached_property
    def zoo(self) -> ZooModel:
        zoo = ZooModel(self.model)
        config = zoo.pipe.scheduler.config
        zoo.pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing")
        return zoo

    @functools.cached_property
    def judge(self) -> Any:
        return dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge")).eval()

    @functools.cached_property
    def real(self) -> torch.Tensor:
        """Features of real pictures."""
        rows = json.loads((FOLDER / "avatars_splits.json").read_text())["reference"][:REAL]
        return self.judge.features(self.style(np.load(FOLDER / "avatars.npz")["image"][rows]) / 255.0)

    @functools.cached_property
    def teacher(self) -> np.ndarray:
        return self.base(self.teacher_steps)

    @functools.cache  # noqa: B019  # a study lives as long as its benchmark
    def base(self, steps: int) -> np.ndarray:
        """Pictures of the base model by DPM-Solver++."""
        return self.draw(self.zoo.pipe, steps, self.guidance_scale)

    def draw(self, pipe: Any, steps: int, guidance_scale: float) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        conditions = self.zoo.conditions(self.pictures)
        return self.zoo.generate(pipe, conditions, range(self.pictures), steps, guidance_scale)

    def frechet(self, pictures: np.ndarray) -> float:
        return frechet_distance(self.judge.features(pictures), self.real, resamples=2).value

    def accuracy(self, pictures: np.ndarray) -> np.ndarray:
        found = self.zoo.accuracy(pictures, self.zoo.conditions(self.pictures), range(self.pictures))
        assert found is not None
        return found

    def compare(
        self,
        recorder: Recorder,
        name: str,
        title: str,
        steps: int,
        pipelines: Sequence[Any],
        guidance_scale: float = 1.0,
        over: Sequence[np.ndarray] | None = None,
        over_title: str = "",
    ) -> list[np.ndarray]:
        """Add the claims `claims_of(name)` and a table.

        Args:
            title: of ours, for sentences.
            steps: of both.
            pipelines: ours, one a training.
            guidance_scale: of ours.
            over: pictures to compare with, one set a training; those of DPM-Solver++ unless given.
            over_title: what these are.

        Returns:
            Our pictures, by training.
        """
        ours = [self.draw(pipe, steps, guidance_scale) for pipe in tqdm(pipelines, desc=name, leave=False)]
        theirs = [self.base(steps)] * len(ours) if over is None else list(over)
        said = over_title or f"DPM-Solver++ with guidance {self.guidance_scale:g}, {steps} steps"
        measured = {
            kind: {
                "frechet": [self.frechet(one) for one in sets],
                "accuracy": np.mean([self.accuracy(one) for one in sets], axis=0).tolist(),
                "rmse": np.mean([rmse(one, self.teacher).numpy() for one in sets], axis=0).tolist(),
            }
            for kind, sets in (("ours", ours), ("theirs", theirs))
        }
        for measure, statement, tolerance, unit, goal in (
            (
                "frechet",
                "Fréchet distance to real pictures (judge features, a training each)",
                _FRECHET_TOLERANCE,
                "",
                "<=",
            ),
            ("accuracy", "balanced accuracy by the judge", ACCURACY_TOLERANCE, "", ">="),
            ("rmse", f"RMSE to the teacher's pictures of {self.teacher_steps} steps", RMSE_TOLERANCE, "", "<="),
        ):
            columns = {kind: measured[kind][measure] for kind in ("ours", "theirs")}
            samples = Samples("difference", columns, tolerance, measure != "accuracy")
            recorder.paired(
                f"{measure}_{name}", f"{statement}: {title}, {steps} steps, less {said}", samples, unit, (goal, 0.0)
            )
        rows = [
            [who, steps, *(float(np.mean(measured[kind][measure])) for measure in MEASURES)]
            for who, kind in ((title, "ours"), (said, "theirs"))
        ]
        recorder.table(name, ["who", "steps", "Fréchet", "accuracy", "RMSE to the teacher"], rows)
        self.sheet |= {said: theirs[0], f"{title}, {steps} steps": ours[0]}
        return ours

    def draw_sheet(self, file: Path, columns: int = 12) -> Path:
        """Write the first pictures of all that was compared, and of the teacher, one row each."""
        rows = [*self.sheet.values(), self.teacher]
        pictures = [Image.fromarray((255 * one).round().astype(np.uint8)) for row in rows for one in row[:columns]]
        file.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(pictures, columns, scale=2).save(file)
        return file
