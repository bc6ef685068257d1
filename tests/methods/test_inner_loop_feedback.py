"""Inner Loop Feedback, by the five proofs. The authors published no code: the reference is a slow derivation here."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, HunyuanDiT2DModel, PixArtTransformer2DModel

import diffusers_ext as dx
from diffusers_ext.hooks._blocks import Streams, block_names
from diffusers_ext.hooks.inner_loop_feedback import _check_shapes
from diffusers_ext.models.inner_loop_feedback import no_feedback
from diffusers_ext.training._trajectories import count_steps
from diffusers_ext.training.train_inner_loop_feedback import feedback_loss, main, run_loss
from tests.card_snippets import run_card
from tests.common import models
from tests.common.learned import check_other_weights_are_told, check_recipe_names_the_part
from tests.common.suite import CommonCase
from tests.tiny_models import class_conditional
from tests.unets import fill

SCRATCH = tempfile.TemporaryDirectory(prefix="inner-loop-feedback-")  # gone with the process
ROOT = Path(SCRATCH.name)
exact = pytest.mark.proof("exact")


def module_for(model, block: int = 1, resume: int = 2, scale: float = 0.3) -> dx.InnerLoopFeedback:
    """With weights of its own and a scale other than 0."""
    made = fill(dx.InnerLoopFeedback.from_transformer(model, block, resume))
    with torch.no_grad():
        made.scale.fill_(scale)
    return made


def saved(module: dx.InnerLoopFeedback) -> str:
    folder = tempfile.mkdtemp(dir=ROOT)
    module.save_pretrained(folder)
    return folder


def case(model) -> dx.InnerLoopFeedbackConfig:
    if dx.InnerLoopFeedbackConfig.supports(model) is not None:
        return dx.InnerLoopFeedbackConfig("me/feedback")
    return dx.InnerLoopFeedbackConfig(saved(module_for(model)))


COMMON = CommonCase(
    settings=[{"feedback": "me/feedback"}, {"feedback": "me/feedback", "interval": 3}],
    make=case,
    free_text=("feedback",),
    skips={
        "travels": "a recipe names its module in a repository; the test of the Hub below has one",
    },
)


def pixart() -> PixArtTransformer2DModel:
    return fill(
        PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
            cross_attention_dim=8, caption_channels=8,
        )
    )  # fmt: skip


def pixart_inputs(model, step: int, batch: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(100 * seed + step)
    return {
        "hidden_states": torch.randn((batch, 4, 8, 8), generator=generator),
        "encoder_hidden_states": torch.randn((batch, 3, 8), generator=torch.Generator().manual_seed(seed)),
        "timestep": torch.full((batch,), 900 - 40 * step),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


MODELS = {**models.MODELS, "PixArtTransformer2DModel": models.Model("PixArtTransformer2DModel", pixart, pixart_inputs)}
# Model, b, resume: the next block, a later one, an earlier one, and over the border of two lists.
PLACES = [
    ("DiTTransformer2DModel", 1, 2), ("DiTTransformer2DModel", 1, 3), ("DiTTransformer2DModel", 3, 2),
    ("PixArtTransformer2DModel", 2, 3), ("FluxTransformer2DModel", 1, 2), ("FluxTransformer2DModel", 2, 3),
    ("FluxTransformer2DModel", 3, 4), ("SD3Transformer2DModel", 1, 2),
]  # fmt: skip


# --- exact -----------------------------------------------------------------------------------------------------------


def slow(model, one, module, steps: int, interval: int) -> list[torch.Tensor]:
    """Each cheap step by running the whole transformer with what block `resume` gets replaced."""
    names, b, resume = block_names(one), module.config.block - 1, module.config.resume - 1
    source, target = one.get_submodule(names[b]), one.get_submodule(names[resume])
    streams, kept, outputs = Streams(source), {}, []
    copied = copy.deepcopy(target)
    copied.load_state_dict(module.copied.state_dict())

    def keep(_module, args, kwargs, output):
        found = streams.read(streams.inputs(args, kwargs), output)
        kept.update({name: value for name, value in found.items() if value is not None})

    def replace(_module, args, kwargs):
        inputs = Streams(target).inputs(args, kwargs)
        given = {**inputs, **kept}
        states = Streams(target).read(given, copied(**given))
        ahead = {
            name: value if states.get(name) is None else value + module.scale * states[name]
            for name, value in kept.items()
        }
        return (), {**inputs, **ahead}

    for step in range(steps):
        if step % interval == 0:
            handle = source.register_forward_hook(keep, with_kwargs=True)
        else:
            handle = target.register_forward_pre_hook(replace, with_kwargs=True)
        outputs.append(model.predict(one, step))
        handle.remove()
    return outputs


@exact
@pytest.mark.parametrize(("name", "block", "resume"), PLACES)
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_cheap_step_goes_on_from_the_predicted_features(name, block, resume, scale):
    """With s = 0 that is the plain cache, which hands h_b to block `resume` as it is."""
    model = MODELS[name]
    one = model.make()
    module = module_for(one, block, resume, scale)
    for interval in (2, 3):
        with torch.no_grad():
            expected = slow(model, one, module, 5, interval)
        with dx.enabled(one, dx.InnerLoopFeedbackConfig(saved(module), interval)):
            found = model.run(one, 5)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        plain = model.run(one, 5)
        assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == [i % interval == 0 for i in range(5)]


@exact
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_interval_1_is_the_full_model(name):
    model = MODELS[name]
    one = model.make()
    plain = model.run(one, 4)
    with dx.enabled(one, dx.InnerLoopFeedbackConfig(saved(module_for(one)), interval=1)):
        assert all(torch.equal(a, b) for a, b in zip(model.run(one, 4), plain, strict=True))


@exact
@pytest.mark.parametrize(("name", "block", "resume"), PLACES)
@pytest.mark.parametrize("interval", [2, 3])
def test_blocks_that_run(name, block, resume, interval):
    """F L + (T - F)(L - resume + 2) of them: a cheap step runs the copied block and those from `resume` on."""
    model, steps, ran = MODELS[name], 7, []
    one = model.make()
    with dx.enabled(one, dx.InnerLoopFeedbackConfig(saved(module_for(one, block, resume)), interval)):
        serving = one.get_submodule(block_names(one)[resume - 1])
        hook = serving._diffusers_hook.hooks["diffusers_ext.inner_loop_feedback"]
        parts = [one.get_submodule(each) for each in block_names(one)] + [hook.feedback[0].copied]
        for part in parts:
            layer = [child for child in part.modules() if isinstance(child, torch.nn.Linear)][-1]
            layer.register_forward_hook(lambda *_: ran.append(1))
        model.run(one, steps)
    full, number = -(-steps // interval), len(block_names(one))
    assert len(ran) == full * number + (steps - full) * (number - resume + 2)


@exact
def test_guidance_in_two_calls_keeps_their_features_apart():
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(dx.zoo_path("avatars-flow"))
    pipe.set_progress_bar_config(disable=True)
    outputs: list[torch.Tensor] = []
    module = dx.InnerLoopFeedback.from_transformer(pipe.transformer, 7, 8)
    dx.enable(pipe, dx.InnerLoopFeedbackConfig(saved(module)))
    seen: list[torch.Tensor] = []
    last = pipe.transformer.get_submodule(block_names(pipe.transformer)[-1])
    last.attn.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    pipe.transformer.register_forward_hook(lambda _m, _a, output: outputs.append(output[0]))
    pipe(
        "a person", negative_prompt="", true_cfg_scale=3, height=32, width=32, max_sequence_length=32,
        num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert len(seen) == len(outputs) == 4
    same = lambda a, b: torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)  # noqa: E731
    assert same(seen[0], seen[2]) > same(seen[0], seen[3]) and same(seen[1], seen[3]) > same(seen[1], seen[2])


@exact
def test_what_does_not_fit_is_refused():
    dit, flux = (MODELS[name].make() for name in ("DiTTransformer2DModel", "FluxTransformer2DModel"))
    folder = saved(module_for(dit))
    for target, config, message in (
        (flux, dx.InnerLoopFeedbackConfig(folder), "trained for another transformer"),
        (dit, dx.InnerLoopFeedbackConfig("nowhere"), "neither a folder nor"),
        (MODELS["UNet2DModel"].make(), dx.InnerLoopFeedbackConfig(folder), "no list of transformer blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            dx.enable(target, config)
        assert not dx.status(target)
    skipping = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=4, sample_size=4, patch_size=2,
        cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, text_len=2, text_len_t5=2, hidden_size=16,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    assert no_feedback(skipping) == "its late blocks read what comes out of early ones"
    for block, resume, name in (
        (0, 2, "block"),
        (4, 2, "block"),
        (1, 1, "resume"),
        (1, 4, "resume"),
        (1.0, 2, "block"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is"):
            dx.InnerLoopFeedback.from_transformer(dit, block, resume)
    for kind in ("no_such_class", "DDIMScheduler", 3):
        with pytest.raises(ValueError, match="`transformer` is"):
            dx.InnerLoopFeedback(transformer=kind, transformer_config={})
    for arguments, name in (({"feedback": ""}, "feedback"), ({"feedback": "x", "interval": 0}, "interval")):
        with pytest.raises(ValueError, match=name):
            dx.InnerLoopFeedbackConfig(**arguments)
    features = {"hidden_states": torch.zeros(2, 3)}
    for inputs in ({"hidden_states": torch.zeros(2, 4)}, {"other": torch.zeros(2, 3)}):
        with pytest.raises(ValueError, match=r"`hidden_states` of shape \(2, 3\)"):
            _check_shapes(features, inputs, "Block")


# --- exact: training -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("feedback")
    torch.manual_seed(0)
    class_conditional(root / "dit")
    pipe = DiTPipeline.from_pretrained(root / "dit")
    fill(pipe.transformer)  # fresh weights end in zeros: nothing would matter
    pipe.save_pretrained(root / "dit")
    return root


@exact
@pytest.mark.parametrize("interval", [2, 3])
def test_loss_and_gradients_of_a_run(start, interval):
    """Slow derivation: the teacher's run is recorded, then each cheap step is computed by itself, with one graph for all."""
    pipe = DiTPipeline.from_pretrained(start / "dit")
    transformer = pipe.transformer.requires_grad_(False)
    steps, weight, phase = 5, 0.2, 1

    def call() -> dict:
        return {
            "class_labels": [3, 7], "num_inference_steps": steps, "guidance_scale": 2.0,
            "generator": torch.Generator().manual_seed(3),
        }  # fmt: skip

    assert count_steps(pipe, call()) == steps
    module = module_for(transformer, 1, 2).train()  # as the loop leaves it: nothing is dropped all the same
    total, gradients = run_loss(pipe, call(), module, steps, interval, phase, weight)

    inputs, outputs, features = [], [], []  # of each step of the teacher
    first, second = (transformer.get_submodule(name) for name in block_names(transformer))
    handles = [
        transformer.register_forward_pre_hook(lambda _m, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True),
        transformer.register_forward_hook(lambda _m, _a, output: outputs.append(output[0])),
        first.register_forward_hook(lambda _m, _a, output: features.append(output)),
    ]
    pipe.set_progress_bar_config(disable=True)
    pipe(**call())
    for handle in handles:
        handle.remove()

    def guided(out):
        cond, uncond = out[:, :4].chunk(2)
        return uncond + 2.0 * (cond - uncond)

    loss, kept = torch.zeros(()), features[0]
    for step in range(1, steps):
        ahead: list[torch.Tensor] = []

        def replace(_module, args, kwargs, kept=kept, ahead=ahead):
            ahead.append(kept + module.scale * module.copied(kept, *args[1:], **kwargs))
            return (ahead[0], *args[1:]), kwargs

        handle = second.register_forward_pre_hook(replace, with_kwargs=True)
        args, kwargs = inputs[step]
        given = transformer(*args, **kwargs).sample
        handle.remove()
        loss = loss + (guided(given) - guided(outputs[step])).square().mean() / (steps - 1)
        loss = loss + weight * (ahead[0] - features[step]).square().mean() / (steps - 1)
        if (step + phase) % (interval - 1) == 0:
            kept = features[step]
    expected = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-4, atol=1e-6)
    for found, wanted in zip(gradients, expected, strict=True):
        wanted = torch.zeros_like(found) if wanted is None else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * max(1.0, wanted.abs().max().item()))
    assert not transformer.__dict__.get("_diffusers_hook") and transformer.training is False


@exact
def test_the_loss_of_a_perfect_prediction_is_zero():
    out, states = torch.randn(2, 3), {"hidden_states": torch.randn(2, 4)}
    assert feedback_loss(out, out, [states], [states], 0.5) == 0
    miss = feedback_loss(out, out + 1, [states], [{"hidden_states": states["hidden_states"] + 2}], 0.5)
    assert miss.item() == pytest.approx(1 + 0.5 * 4)


def training(root: Path, output: str, *flags: str) -> dx.InnerLoopFeedback:
    main([
        f"--pretrained_model_name_or_path={root / 'dit'}", "--block=1", "--resume_block=2", "--num_inference_steps=4",
        "--guidance_scale=2", "--train_batch_size=2", "--checkpointing_steps=2", "--learning_rate=0.01",
        "--num_validation_images=2", f"--output_dir={root / output}", *flags,
    ])  # fmt: skip
    return dx.InnerLoopFeedback.from_pretrained(root / output)


@pytest.fixture(scope="module")
def trained(start) -> Path:
    """Two trainings: 6 runs, and 2 runs resumed to 6."""
    training(start, "straight", "--max_train_steps=6")
    training(start, "resumed", "--max_train_steps=2")
    training(start, "resumed", "--max_train_steps=6", "--resume_from_checkpoint=latest")
    return start


@exact
def test_the_backbone_is_not_trained(trained, monkeypatch):
    from diffusers_ext.training import train_inner_loop_feedback as script

    tasks = []

    class Task(script.FeedbackTask):
        def __init__(self, args):
            super().__init__(args)
            tasks.append((self, {name: value.clone() for name, value in self.transformer.state_dict().items()}))

    monkeypatch.setattr(script, "FeedbackTask", Task)
    made = training(trained, "watched", "--max_train_steps=1")
    ((task, before),) = tasks
    after = task.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert made.scale != 0


@exact
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--interval=1", "interval"),
        ("--feature_weight=-1", "feature_weight"),
        ("--num_inference_steps=1", "num_inference_steps"),
        ("--mixed_precision=fp16", "mixed_precision"),
        ("--max_train_steps=0", "max_train_steps"),
    ],
)
def test_bad_arguments_of_the_trainer_are_refused(flag, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(
            [
                "--pretrained_model_name_or_path=x",
                "--block=1",
                "--resume_block=2",
                f"--output_dir={tmp_path / 'o'}",
                flag,
            ]
        )
    assert not list(tmp_path.iterdir())


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
def test_training_makes_cheap_steps_nearer_to_full_ones_than_the_plain_cache(start):
    """No code was published. The independent derivations above stand for it; here a module learns what it is to do."""
    pipe = DiTPipeline.from_pretrained(start / "dit")
    pipe.transformer.requires_grad_(False)
    module = dx.InnerLoopFeedback.from_transformer(pipe.transformer, 1, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        call = {
            "class_labels": [3, 7], "num_inference_steps": 6, "guidance_scale": 1.0,
            "generator": torch.Generator().manual_seed(3),
        }  # fmt: skip
        total, gradients = run_loss(pipe, call, module, 6, 2, 0, 0.0)
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.9 * losses[0], losses


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_a_resumed_training_is_bit_equal(trained):
    straight, resumed = (dx.InnerLoopFeedback.from_pretrained(trained / name) for name in ("straight", "resumed"))
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in straight.state_dict().items())
    assert straight.config.block == 1 and straight.config.resume == 2
    assert list((trained / "straight" / "samples").glob("step-*.png"))
    card = (trained / "straight" / "README.md").read_text()
    assert "InnerLoopFeedback" in card and str(trained) not in card


@pytest.mark.proof("loads")
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel"])
def test_a_module_is_saved_and_loaded(name):
    one = MODELS[name].make()
    module = module_for(one)
    loaded = dx.InnerLoopFeedback.from_pretrained(saved(module))
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    made = dx.InnerLoopFeedback.from_transformer(one, 1, 2).copied.state_dict()
    assert all(
        torch.equal(value, made[key]) for key, value in one.get_submodule(block_names(one)[1]).state_dict().items()
    )


@pytest.mark.proof("loads")
def test_a_module_of_other_weights_is_told(trained):
    pipe = DiTPipeline.from_pretrained(trained / "dit")
    check_other_weights_are_told(pipe, pipe.transformer, dx.InnerLoopFeedbackConfig(str(trained / "straight")))


@pytest.mark.proof("loads")
def test_a_pipeline_is_shared_with_the_name_of_its_module_and_not_with_a_local_folder(trained, tmp_path):
    check_recipe_names_the_part(
        tmp_path, trained / "dit", "[3], num_inference_steps=4", "InnerLoopFeedback", trained / "straight",
        "dx.InnerLoopFeedbackConfig({})", exact=False,
    )  # fmt: skip


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippets_of_the_card_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card, names = run_card("inner_loop_feedback")
    assert not dx.status(names["pipe"]) and names["image"].size == (28, 28)
    assert "2501.13107" in card
