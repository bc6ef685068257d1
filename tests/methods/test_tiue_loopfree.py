"""TiUE, by the five proofs."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

import diffusers_ext as dx
from diffusers_ext.hooks._plan import find_run
from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training._score_distillation import distillation_loss, vsd_gradient
from diffusers_ext.training.train_tiue_loopfree import LoopfreeTask, main, noise_divergence, parse_args
from tests import tiny_sd
from tests.card_snippets import run_card
from tests.common import models
from tests.common.suite import CommonCase
from tests.methods.test_faster_diffusion import MODELS, call, substitute
from tests.unets import UNETS, conditional, inputs, predict

COMMON = CommonCase(settings=[{"parallel": False}])
GOLDEN = Path(__file__).parents[1] / "golden" / "tiue_loopfree.json"
RUNS = {"sequential": (4, False), "parallel": (4, True), "two steps": (2, True)}  # name -> steps, parallel
STEPS = 4

exact = pytest.mark.proof("exact")


def ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False, beta_schedule="scaled_linear")


def noise() -> torch.Tensor:
    first = tiny_sd.inputs()["latents"]
    return torch.cat([first, first.flip(-1)])


def states() -> torch.Tensor:
    given = tiny_sd.inputs()
    return torch.cat([given["prompt_embeds"], given["negative_prompt_embeds"]])


def in_parallel(unet) -> None:
    """The parallel form on a bare model, which a pipeline would tell of its scheduler."""
    config = dx.TiUELoopfreeConfig()
    config.apply(unet)
    timesteps = torch.tensor([900 - 40 * step for step in range(STEPS)])
    find_run(unet, config.key).begin(STEPS, SimpleNamespace(timesteps=timesteps))


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", MODELS)
def test_both_forms_equal_the_slow_derivation(name):
    """The slow one computes everything in each step, and puts what the up blocks read in the first one in place."""
    make, more = MODELS[name]
    plain, one, many = (make().double() for _ in range(3))
    dx.apply_tiue_loopfree(one)
    in_parallel(many)
    assert torch.equal(call(one, 0, **more), call(plain, 0, **more)), "the first prediction is the U-Net's"
    dx.remove_tiue_loopfree(one)
    dx.apply_tiue_loopfree(one)
    stored: list = []
    for i, up in enumerate(plain.up_blocks):
        up.register_forward_pre_hook(substitute(stored, i), with_kwargs=True)
    for step in range(STEPS):
        expected = call(plain, step, **more)
        assert torch.equal(call(one, step, **more), expected), f"step {step}"
        torch.testing.assert_close(call(many, step, **more), expected, rtol=1e-10, atol=1e-10)


@exact
@pytest.mark.parametrize("name", UNETS)
def test_a_run_of_one_step_is_the_plain_unet(name):
    unet = UNETS[name](1)
    plain = predict(unet, 0)
    dx.apply_tiue_loopfree(unet)
    assert torch.equal(predict(unet, 0), plain)
    dx.remove_tiue_loopfree(unet)
    dx.TiUELoopfreeConfig().apply(unet)
    find_run(unet, "tiue_loopfree").begin(1, SimpleNamespace(timesteps=torch.tensor([900])))
    assert torch.equal(predict(unet, 0), plain)


@exact
def test_no_prediction_but_the_first_sees_its_latents():
    for parallel in (False, True):
        found = []
        for factor in (1.0, -7.0):
            unet = conditional(1, 2).double()
            if parallel:
                in_parallel(unet)
            else:
                dx.apply_tiue_loopfree(unet)
            call(unet, 0)
            found.append([call(unet, step, sample=factor * inputs(unet, step)["sample"]) for step in range(1, STEPS)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@exact
@pytest.mark.parametrize(("parallel", "decoders"), [(False, 4), (True, 1)])
def test_the_encoder_runs_once(parallel, decoders):
    pipe = dx.enable(tiny_sd.make(ddim()), dx.TiUELoopfreeConfig(parallel))
    counts = {"down": 0, "mid": 0, "up": 0}
    unet = pipe.unet
    for name, block in (("down", unet.down_blocks[0]), ("mid", unet.mid_block), ("up", unet.up_blocks[0])):
        block.resnets[0].conv1.register_forward_hook(lambda *_, n=name: counts.update({n: counts[n] + 1}))
    tiny_sd.draw(pipe, 4)
    assert counts == {"down": 1, "mid": 1, "up": decoders}


@exact
def test_in_a_pipeline_both_forms_agree():
    made = [
        tiny_sd.draw(dx.enable(tiny_sd.make(ddim()), dx.TiUELoopfreeConfig(parallel)), 4) for parallel in (False, True)
    ]
    for one, many in zip(*made, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-10, atol=1e-10)


@exact
def test_runs_of_another_number_of_steps_are_refused():
    pipe = dx.enable(tiny_sd.make(ddim()), dx.TiUELoopfreeConfig(steps=4))
    with pytest.raises(ValueError, match="`num_inference_steps` is 5; this U-Net was distilled for runs of 4 steps"):
        tiny_sd.draw(pipe, 5)
    assert len(tiny_sd.draw(pipe, 4)) == 4


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [({"parallel": 1}, "`parallel` is 1"), ({"steps": 0}, "`steps` is 0"), ({"steps": True}, "`steps` is True"), ({"steps": 2.0}, "`steps` is 2.0")],
)  # fmt: skip
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        dx.TiUELoopfreeConfig(**options)


@exact
def test_what_does_not_fit_is_refused():
    unet = conditional(1, 2)
    with pytest.raises(ValueError, match="`parallel` is True, which needs the timesteps"):
        dx.enable(unet, dx.TiUELoopfreeConfig())
    with pytest.raises(
        ValueError, match=r"TiUE \(tiue_loopfree\) does not work on FluxTransformer2DModel: it is no U-Net"
    ):
        dx.enable(models.flux(), dx.TiUELoopfreeConfig())
    assert not dx.status(unet)


# --- exact: losses ---------------------------------------------------------------------------------------------------


@exact
def test_the_divergence_of_noise():
    maps = torch.randn((3, 4, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    standard = (maps - maps.mean((1, 2, 3), keepdim=True)) / maps.std((1, 2, 3), keepdim=True)
    assert noise_divergence(standard).item() == pytest.approx(0, abs=1e-6)
    one = torch.distributions.Normal(0.0, 1.0)
    expected = sum(
        torch.distributions.kl_divergence(torch.distributions.Normal(m.mean().float(), m.std().float()), one)
        for m in maps * 2 + 1
    )
    assert noise_divergence(maps * 2 + 1).item() == pytest.approx(float(expected), rel=1e-5)


@exact
def test_the_gradient_of_the_loss():
    clean = torch.randn((2, 3, 4), requires_grad=True)
    wanted, fake, sigma = torch.randn((2, 3, 4)), torch.randn((2, 3, 4)), torch.tensor([0.3, 0.9]).reshape(2, 1, 1)
    loss = distillation_loss(clean, vsd_gradient(wanted, fake, sigma))
    (found,) = torch.autograd.grad(loss, clean)
    torch.testing.assert_close(found, sigma**2 * (wanted - fake) / clean.numel(), rtol=1e-4, atol=1e-7)
    assert distillation_loss(clean, vsd_gradient(wanted, wanted, sigma)) == 0


@exact
def test_a_gaussian_student_reaches_gaussian_data():
    """Scores of both are known, so the sign and the fixed point are: N(2, 0.5^2)."""
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.02)
    alphas = ddim().alphas_cumprod

    def epsilon(x, alpha, sigma, centre, std):
        return sigma * (x - alpha * centre) / (alpha**2 * std**2 + sigma**2)

    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.02 if step < 400 else 0.002
        clean = mean + log_std.exp() * torch.randn(256, generator=generator)
        t = torch.randint(20, 981, (256,), generator=generator)
        alpha, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        with torch.no_grad():
            noisy = alpha * clean + sigma * torch.randn(256, generator=generator)
            wanted = epsilon(noisy, alpha, sigma, 2.0, 0.5)
            fake = epsilon(noisy, alpha, sigma, mean, log_std.exp())
        optimizer.zero_grad()
        distillation_loss(clean, vsd_gradient(wanted, fake, sigma)).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(2.0, abs=0.01) and log_std.exp().item() == pytest.approx(0.5, abs=0.01)


# --- training --------------------------------------------------------------------------------------------------------


def flags(tiny_folder: Path, output: Path, *more: str) -> list[str]:
    prompts = tiny_folder.parent / "prompts.txt"
    prompts.write_text("a person with tan skin\na person with red hair\na person\n", encoding="utf-8")
    return [
        f"--pretrained_model_name_or_path={tiny_folder}", f"--prompts={prompts}", f"--output_dir={output}", "--seed=3",
        "--train_batch_size=2", "--num_decoder_steps=2", "--rank=2", "--learning_rate=1e-3", "--guidance_scale=2",
        "--checkpointing_steps=1", "--validation_prompts", "a person", "--num_validation_images=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, avatars_sd) -> Path:
    """The zoo's pipeline; trained for two optimizer steps, and for one that is resumed to two."""
    root = tmp_path_factory.mktemp("loopfree")
    base = root / "base"
    base.mkdir()
    copy.deepcopy(avatars_sd).save_pretrained(base)
    main([*flags(base, root / "straight"), "--max_train_steps=2"])
    main([*flags(base, root / "resumed"), "--max_train_steps=1"])
    main([*flags(base, root / "resumed"), "--max_train_steps=2", "--resume_from_checkpoint=latest"])
    return root


@exact
def test_the_loss_of_the_task(trained):
    """Slow derivation: runs without hooks, the two networks apart, and the same noise in the same order."""
    args = parse_args([*flags(trained / "base", trained / "unused"), "--max_train_steps=1"])
    task = LoopfreeTask(args)
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    task.prepare(task.dataset(args), accelerator)
    for parameter in task.lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # B begins as zeros
    for parameter in task.student.parameters():
        parameter.data.mul_(1.01)
    batch = {"condition": ["a person with tan skin", "a person"], "sample_id": torch.tensor([4, 5])}
    learned = []
    task.fake.learn = learned.append
    found = task.loss(batch, SampleNoise(3, batch["sample_id"]))
    gradients = torch.autograd.grad(found, list(task.student.parameters()))

    draws, student = SampleNoise(3, batch["sample_id"]), copy.deepcopy(task.student)
    dx.disable(student)
    teacher, pipe = task.teacher, task.pipeline
    given = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in batch["condition"]])
    empty = pipe.encode_prompt("", "cpu", 1, False)[0].expand(2, -1, -1)
    latents, predicted, stored = draws.normal(*teacher.shape), [], []
    for i, up in enumerate(student.up_blocks):
        up.register_forward_pre_hook(substitute(stored, i), with_kwargs=True)
    alphas = pipe.scheduler.alphas_cumprod
    times = task.scheduler.timesteps.tolist()
    for t, following in zip(times, [*times[1:], None], strict=True):
        predicted.append(student(latents, t, given, return_dict=False)[0])
        last = task.scheduler.final_alpha_cumprod if following is None else alphas[following]
        clean = (latents - (1 - alphas[t]).sqrt() * predicted[-1]) / alphas[t].sqrt()
        latents = last.sqrt() * clean + (1 - last).sqrt() * predicted[-1]
    t, epsilon = 20 + draws.integers(961), draws.normal(*teacher.shape)
    alpha, sigma = (level.reshape(2, 1, 1, 1) for level in (alphas[t].sqrt(), (1 - alphas[t]).sqrt()))

    def guided(x):
        with torch.no_grad():
            cond, uncond = (pipe.unet(x, t, each, return_dict=False)[0] for each in (given, empty))
        return uncond + 2.0 * (cond - uncond)

    noisy = (alpha * latents + sigma * epsilon).detach()
    fake = guided(noisy)
    with task.lora.disabled():
        wanted = guided(noisy)
    assert (fake - wanted).abs().max() > 1e-3, "the test would not notice that they are mixed up"
    target = (latents - sigma**2 * (wanted - fake)).detach()
    expected = 0.5 * (latents - target).square().mean()
    for each in torch.cat(predicted):
        expected = expected + 0.1 * 0.5 * (each.mean() ** 2 + each.var() - 1 - each.var().log())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted_gradients = torch.autograd.grad(expected, list(student.parameters()))
    for one, other in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, other.abs().max().item()))

    t, epsilon = draws.integers(1000), draws.normal(*teacher.shape)
    alpha, sigma = (level.reshape(2, 1, 1, 1) for level in (alphas[t].sqrt(), (1 - alphas[t]).sqrt()))
    chosen = torch.where((draws.uniform() < 0.1).reshape(2, 1, 1), empty, given)
    prediction = pipe.unet(alpha * latents.detach() + sigma * epsilon, t, chosen, return_dict=False)[0]
    (fake_loss,) = learned
    torch.testing.assert_close(fake_loss, (alpha * (prediction - epsilon)).square().mean(), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for name, parameter in pipe.unet.named_parameters() if "lora" not in name)


@exact
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_decoder_steps=0", "num_decoder_steps"), ("--lambda_kl=-1", "lambda_kl"), ("--rank=0", "rank"),
        ("--learning_rate_lora=0", "learning_rate_lora"), ("--mixed_precision=fp16", "mixed_precision"),
        ("--guidance_scale=0.5", "guidance_scale"), ("--proportion_empty_prompts=2", "proportion_empty_prompts"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_trainer_are_refused(flag, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--pretrained_model_name_or_path=x", "--prompts=y", f"--output_dir={tmp_path / 'o'}", flag])
    assert not list(tmp_path.iterdir())


@exact
def test_a_pipeline_without_a_unet_is_refused(tmp_path):
    from tests.tiny_models import class_conditional

    class_conditional(tmp_path / "dit")
    (tmp_path / "classes.txt").write_text("3\n")
    with pytest.raises(ValueError, match="DiTPipeline: it is no U-Net"):
        main(
            [
                f"--pretrained_model_name_or_path={tmp_path / 'dit'}",
                f"--prompts={tmp_path / 'classes.txt'}",
                "--max_train_steps=1",
            ]
        )


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", RUNS)
def test_equals_the_authors_student(name):
    """Of a sequential run their divergence is that of the last step's noise alone; the paper's is that of all."""
    steps, parallel = RUNS[name]
    unet, scheduler = conditional(1, 2).double(), ddim()
    dx.TiUELoopfreeConfig(parallel).apply(unet)
    scheduler.set_timesteps(steps)
    find_run(unet, "tiue_loopfree").begin(steps, scheduler)
    latents, found, predicted = noise(), [], []
    for t in scheduler.timesteps:
        with torch.no_grad():
            predicted.append(unet(latents, t, states(), return_dict=False)[0])
        latents = scheduler.step(predicted[-1], t, latents, return_dict=False)[0]
        found.append(tiny_sd.numbers(latents))
    expected = json.loads(GOLDEN.read_text())["runs"][name]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64),
        torch.tensor(expected["latents"], dtype=torch.float64),
        rtol=1e-8,
        atol=1e-8,
    )
    compared = torch.cat(predicted) if parallel else predicted[-1]
    assert noise_divergence(compared).item() == pytest.approx(expected["divergence"], rel=1e-5)


# --- loads, card -----------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_a_resumed_training_is_bit_equal(trained):
    def hashes(folder: Path) -> dict[str, str]:
        files = [file for file in folder.rglob("*.safetensors") if "checkpoint" not in str(file.relative_to(folder))]
        return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    straight = hashes(trained / "straight")
    assert straight and straight == hashes(trained / "resumed")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert straight[weights] != hashes(trained / "base")[weights], "it was trained"
    card = (trained / "straight" / "README.md").read_text()
    assert "train_tiue_loopfree" in card and str(trained) not in card
    assert list((trained / "straight" / "samples").glob("step-*.png"))


@pytest.mark.proof("loads")
def test_the_student_brings_the_method_along(trained):
    loaded = dx.Pipeline.from_pretrained(trained / "straight")
    loaded.set_progress_bar_config(disable=True)
    assert [entry.config for entry in dx.status(loaded)] == [dx.TiUELoopfreeConfig(steps=2)]
    counts = []
    loaded.unet.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: counts.append(1))
    generator = torch.Generator().manual_seed(0)
    loaded("a person", num_inference_steps=2, guidance_scale=1, generator=generator)
    assert len(counts) == 1 and type(loaded.scheduler) is DDIMScheduler


@pytest.mark.proof("card")
def test_the_snippets_of_the_card_run():
    card, names = run_card("tiue_loopfree")
    assert names["image"].size == (32, 32) and not dx.status(names["pipe"])
    assert "2505.21960" in card and "Apache-2.0" in card
