"""FlowTurbo, by the five proofs."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
)

import diffusers_ext as dx
from diffusers_ext.oracles import convergence_order, sampler_error
from diffusers_ext.training.train_velocity_refiner import main, observed, refiner_loss
from tests.common import models
from tests.common.learned import check_recipe_names_the_part
from tests.common.suite import CommonCase
from tests.tiny_models import flux as untrained_flux

COMMON = CommonCase(settings=[{"n_heun": 3}])
GOLDEN = Path(__file__).parents[1] / "golden" / "flowturbo.json"
# name -> (Heun steps, steps)
RUNS = {"H1P5": (1, 6), "H2P4": (2, 6), "H6": (6, 6)}
Scheduler = dx.FlowMatchPseudoCorrectorScheduler
exact = pytest.mark.proof("exact")


def start() -> torch.Tensor:
    return torch.sin(torch.arange(2 * 3 * 4, dtype=torch.float64) * 1.7).reshape(2, 3, 2, 2) * 1.4


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.sin(2 * x) + (1 - sigma) * x - 0.5 * math.cos(3 * sigma)


def numbers(x: torch.Tensor) -> list[float]:
    return [x.mean().item(), x.std().item(), *x.flatten()[:3].tolist()]


def uniform(number: int) -> list[float]:
    """What `FluxPipeline` gives."""
    return np.linspace(1.0, 1 / number, number).tolist()


def states(scheduler, x: torch.Tensor, field=velocity, begin: int = 0) -> list[torch.Tensor]:
    """The states at which the velocity is asked for, and the result."""
    seen, sigmas = [x], scheduler.sigmas.tolist()
    for i, t in enumerate(scheduler.timesteps[begin:]):
        seen.append(scheduler.step(field(seen[-1], sigmas[begin + i]), t, seen[-1]).prev_sample)
    return seen


def draw(pipe, steps: int = 4, **kwargs) -> np.ndarray:
    return pipe(
        "a person", negative_prompt="", true_cfg_scale=3, height=32, width=32, max_sequence_length=32,
        num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np", **kwargs,
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def flux():
    pipe = FluxPipeline.from_pretrained(dx.zoo_path("avatars-flow"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_steps_only_are_diffusers_heun(number, shift):
    ours, theirs = Scheduler(n_heun=number, shift=shift), FlowMatchHeunDiscreteScheduler(shift=shift)
    ours.set_timesteps(number)
    theirs.set_timesteps(number)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = y = start().float()
    for t in ours.timesteps:
        x = ours.step(velocity(x, float(t) / 1000), t, x).prev_sample
        y = theirs.step(velocity(y, float(t) / 1000), t, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)  # theirs divides by sigma, down to 0.001


@exact
def test_one_step_is_euler():
    ours, theirs = Scheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(1)
    x, v = start().float(), velocity(start(), 1.0).float()
    assert torch.equal(ours.step(v, 1000.0, x).prev_sample, theirs.step(v, ours.timesteps[0], x).prev_sample)


def slow(nodes: list[float], n_heun: int, x: torch.Tensor) -> list[torch.Tensor]:
    """The paper's two steps as they stand, and Euler for the last; states at which the velocity is asked for."""
    seen, cached = [], None

    def ask(x, sigma):
        seen.append(x)
        return velocity(x, sigma)

    for i in range(len(nodes) - 2):
        h = nodes[i + 1] - nodes[i]
        d = ask(x, nodes[i]) if i < n_heun or cached is None else cached
        cached = ask(x + h * d, nodes[i + 1])
        x = x + h / 2 * (d + cached)
    last = nodes[-2]
    d = cached if len(nodes) - 2 >= n_heun and cached is not None else ask(x, last)
    return [*seen, x + (nodes[-1] - last) * d]


@exact
@pytest.mark.parametrize("n_heun", [1, 2, 4, 9])
@pytest.mark.parametrize("number", [2, 5, 8])
def test_it_takes_the_steps_of_the_paper(n_heun, number):
    scheduler = Scheduler(n_heun=n_heun, shift=2.5)
    scheduler.set_timesteps(number)
    nodes = list(dict.fromkeys(scheduler.sigmas.tolist()))
    expected = slow(nodes, n_heun, start())
    found = states(scheduler, start())
    assert len(found) == len(expected) == number + min(n_heun, number)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@exact
@pytest.mark.parametrize("n_heun", [1, 2])
def test_it_is_of_second_order_at_one_call_a_step(n_heun):
    def growth(x, sigma):
        return -1.3 * x

    x, errors, counts = torch.ones(1, 1, 1, 1, dtype=torch.float64), [], (20, 40, 80, 160)
    for number in counts:
        scheduler = Scheduler(n_heun=n_heun)
        scheduler.set_timesteps(sigmas=uniform(number))
        found = states(scheduler, x, growth)
        assert len(found) - 1 == number + n_heun - 1
        errors.append(abs(found[-1].item() - math.exp(1.3)))
    assert 1.9 < convergence_order(errors, counts) < 2.1, errors


@exact
def test_on_exact_scores_it_is_far_closer_than_euler():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 1, 2, 4, generator=generator, dtype=torch.float64)
    model = dx.GaussianMixtureDenoiser.from_components(means, 0.05, Scheduler())
    x = torch.randn(32, 1, 2, 4, generator=generator, dtype=torch.float64)
    for number in (10, 20):
        ours = sampler_error(Scheduler(), model, number, x)
        euler = sampler_error(FlowMatchEulerDiscreteScheduler(), model, number, x)
        assert ours.calls == euler.calls == number
        assert ours.per_sample.median() < 0.5 * euler.per_sample.median()


@exact
def test_a_sample_changed_between_steps_is_what_the_next_step_starts_from():
    """Inpainting and callbacks write into the latents; a velocity that ignores its state carries the change to the end."""
    ends = []
    for change in (0.0, 0.25):
        scheduler = Scheduler(n_heun=2)
        scheduler.set_timesteps(6)
        x = start()
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.full_like(x, math.sin(float(t))), t, x).prev_sample + (change if i == 3 else 0.0)
        ends.append(x)
    torch.testing.assert_close(ends[1] - ends[0], torch.full_like(x, 0.25), rtol=0, atol=1e-12)


@exact
def test_a_start_at_either_visit_of_a_timestep_gives_the_same():
    scheduler = Scheduler(n_heun=3)
    ends = []
    for begin in (1, 2):
        scheduler.set_timesteps(6)
        assert scheduler.timesteps[1] == scheduler.timesteps[2]
        scheduler.set_begin_index(begin)
        ends.append(states(scheduler, start(), begin=begin)[-1])
    assert torch.equal(*ends)


@exact
def test_given_timesteps_are_where_the_denoiser_is_asked():
    scheduler = Scheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[900.0, 500.0, 100.0])
    assert scheduler.timesteps.tolist() == [900.0, 500.0, 100.0]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.9, 0.5, 0.1, 0.0]))


@exact
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"timesteps": [100.0, 500.0]}, "timesteps"),
        ({"timesteps": [1200.0, 500.0]}, "timesteps"),
        ({"sigmas": [0.5, 0.5]}, "sigmas"),
        ({"sigmas": []}, "sigmas"),
        ({"sigmas": [0.5, math.nan]}, "sigmas"),
        ({}, "num_inference_steps"),
        ({"timesteps": [500.0, 100.0], "num_inference_steps": 3}, "num_inference_steps"),
    ],
)
def test_grids_that_cannot_be_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        Scheduler().set_timesteps(**arguments)


# --- refiner steps, exact ----------------------------------------------------------------------------------------------

TINY = ("tiny-flux", "tiny-sd3")


def saved_refiner(transformer, folder: Path, random: bool = True) -> str:
    torch.manual_seed(0)
    refiner = dx.VelocityRefiner(**dx.VelocityRefiner.config_for(transformer))
    if random:
        for parameter in refiner.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    refiner.save_pretrained(folder)
    return str(folder)


def recorded(pipe, draw_once) -> tuple[torch.Tensor, list[dict], list[torch.Tensor]]:
    """The picture, and arguments and output of each call of the transformer."""
    calls, outputs = [], []

    def record(module, args, kwargs, output):
        calls.append(kwargs)
        outputs.append(output[0].clone())

    handle = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    picture = draw_once()
    handle.remove()
    return picture, calls, outputs


@exact
@pytest.mark.parametrize("name", TINY)
def test_no_refined_steps_and_disabled_are_bit_equal(name, tmp_path):
    stock = models.STOCKS[name]
    pipe = stock.make()
    plain = stock.draw(pipe, 4)
    refiner = saved_refiner(pipe.transformer, tmp_path)
    with dx.enabled(pipe, dx.FlowTurboConfig(refiner, n_refiner=0)):
        assert torch.equal(stock.draw(pipe, 4), plain)
    with dx.enabled(pipe, dx.FlowTurboConfig(refiner, n_refiner=2)):
        refined = stock.draw(pipe, 4)
        models.abort(stock, pipe)
        assert torch.equal(stock.draw(pipe, 4), refined), "a run broken off leaves nothing behind"
    assert not torch.equal(refined, plain)
    assert torch.equal(stock.draw(pipe, 4), plain)


@exact
def test_an_untrained_refiner_carries_the_velocity_on_in_each_branch_of_guidance(flux, tmp_path):
    pipe = copy.deepcopy(flux)
    dx.enable(pipe, dx.FlowTurboConfig(saved_refiner(pipe.transformer, tmp_path, random=False), n_refiner=2))
    _, _, outputs = recorded(pipe, lambda: draw(pipe, 5))
    assert len(outputs) == 10, "two branches, five steps"
    for call in range(6, 10):
        assert torch.equal(outputs[call], outputs[call - 2])
    assert not torch.equal(outputs[5], outputs[3]) and not torch.equal(outputs[6], outputs[7])


@exact
@pytest.mark.parametrize("name", TINY)
def test_a_refined_step_adds_what_the_refiner_says_and_runs_no_block(name, tmp_path):
    """Slow derivation: the plain transformer tells at each recorded state what the refiner is to be given."""
    stock = models.STOCKS[name]
    pipe = stock.make()
    folder = saved_refiner(pipe.transformer, tmp_path)
    plain, refiner = copy.deepcopy(pipe.transformer), dx.VelocityRefiner.from_pretrained(folder)
    dx.enable(pipe, dx.FlowTurboConfig(folder, n_refiner=2))
    ran: list[int] = []
    for block in pipe.transformer.transformer_blocks:
        block.attn.register_forward_hook(lambda *_: ran.append(len(outputs)))
    outputs: list[torch.Tensor] = []
    pipe.transformer.register_forward_hook(lambda _module, _args, output: outputs.append(output[0].clone()))
    _, calls, _ = recorded(pipe, lambda: stock.draw(pipe, 5))
    assert len(outputs) == 5 and set(ran) == {0, 1, 2}
    tokens_of = {"tiny-flux": lambda v: v, "tiny-sd3": lambda v: v.flatten(2).transpose(1, 2)}[name]  # of patches of 1
    for i in (3, 4):
        with torch.no_grad(), observed(plain) as seen:
            plain(**calls[i])
            previous = tokens_of(outputs[i - 1])
            rotary = seen.get("image_rotary_emb")  # of the text's tokens, then of the state's
            rotary = None if rotary is None else tuple(part[-previous.shape[1] :] for part in rotary)
            expected = previous + refiner(seen["hidden_states"], previous, seen["temb"], rotary)
        torch.testing.assert_close(tokens_of(outputs[i]), expected, rtol=1e-5, atol=1e-5)


@exact
def test_refiners_of_other_models_and_bare_models_are_refused(flux, tmp_path):
    tiny = models.STOCKS["tiny-flux"].make()
    folder = saved_refiner(tiny.transformer, tmp_path)
    for target, config, message in (
        (flux, dx.FlowTurboConfig(folder), "trained for another transformer"),
        (tiny, dx.FlowTurboConfig("nowhere"), "neither a folder nor"),
        (tiny.transformer, dx.FlowTurboConfig(folder), "needs the number of steps"),
        (models.STOCKS["tiny-dit"].make(), dx.FlowTurboConfig(folder), "neither a FluxTransformer2DModel"),
    ):
        with pytest.raises(ValueError, match=message):
            dx.enable(target, config)
        assert not dx.status(target)
    with pytest.raises(ValueError, match="`transformer` is a DiTTransformer2DModel"):
        dx.VelocityRefiner.config_for(models.dit())
    for name, value in (("velocity_channels", 0), ("num_attention_heads", 2.0), ("mlp_ratio", math.nan)):
        with pytest.raises(ValueError, match=name):
            dx.VelocityRefiner(**{name: value})
    for arguments, name in (({"refiner": ""}, "refiner"), ({"refiner": "x", "n_refiner": -1}, "n_refiner")):
        with pytest.raises(ValueError, match=name):
            dx.FlowTurboConfig(**arguments)


@exact
def test_the_loss_of_an_untrained_refiner_is_the_change_of_the_velocity(flux):
    refiner = dx.VelocityRefiner(**dx.VelocityRefiner.config_for(flux.transformer))
    states, pooled, text_ids = flux.encode_prompt(["a person"] * 3, prompt_2=None, max_sequence_length=8)
    ids = flux._prepare_latent_image_ids(3, 4, 4, states.device, states.dtype)

    def field(tokens, sigmas):
        return flux.transformer(
            hidden_states=tokens, timestep=sigmas, pooled_projections=pooled, encoder_hidden_states=states,
            txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip

    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    sigmas, gaps = torch.tensor([0.9, 0.5, 0.05]), torch.tensor([0.1, 0.02, 0.1])
    with torch.no_grad():
        loss = refiner_loss(refiner, flux.transformer, field, x, sigmas, gaps)
        lower = torch.tensor([0.8, 0.48, 0.0])
        before = field(x, sigmas)
        after = field(x - (sigmas - lower)[:, None, None] * before, lower)
    torch.testing.assert_close(loss, (before - after).square().mean())


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("name", RUNS)
def test_it_calls_the_network_where_the_authors_code_does(name):
    n_heun, number = RUNS[name]
    scheduler = Scheduler(n_heun=n_heun)
    scheduler.set_timesteps(sigmas=uniform(number))
    found = [numbers(x) for x in states(scheduler, start())[:-1]]
    wanted = json.loads(GOLDEN.read_text())["runs"][name]
    assert len(found) == len(wanted) == number + n_heun - 1
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)  # diffusers keeps the nodes in float32


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_in_a_stock_flux_pipeline_the_calls_are_as_many_as_promised(flux, tmp_path):
    pipe = copy.copy(flux)
    pipe.scheduler = Scheduler.from_config(flux.scheduler.config, n_heun=2)
    assert {k: v for k, v in pipe.scheduler.config.items() if k in flux.scheduler.config and k[0] != "_"} == {
        k: v for k, v in flux.scheduler.config.items() if k[0] != "_"
    }
    seen: list[int] = []
    picture = draw(pipe, callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(i) or {})
    assert seen == [0, 1, 2, 3, 4]
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = Scheduler.from_pretrained(tmp_path)
    assert pipe.scheduler.config.n_heun == 2
    assert (draw(pipe) == picture).all()


@pytest.mark.proof("loads")
def test_it_understands_the_configs_of_flow_schedulers_and_no_others():
    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    assert Scheduler.from_config(wan.config).config.shift == 5.0
    assert Scheduler.from_config(FlowMatchHeunDiscreteScheduler(shift=2.0).config).config.shift == 2.0
    with pytest.raises(ValueError, match="use_flow_sigmas"):
        Scheduler.from_config(DDIMScheduler().config)
    with pytest.raises(ValueError, match="stochastic_sampling"):
        Scheduler.from_config(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two runs of the trainer on a tiny Flux: 4 steps, and 2 steps resumed to 4."""
    root = tmp_path_factory.mktemp("refiner")
    torch.manual_seed(0)
    untrained_flux(root / "flux")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.savez(root / "pictures.npz", image=pictures, text=["a"] * 8)

    def run(output: str, *flags: str) -> None:
        main([
            f"--pretrained_model_name_or_path={root / 'flux'}", f"--train_data_dir={root / 'pictures.npz'}",
            f"--output_dir={root / output}", "--resolution=16", "--max_sequence_length=8", "--train_batch_size=2",
            "--checkpointing_steps=2", "--use_ema", "--learning_rate=1e-2", "--validation_prompts", "a",
            "--validation_inference_steps=4", *flags,
        ])  # fmt: skip

    run("straight", "--max_train_steps=4")
    run("resumed", "--max_train_steps=2")
    run("resumed", "--max_train_steps=4", "--resume_from_checkpoint=latest")
    return root


@pytest.mark.proof("loads")
def test_a_resumed_training_is_bit_equal_and_changes_the_refiner(trained):
    straight, resumed = (dx.VelocityRefiner.from_pretrained(trained / name) for name in ("straight", "resumed"))
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in straight.state_dict().items())
    assert straight.proj_out.weight.abs().max() > 0
    assert list((trained / "straight" / "samples").glob("step-*.png"))
    assert "VelocityRefiner" in (trained / "straight" / "README.md").read_text()


@pytest.mark.proof("loads")
def test_a_pipeline_is_shared_with_the_name_of_its_refiner_and_not_with_a_local_folder(trained, tmp_path):
    check_recipe_names_the_part(
        tmp_path, trained / "flux", '"a", height=16, width=16, max_sequence_length=8, num_inference_steps=4',
        "VelocityRefiner", trained / "straight", "dx.FlowTurboConfig({}, n_refiner=2)",
    )  # fmt: skip


@pytest.mark.proof("loads")
@pytest.mark.parametrize(
    ("flag", "message"),
    [("--max_gap=0", "max_gap"), ("--validation_refiner_steps=-1", "validation_refiner_steps")],
)
def test_bad_arguments_of_the_trainer_are_refused(flag, message):
    with pytest.raises(ValueError, match=message):
        main(["--pretrained_model_name_or_path=x", "--train_data_dir=x", flag])


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippets_of_the_card_run(tmp_path, monkeypatch):
    from diffusers_ext.cards import method_card

    monkeypatch.chdir(tmp_path)
    card = method_card("flowturbo")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) >= 2
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), names)
        assert type(names["pipe"].scheduler) is Scheduler
        assert names["image"].size == (32, 32)
    assert not dx.status(names["pipe"])
    assert "2409.18128" in card
