"""NitroFusion, by four of the five proofs; the claim is the benchmark's.

The authors published the scheduler and no training: its references are derived here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionImg2ImgPipeline

import diffusers_ext as dx
from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training._discriminators import HeadPool, generator_hinge_loss, head_hinge_loss, unet_features
from diffusers_ext.training.train_nitrofusion import NitroFusionTask, main, parse_args
from tests import tiny_sd
from tests.card_snippets import run_card
from tests.common.suite import CommonCase
from tests.fresh import run_fresh
from tests.methods.test_agd import stable_diffusion

GOLDEN = Path(__file__).parents[1] / "golden" / "nitrofusion.json"
RUNS = [(1, 250), (2, 250), (4, 250), (3, 500), (4, 1000)]  # steps and shifted timestep
PROMPT = "a person with tan skin"

exact = pytest.mark.proof("exact")
loads = pytest.mark.proof("loads")


def few(folder: Path) -> dict[str, Any]:
    """Arguments of a short run on a tiny pipeline."""
    stable_diffusion(folder / "tiny")
    (folder / "prompts.txt").write_text(f"{PROMPT}\na person\n")
    return {
        "pretrained_model_name_or_path": folder / "tiny", "prompts": folder / "prompts.txt", "stage": "adversarial",
        "teacher_steps": 2, "train_batch_size": 2, "guidance_scale": 2, "heads_per_group": 2, "refresh_rate": 0.2,
    }  # fmt: skip


COMMON = CommonCase(inputs=few)


def run(scheduler: Any, steps: int) -> list[list[float]]:
    """Numbers of the latents after each step, on formula weights and inputs."""
    pipe, seen = tiny_sd.make(scheduler), []

    def note(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(tiny_sd.numbers(kwargs["latents"]))
        return kwargs

    pipe(
        **tiny_sd.inputs(), num_inference_steps=steps, guidance_scale=1.5, output_type="latent", callback_on_step_end=note,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return seen


# --- the scheduler ---------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_without_a_shift_it_is_lcm_bit_for_bit(steps, prediction_type):
    settings = {"original_inference_steps": 4, "prediction_type": prediction_type}
    ours, stock = dx.TimestepShiftLCMScheduler(shifted_timestep=1000, **settings), LCMScheduler(**settings)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps)
    assert torch.equal(ours.timesteps, stock.timesteps)
    x, noise = torch.linspace(-2, 2, 32).reshape(2, 1, 4, 4).unbind(0)
    assert torch.equal(ours.add_noise(x, noise, ours.timesteps[-1:]), stock.add_noise(x, noise, stock.timesteps[-1:]))
    made = []
    for scheduler in (ours, stock):
        y, generator = x, torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            y = scheduler.step(torch.cos(y + t / 300), t, y, generator=generator).prev_sample
        made.append(y)
    assert torch.equal(*made)


@exact
@pytest.mark.parametrize(("steps", "shift", "asked"), [
    (4, 250, [249, 187, 124, 62]), (1, 250, [249]), (4, 500, [499, 374, 249, 124]), (2, 1000, [999, 499]), (1, 1, [0]),
])  # fmt: skip
def test_a_run_equals_the_slow_derivation(steps, shift, asked):
    scheduler = dx.TimestepShiftLCMScheduler(shifted_timestep=shift)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == asked
    levels = scheduler.alphas_cumprod.double()
    true = [999, 749, 499, 249][:: 4 // steps]
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    x = y = torch.linspace(-2, 2, 16, dtype=torch.float64)
    for number, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.cos(x + t / 300), t, x, generator=generators[0], return_dict=False)[0]
        q, level = 10 * asked[number], levels[asked[number]]
        clean = (y - (1 - level).sqrt() * torch.cos(y + t / 300)) / level.sqrt()
        y = q / (q**2 + 0.25) ** 0.5 * clean + 0.25 / (q**2 + 0.25) * y
        if number < steps - 1:
            level = levels[true[number + 1]]
            y = level.sqrt() * y + (1 - level).sqrt() * torch.randn(16, generator=generators[1], dtype=torch.float64)
        torch.testing.assert_close(x, y, rtol=1e-6, atol=2e-6)


@exact
def test_image_to_image_begins_with_the_noise_that_a_run_has_there():
    scheduler, (x, noise) = dx.TimestepShiftLCMScheduler(), torch.randn(2, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        scheduler.add_noise(x, noise, torch.tensor([249]))
    scheduler.set_timesteps(4)
    level = scheduler.alphas_cumprod[749]
    assert torch.equal(
        scheduler.add_noise(x, noise, torch.tensor([187])), level.sqrt() * x + (1 - level).sqrt() * noise
    )
    with pytest.raises(ValueError, match=r"`timesteps` is \[749\]"):
        scheduler.add_noise(x, noise, torch.tensor([749]))


@exact
def test_steps_that_fail_leave_no_trace_and_bad_settings_are_refused():
    scheduler, x = dx.TimestepShiftLCMScheduler(), torch.ones(4)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 249, x)
    scheduler.set_timesteps(2)
    with pytest.raises(RuntimeError):
        scheduler.step(x[:3], scheduler.timesteps[0], x)
    assert scheduler.timesteps.tolist() == [249, 124]
    with pytest.raises(ValueError, match="two steps at one timestep"):
        dx.TimestepShiftLCMScheduler(shifted_timestep=2).set_timesteps(4)
    for settings, name in (
        ({"shifted_timestep": 0}, "shifted_timestep"), ({"shifted_timestep": 1001}, "shifted_timestep"),
        ({"original_inference_steps": 0}, "original_inference_steps"), ({"prediction_type": "x"}, "prediction_type"),
        ({"beta_schedule": "x"}, "beta_schedule"), ({"num_train_timesteps": 1}, "num_train_timesteps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}`"):
            dx.TimestepShiftLCMScheduler(**settings)


@pytest.mark.proof("reference")
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_the_latents_are_those_of_the_authors_scheduler(case):
    steps, shift = case
    found = run(dx.TimestepShiftLCMScheduler(shifted_timestep=shift), steps)
    expected = json.loads(GOLDEN.read_text())["runs"][f"{steps} {shift}"]
    assert len(found) == steps
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


@loads
def test_the_shift_is_saved(tmp_path):
    """The README of the authors sets a number on the config by hand, which a saved scheduler then lacks."""
    made = dx.TimestepShiftLCMScheduler.from_config(DDIMScheduler(beta_end=0.02).config, shifted_timestep=500)
    made.save_pretrained(tmp_path)
    loaded = dx.TimestepShiftLCMScheduler.from_pretrained(tmp_path)
    assert loaded.config.shifted_timestep == 500 and loaded.config.original_inference_steps == 4
    assert loaded.config.beta_end == 0.02 and torch.equal(loaded.alphas_cumprod, made.alphas_cumprod)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nitrofusion")
    few(root)
    return root


def made(folder: Path, **changes: Any) -> NitroFusionTask:
    """A task that is ready for its loss."""
    values = {
        "pretrained_model_name_or_path": folder / "tiny", "prompts": folder / "prompts.txt", "stage": "adversarial",
        "teacher_steps": 2, "train_batch_size": 2, "output_dir": folder / "task", "guidance_scale": 2, **changes,
    }  # fmt: skip
    args = parse_args([f"--{name}={value}" for name, value in values.items()])
    task = NitroFusionTask(args)
    task.prepare(task.dataset(args), Accelerator(cpu=True))
    return task


@pytest.fixture(scope="module")
def task(folder) -> NitroFusionTask:
    return made(folder, heads_per_group=4)


def batch(task: NitroFusionTask) -> tuple[dict[str, Any], SampleNoise]:
    pairs = task.dataset(task.args)
    rows = [pairs[i] for i in range(2)]
    found = {name: torch.stack([row[name] for row in rows]) for name in ("noise", "clean")}
    ids = torch.tensor([6, 7])
    return {**found, "condition": [row["condition"] for row in rows], "sample_id": ids}, SampleNoise(3, ids)


@exact
def test_the_student_is_the_pipeline_in_one_step(task):
    """Of training and inference the picture is the same, so that what is trained is what is used."""
    noise = torch.randn(1, *task.teacher.shape)
    drawn = task.draw(noise, task.teacher.encode([PROMPT]).given)
    pipe = task.student_pipeline()
    found = pipe(PROMPT, num_inference_steps=1, guidance_scale=1, latents=noise, output_type="latent").images
    torch.testing.assert_close(found, drawn, rtol=0, atol=1e-5 * drawn.abs().max().item())


@exact
def test_features_are_those_of_a_whole_call(task):
    unet, seen = task.teacher.denoiser, []
    x, t, given = torch.randn(2, *task.teacher.shape), torch.tensor([250, 250]), task.teacher.encode([PROMPT] * 2).given
    handles = [block.register_forward_hook(lambda _m, _a, output: seen.append(output)) for block in unet.down_blocks]
    with torch.no_grad():
        unet(x, t, **given)
    for handle in handles:
        handle.remove()
    found = unet_features(task.teacher, x, t, given)
    assert len(found) == len(seen) + 1 and not any(len(block._forward_hooks) for block in unet.down_blocks)
    for ours, (theirs, _) in zip(found, seen, strict=False):
        assert torch.equal(ours, theirs)


@exact
def test_the_hinge_losses():
    real, fake = [torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0]])], [torch.tensor([[-3.0]]), torch.tensor([[1.0]])]
    assert head_hinge_loss(real, fake).item() == pytest.approx(((0 + 0.5) / 2 + 0 + 2 + 2) / 2)
    assert generator_hinge_loss(fake).item() == pytest.approx((3 - 1) / 2)


def small_pool(**changes: Any) -> HeadPool:
    settings = {"timesteps": [10, 500], "channels": [4, 8], "heads_per_group": 4, "refresh_rate": 0.0, "seed": 0}
    return HeadPool(**{**settings, **changes}, accelerator=Accelerator(cpu=True), learning_rate=1e-2)


FEATURES = [torch.linspace(-1, 1, 2 * c * 9).reshape(2, c, 3, 3).sin() for c in (4, 8)]
PLACES = torch.tensor([1, 0])
LAYOUT = [(place, level, number) for place in (0, 1) for level in (0, 1) for number in range(4)]


@exact
def test_a_draw_is_one_head_of_each_group():
    pool, seen = small_pool(), set()
    assert pool.places(torch.tensor([6, 7, 8])).tolist() == [0, 1, 0]
    for step in range(40):
        drawn = pool.draw(step)
        assert drawn.timesteps.tolist() == [10, 500]
        for place, heads in enumerate(drawn.heads):
            numbers = [[head is each for each in pool.heads].index(True) for head in heads]
            told = [LAYOUT[number] for number in numbers]
            assert [each[:2] for each in told] == [(place, 0), (place, 1)]
            assert all((number < 2) == drawn.conditional[place] for _, _, number in told)
            assert all(pool.heads[number].pooled == (LAYOUT[number][2] % 2 == 1) for number in numbers)
            assert all(head is other for head, other in zip(heads, pool.draw(step).heads[place], strict=True))
            seen.update(numbers)
    assert seen == set(range(16)), "each head has its turns"


@exact
def test_heads_judge_the_samples_of_their_noise_level():
    drawn = small_pool().draw(0)
    expected = [head(each[[1 - place]]) for place in (0, 1) for head, each in zip(drawn.heads[place], FEATURES, strict=True)]  # fmt: skip
    for trained in (True, False):
        found = drawn.judge(FEATURES, PLACES, trained)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
            assert one.requires_grad == trained
    assert len(drawn.judge(FEATURES, torch.tensor([0, 0]))) == 2


def weights(pool: HeadPool) -> list[torch.Tensor]:
    return [torch.cat([value.detach().flatten() for value in head.parameters()]) for head in pool.heads]


@exact
def test_without_refresh_only_the_heads_that_were_drawn_change():
    pool = small_pool()
    for step in range(3):
        before, drawn = weights(pool), pool.draw(step)
        pool.learn(head_hinge_loss(drawn.judge(FEATURES, PLACES), drawn.judge([-each for each in FEATURES], PLACES)))
        pool.around_step(lambda: None)
        for head, old, new in zip(pool.heads, before, weights(pool), strict=True):
            assert torch.equal(old, new) != any(head is each for heads in drawn.heads for each in heads)


@exact
def test_refreshed_heads_are_new_and_have_no_past():
    pool, count = small_pool(refresh_rate=0.3), 0
    for step in range(6):
        drawn = pool.draw(step)
        pool.learn(head_hinge_loss(drawn.judge(FEATURES, PLACES), drawn.judge(FEATURES, PLACES)))
        super(HeadPool, pool).around_step(lambda: None)
        before, other = weights(pool), copy.deepcopy(pool.heads)
        pool.refresh(step)
        changed = [not torch.equal(old, new) for old, new in zip(before, weights(pool), strict=True)]
        count += sum(changed)
        for head, new in zip(pool.heads, changed, strict=True):
            assert not (new and any(p in pool.optimizer.state for p in head.parameters()))
            if new:
                assert head.into.weight.abs().max() <= head.into.in_channels**-0.5 and not head.into.bias.any()
        pool.heads.load_state_dict(other.state_dict())
        pool.refresh(step)
        assert changed == [not torch.equal(old, new) for old, new in zip(before, weights(pool), strict=True)]
    assert 0.2 < count / (6 * len(pool.heads)) < 0.4


@exact
def test_pooled_heads_see_the_mean_alone():
    local, whole = small_pool().heads[:2]
    shuffled = FEATURES[0].flatten(2)[..., torch.randperm(9)].reshape(FEATURES[0].shape)
    assert whole(FEATURES[0]).shape == (2, 1, 1, 1) and local(FEATURES[0]).shape == (2, 1, 3, 3)
    torch.testing.assert_close(whole(FEATURES[0]), whole(shuffled))
    assert (local(FEATURES[0]) - local(shuffled)).abs().max() > 1e-3


@exact
def test_each_sample_has_its_noise_level_and_condition(task):
    """Slow derivation, sample by sample: the timesteps are 10, 250, 500 and 750, so that numbers 6 and 7 have the last two."""
    rows, noise = batch(task)
    conditions, fake = task.teacher.encode(rows["condition"]), torch.randn(2, *task.teacher.shape)
    for step in (0, 1, 2):
        draws = SampleNoise(3, rows["sample_id"])
        found = task.adversarial_loss(fake, rows["clean"], conditions, noise, step, rows["sample_id"])
        noise, drawn, logits = SampleNoise(3, rows["sample_id"]), task.pool.draw(step), []
        epsilon = draws.normal(*task.teacher.shape)
        for row, (place, t) in enumerate(((2, 500), (3, 750))):
            level = task.pipeline.scheduler.alphas_cumprod[t]
            prompt = rows["condition"][row] if drawn.conditional[place] else ""
            states = task.pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
            x = level.sqrt() * fake[[row]] + (1 - level).sqrt() * epsilon[[row]]
            features = unet_features(task.teacher, x, torch.tensor([t]), {"encoder_hidden_states": states})
            logits += [head(each).mean() for head, each in zip(drawn.heads[place], features, strict=True)]
        torch.testing.assert_close(found, -sum(logits) / len(logits), rtol=1e-4, atol=1e-5)


@exact
def test_a_pool_of_one_is_a_plain_gan(folder):
    """Slow derivation of two steps: one discriminator on the encoder's features, AdamW for both, no pool."""
    task = made(folder, heads_per_group=1, refresh_rate=0, head_timesteps=250, learning_rate_heads=1e-2)
    student, heads, teacher = copy.deepcopy(task.student), copy.deepcopy(task.pool.heads), task.teacher
    assert len(heads) == 3
    mine, theirs = (torch.optim.SGD(model.parameters(), lr=1e-3) for model in (task.student, student))
    critic = torch.optim.AdamW(heads.parameters(), lr=1e-2, weight_decay=0.0)
    level = task.scheduler.alphas_cumprod[250]
    given = teacher.encode(batch(task)[0]["condition"]).given
    for _ in range(2):
        rows, noise = batch(task)
        found = task.loss(rows, noise)
        mine.zero_grad()
        found.backward()
        assert not any(p.grad is not None and p.grad.isnan().any() for p in task.student.parameters())
        task.pool.around_step(mine.step)

        draws = SampleNoise(3, rows["sample_id"])
        z, first, second = (draws.normal(*teacher.shape) for _ in range(3))
        at, q = task.scheduler.alphas_cumprod[249], 2490
        clean = (z - (1 - at).sqrt() * student(z, torch.tensor(249), **given).sample) / at.sqrt()
        fake = q / (q**2 + 0.25) ** 0.5 * clean + 0.25 / (q**2 + 0.25) * z

        def judged(x: torch.Tensor, epsilon: torch.Tensor) -> list[torch.Tensor]:
            noisy = level.sqrt() * x + (1 - level).sqrt() * epsilon
            features = unet_features(teacher, noisy, torch.tensor(250), given)
            return [head(each) for head, each in zip(heads, features, strict=True)]

        expected = -sum(logits.mean() for logits in judged(fake, first)) / 3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(expected, list(student.parameters()))
        on_heads = sum(
            (1 - real).relu().mean() + (1 + other).relu().mean()
            for real, other in zip(judged(rows["clean"], second), judged(fake.detach(), first), strict=True)
        )
        critic.zero_grad()
        (on_heads / 3).backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        critic.step()
        for parameter, gradient in zip(student.parameters(), gradients, strict=True):
            parameter.grad = gradient
        theirs.step()
    for ours, other in ((task.student, student), (task.pool.heads, heads)):
        for a, b in zip(ours.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@exact
@pytest.mark.parametrize(("flag", "message"), [
    ("--shifted_timestep=0", "shifted_timestep"), ("--refresh_rate=1", "refresh_rate"), ("--heads_per_group=0", "heads_per_group"),
    ("--head_timesteps=-1", "head_timesteps"), ("--learning_rate_heads=0", "learning_rate_heads"),
    ("--mixed_precision=fp16", "mixed_precision"), ("--guidance_scale=0", "guidance_scale"),
])  # fmt: skip
def test_bad_arguments_of_the_trainer_are_refused(flag, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--pretrained_model_name_or_path=x", "--prompts=y", "--stage=distill", flag])


@exact
@pytest.mark.parametrize(("changes", "message"), [
    ({"head_timesteps": 1000}, "`--head_timesteps` is"), ({"shifted_timestep": 1001}, "`shifted_timestep` is 1001"),
])  # fmt: skip
def test_what_the_pipeline_does_not_have_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        made(folder, **changes)


# --- loads, card -----------------------------------------------------------------------------------------------------


@loads
def test_both_stages_give_pipelines_of_one_to_four_steps(folder, tmp_path):
    """The second begins with the first's student; the result loads without this package."""
    values = few(folder) | {"stage": "distill", "learning_rate": 1e-3, "max_train_steps": 1, "shifted_timestep": 400}
    start, result = tmp_path / "start", tmp_path / "result"
    main([f"--{name}={value}" for name, value in {**values, "output_dir": start}.items()])
    changes = {"stage": "adversarial", "student_path": start, "learning_rate": 1e-12, "output_dir": result}
    main([f"--{name}={value}" for name, value in {**values, **changes}.items()] + ["--validation_prompts", PROMPT])
    pipes = [dx.Pipeline.from_pretrained(each, dtype=torch.float32) for each in (start, result)]
    for pipe in pipes:
        assert type(pipe.scheduler) is dx.TimestepShiftLCMScheduler and pipe.scheduler.config.shifted_timestep == 400
    first, second, base = (pipe.unet.state_dict() for pipe in (*pipes, dx.Pipeline.from_pretrained(folder / "tiny")))
    for name, value in second.items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(first[name], base[name]) for name in base)
    assert list((result / "samples").glob("step-*.png"))
    call = {"num_inference_steps": 4, "guidance_scale": 0, "output_type": "latent"}
    expected = pipes[1](PROMPT, generator=torch.Generator().manual_seed(0), **call).images
    late = StableDiffusionImg2ImgPipeline.from_pipe(pipes[1])
    image = late(PROMPT, image=torch.rand(1, 3, 16, 16), strength=0.5, num_inference_steps=4, guidance_scale=0)
    assert len(image.images) == 1
    run_fresh(f"""
        import sys
        sys.modules["diffusers_ext"] = None
        import torch
        from diffusers import StableDiffusionPipeline
        pipe = StableDiffusionPipeline.from_pretrained({str(result)!r}, dtype=torch.float32, trust_remote_code=True)
        torch.save(pipe({PROMPT!r}, generator=torch.Generator().manual_seed(0), **{call!r}).images, {str(tmp_path / "x")!r})
    """)
    torch.testing.assert_close(torch.load(tmp_path / "x"), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="`--student_path` is"):
        made(folder, student_path=dx.zoo_path("avatars-sd"))


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs():
    card, names = run_card("nitrofusion")
    assert names["image"].size == (32, 32) and "2412.02030" in card
