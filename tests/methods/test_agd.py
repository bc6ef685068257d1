"""Adapter guidance distillation, by four of the five proofs; the claim is the benchmark's."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

import diffusers_ext as dx
from diffusers_ext.models.agd import AdditiveAdapter, CrossAttentionAdapter, ScalarEncoder
from diffusers_ext.training._data import collate
from diffusers_ext.training._guided import GuidedRuns, denoiser_inputs, denoiser_of, guide, record_guided_runs
from diffusers_ext.training.train_agd import agd_loss, main
from tests import tiny_sd
from tests.common.models import MODELS, STOCKS
from tests.common.suite import CommonCase
from tests.common.traces import require_unchanged, trace
from tests.tiny_models import class_conditional, tiny_vae
from tests.unets import fill

GOLDEN = Path(__file__).parents[1] / "golden" / "agd.json"
DENOISERS = ("UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel")
exact = pytest.mark.proof("exact")


def adapter_for(denoiser: torch.nn.Module, zero: bool = False, **options: Any) -> dx.AGDAdapter:
    """Small; it changes much unless `zero`."""
    torch.manual_seed(0)
    adapter = dx.AGDAdapter(**dx.AGDAdapter.config_for(denoiser, **{"hidden_dim": 8, "mlp_ratio": 1.0, **options}))
    if not zero:
        for part in adapter.adapters:
            torch.nn.init.normal_(part.to_out.weight, std=0.3)
    return adapter


def make(pipe: Any) -> dx.AGDAdapter:
    return adapter_for(denoiser_of(pipe))


COMMON = CommonCase(make=make)


def stable_diffusion(folder: Path) -> None:
    """A tiny U-Net and decoder with the text encoder of the zoo."""
    base = StableDiffusionPipeline.from_pretrained(dx.zoo_path("avatars-sd"), dtype=torch.float32)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=64,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    torch.manual_seed(0)
    StableDiffusionPipeline(
        **{**base.components, "unet": fill(unet), "vae": tiny_vae(3)}, requires_safety_checker=False
    ).save_pretrained(folder)


# --- adapters --------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("name", DENOISERS)
def test_new_adapters_change_nothing_trained_ones_do_and_detached_they_are_gone(name):
    stock = MODELS[name]
    model = stock.make()
    plain, before = stock.run(model, 2), trace(model)
    adapter = adapter_for(model, zero=True).attach(model, 4.0)
    assert all(torch.equal(a, b) for a, b in zip(stock.run(model, 2), plain, strict=True)), "the conditional prediction"
    for part in adapter.adapters:
        torch.nn.init.normal_(part.to_out.weight, std=0.3)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(stock.run(model, 2), plain, strict=True))
    adapter.detach()
    assert all(torch.equal(a, b) for a, b in zip(stock.run(model, 2), plain, strict=True))
    require_unchanged(model, before, "detached")


@exact
@pytest.mark.parametrize("name", DENOISERS)
def test_each_row_has_its_own_scale(name):
    stock = MODELS[name]
    model = stock.make()
    adapter = adapter_for(model).attach(model)
    adapter.set_guidance_scale(torch.tensor([2.0, 9.0]))
    both = stock.predict(model)
    for row, scale in enumerate((2.0, 9.0)):
        adapter.set_guidance_scale(scale)
        torch.testing.assert_close(stock.predict(model)[row], both[row], rtol=0, atol=1e-5)
    adapter.set_guidance_scale(4.0)
    assert (stock.predict(model) - both).abs().max() > 1e-4, "the scale matters"


@exact
@pytest.mark.parametrize("use_timestep", [True, False])
@pytest.mark.parametrize("use_prompt", [True, False])
def test_adapters_see_what_they_are_told_to_see(use_timestep, use_prompt):
    """On what depends what an adapter adds: found by changing one thing at a time."""
    stock = MODELS["UNet2DConditionModel"]
    model = stock.make()
    adapter = adapter_for(model, use_timestep=use_timestep, use_prompt=use_prompt).attach(model)
    h, prompt = torch.randn(2, 5, 8), torch.randn(2, 3, 8)

    def added(time: float = 1.0, prompt: torch.Tensor = prompt) -> torch.Tensor:
        adapter.see("time_embedding", time * torch.ones(2, 32))
        return adapter.added(0, h, prompt)

    assert torch.equal(added(), added(time=2.0)) is not use_timestep
    assert torch.equal(added(), added(prompt=2 * prompt)) is not use_prompt
    assert torch.equal(added(), added(prompt=(prompt, [torch.randn(2, 4, 8)]))), "an IP-Adapter's picture is left out"


@exact
def test_scales_that_differ_by_little_look_alike():
    """The authors' additive adapter embeds 1000 w, so that neighbours are unrelated; see the notes of the catalogue."""
    torch.manual_seed(0)
    encoder = ScalarEncoder(256, 1.0)
    w = torch.linspace(1, 8, 200)

    def similarity(factor: float) -> float:
        a, b = (
            torch.cos(2 * torch.pi * (encoder.frequencies * factor * x[:, None] + encoder.phases))
            for x in (w, w + 0.005)
        )
        return torch.nn.functional.cosine_similarity(a, b).mean().item()

    assert similarity(1.0) > 0.99 and similarity(1000.0) < 0.2
    near = (encoder(w + 0.005) - encoder(w)).norm(dim=1) / (encoder(w + 1) - encoder(w)).norm(dim=1)
    assert near.max() < 0.1


@exact
def test_wrong_uses_are_refused(pipe):
    adapter = make(pipe)
    for wrong in (0.5, 13.0, float("nan"), "7", True, torch.tensor([2.0, 50.0]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"(?s)`guidance_scale` is .*trained for 1 to 12"):
            adapter.attach(pipe, wrong)
    with pytest.raises(ValueError, match="not attached"):
        adapter.detach()
    adapter.attach(pipe)
    with pytest.raises(ValueError, match="call `detach` first"):
        adapter.attach(copy.deepcopy(pipe))
    with pytest.raises(ValueError, match="another adapter on"):
        make(pipe).attach(pipe)
    adapter.detach()
    with pytest.raises(ValueError, match="UNet2DConditionModel without a layer 'transformer_blocks"):
        adapter_for(MODELS["DiTTransformer2DModel"].make()).attach(pipe)
    with pytest.raises(ValueError, match="no `unet` and no `transformer`"):
        adapter.attach(pipe.vae.config)
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        dx.AGDAdapter.config_for(MODELS["FluxTransformer2DModel"].make())
    good = dx.AGDAdapter.config_for(pipe.unet)
    for wrong in (
        {"kind": "gate"},
        {"hidden_dim": 7},
        {"mlp_ratio": 0.0},
        {"layers": {}},
        {"min_guidance_scale": 20.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dx.AGDAdapter(**{**good, **wrong})


@exact
def test_one_call_a_step_and_half_the_rows(pipe):
    rows: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    prompt = ["a person with tan skin"]
    pipe(prompt, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    adapter = make(pipe).attach(pipe, 3.0)
    pipe(prompt, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    assert rows == [2, 2, 1, 1]
    adapter.detach()
    handle.remove()


@exact
@pytest.mark.parametrize("config", [dx.TiUELoopfreeConfig(), dx.FasterDiffusionConfig(parallel=True)])
def test_several_steps_in_one_call_are_refused_in_both_orders(pipe, config):
    """Adapters take the time of a call, and decoders of several steps at once have several."""
    adapter = make(pipe)
    adapter.attach(pipe)
    with pytest.raises(ValueError, match="`parallel` is True"):
        dx.enable(pipe, config)
    assert dx.status(pipe) == []
    adapter.detach()
    with dx.enabled(pipe, config), pytest.raises(ValueError, match="parallel=False"):
        adapter.attach(pipe)
    dx.enable(pipe, dataclasses.replace(config, parallel=False))
    adapter.attach(pipe)
    dx.disable(pipe)
    adapter.detach()


@exact
def test_it_goes_with_deepcache_and_with_a_lora():
    pipe = tiny_sd.make(DDIMScheduler(clip_sample=False, steps_offset=1))

    def draw(pipe: Any) -> torch.Tensor:
        return pipe(**tiny_sd.inputs(), num_inference_steps=4, guidance_scale=1.0, output_type="latent").images

    plain = draw(pipe)
    with dx.enabled(pipe, dx.DeepCacheConfig(interval=2)):
        plain_cached = draw(pipe)
        zero = adapter_for(pipe.unet, zero=True).double().attach(pipe)
        assert torch.equal(draw(pipe), plain_cached)
        zero.detach()
    adapter = adapter_for(pipe.unet).double().attach(pipe)
    alone = draw(pipe)
    with dx.enabled(pipe, dx.DeepCacheConfig(interval=1)):
        assert torch.equal(draw(pipe), alone)
    with dx.enabled(pipe, dx.DeepCacheConfig(interval=2)):
        cached = draw(pipe)
    assert not any(torch.equal(cached, other) for other in (alone, plain, plain_cached)), "both have their effect"
    assert torch.equal(draw(pipe), alone)
    adapter.detach()

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with_lora = draw(pipe)
    zero = adapter_for(pipe.unet, zero=True).double().attach(pipe)
    assert torch.equal(draw(pipe), with_lora) and not torch.equal(with_lora, plain)
    zero.detach()
    adapter.attach(pipe)
    assert not torch.equal(draw(pipe), with_lora)
    pipe.unet.delete_adapters(["default"])
    torch.testing.assert_close(draw(pipe), alone)


# --- recorded runs ---------------------------------------------------------------------------------------------------


def _tiny_sd() -> tuple[Any, list[Any], dict[str, Any]]:
    given = {name: value for name, value in tiny_sd.inputs().items() if name != "latents"}
    other = {name: value.flip(1) for name, value in given.items()}
    return tiny_sd.make(DDIMScheduler(clip_sample=False, steps_offset=1)), [given, other], {}


def _tiny_dit() -> tuple[Any, list[Any], dict[str, Any]]:
    return STOCKS["tiny-dit"].make(), [3, 5], {}


def _tiny_sd3() -> tuple[Any, list[Any], dict[str, Any]]:
    stock = STOCKS["tiny-sd3"]
    call = stock.call(3)
    rows = {name: value for name, value in call.items() if torch.is_tensor(value)}
    other = {name: value.flip(-1) for name, value in rows.items()}
    pipe = stock.make()
    pipe.set_progress_bar_config(disable=True)
    return pipe, [rows, other], {"height": 64, "width": 64}


PIPES = {"unet": _tiny_sd, "dit": _tiny_dit, "sd3": _tiny_sd3}


@exact
@pytest.mark.parametrize("name", PIPES)
def test_recorded_runs_are_those_of_the_pipeline(name, tmp_path):
    """With one scale, the pipeline's own guided run passes through the same states; what it predicts there is recorded."""
    pipe, conditions, call = PIPES[name]()
    options: dict[str, Any] = dict(
        num_runs=2, num_inference_steps=3, batch_size=2, dtype=torch.float64, call=call, seed=7
    )
    before = trace(pipe)
    record_guided_runs(pipe, tmp_path / "both", conditions, guidance_scales=(3, 3), keep="both", **options)
    record_guided_runs(pipe, tmp_path / "guided", conditions, guidance_scales=(3, 3), **options)
    require_unchanged(pipe, before, "after recording")
    both, guided = GuidedRuns(tmp_path / "both"), GuidedRuns(tmp_path / "guided")
    assert len(both) == 6 and both.num_runs == 2

    seen: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def see(module, args, kwargs, output):
        x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        seen.append((x.clone(), output[0].clone(), float(torch.as_tensor(t).flatten()[0])))

    from diffusers_ext.training._data import SampleNoise
    from diffusers_ext.training._guided import _together

    noise = SampleNoise(7, torch.arange(2))
    noise.uniform(), noise.uniform(3)
    denoiser = denoiser_of(pipe)
    handle = denoiser.register_forward_hook(see, with_kwargs=True)
    made = _together(conditions, "class_labels")
    more = {} if name == "dit" else {"output_type": "latent"}
    pipe(**made, **call, **more, guidance_scale=3.0, num_inference_steps=3, generator=noise.generators)
    handle.remove()
    channels = seen[0][0].shape[1]
    for step, (x, prediction, t) in enumerate(seen):
        cond, uncond = prediction.chunk(2) if name == "dit" else prediction.chunk(2)[::-1]
        for run in range(2):
            row, other = both[run * 3 + step], guided[run * 3 + step]
            torch.testing.assert_close(row["x"], x.double()[run], rtol=0, atol=1e-5)
            torch.testing.assert_close(row["cond"], cond.double()[run], rtol=0, atol=1e-5)
            torch.testing.assert_close(row["uncond"], uncond.double()[run], rtol=0, atol=1e-5)
            c, u = row["cond"][None], row["uncond"][None]
            wanted = guide(c, u, torch.tensor([3.0]), channels)[0]
            torch.testing.assert_close(other["guided"], wanted, rtol=0, atol=1e-5)
            assert row["t"].item() == pytest.approx(t) and row["scale"].item() == 3.0
    batch = collate([both[i] for i in range(6)])
    with torch.no_grad():
        dtype = next(denoiser.parameters()).dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in denoiser_inputs(batch).items()}
        found = denoiser(batch["x"].to(dtype), timestep=batch["t"], **inputs, return_dict=False)[0]
    torch.testing.assert_close(found.double(), batch["cond"], rtol=0, atol=1e-5)


@exact
def test_at_scale_one_the_target_is_the_conditional_prediction_and_the_loss_of_no_adapter_is_known(tmp_path):
    pipe, conditions, _ = _tiny_sd()
    options: dict[str, Any] = dict(num_runs=4, num_inference_steps=3, batch_size=4, dtype=torch.float64)
    record_guided_runs(pipe, tmp_path / "one", conditions, guidance_scales=(1, 1), **options)
    record_guided_runs(pipe, tmp_path / "both", conditions, guidance_scales=(1, 6), keep="both", **options)
    adapter = adapter_for(pipe.unet, zero=True).double().attach(pipe)
    batch = collate([GuidedRuns(tmp_path / "one")[i] for i in range(12)])
    assert agd_loss(pipe.unet, adapter, batch).item() < 1e-12
    batch = collate([GuidedRuns(tmp_path / "both")[i] for i in range(12)])
    assert batch["scale"].reshape(4, 3).std(dim=1).max() == 0 and batch["scale"].unique().numel() == 4
    batch["guided"] = guide(batch["cond"], batch["uncond"], batch["scale"], 4)
    w = batch["scale"].view(-1, 1, 1, 1)
    wanted = ((w - 1) * (batch["cond"] - batch["uncond"])).square().mean().item()
    assert agd_loss(pipe.unet, adapter, batch).item() == pytest.approx(wanted, rel=1e-5)


@exact
def test_learned_variances_are_of_the_condition():
    cond, uncond = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    found = guide(cond, uncond, torch.tensor([1.0, 5.0]), 4)
    torch.testing.assert_close(found[0], cond[0])
    assert torch.equal(found[1, 4:], cond[1, 4:])
    torch.testing.assert_close(found[1, :4], uncond[1, :4] + 5 * (cond[1, :4] - uncond[1, :4]))


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


@exact
def test_recording_goes_on_where_it_stopped_and_refuses_other_runs(tmp_path):
    pipe, conditions, _ = _tiny_sd()
    options: dict[str, Any] = dict(num_inference_steps=4, guidance_scales=(1, 6), kept_steps=2, batch_size=2)
    record_guided_runs(pipe, tmp_path / "a", conditions, num_runs=6, **options)
    record_guided_runs(pipe, tmp_path / "b", conditions, num_runs=2, **options)
    first = _digests(tmp_path / "b")
    record_guided_runs(pipe, tmp_path / "b", conditions, num_runs=6, process=(1, 2), **options)
    record_guided_runs(pipe, tmp_path / "b", conditions, num_runs=6, process=(0, 2), **options)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b") and first.items() <= _digests(tmp_path / "b").items()
    times = torch.stack([row["t"] for row in (GuidedRuns(tmp_path / "a")[i] for i in range(12))]).reshape(6, 2)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    grid = scheduler.timesteps.tolist()
    assert {float(t) for t in times[:, 0]} <= set(grid[:2]) and {float(t) for t in times[:, 1]} <= set(grid[2:])
    assert len(times.unique()) > 2, "each run has steps of its own"

    with pytest.raises(ValueError, match="another guidance_scales"):
        record_guided_runs(pipe, tmp_path / "a", conditions, num_runs=6, **{**options, "guidance_scales": (1, 7)})
    with pytest.raises(ValueError, match="another conditions"):
        record_guided_runs(pipe, tmp_path / "a", conditions[::-1], num_runs=6, **options)
    other = copy.deepcopy(pipe)
    other.unet.conv_in.weight.data *= 1.5
    with pytest.raises(ValueError, match="other weights"):
        record_guided_runs(other, tmp_path / "a", conditions, num_runs=6, **options)
    for wrong in ({"num_runs": 3}, {"kept_steps": 5}, {"guidance_scales": (3, 1)}, {"keep": "all"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            record_guided_runs(pipe, tmp_path / "c", conditions, **{"num_runs": 2, **options, **wrong})
    noisy = tiny_sd.make(DDPMScheduler())
    with pytest.raises(ValueError, match="DDPMScheduler, which draws noise"):
        record_guided_runs(noisy, tmp_path / "d", conditions, num_runs=2, **options)
    with pytest.raises(ValueError, match="no recorded runs"):
        GuidedRuns(tmp_path / "d")


# --- the trainer -----------------------------------------------------------------------------------------------------


def training(root: Path, output: str, *flags: str, model: str = "dit") -> dx.AGDAdapter:
    main([
        f"--pretrained_model_name_or_path={root / model}", "--num_inference_steps=4", "--num_runs=4", "--run_batch_size=2",
        "--kept_steps=3", "--train_batch_size=4", "--hidden_dim=8", "--mlp_ratio=1", "--learning_rate=0.01", "--seed=5",
        f"--runs={root / 'runs'}-{model}", "--max_guidance_scale=6", f"--output_dir={root / output}", "--checkpointing_steps=1",
        "--num_validation_images=2", "--validation_inference_steps=2", "--lr_scheduler=constant", *flags,
    ])  # fmt: skip
    return dx.AGDAdapter.from_pretrained(root / output)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """On a tiny DiT: 3 steps, and 1 step resumed to 3; on a tiny Stable Diffusion 20 steps."""
    root = tmp_path_factory.mktemp("agd")
    torch.manual_seed(0)
    class_conditional(root / "dit")
    pipe = DiTPipeline.from_pretrained(root / "dit")
    fill(pipe.transformer)  # fresh weights end in zeros: nothing would matter
    pipe.register_to_config(id2label={0: "boot, ankle boot", 3: "bag"})
    pipe.save_pretrained(root / "dit")
    stable_diffusion(root / "sd")
    (root / "prompts.txt").write_text("a person with tan skin\n\na person with pale skin, a beard\n")
    training(root, "straight", "--max_train_steps=3")
    training(root, "resumed", "--max_train_steps=1")
    training(root, "resumed", "--max_train_steps=3", "--resume_from_checkpoint=latest")
    training(root, "sd-adapter", f"--prompts={root / 'prompts.txt'}", "--max_train_steps=20", model="sd")
    return root


@exact
def test_training_brings_one_call_nearer_to_guidance(trained):
    pipe = StableDiffusionPipeline.from_pretrained(trained / "sd")
    runs = GuidedRuns(trained / "runs-sd")
    batch = collate([runs[i] for i in range(len(runs))])
    adapter = dx.AGDAdapter.from_pretrained(trained / "sd-adapter").attach(pipe)
    with torch.no_grad():
        after = agd_loss(pipe.unet, adapter, batch).item()
        for part in adapter.adapters:
            part.to_out.weight.zero_(), part.to_out.bias.zero_()
        before = agd_loss(pipe.unet, adapter, batch).item()
    assert after < 0.8 * before
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in pipe.unet.parameters())


@exact
def test_the_first_weights_belong_to_the_seed_and_the_base_stays(trained):
    pipe = DiTPipeline.from_pretrained(trained / "dit")
    made = dx.AGDAdapter.from_pretrained(trained / "straight")
    set_seed(5)
    first = dx.AGDAdapter(**{k: v for k, v in made.config.items() if not k.startswith("_")})
    assert torch.equal(first.adapters[0].scale_encoder.frequencies, made.adapters[0].scale_encoder.frequencies)
    assert made.config.kind == "additive" and set(made.config.layers) == {
        f"transformer_blocks.{i}.attn1" for i in range(len(pipe.transformer.transformer_blocks))
    }


@exact
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_runs=3", "num_runs"), ("--min_guidance_scale=20", "min_guidance_scale"), ("--guidance_scale=13", "guidance_scale"),
        ("--validation_inference_steps=0", "validation_inference_steps"), ("--train_batch_size=0", "train_batch_size"),
        ("--push_to_hub", "hub_model_id"), ("--mixed_precision=fp16", "mixed_precision"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_trainer_are_refused(flag, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--pretrained_model_name_or_path=x", f"--output_dir={tmp_path / 'out'}", flag])
    assert not list(tmp_path.iterdir())


# --- reference -------------------------------------------------------------------------------------------------------

WIDTH, HIDDEN, TIME, PROMPT = 6, 8, 5, 7
GOLDEN_SCALES = (1.0, 4.0, 7.5)


def golden_adapter(kind: str) -> torch.nn.Module:
    """With weights by formula, buffers included."""
    make = CrossAttentionAdapter if kind == "cross_attention" else AdditiveAdapter
    adapter = fill(make(WIDTH, HIDDEN, 4.0, [TIME], PROMPT))
    adapter.scale_encoder.frequencies.copy_(torch.sin(torch.arange(HIDDEN) * 1.7))
    adapter.scale_encoder.phases.copy_(torch.arange(HIDDEN) / HIDDEN)
    return adapter


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, w, embedding of the time and prompt of three rows."""
    wave = torch.arange(3 * 4 * 7 * 5, dtype=torch.float32)
    h = torch.sin(0.37 * wave[: 3 * 4 * WIDTH]).reshape(3, 4, WIDTH)
    time = torch.cos(0.61 * wave[: 3 * TIME]).reshape(3, TIME)
    prompt = torch.sin(0.23 * wave[: 3 * 5 * PROMPT]).reshape(3, 5, PROMPT)
    return h, torch.tensor(GOLDEN_SCALES), time, prompt


@pytest.mark.proof("reference")
@pytest.mark.parametrize("kind", ["cross_attention", "additive"])
def test_adapters_add_what_the_authors_add(kind):
    h, w, time, prompt = golden_inputs()
    with torch.no_grad():
        found = golden_adapter(kind)(h, w, [time], prompt)
    wanted = torch.tensor(json.loads(GOLDEN.read_text())["added"][kind])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.proof("reference")
def test_faults_of_the_authors_code_are_not_here():
    """There `zero_init=True` draws the last weights of the attention adapter at random, and `False` makes them zero; and a
    prompt of more than 249 tokens has no positions, as that of Stable Diffusion 3 would be."""
    faults = json.loads(GOLDEN.read_text())["faults"]
    assert faults.keys() == {"largest last weight with zero_init", "positions"}
    assert faults["positions"] == 250
    assert faults["largest last weight with zero_init"] > 0.1
    adapter = CrossAttentionAdapter(WIDTH, HIDDEN, 4.0, [TIME], PROMPT)
    assert not adapter.to_out.weight.any()
    h, w, time, _ = golden_inputs()
    assert adapter(h, w, [time], torch.randn(3, 333, PROMPT)).shape == h.shape


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_a_resumed_training_is_bit_equal_and_the_result_loads(trained):
    straight, resumed = (dx.AGDAdapter.from_pretrained(trained / name) for name in ("straight", "resumed"))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    loaded = dx.AGDAdapter.from_pretrained(trained / "sd-adapter")
    assert len(loaded.adapters) == len(loaded.config.layers) > 2, (
        "of different widths, in whatever order the config has them"
    )
    assert any("frequencies" in name for name in straight.state_dict()), "random features are part of the file"
    assert straight.adapters[0].to_out.weight.any()
    assert list((trained / "straight" / "samples").glob("step-*.png"))
    card = (trained / "straight" / "README.md").read_text()
    assert "AGDAdapter" in card and str(trained) not in card
    pipe = DiTPipeline.from_pretrained(trained / "dit")
    adapter = straight.attach(pipe, guidance_scale=4.0)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe([3], num_inference_steps=2, guidance_scale=1.0).images) == 1
    adapter.detach()


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(tmp_path, monkeypatch):
    from diffusers_ext.cards import method_card

    monkeypatch.chdir(tmp_path)
    card = method_card("agd")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert snippets, "the card shows how to call it"
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), names)
    assert names["image"].size == (32, 32) and "2503.07274" in card
