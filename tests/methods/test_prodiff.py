"""ProDiff, by four of the five proofs; the claim is the benchmark's."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training._teacher import CLEAN, Conditions, Process, Teacher
from diffusers_ext.training.train_guided_distillation import halving_target, step_levels
from diffusers_ext.training.train_prodiff import (
    ProDiffTask,
    clean_data_loss,
    main,
    parse_args,
    prodiff_betas,
    prodiff_distillation_loss,
    stages,
    structural_similarity,
)
from tests.card_snippets import run_card
from tests.common.suite import CommonCase
from tests.methods.test_guided_distillation import inputs

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "prodiff.json"
KINDS = ("l1", "l2")  # losses of the authors
NOTHING = Conditions({}, {})

exact = pytest.mark.proof("exact")
reference = pytest.mark.proof("reference")


def few(folder: Path) -> dict[str, Any]:
    """Arguments of a short run on a tiny pipeline."""
    return {**inputs(folder), "stage": "distill", "student_steps": 2}


COMMON = CommonCase(inputs=few)


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches of maps, `(3, 1, 8, 20)`."""
    wave = torch.arange(3 * 8 * 20, dtype=torch.float64).reshape(3, 1, 8, 20)
    return torch.sin(wave / 7), torch.sin(wave / 7) + 0.3 * torch.cos(wave / 3)


def student_formula(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.tanh(x)


def teacher_formula(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(x + t.reshape(-1, 1, 1, 1) / 3)


class Formula(Teacher):
    """A teacher whose predictions are a formula of x and t."""

    def __init__(self, process: Process, formula: Any) -> None:
        self.process, self.formula = process, formula

    def predict(self, x, t, conditions, guidance_scale=None):
        return self.formula(x, t)

    def call(self, denoiser, x, t, condition, guidance_scale=None):
        return denoiser(x, t)


def levels_of(count: int) -> torch.Tensor:
    return torch.cumprod(1 - torch.tensor(prodiff_betas(count), dtype=torch.float64), dim=0)


def process(prediction_type: str = "sample") -> Process:
    return Process(DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod, prediction_type)


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
def test_the_levels_are_those_of_the_formula():
    for count in (2, 5, 100):
        share = torch.arange(1, count + 1, dtype=torch.float64) / count
        torch.testing.assert_close(levels_of(count), torch.exp(-0.1 * share - 19.95 * share**2))
    assert levels_of(4).sqrt().tolist() == pytest.approx([0.529, 0.0805, 0.00348, 4.42e-5], rel=0.02)


@exact
@pytest.mark.parametrize("of", [process(), Process(levels_of(8), "sample")], ids=["pipeline", "paper"])
def test_one_step_with_the_target_lands_on_two_of_the_teacher(of):
    x, teacher = maps()[1].float(), Formula(of, lambda x, t: torch.sin(x + t.reshape(-1, 1, 1, 1) / of.num_timesteps))
    levels = step_levels(of, 8)
    for place in (0, 2, 4, 6):
        times = tuple(levels[place + i].expand(3) for i in range(3))
        t, between, s = times
        wanted = halving_target(teacher, x, times, NOTHING, 1.0)
        middle = of.jump(x, teacher.predict(x, t, NOTHING), t, between)
        last = teacher.predict(middle, between, NOTHING)
        torch.testing.assert_close(of.jump(x, wanted, t, s), of.jump(middle, last, between, s), rtol=0, atol=3e-6)
        assert prodiff_distillation_loss(teacher, lambda x, t, w=wanted: w, x, times, NOTHING) == 0
        if place == 6:
            assert s[0] == CLEAN
            torch.testing.assert_close(wanted, last, rtol=0, atol=1e-6)


@exact
def test_a_teacher_that_knows_the_data_gives_the_data():
    data, _ = maps()
    teacher = Formula(process(), lambda x, t: data)
    for steps in (1, 4):
        levels = step_levels(teacher.process, 2 * steps)
        times = tuple(levels[i].expand(3) for i in range(3))
        x = teacher.process.add_noise(data, torch.randn_like(data), times[0])
        torch.testing.assert_close(halving_target(teacher, x, times, NOTHING, 1.0), data, rtol=0, atol=1e-9)


@exact
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_of_clean_data_whatever_is_predicted(prediction_type):
    of, (a, _) = process(prediction_type), maps()
    levels = step_levels(of, 4)
    times = tuple(levels[i].expand(3) for i in range(3))
    teacher = Formula(of, lambda x, t: torch.cos(x))
    wanted = of.data_and_noise(a, halving_target(teacher, a, times, NOTHING, 1.0), times[0])[0]
    found = of.data_and_noise(a, student_formula(a), times[0])[0]
    loss = prodiff_distillation_loss(teacher, lambda x, t: student_formula(x), a, times, NOTHING)
    assert loss.item() == pytest.approx((found - wanted).abs().mean().item(), rel=1e-5)


@exact
def test_the_loss_of_the_teacher():
    a, b = maps()
    assert structural_similarity(a, a).item() == pytest.approx(1.0)
    assert clean_data_loss(a, a).item() == pytest.approx(0.0, abs=1e-6)
    assert 0 < structural_similarity(a, b).item() < 1
    expected = 0.5 * (a - b).abs().mean() + 0.5 * (1 - structural_similarity(a, b))
    assert clean_data_loss(a, b).item() == pytest.approx(expected.item(), rel=1e-4)


# --- reference -------------------------------------------------------------------------------------------------------


@reference
def test_the_levels_and_the_similarity_are_the_authors():
    golden = json.loads(GOLDEN.read_text())
    assert prodiff_betas(5) == pytest.approx(golden["betas"], rel=1e-12)
    assert levels_of(5).sqrt().tolist() == pytest.approx([0.664, 0.199, 0.027, 0.0016, 0.00004], abs=5e-4)
    assert structural_similarity(*maps()).item() == pytest.approx(golden["similarity"], abs=1e-5)


@reference
@pytest.mark.parametrize("kind", KINDS)
def test_the_distillation_loss_is_the_authors(kind):
    """Of a student that does not heed its label: theirs is told the level where its step ends, and samples at yet another."""
    of, (data, _) = Process(levels_of(5), "sample"), maps()
    torch.manual_seed(0)
    t = 2 * torch.randint(1, 3, (3,))
    x = of.add_noise(data, torch.randn_like(data), t)
    teacher, times = Formula(of, teacher_formula), (t, t - 1, t - 2)
    loss = prodiff_distillation_loss(teacher, lambda x, t: student_formula(x), x, times, NOTHING)
    if kind == "l2":  # of the same target
        target = halving_target(teacher, x, times, NOTHING, 1.0)
        loss = (student_formula(x) - target).square().mean()
    assert loss.item() == pytest.approx(json.loads(GOLDEN.read_text())["losses"][kind], rel=1e-6)


# --- the trainer -----------------------------------------------------------------------------------------------------


def flags(values: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A teacher of clean data, and students of two steps and one."""
    root = tmp_path_factory.mktemp("prodiff")
    values = few(root) | {"learning_rate": 1e-3, "max_train_steps": 1, "seed": 3, "guidance_scale": 2}
    steps = values.pop("student_steps")
    assert steps == 2
    main(flags({**values, "stage": "teacher", "noise_levels": 8, "output_dir": root / "my-teacher"}))
    student = {**values, "pretrained_model_name_or_path": root / "my-teacher", "output_dir": root / "my-student"}
    main(
        [*flags(student), "--student_steps", "2", "1", "--validation_prompts", "a person", "--num_validation_images=1"]
    )
    return root


@pytest.mark.proof("loads")
def test_results_are_stock_pipelines_with_the_right_steps(trained):
    teacher, student = (
        StableDiffusionPipeline.from_pretrained(trained / name) for name in ("my-teacher", "my-student")
    )
    for pipe in (teacher, student):
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe.scheduler) is DDIMScheduler and pipe.scheduler.config.prediction_type == "sample"
        assert pipe.scheduler.config.trained_betas == prodiff_betas(8)
    seen: list[int] = []
    student.unet.register_forward_pre_hook(lambda _module, args: seen.append(int(args[1])))
    student("a person", num_inference_steps=1, guidance_scale=1)
    assert seen == [7], "the noisiest level"
    weights = [
        StableDiffusionPipeline.from_pretrained(trained / name).unet.conv_in.weight
        for name in ("tiny", "my-teacher", "my-student/checkpoint-2-steps", "my-student")
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    assert list((trained / "my-student" / "samples").glob("step-*.png"))


def made(folder: Path, **changes: Any) -> ProDiffTask:
    """A task that is ready for its loss."""
    values = {**few(folder), "output_dir": folder / "task", "guidance_scale": 3, "proportion_empty_prompts": 0.5}
    if changes.get("stage") == "teacher":
        values.pop("student_steps")
    (args,) = stages(parse_args(flags(values | changes)))
    task = ProDiffTask(args)
    task.prepare(task.dataset(args), SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    return task


@exact
@pytest.mark.parametrize("stage", ["teacher", "distill"])
def test_the_loss_of_a_task(trained, stage):
    """Slow derivation from the same noise in the same order."""
    task = made(trained, stage=stage)
    rows, ids = [task.pictures[i] for i in range(2)], torch.tensor([4, 5])
    batch: dict[str, Any] = {"caption": [row["caption"] for row in rows]}
    batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
    found, draws = task.loss(batch, SampleNoise(1, ids)), SampleNoise(1, ids)
    latents = task.latents(batch, draws)
    epsilon = draws.normal(*latents.shape[1:])
    shown = task.teacher.encode(batch["caption"]).dropped(draws.uniform() < 0.5)
    alphas = task.pipeline.scheduler.alphas_cumprod

    def noised(t: torch.Tensor) -> torch.Tensor:
        level = alphas[t].reshape(-1, 1, 1, 1)
        return level.sqrt() * latents + (1 - level).sqrt() * epsilon

    if stage == "teacher":
        t = draws.integers(1000)
        expected = clean_data_loss(task.student(noised(t), t, **shown.given).sample, latents)
    else:
        place = 2 * draws.integers(2)
        first, between, last = (torch.tensor([999, 749, 499, 249, -1])[place + i] for i in range(3))
        times = (first, between, last)
        expected = prodiff_distillation_loss(task.teacher, task.student, noised(first), times, shown, 3.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@exact
def test_guidance_is_that_of_the_first_halving():
    args = parse_args([
        "--pretrained_model_name_or_path=x", "--train_data_dir=y", "--output_dir=z", "--guidance_scale=3", "--stage=distill",
        "--student_steps", "4", "2", "1",
    ])  # fmt: skip
    made = list(stages(args))
    assert [stage.guidance_scale for stage in made] == [3.0, 1.0, 1.0] and [stage.steps for stage in made] == [4, 2, 1]
    places = ["z/checkpoint-4-steps", "z/checkpoint-2-steps", "z"]
    assert [stage.output_dir for stage in made] == places
    assert [stage.pretrained_model_name_or_path for stage in made] == ["x", *places[:2]]


@exact
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stage=distill"], "student_steps"), (["--stage=distill", "--student_steps", "4", "3"], "student_steps"),
        (["--stage=teacher", "--student_steps", "4"], "student_steps"), (["--stage=teacher", "--noise_levels=1"], "noise_levels"),
        (["--stage=distill", "--student_steps", "4", "--noise_levels=8"], "noise_levels"),
        (["--stage=teacher", "--proportion_empty_prompts=2"], "proportion_empty_prompts"),
        (["--stage=distill", "--student_steps", "2", "1", "--resume_from_checkpoint=checkpoint-1"], "resume_from_checkpoint"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_trainer_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--pretrained_model_name_or_path=x", "--train_data_dir=y", *more])


@exact
def test_more_steps_than_the_pipeline_has_levels_are_refused(trained):
    base = few(trained) | {"pretrained_model_name_or_path": trained / "my-teacher", "output_dir": trained / "none"}
    with pytest.raises(ValueError, match="`--student_steps` has 5"):
        main(flags({**base, "student_steps": 5}))
    assert not (trained / "none").exists()


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card, names = run_card("prodiff")
    assert names["image"].size == (32, 32) and "2207.06389" in card
    for command in re.findall(r"train_prodiff (.*)", card):
        for flag in re.findall(r"--(\w+)", command):
            assert hasattr(parse_args(["--pretrained_model_name_or_path=x", "--train_data_dir=y", "--stage=teacher"]), flag)  # fmt: skip
