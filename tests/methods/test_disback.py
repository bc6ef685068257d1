"""DisBack, by four of the five proofs; the claim is the benchmark's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

import diffusers_ext as dx
from diffusers_ext.training._data import GlobalBatches, SampleNoise
from diffusers_ext.training._score_distillation import distillation_loss
from diffusers_ext.training._teacher import Process
from diffusers_ext.training.train_disback import DisBackTask, dmd_gradient, main, parse_args, target_number
from tests.card_snippets import run_card
from tests.common.suite import CommonCase
from tests.methods.test_agd import stable_diffusion

GOLDEN = Path(__file__).parents[1] / "golden" / "disback.json"
SCALE = 8.0
PROMPTS = ["a person with tan skin", "a person with red hair", "a person"]

exact = pytest.mark.proof("exact")
loads = pytest.mark.proof("loads")


def few(folder: Path) -> dict[str, Any]:
    """Arguments of a short run on a tiny pipeline."""
    stable_diffusion(folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return {
        "pretrained_model_name_or_path": folder / "tiny", "prompts": folder / "prompts.txt", "train_batch_size": 2,
        "record_steps": 2, "record_every": 1, "switch_steps": 1, "score_updates": 1, "guidance_scale": 2,
        "learning_rate_score": 1e-3,
    }  # fmt: skip


COMMON = CommonCase(inputs=few)


def latents() -> torch.Tensor:
    return torch.sin(torch.arange(3 * 4 * 25, dtype=torch.float32)).reshape(3, 4, 5, 5)


def real_formula(x: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return torch.sin(x + t.reshape(-1, 1, 1, 1) / 300) * (1 + 0.1 * states)


def fake_formula(x: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return 0.9 * torch.tanh(x) + 0.1 * states


# --- exact: the loss -------------------------------------------------------------------------------------------------


@exact
def test_the_gradient_of_the_loss():
    clean = latents().requires_grad_()
    wanted, fake = torch.cos(latents()), torch.sin(2 * latents())
    (found,) = torch.autograd.grad(distillation_loss(clean, dmd_gradient(clean, wanted, fake)), clean)
    for x, w, f, g in zip(latents(), wanted, fake, found, strict=True):
        torch.testing.assert_close(g, (f - w) / (x - w).abs().mean() / found.numel(), rtol=1e-4, atol=1e-8)
    assert not dmd_gradient(latents(), wanted, wanted).any(), "equal scores pull nowhere"
    assert not dmd_gradient(wanted, wanted, wanted).any(), "also where the sample is what is wanted"


@exact
def test_a_gaussian_student_reaches_gaussian_data():
    """Scores of both are known, so the sign and the fixed point are: N(2, 0.5^2)."""
    generator, of = torch.Generator().manual_seed(0), Process(DDIMScheduler().alphas_cumprod)
    mean, log_std = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.02)

    def data(x: torch.Tensor, t: torch.Tensor, centre: Any, std: Any) -> torch.Tensor:
        alpha, sigma = of.alpha_sigma(t, x)
        return centre + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * centre)

    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.02 if step < 300 else 0.002
        clean = mean + log_std.exp() * torch.randn(32, 16, generator=generator)
        t = torch.randint(20, 981, (32,), generator=generator)
        with torch.no_grad():
            noisy = of.add_noise(clean, torch.randn(32, 16, generator=generator), t)
            gradient = dmd_gradient(clean, data(noisy, t, 2.0, 0.5), data(noisy, t, mean, log_std.exp()))
        optimizer.zero_grad()
        distillation_loss(clean, gradient).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(2.0, abs=0.01) and log_std.exp().item() == pytest.approx(0.5, abs=0.01)


@exact
@pytest.mark.parametrize(("recorded", "interval", "expected"), [
    (0, 2, [0, 0, 0]), (1, 2, [0, 0, 0]), (3, 2, [2, 2, 1, 1, 0, 0, 0, 0]), (4, 1, [3, 2, 1, 0, 0]),
])  # fmt: skip
def test_targets_go_back_to_the_teacher_and_stay_there(recorded, interval, expected):
    assert [target_number(step, recorded, interval) for step in range(len(expected))] == expected
    assert target_number(10**6, recorded, interval) == 0


@pytest.mark.proof("reference")
def test_the_loss_and_its_gradient_are_the_authors():
    """Their targets are the teacher's alone: of the path their code loads nothing, as the names of weights do not fit."""
    golden = json.loads(GOLDEN.read_text())
    of = Process(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod)
    torch.manual_seed(0)
    t = torch.randint(20, 981, (3,))
    noisy = of.add_noise(latents(), torch.randn_like(latents()), t)
    one = torch.ones(3, 1, 1, 1)
    empty, given = real_formula(noisy, t, 0 * one), real_formula(noisy, t, one)
    wanted, fake = (
        of.data_and_noise(noisy, each, t)[0] for each in (empty + SCALE * (given - empty), fake_formula(noisy, t, one))
    )
    gradient = dmd_gradient(latents(), wanted, fake)
    assert distillation_loss(latents(), gradient).item() == pytest.approx(golden["loss"], rel=1e-4)
    for each, expected in zip(gradient, golden["gradient"], strict=True):
        assert [each.abs().mean().item(), *each.flatten()[:3].tolist()] == pytest.approx(expected, rel=1e-3, abs=1e-4)


# --- exact: the path and the task ------------------------------------------------------------------------------------


def made(folder: Path, output: str, **changes: Any) -> DisBackTask:
    """A task that is ready for its loss."""
    values = {**few(folder), "output_dir": folder / output, **changes}
    args = parse_args([f"--{name}={value}" for name, value in values.items()])
    task = DisBackTask(args)
    task.prepare(task.dataset(args), Accelerator(cpu=True))
    return task


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("disback")


@pytest.fixture(scope="module")
def task(folder) -> DisBackTask:
    return made(folder, "task")


BATCH = {"condition": PROMPTS[:2], "sample_id": torch.tensor([0, 1])}


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in module.state_dict().values()])


@exact
def test_the_path_is_that_of_a_slow_recording(task):
    """Two steps of AdamW on the error of noise in the samples of the first student, which does not change."""
    net, start = task.teacher.student(), weights(task.student)
    assert torch.equal(start, weights(task.teacher.denoiser))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    alphas = task.pipeline.scheduler.alphas_cumprod
    for step, batch in enumerate(GlobalBatches(3, 2, 0, 0, 2), start=1):
        draws = SampleNoise(0x50415448, torch.tensor([number for _, number in batch]))
        shown = task.teacher.encode([PROMPTS[index] for index, _ in batch])
        clean = task.draw(draws.normal(*task.teacher.shape), shown.given).detach()
        t, epsilon = draws.integers(1000), draws.normal(*task.teacher.shape)
        level = alphas[t].reshape(-1, 1, 1, 1)
        chosen = shown.dropped(draws.uniform() < 0.1).given
        found = net(level.sqrt() * clean + (1 - level).sqrt() * epsilon, t, **chosen).sample
        optimizer.zero_grad()
        (found - epsilon).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        recorded = torch.cat([task.path.weights(step)[name].flatten() for name in net.state_dict()])
        torch.testing.assert_close(recorded, weights(net), rtol=0, atol=1e-5)
        assert (recorded - start).abs().max() > 1e-4
    torch.testing.assert_close(weights(task.score_net), weights(net), rtol=0, atol=1e-5)


@exact
def test_targets_are_the_recorded_networks_and_then_the_teacher(task):
    before = weights(task.teacher.denoiser)
    first = task.target(0)
    net = getattr(first.pipeline, "unet")  # noqa: B009
    assert torch.equal(weights(net), torch.cat([task.path.weights(1)[name].flatten() for name in net.state_dict()]))
    assert task.target(0) is first and first.guidance_scale == 2
    assert task.target(1) is task.teacher and task.target(99) is task.teacher
    assert torch.equal(weights(task.teacher.denoiser), before)


@exact
def test_without_a_path_the_first_pull_is_nought_and_the_score_that_of_the_teacher(folder):
    """`--record_steps 0` is the baseline; without guidance both scores are the teacher's own at first."""
    task = made(folder, "baseline", record_steps=0, guidance_scale=1)
    assert not (folder / "baseline" / "checkpoint-path").exists()
    assert torch.equal(weights(task.score_net), weights(task.teacher.denoiser))
    loss = task.loss(BATCH, SampleNoise(3, BATCH["sample_id"]))
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in task.student.parameters())
    task.score.around_step(lambda: None)
    assert task.loss(BATCH, SampleNoise(3, BATCH["sample_id"])).item() > 0


@exact
@pytest.mark.parametrize("updates", [1, 2])
def test_the_loss_of_a_step(folder, updates):
    """Slow derivation: target of the path with guidance, score after the updates before, same noise in the same order."""
    task = made(folder, "task", score_updates=updates)
    teacher, alphas = task.teacher, task.pipeline.scheduler.alphas_cumprod
    net = task.teacher.student()
    net.load_state_dict(task.path.weights(2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    found = task.loss(BATCH, SampleNoise(3, BATCH["sample_id"]))
    gradients = torch.autograd.grad(found, list(task.student.parameters()))

    draws, shown = SampleNoise(3, BATCH["sample_id"]), teacher.encode(BATCH["condition"])
    at = alphas[399]

    def drawn() -> torch.Tensor:
        z = draws.normal(*teacher.shape)
        clean = (z - (1 - at).sqrt() * task.student(z, torch.tensor(399), **shown.given).sample) / at.sqrt()
        return 3990 / (3990**2 + 0.25) ** 0.5 * clean + 0.25 / (3990**2 + 0.25) * z

    def noised(clean: torch.Tensor, low: int, count: int) -> tuple[torch.Tensor, ...]:
        t, epsilon = low + draws.integers(count), draws.normal(*teacher.shape)
        level = alphas[t].reshape(-1, 1, 1, 1)
        return level.sqrt() * clean + (1 - level).sqrt() * epsilon, t, epsilon, level

    for _ in range(updates - 1):
        x, t, epsilon, _ = noised(drawn().detach(), 0, 1000)
        chosen = shown.dropped(draws.uniform() < 0.1).given
        optimizer.zero_grad()
        (net(x, t, **chosen).sample - epsilon).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    clean = drawn()
    x, t, _, level = noised(clean.detach(), 20, 961)
    target = teacher.student()
    target.load_state_dict(task.path.weights(1))
    with torch.no_grad():
        given, empty = (target(x, t, **part).sample for part in (shown.given, shown.empty))
        outputs = empty + 2 * (given - empty), net(x, t, **shown.given).sample
    wanted, fake = ((x - (1 - level).sqrt() * each) / level.sqrt() for each in outputs)
    pull = (fake - wanted) / (clean.detach() - wanted).abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = 0.5 * (clean - (clean - pull).detach()).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    for one, other in zip(gradients, torch.autograd.grad(expected, list(task.student.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * max(1e-2, other.abs().max().item()))


@exact
def test_a_recording_is_kept_finished_and_never_mixed(folder, task):
    def marks() -> list[bytes]:
        return [task.path.file(number).read_bytes() for number in (1, 2)]

    before, times = marks(), [task.path.file(number).stat().st_mtime_ns for number in (1, 2)]
    made(folder, "task")
    assert times == [task.path.file(number).stat().st_mtime_ns for number in (1, 2)]
    with pytest.raises(ValueError, match="another learning_rate_score"):
        made(folder, "task", learning_rate_score=2e-3)
    (task.path.folder / "path.json").unlink()  # as if it had been broken off
    task.path.file(2).unlink()
    made(folder, "task")
    assert marks() == before


@exact
@pytest.mark.parametrize(("flags", "message"), [
    (["--record_steps=-1"], "record_steps"), (["--record_steps=150"], "record_steps"), (["--record_every=0"], "record_every"),
    (["--switch_steps=0"], "switch_steps"), (["--score_updates=0"], "score_updates"), (["--mixed_precision=fp16"], "mixed_precision"),
    (["--learning_rate_score=0"], "learning_rate_score"), (["--gradient_accumulation_steps=2"], "score_updates"),
    (["--proportion_empty_prompts=-1"], "proportion_empty_prompts"),
])  # fmt: skip
def test_bad_arguments_of_the_trainer_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--pretrained_model_name_or_path=x", "--prompts=y", *flags])


# --- loads, card -----------------------------------------------------------------------------------------------------


@loads
def test_the_result_is_a_pipeline_of_one_step(folder):
    values = {**few(folder), "output_dir": folder / "result", "max_train_steps": 3, "learning_rate": 1e-3, "seed": 1}
    main([f"--{name}={value}" for name, value in values.items()] + ["--validation_prompts", PROMPTS[0]])
    pipe = dx.Pipeline.from_pretrained(folder / "result", dtype=torch.float32)
    assert type(pipe.scheduler) is dx.TimestepShiftLCMScheduler
    seen: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _module, args: seen.append(int(args[1])))
    pipe(PROMPTS[0], num_inference_steps=1, guidance_scale=0)
    assert seen == [399]
    base = dx.Pipeline.from_pretrained(folder / "tiny", dtype=torch.float32)
    assert not torch.equal(weights(pipe.unet), weights(base.unet))
    assert not any("path" in name for name in dx.hub.upload_contents(folder / "result"))
    assert list((folder / "result" / "samples").glob("step-*.png"))


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    card, names = run_card("disback")
    assert names["image"].size == (32, 32) and "2408.15991" in card
    (command,) = re.findall(r"train_disback (.*)", card)
    known = parse_args(["--pretrained_model_name_or_path=x", "--prompts=y"])
    assert all(hasattr(known, flag) for flag in re.findall(r"--(\w+)", command))
