"""HiPA, by the five proofs. The authors published no code: the reference is a slow derivation of the loss here."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training._high_frequency import EncoderFeatures, edges, high_pass, spatial_loss
from diffusers_ext.training._lora import NAME, TrainableLora
from diffusers_ext.training._teacher import few_step_scheduler
from diffusers_ext.training.train_hipa import (
    HiPATask,
    high_frequency_promoting_loss,
    main,
    parse_args,
)
from tests.common import trainer
from tests.common.models import STOCKS
from tests.common.suite import CommonCase
from tests.test_training import launch

exact, loads = pytest.mark.proof("exact"), pytest.mark.proof("loads")
FILE = "pytorch_lora_weights.safetensors"
PROMPTS = [
    "a person with tan skin and short brown hair, a green hat, a happy smile, navy clothes",
    "a person with pale skin and long red hair, clear glasses, a sad mouth, mint clothes",
    "a person with brown skin and short black hair, a beard, a happy smile, coral clothes",
]


def lora_for(pipe, folder: Path) -> None:
    """A LoRA as the trainer writes it, with weights as if trained."""
    if not isinstance(pipe, StableDiffusionPipeline):
        raise ValueError(f"{type(pipe).__name__} is no Stable Diffusion pipeline.")
    trained_lora(pipe).save_pretrained(folder)
    pipe.unload_lora_weights()


def trained_lora(pipe, rank: int = 4) -> TrainableLora:
    torch.manual_seed(0)
    lora = TrainableLora(pipe, rank)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return lora


COMMON = CommonCase(make=lora_for)


def avatars(**options) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"), dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(folder: Path, **options) -> dict:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    base = {
        "pretrained_model_name_or_path": dx.zoo_path("avatars-sd"), "prompts": folder / "prompts.txt", "rank": 2,
        "train_batch_size": 2, "num_pairs": 4, "teacher_steps": 2, "guidance_scale": 3,
    }  # fmt: skip
    return {**base, **options}


def args_for(folder: Path, **options):
    return parse_args(trainer.flags(inputs(folder, output_dir=folder / "out", **options)))


def pictures(seed: int = 0, height: int = 12, width: int = 10, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- exact: the operators --------------------------------------------------------------------------------------------


@exact
def test_a_picture_of_one_colour_has_no_detail_and_no_edge():
    flat = torch.full((1, 3, 9, 8), 0.3)
    assert high_pass(flat, 0).abs().max() < 1e-6
    assert edges(flat).max() <= 1e-6 * (1 + 1e-6), "with borders of zeros it would have a frame"


@exact
@pytest.mark.parametrize(("height", "width"), [(12, 10), (9, 8), (7, 7)])
def test_a_wave_is_detail_above_the_cutoff_only(height, width):
    y, x = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
    for u, v in ((2, 0), (0, 3), (1, 2), (-3, 1), (3, 3)):
        wave = torch.cos(2 * math.pi * (u * y + v * x) + 0.4)
        for cutoff in (1.9, 2.0, 2.3, 3.0, 3.5, 4.5):
            expected = torch.zeros_like(wave) if math.hypot(u, v) <= cutoff else wave
            torch.testing.assert_close(high_pass(wave, cutoff), expected, rtol=0, atol=2e-6)


@exact
def test_edges_are_those_of_sobel():
    y, x = torch.arange(6.0)[:, None], torch.arange(7.0)[None]
    ramp = (0.1 * x + 0.2 * y)[None, None].expand(1, 3, 6, 7)
    found = edges(ramp)[0, 0]
    torch.testing.assert_close(found[1:-1, 1:-1], torch.full((4, 5), 8 * math.hypot(0.1, 0.2)))
    # Replicated borders have half the slope across them.
    torch.testing.assert_close(found[2, 0], torch.tensor(math.hypot(4 * 0.1, 8 * 0.2)))


@exact
def test_without_weight_the_loss_is_the_spatial_one_and_it_is_zero_on_the_target():
    a, b = pictures(0), pictures(1)
    features = EncoderFeatures(avatars().vae)
    for given in (None, features):
        assert high_frequency_promoting_loss(a, b, given, hf_weight=0).equal(spatial_loss(a, b, given))
        assert high_frequency_promoting_loss(a, a, given) == 0
    one, two = (high_frequency_promoting_loss(a, b, hf_weight=weight) for weight in (1, 2))
    torch.testing.assert_close(two - one, one - spatial_loss(a, b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(spatial_loss(a, b), (a - b).abs().mean())


@exact
def test_the_gradient_is_finite_where_there_is_no_edge():
    flat = torch.zeros(1, 3, 8, 8, requires_grad=True)
    high_frequency_promoting_loss(flat, pictures(height=8, width=8, count=1)).backward()
    assert flat.grad.isfinite().all() and flat.grad.abs().max() > 0


@exact
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: high_frequency_promoting_loss(a, a[:1]), "`target`"),
        (lambda a: high_frequency_promoting_loss(a[0], a[0]), "`pred`"),
        (lambda a: high_frequency_promoting_loss(a, a, hf_weight=-1), "`hf_weight` is -1"),
        (lambda a: high_frequency_promoting_loss(a, a, cutoff=-1), "`cutoff` is -1"),
        (lambda a: high_frequency_promoting_loss(a, a, cutoff=math.nan), "`cutoff` is nan"),
        (lambda a: EncoderFeatures(torch.nn.Linear(1, 1)), "`vae` is a Linear"),
    ],
)
def test_bad_arguments_of_the_loss_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(pictures())


# --- reference -------------------------------------------------------------------------------------------------------


def slow_detail(picture: torch.Tensor, cutoff: float) -> torch.Tensor:
    """One channel, term by term of the discrete Fourier transform."""
    height, width = picture.shape
    low = torch.zeros(height, width, dtype=torch.complex128)
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    for row in range(height):
        for column in range(width):
            u, v = row - height * (row > (height - 1) // 2), column - width * (column > (width - 1) // 2)
            if u * u + v * v <= cutoff * cutoff:
                wave = torch.exp(2j * math.pi * (row * y / height + column * x / width))
                low += wave * (picture * wave.conj()).sum() / (height * width)
    return picture - low.real


def slow_edges(picture: torch.Tensor) -> torch.Tensor:
    """Of `(channels, height, width)`."""
    grey = picture.mean(0)
    height, width = grey.shape
    kernel = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]
    found = torch.zeros(height, width, dtype=grey.dtype)
    for y in range(height):
        for x in range(width):
            gx = gy = 0.0
            for i in range(3):
                for j in range(3):
                    value = grey[min(max(y + i - 1, 0), height - 1), min(max(x + j - 1, 0), width - 1)].item()
                    gx, gy = gx + kernel[i][j] * value, gy + kernel[j][i] * value
            found[y, x] = math.sqrt(gx * gx + gy * gy + 1e-12)
    return found


@pytest.mark.proof("reference")
def test_the_loss_is_that_of_a_slow_derivation():
    a, b, vae = pictures(2), pictures(3), avatars().vae
    maps_a, maps_b = ([vae.encoder.conv_in(p)] for p in (a, b))
    for block in vae.encoder.down_blocks:
        maps_a.append(block(maps_a[-1]))
        maps_b.append(block(maps_b[-1]))
    perceptual = 0.0
    for f, g in zip(maps_a, maps_b, strict=True):
        f, g = (m.permute(0, 2, 3, 1).reshape(-1, m.shape[1]).double() for m in (f, g))
        distances = [(p / p.norm() - q / q.norm()).square().sum() for p, q in zip(f, g, strict=True)]
        perceptual += torch.stack(distances).mean() / len(maps_a)
    detail = sum((slow_detail(p, 2.5) - slow_detail(q, 2.5)).square().mean() for p, q in zip(a.double().flatten(0, 1), b.double().flatten(0, 1), strict=True)) / 6  # fmt: skip
    edge = sum((slow_edges(p) - slow_edges(q)).square().mean() for p, q in zip(a.double(), b.double(), strict=True)) / 2
    expected = (a - b).abs().mean() + perceptual + 0.7 * (detail + edge)
    found = high_frequency_promoting_loss(a, b, EncoderFeatures(vae), hf_weight=0.7, cutoff=2.5)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


# --- exact: the one step ---------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_one_step_is_the_pipelines_and_gives_clean_latents(prediction_type, tmp_path):
    task = HiPATask(args_for(tmp_path))
    task.scheduler = few_step_scheduler(
        DDIMScheduler.from_config(task.pipeline.scheduler.config, prediction_type=prediction_type)
    )
    task.scheduler.set_timesteps(1)
    assert task.scheduler.timesteps.tolist() == [999]
    z = SampleNoise(0, torch.arange(2)).normal(*task.teacher.shape)
    with torch.no_grad():
        found = task.predict(z, PROMPTS[:2])
        output = task.teacher.call(task.pipeline.unet, z, torch.tensor(999), task.teacher.encode(PROMPTS[:2]).given)
    square = task.scheduler.alphas_cumprod[999].double()
    alpha, sigma = square.sqrt(), (1 - square).sqrt()
    clean = (
        (z - sigma * output.double()) / alpha if prediction_type == "epsilon" else alpha * z - sigma * output.double()
    )
    torch.testing.assert_close(found.double(), clean, rtol=1e-5, atol=1e-4)
    pipe = avatars()
    pipe.scheduler = task.scheduler
    call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"}
    assert pipe(PROMPTS[:2], latents=z, **call).images.equal(found)


@exact
def test_an_untrained_lora_is_bit_equal_to_the_base(tmp_path):
    pipe = avatars()
    pipe.scheduler = few_step_scheduler(pipe.scheduler)
    call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}

    def draw():
        return torch.as_tensor(pipe(PROMPTS[:2], generator=torch.Generator().manual_seed(0), **call).images)

    plain = draw()
    lora = TrainableLora(pipe, 16)
    assert draw().equal(plain)
    lora.save_pretrained(tmp_path)
    lora.detach()
    assert draw().equal(plain) and all("lora" not in name for name in pipe.unet.state_dict())
    pipe.load_lora_weights(tmp_path)
    assert draw().equal(plain)


@exact
def test_the_number_of_parameters_on_stable_diffusion_2_1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
        )
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(None, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    lora = TrainableLora(pipe, 16)
    assert sum(parameter.numel() for parameter in lora.parameters()) == 3_319_808
    assert {parameter.dtype for parameter in lora.parameters()} == {torch.float32}


@exact
def test_the_loss_trains_the_lora_alone(tmp_path):
    task = HiPATask(args_for(tmp_path))
    z = SampleNoise(1, torch.arange(2)).normal(*task.teacher.shape)
    with torch.no_grad():
        clean = task.teacher.sample(z, task.teacher.encode(PROMPTS[:2]), 4)
    task.loss({"noise": z, "clean": clean, "condition": PROMPTS[:2]}, SampleNoise(0, torch.arange(2))).backward()
    lora = dict(task.trained["lora"].named_parameters())
    assert all((p.grad is not None) for p in lora.values())
    assert all(p.grad.abs().max() > 0 for name, p in lora.items() if "lora_B" in name and "attn2.to_q" not in name)
    trained = {id(p) for p in lora.values()}
    for part in (task.pipeline.unet, task.pipeline.vae, task.pipeline.text_encoder):
        assert all(p.grad is None and not p.requires_grad for p in part.parameters() if id(p) not in trained)


# --- exact: a LoRA for other papers ----------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", ["avatars-sd", "avatars-flow"])
def test_the_module_and_the_file_have_the_same_names_and_disabled_is_the_base(name, tmp_path):
    stock = STOCKS[name]
    pipe = stock.make()
    plain = stock.draw(pipe)
    lora = trained_lora(pipe)
    changed = stock.draw(pipe)
    assert not changed.equal(plain)
    with lora.disabled():
        assert stock.draw(pipe).equal(plain)
    assert stock.draw(pipe).equal(changed) and all(p.requires_grad for p in lora.parameters())
    lora.save_pretrained(tmp_path)
    file, state = load_file(tmp_path / FILE), lora.state_dict()
    assert file.keys() == state.keys() and all(file[key].equal(state[key]) for key in file)
    other = stock.make()
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(stock.draw(other), changed, rtol=0, atol=1e-5)


@exact
def test_rank_and_alpha_go_with_the_file(tmp_path):
    pipe, stock = avatars(), STOCKS["avatars-sd"]
    lora = TrainableLora(pipe, rank=4, alpha=2.0, targets=("to_q", "to_v"))
    assert all("to_q" in key or "to_v" in key for key in lora.state_dict())
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.fill_(0.1)
    expected = stock.draw(pipe)
    lora.save_pretrained(tmp_path)
    other = avatars()
    other.load_lora_weights(tmp_path)
    assert {config.lora_alpha for config in other.unet.peft_config.values()} == {2}
    torch.testing.assert_close(stock.draw(other), expected, rtol=0, atol=1e-5)


@exact
def test_what_takes_no_lora_is_refused():
    pipe = avatars()
    for options, message in (
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 1, "alpha": 0}, "`lora_alpha` is 0"),
        ({"rank": 1, "targets": ["to_x"]}, "`targets`"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainableLora(pipe, **options)
    assert not hasattr(pipe.unet, "peft_config")
    for name in ("fashion-dit", "fashion-ddpm"):
        with pytest.raises(ValueError, match="loads no LoRA files"):
            TrainableLora(STOCKS[name].make(), 1)
    TrainableLora(pipe, 1)
    with pytest.raises(ValueError, match=f"LoRA '{NAME}'"):
        TrainableLora(pipe, 1)


# --- the trainer -----------------------------------------------------------------------------------------------------


@loads
def test_the_rules_of_trainers_hold(tmp_path):
    trainer.hold_to_the_rules("hipa", inputs, tmp_path / "runs")


@exact
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0"),
        ({"hf_weight": -1}, "`hf_weight` is -1"),
        ({"cutoff": -1}, "`cutoff` is -1"),
        ({"guidance_scale": 0.5}, "`--guidance_scale` is 0.5"),
    ],
)
def test_bad_arguments_of_the_trainer_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(trainer.flags(inputs(tmp_path, output_dir=tmp_path / "out", **options)))
    assert not (tmp_path / "out").exists()


@exact
def test_a_pipeline_without_lora_is_refused(tmp_path):
    values = inputs(tmp_path, output_dir=tmp_path / "out", pretrained_model_name_or_path=dx.zoo_path("fashion-dit"))
    (tmp_path / "prompts.txt").write_text("3")  # a class
    with pytest.raises(ValueError, match="DiTPipeline, which loads no LoRA files"):
        main(trainer.flags(values))
    assert not (tmp_path / "out").exists()


@loads
@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    """Pairs too are made by both: each makes one of the two shards."""
    for name, processes, batch in (("one", 1, 4), ("two", 2, 2)):
        values = inputs(tmp_path, output_dir=tmp_path / name, train_batch_size=batch, max_train_steps=2, num_pairs=258)
        flags = trainer.flags({**values, "learning_rate": 1e-3, "adam_epsilon": 1e-3, "teacher_steps": 1, "seed": 3})
        launch("diffusers_ext.training.train_hipa", *flags, processes=processes)
    pairs = [sorted((tmp_path / name).glob("*pairs*/*.safetensors")) for name in ("one", "two")]
    assert len(pairs[0]) == 2
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(load_file(one), load_file(two), rtol=0, atol=1e-5)
    one, two = (load_file(tmp_path / name / FILE) for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)


@loads
def test_the_folder_is_a_repository_for_stock_diffusers(tmp_path):
    """The LoRA, the scheduler and the card; the code of the card draws in one step what the trainer's pipeline drew."""
    out = tmp_path / "out"
    values = inputs(tmp_path, output_dir=out, max_train_steps=2, learning_rate=1e-2, checkpointing_steps=1)
    main(trainer.flags({**values, "validation_prompts": PROMPTS[0]}))
    names = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    shared = {name for name in names if not name.startswith("checkpoint-")}
    assert shared >= {FILE, "README.md", "scheduler/scheduler_config.json", "samples/step-000002.png"}
    assert load_file(out / "checkpoint-1" / "lora" / FILE).keys() == load_file(out / FILE).keys()
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and "lora" in card and "train_hipa" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = code.replace("path/to/the/base/pipeline", str(dx.zoo_path("avatars-sd"))).replace(
        "path/to/this/folder", str(out)
    )
    found: dict = {}
    exec(compile(code, "card", "exec"), found)
    assert found["image"].size == (32, 32)
    pipe = found["pipe"]
    assert pipe.unet.peft_config["default_0"].r == 2
    draw = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    pictures = pipe(PROMPTS[:1], generator=torch.Generator().manual_seed(0), **draw).images
    base = avatars()
    base.scheduler = pipe.scheduler
    plain = base(PROMPTS[:1], generator=torch.Generator().manual_seed(0), **draw).images
    assert abs(pictures - plain).max() > 1e-3, "it is trained"
    assert pipe.scheduler.timesteps.tolist() == [999]


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(tmp_path, monkeypatch):
    from diffusers_ext.cards import method_card, snippet

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet("hipa"), "card", "exec"), names)
    assert names["image"].size == (32, 32)
    assert "2311.18158" in method_card("hipa")
    shutil.rmtree(tmp_path / "my-lora")
