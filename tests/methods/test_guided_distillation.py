"""Guided distillation, by four of the five proofs; the claim is the benchmark's. No code was published: references are derived here."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.training._teacher import CLEAN, Conditions, Process, Teacher, few_step_scheduler, guidance_embedding
from diffusers_ext.training.train_guided_distillation import (
    guidance_distillation_loss,
    halving_loss,
    halving_target,
    main,
    prediction_weights,
    step_levels,
    with_scale_input,
)
from tests.common.suite import CommonCase
from tests.methods.test_agd import stable_diffusion

ROOT = Path(__file__).parents[2]
PROMPTS = ["a person with tan skin", "a person with pale skin, a beard"]
exact = pytest.mark.proof("exact")
reference = pytest.mark.proof("reference")


def inputs(folder: Path) -> dict[str, Any]:
    """Arguments of a short run on a tiny pipeline."""
    stable_diffusion(folder / "tiny")
    with np.load(ROOT / "benchmarks" / "data" / "avatars.npz") as avatars:
        np.savez(folder / "few.npz", image=avatars["image"][:12], text=avatars["caption"][:12])
    return {
        "pretrained_model_name_or_path": folder / "tiny", "train_data_dir": folder / "few.npz", "train_batch_size": 2,
    }  # fmt: skip


COMMON = CommonCase(inputs=inputs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guided")
    inputs(folder)
    return folder


@pytest.fixture
def teacher(tiny) -> Teacher:
    pipe = StableDiffusionPipeline.from_pretrained(tiny / "tiny")
    pipe.set_progress_bar_config(disable=True)
    return Teacher(pipe, 5.0)


def batch(teacher: Teacher, process: Process | None = None) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """x, t and conditions of two samples."""
    x = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([900, 300]), teacher.encode(PROMPTS)


# --- stage one -------------------------------------------------------------------------------------------------------


@exact
def test_a_new_student_is_the_conditional_teacher_bit_for_bit_at_every_scale(teacher):
    x, t, conditions = batch(teacher)
    student = with_scale_input(teacher.denoiser)
    with torch.no_grad():
        plain = teacher.call(teacher.denoiser, x, t, conditions.given)
        for scale in (1.0, 7.5, torch.tensor([2.0, 15.0])):
            assert torch.equal(teacher.call(student, x, t, conditions.given, scale), plain)
        torch.nn.init.normal_(student.time_embedding.cond_proj.weight)
        changed = [teacher.call(student, x, t, conditions.given, scale) for scale in (1.0, 7.5)]
    assert not torch.equal(changed[0], changed[1]), "and with weights there it heeds the scale"
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        with_scale_input(student)


@exact
def test_the_loss_of_a_new_student_is_known(teacher):
    """It predicts c, and u + w (c - u) is wanted: what is missing is (w - 1) (c - u)."""
    x, t, conditions = batch(teacher)
    scales = torch.tensor([1.0, 4.0])
    with torch.no_grad():
        c, u = (teacher.call(teacher.denoiser, x, t, part) for part in (conditions.given, conditions.empty))
    alpha, sigma = teacher.process.alpha_sigma(t, x)
    missing = ((scales - 1).view(-1, 1, 1, 1) * (c - u)).square()
    student = with_scale_input(teacher.denoiser).requires_grad_(True)
    for weighting, factor in (
        ("snr", torch.ones_like(alpha)),
        ("snr_plus_one", 1 / alpha.square()),
        ("truncated_snr", torch.maximum(torch.ones_like(alpha), (sigma / alpha).square())),
    ):
        loss = guidance_distillation_loss(teacher, student, x, t, conditions, scales, weighting)
        assert loss.item() == pytest.approx((factor * missing).mean().item(), rel=1e-4)
    loss.backward()
    assert student.time_embedding.cond_proj.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.denoiser.parameters())


@exact
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_weights_are_of_errors_of_the_clean_data(prediction_type):
    process = Process(DDIMScheduler().alphas_cumprod, prediction_type)
    x, noise = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    t, found = torch.tensor([20, 500, 999]), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t, x)
    snr = (alpha / sigma).square()
    wrong = process.data_and_noise(x, found, t)[0] - process.data_and_noise(x, noise, t)[0]
    for weighting, omega in (("truncated_snr", snr.clamp_min(1)), ("snr", snr), ("snr_plus_one", snr + 1)):
        weights = prediction_weights(process, t, x, weighting)
        torch.testing.assert_close(weights * (found - noise).square(), omega * wrong.square())


@exact
def test_the_stock_pipeline_hands_the_scale_over_and_skips_guidance(teacher):
    """Its embedding of the scale is that of the training, w = scale - 1."""
    pipe = teacher.pipeline
    w = torch.tensor([0.0, 1.5, 14.0])
    torch.testing.assert_close(guidance_embedding(w, 256), pipe.get_guidance_scale_embedding(w, 256))
    student = with_scale_input(teacher.denoiser)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.05)
    made = copy.copy(pipe)
    made.unet = student
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def see(module, args, kwargs, output):
        seen.append((args[0], args[1], output[0]))

    handle = student.register_forward_hook(see, with_kwargs=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    made(PROMPTS, guidance_scale=6.0, num_inference_steps=2, generator=generators, output_type="latent")
    handle.remove()
    assert [len(x) for x, _, _ in seen] == [2, 2], "one call a step, of as many rows as pictures"
    x, t, output = seen[1]
    with torch.no_grad():
        torch.testing.assert_close(teacher.call(student, x, t, teacher.encode(PROMPTS).given, 6.0), output)


# --- stage two -------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_step_with_the_target_ends_where_two_steps_of_the_teacher_end(teacher, prediction_type):
    teacher.process = Process(teacher.pipeline.scheduler.alphas_cumprod, prediction_type)
    process = teacher.process
    x, _, conditions = batch(teacher)
    for steps in (1, 4, 16):
        levels = step_levels(process, 2 * steps)
        for place in {0, 2 * steps - 2}:
            t, between, s = (levels[place + i].expand(2) for i in range(3))
            wanted = halving_target(teacher, x, (t, between, s), conditions, 3.0)
            middle = process.jump(x, teacher.predict(x, t, conditions, 3.0), t, between)
            second = teacher.predict(middle, between, conditions, 3.0)
            end = process.jump(middle, second, between, s)
            torch.testing.assert_close(
                process.jump(x, wanted, t, s), end, rtol=0, atol=1e-5 * max(1, end.abs().max().item())
            )
            if place == 2 * steps - 2:
                assert s[0] == CLEAN
                last = process.data_and_noise(middle, second, between)[0]
                data = process.data_and_noise(x, wanted, t)[0]
                torch.testing.assert_close(data, last, rtol=1e-4, atol=1e-4 * last.abs().max().item())


class _Formula(Teacher):
    """A teacher whose predictions are given by a formula of x, t and scale."""

    def __init__(self, process: Process, formula: Any) -> None:
        self.process, self.formula = process, formula

    def predict(self, x, t, conditions, guidance_scale=None):
        return self.formula(x, t, guidance_scale)

    def call(self, denoiser, x, t, condition, guidance_scale=None):
        return denoiser(x, t, guidance_scale)


def _process(prediction_type: str = "epsilon") -> Process:
    return Process(
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod, prediction_type
    )


@exact
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_teacher_that_knows_the_picture_gives_the_picture(prediction_type):
    process = _process(prediction_type)
    picture = torch.randn(1, 4, 5, 5, dtype=torch.float64)

    def knows(x, t, scale):
        alpha, sigma = process.alpha_sigma(t, x)
        return process.prediction(picture.expand_as(x), (x - alpha * picture) / sigma, t)

    teacher, x = _Formula(process, knows), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    levels = step_levels(process, 8)
    for place in (0, 2, 6):
        times = tuple(levels[place + i].expand(2) for i in range(3))
        wanted = halving_target(teacher, x, times, None, 2.0)
        data = process.data_and_noise(x, wanted, times[0])[0]
        torch.testing.assert_close(data, picture.expand_as(data), rtol=0, atol=1e-8)


@exact
def test_on_gaussian_data_a_student_of_one_number_a_time_and_scale_learns_all():
    r"""Of data :math:`N(0, s^2)` per scale, the noise is :math:`\sigma / (\alpha^2 s^2 + \sigma^2) x`: targets are linear too."""
    process, nothing = _process(), Conditions({}, {})

    def gaussian(x, t, scale):
        alpha, sigma = process.alpha_sigma(t, x)
        variance = (1 / scale).view(-1, 1, 1, 1).to(x)
        return sigma / (alpha.square() * variance + sigma.square()) * x

    teacher = _Formula(process, gaussian)
    levels, scales = step_levels(process, 8), torch.tensor([1.0, 2.0, 5.0])
    for place in (0, 4, 6):
        times = tuple(levels[place + i].expand(3) for i in range(3))
        x, y = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
        one, other = (halving_target(teacher, each, times, nothing, scales) for each in (x, y))
        ratio = (one / x).flatten(1).mean(dim=1)
        torch.testing.assert_close(one, ratio.view(-1, 1, 1, 1) * x, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(other, ratio.view(-1, 1, 1, 1) * y, rtol=1e-6, atol=1e-9)
        assert ratio.unique().numel() == 3

        def student(x, t, scale, ratio=ratio):
            return ratio.view(-1, 1, 1, 1) * x

        assert halving_loss(teacher, student, x, times, nothing, scales).item() < 1e-12


@exact
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_few_step_scheduler_takes_the_steps_of_the_training(steps):
    """The stock pipeline's steps: the same times, and each ends where a jump of the process ends."""
    base = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False
    )
    scheduler, process = few_step_scheduler(base), Process.of(base)
    scheduler.set_timesteps(steps)
    levels = step_levels(process, steps)
    assert scheduler.timesteps.tolist() == levels[:-1].tolist() and levels[0] == 999 and levels[-1] == CLEAN
    x, prediction = torch.randn(2, 1, 4, 3, 3)
    for t, s in itertools.pairwise(levels):
        wanted = process.jump(x, prediction, t[None], s[None])
        torch.testing.assert_close(scheduler.step(prediction, t, x).prev_sample, wanted, rtol=1e-5, atol=1e-5)


@exact
def test_half_as_many_steps_are_every_other_one():
    process = _process()
    for steps in (1, 2, 4, 8, 16, 32, 64):
        assert torch.equal(step_levels(process, 2 * steps)[::2], step_levels(process, steps))


# --- reference: derivations of our own -------------------------------------------------------------------------------


@reference
def test_the_target_is_that_of_the_angles():
    r"""With :math:`\alpha = \cos \phi`, a DDIM step by v turns :math:`z` by the difference of the angles (Salimans & Ho 2022,
    appendix D): :math:`z_s = \cos(\phi_s - \phi_t) z_t + \sin(\phi_s - \phi_t) v`. Two turns of the teacher give the one turn
    that the student's v has to make."""
    process = _process("v_prediction")
    levels = step_levels(process, 16)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)

    def angle(t: torch.Tensor) -> float:
        alpha, sigma = process.alpha_sigma(t[None], x)
        return math.atan2(sigma.item(), alpha.item())

    def turn(z, v, by):
        return math.cos(by) * z + math.sin(by) * v

    def predicts(x, t, scale):
        return torch.tanh(x) * scale + 0.001 * t.view(-1, 1, 1, 1)

    for place in (0, 6, 14):
        t, between, s = (levels[place + i] for i in range(3))
        middle = turn(x, predicts(x, t[None], 2.0), angle(between) - angle(t))
        end = turn(middle, predicts(middle, between[None], 2.0), angle(s) - angle(between))
        by = angle(s) - angle(t)
        wanted = (end - math.cos(by) * x) / math.sin(by)
        found = halving_target(_Formula(process, predicts), x, (t[None], between[None], s[None]), None, 2.0)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@reference
def test_the_guided_target_is_the_papers_combination_of_clean_data(teacher):
    r""":math:`\hat x^w = (1 + w) \hat x_c - w \hat x_u` with w one less than the scale of pipelines."""
    x, t, conditions = batch(teacher)
    scales = torch.tensor([2.0, 6.0])
    process = teacher.process
    found = process.data_and_noise(x, teacher.predict(x, t, conditions, scales), t)[0]
    with torch.no_grad():
        parts = [teacher.call(teacher.denoiser, x, t, part) for part in (conditions.given, conditions.empty)]
    c, u = (process.data_and_noise(x, part, t)[0] for part in parts)
    w = (scales - 1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, (1 + w) * c - w * u, rtol=1e-4, atol=1e-4 * found.abs().max().item())


# --- the trainer, loads ----------------------------------------------------------------------------------------------


def run(tiny: Path, output: Path, *flags: str) -> dict[str, str]:
    main([
        f"--pretrained_model_name_or_path={tiny / 'tiny'}", f"--train_data_dir={tiny / 'few.npz'}", "--train_batch_size=2",
        "--learning_rate=1e-3", "--seed=3", "--checkpointing_steps=1", f"--output_dir={output}", "--guidance_scale=4",
        "--validation_prompts=a person", "--num_validation_images=1", *flags,
    ])  # fmt: skip
    found = [file for file in output.rglob("*.safetensors") if not re.search(r"checkpoint-\d+/", str(file))]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


@pytest.mark.proof("loads")
def test_both_stages_resume_and_the_result_is_a_stock_pipeline_of_few_calls(tiny, tmp_path):
    stages = ("--student_steps", "2", "1")
    straight = run(tiny, tmp_path / "straight", "--max_train_steps=2", *stages)
    # As if stopped in the second of the three stages: the first is kept, the last not begun.
    resumed, second = tmp_path / "resumed", Path("checkpoint-2-steps", "checkpoint-1")
    shutil.copytree(tmp_path / "straight" / "checkpoint-guidance", resumed / "checkpoint-guidance")
    shutil.copytree(tmp_path / "straight" / second, resumed / second)
    assert run(tiny, resumed, "--max_train_steps=2", "--resume_from_checkpoint=latest", *stages) == straight
    unets = [digest for name, digest in straight.items() if name.endswith("unet/diffusion_pytorch_model.safetensors")]
    assert len(unets) == len(set(unets)) == 3, "guidance, two steps, one step"

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "straight")
    index = json.loads((tmp_path / "straight" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"][1] == "DDIMScheduler"
    rows: list[tuple[int, int]] = []
    pipe.unet.register_forward_pre_hook(lambda _module, args: rows.append((len(args[0]), int(args[1]))))
    pipe.set_progress_bar_config(disable=True)
    pipe("a person", num_inference_steps=1, guidance_scale=4.0)
    assert rows == [(1, 999)] and pipe.unet.config.time_cond_proj_dim == 256
    card = (tmp_path / "straight" / "README.md").read_text()
    assert "StableDiffusionPipeline" in card and str(tmp_path) not in card and str(tiny) not in card
    again = tmp_path / "again"
    with pytest.raises(ValueError, match="nothing is to be done"):
        main([f"--pretrained_model_name_or_path={tmp_path / 'straight'}", f"--train_data_dir={tiny / 'few.npz'}", f"--output_dir={again}"])  # fmt: skip
    assert not again.exists()


@exact
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student_steps", "8", "3"], "student_steps"), (["--student_steps", "0"], "student_steps"),
        (["--min_guidance_scale", "0.5"], "min_guidance_scale"), (["--guidance_scale", "0"], "guidance_scale"),
        (["--time_cond_proj_dim", "7"], "time_cond_proj_dim"), (["--halving_train_steps", "0"], "halving_train_steps"),
        (["--student_steps", "2", "--resume_from_checkpoint", "checkpoint-5"], "resume_from_checkpoint"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(flags, message, tmp_path):
    start = ["--pretrained_model_name_or_path=x", "--train_data_dir=y", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=message):
        main([*start, *flags])
    assert not list(tmp_path.iterdir())


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(tiny, tmp_path, monkeypatch):
    from diffusers_ext.cards import method_card

    monkeypatch.chdir(tmp_path)
    card = method_card("guided_distillation")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), names)
    assert names["image"].size == (32, 32) and "2210.03142" in card
    assert dx.get_method("guided_distillation").usage
