"""InstaFlow, by the five proofs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import diffusers_ext as dx
from diffusers_ext.training._teacher import Conditions
from diffusers_ext.training.train_instaflow import FlowTeacher, main, one_step_loss, parse_args, reflow_loss
from tests import tiny_sd
from tests.common.suite import CommonCase
from tests.fresh import run_fresh

GOLDEN = Path(__file__).parents[1] / "golden" / "instaflow.json"
RUNS = [(1, 1.0), (1, 1.5), (2, 3.0), (3, 1.0), (7, 1.5)]  # steps and guidance

exact = pytest.mark.proof("exact")
loads = pytest.mark.proof("loads")
PROMPT = "a person with tan skin and short brown hair, a happy smile, yellow clothes"


def few(folder: Path) -> dict[str, Any]:
    """Arguments of a short run, for the common rules."""
    (folder / "prompts.txt").write_text(f"{PROMPT}\na person\n")
    return {
        "pretrained_model_name_or_path": dx.zoo_path("avatars-sd"), "prompts": folder / "prompts.txt", "stage": "reflow",
        "teacher_steps": 2, "train_batch_size": 2,
    }  # fmt: skip


COMMON = CommonCase(inputs=few)


def velocity(x: torch.Tensor, t: Any) -> torch.Tensor:
    return 0.5 * torch.cos(x + float(t) / 300) - x


def flow(steps: int) -> Any:
    scheduler = dx.RectifiedFlowEulerScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_the_steps_are_those_of_stock_flow_matching_with_the_other_sign(steps):
    ours, stock = flow(steps), FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=1e-3)
    x = y = torch.linspace(-2, 2, 16)
    for t, u in zip(ours.timesteps, stock.timesteps, strict=True):
        x = ours.step(velocity(x, t), t, x, return_dict=False)[0]
        y = stock.step(-velocity(y, t), u, y, return_dict=False)[0]
    torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


@exact
def test_one_step_is_the_noise_plus_the_velocity():
    scheduler, x = flow(1), torch.linspace(-2, 2, 16)
    assert scheduler.timesteps.tolist() == [1000.0]
    assert torch.equal(scheduler.step(velocity(x, 1000), 1000.0, x).prev_sample, x + velocity(x, 1000))


@exact
def test_noised_data_lie_on_the_line():
    noise, clean = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 4, 4)
    found = dx.RectifiedFlowEulerScheduler().add_noise(clean, noise, torch.tensor([1000.0, 250.0]))
    assert torch.equal(found[0], noise[0])
    torch.testing.assert_close(found[1], 0.75 * clean[1] + 0.25 * noise[1])


@exact
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_of_gaussian_data_the_coupling_is_straight_and_one_step_reproduces_it(steps):
    r"""The ODE of data N(m, s^2) couples :math:`x_1 = m + s x_0`: the best velocity is constant along a path."""
    m, s = 0.7, 0.4

    def best(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        t = 1 - torch.as_tensor(timesteps).double().reshape(-1, *[1] * (x.ndim - 1)) / 1000
        noise = (x - t * m) / (1 - t + t * s)
        return m + (s - 1) * noise

    noise = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean, t = m + s * noise, torch.linspace(0, 1, 8, dtype=torch.float64)
    assert reflow_loss(best, noise, clean, t) < 1e-12
    assert one_step_loss(best, noise, clean) < 1e-12
    scheduler, x = flow(steps), noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(best(x, timestep), timestep, x, return_dict=False)[0]
    assert (x - clean).abs().max() < 1e-5


@exact
def test_the_losses_see_the_line_and_the_sign():
    noise, clean = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    asked = []

    def zero(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        asked.append((x, timesteps))
        return torch.zeros_like(x)

    assert reflow_loss(zero, noise, clean, torch.tensor([0.25, 1.0])).item() == pytest.approx(1.0)
    assert asked[0][0][:, 0, 0, 0].tolist() == [0.25, 1.0] and asked[0][1].tolist() == [750.0, 0.0]
    assert one_step_loss(lambda x, t: torch.ones_like(x), noise, clean) == 0
    assert one_step_loss(lambda x, t: -torch.ones_like(x), noise, clean) == 4
    one_step_loss(zero, noise, clean)
    assert torch.equal(asked[1][0], noise) and asked[1][1].tolist() == [1000.0, 1000.0]


@exact
def test_a_flow_teacher_draws_as_the_pipeline_does():
    pipe, given = tiny_sd.make(dx.RectifiedFlowEulerScheduler()), tiny_sd.inputs()
    states, empty = ({"encoder_hidden_states": given[name]} for name in ("prompt_embeds", "negative_prompt_embeds"))
    teacher = FlowTeacher(pipe, tiny_sd.GUIDANCE)
    found = teacher.sample(given["latents"], Conditions(states, empty), 3)
    torch.testing.assert_close(found, tiny_sd.draw(pipe, 3)[-1], rtol=0, atol=1e-10)


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.proof("reference")
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_the_latents_are_those_of_the_authors_pipeline(case):
    steps, scale = case
    expected = json.loads(GOLDEN.read_text())["runs"][f"{steps} {scale}"]
    pipe, seen = tiny_sd.make(dx.RectifiedFlowEulerScheduler()), []

    def note(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(tiny_sd.numbers(kwargs["latents"]))
        return kwargs

    pipe(
        **tiny_sd.inputs(),
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
        callback_on_step_end=note,
    )
    assert len(seen) == steps
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Reflow for 2 steps, and distillation of that for 1."""
    root = tmp_path_factory.mktemp("instaflow")
    given = few(root)

    def train(output: str, **changes: Any) -> None:
        values = {**given, "output_dir": root / output, "learning_rate": 1e-3, **changes}
        main([f"--{name}={value}" for name, value in values.items()] + ["--validation_prompts", PROMPT])

    train("my-reflow", max_train_steps=2, guidance_scale=3)
    train("my-instaflow", max_train_steps=1, stage="distill", pretrained_model_name_or_path=root / "my-reflow",
          guidance_scale=1.5)  # fmt: skip
    return root


@loads
def test_the_result_is_a_stock_pipeline_of_one_step_here_and_without_this_package(trained, tmp_path):
    folder = trained / "my-instaflow"
    pipe = dx.Pipeline.from_pretrained(folder, dtype=torch.float32)
    assert type(pipe).__name__ == "StableDiffusionPipeline" and type(pipe.scheduler) is dx.RectifiedFlowEulerScheduler
    call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"}
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images
    run_fresh(f"""
        import sys
        sys.modules["diffusers_ext"] = None
        import torch
        from diffusers import StableDiffusionPipeline
        pipe = StableDiffusionPipeline.from_pretrained({str(folder)!r}, dtype=torch.float32, trust_remote_code=True)
        torch.save(pipe({PROMPT!r}, generator=torch.Generator().manual_seed(0), **{call!r}).images, {str(tmp_path / "x")!r})
    """)
    torch.testing.assert_close(torch.load(tmp_path / "x"), expected, rtol=0, atol=1e-5)


@loads
def test_pairs_are_of_the_teacher_of_each_stage_and_never_pushed(trained):
    notes = [
        json.loads((trained / name / "checkpoint-pairs" / "pairs.json").read_text())
        for name in ("my-reflow", "my-instaflow")
    ]
    assert notes[0]["teacher"] != notes[1]["teacher"]
    assert [note["guidance_scale"] for note in notes] == [3.0, 1.5]
    assert not any("pairs" in name for name in dx.hub.upload_contents(trained / "my-reflow"))
    assert list((trained / "my-instaflow" / "samples").glob("step-*.png"))
    assert (trained / "my-instaflow" / "README.md").is_file()


@loads
@pytest.mark.parametrize(("flags", "message"), [
    ([], "exactly one of"), (["--prompts=a", "--num_pairs=0"], "`--num_pairs` is 0"),
    (["--prompts=a", "--teacher_steps=0"], "`--teacher_steps` is 0"),
    (["--prompts=a", "--proportion_empty_prompts=-1"], "proportion_empty_prompts"),
])  # fmt: skip
def test_bad_arguments_of_the_trainer_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--pretrained_model_name_or_path=x", "--stage=reflow", *flags])


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(trained, monkeypatch):
    from diffusers_ext.cards import method_card

    monkeypatch.chdir(trained)
    card = method_card("instaflow")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "card", "exec"), names)
    assert names["image"].size == (32, 32)
    known = parse_args(["--pretrained_model_name_or_path=x", "--prompts=a", "--stage=reflow"])
    for flag in re.findall(r"--(\w+)", re.findall(r"```bash\n(.*?)```", card, flags=re.DOTALL)[0]):
        assert hasattr(known, flag)
    assert "2309.06380" in card
