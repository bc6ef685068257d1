"""PeRFlow, by the five proofs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.training._teacher import Conditions, Teacher
from diffusers_ext.training.train_perflow import DELTA, main, parse_args, perflow_loss
from tests import tiny_sd
from tests.common.suite import CommonCase
from tests.fresh import run_fresh

GOLDEN = Path(__file__).parents[1] / "golden" / "perflow.json"

exact = pytest.mark.proof("exact")
reference = pytest.mark.proof("reference")
loads = pytest.mark.proof("loads")

# --- what the golden numbers are of ----------------------------------------------------------------------------------

PROCESS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
    "clip_sample": False, "steps_offset": 1,
}  # fmt: skip
GRIDS = [(4, 4), (4, 5), (4, 6), (4, 8), (4, 11), (3, 3), (3, 7), (1, 1), (1, 6), (5, 12), (2, 1000)]
RUNS = [
    ("ddim_eps", 4, 4), ("ddim_eps", 4, 7), ("ddim_eps", 3, 8), ("ddim_eps", 1, 5), ("diff_eps", 4, 4), ("diff_eps", 4, 6),
    ("diff_eps", 5, 9), ("diff_eps", 1, 1), ("velocity", 4, 5), ("velocity", 1, 3),
]  # fmt: skip
TIMES = [1.0, 0.999, 0.801, 0.8, 0.7501, 0.75, 0.667, 0.666, 0.5, 0.4999, 0.25, 0.2, 0.1, 0.001]
SOLVED = [(1.0, 5), (7.5, 5), (7.5, 10)]


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    return 0.5 * x + 0.4 * torch.sin(2 * x + float(t) / 200)


def start() -> torch.Tensor:
    return torch.sin(torch.arange(24, dtype=torch.float64)).reshape(1, 2, 3, 4)


def numbers(x: torch.Tensor) -> list[float]:
    return [x.mean().item(), x.std().item(), *x.flatten()[:3].tolist()]


def noised_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = start().float()
    return torch.cat([x, 2 * x, -x]), torch.cos(torch.arange(72.0)).reshape(3, 2, 3, 4), torch.tensor([1, 500, 1000])


def solver_inputs() -> dict[str, torch.Tensor]:
    given = tiny_sd.inputs()
    x = given["latents"]
    return {
        "x": torch.cat([x, x.flip(-1), -x]), "start": torch.tensor([1.0, 0.5, 0.25]), "end": torch.tensor([0.75, 0.25, 0.0]),
        "states": given["prompt_embeds"].repeat(3, 1, 1), "empty": given["negative_prompt_embeds"].repeat(3, 1, 1),
    }  # fmt: skip


# --- for the common rules --------------------------------------------------------------------------------------------


def run(scheduler: Any, number: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A sampling loop on a network given by formula."""
    scheduler.set_timesteps(number)
    x = torch.randn((2, 3, 4, 4), generator=generator).to(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


COMMON = CommonCase(
    process="other",
    inputs=run,
    settings=[
        {"prediction_type": "diff_eps", "num_time_windows": 2},
        {"prediction_type": "velocity", "num_time_windows": 1},
    ],
)


def perflow(kind: str = "ddim_eps", windows: int = 4, **more: Any) -> Any:
    return dx.PeRFlowScheduler(prediction_type=kind, num_time_windows=windows, **more)


def ends(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn((2, count, 4, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z[0], z[1]


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("kind", ["ddim_eps", "diff_eps", "velocity"])
@pytest.mark.parametrize("windows", [1, 4, 5])
def test_the_target_leads_from_everywhere_on_the_line_to_its_end(kind, windows):
    scheduler, each = perflow(kind, windows), 5
    scheduler.set_timesteps(windows * each)
    for window in range(windows):
        z_s, z_e = ends(1, window)
        t = scheduler.timesteps[window * each : window * each + 1] / 1000
        first, last = scheduler.windows_of(t)
        target, x = scheduler.target(z_s, z_e, first, last), z_s
        for number, t in enumerate(scheduler.timesteps[window * each : (window + 1) * each]):
            line = torch.lerp(z_s, z_e, ((t / 1000 - first) / (last - first)).double())
            assert number == 0 or (x - line).abs().max() < 1e-5, "the states lie on the line"
            x = scheduler.step(target, t, x, return_dict=False)[0]
        assert (x - z_e).abs().max() < 1e-5 * z_s.abs().max()


@exact
def test_one_window_of_velocities_is_euler_on_a_rectified_flow():
    flow = FlowMatchEulerDiscreteScheduler()
    for number in (1, 4, 8):
        scheduler = perflow("velocity", 1)
        scheduler.set_timesteps(number)
        flow.set_timesteps(sigmas=[1 - i / number for i in range(number)])
        assert flow.timesteps.tolist() == scheduler.timesteps.tolist()
        x = y = start().float()
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
            y = flow.step(network(y, t), flow.timesteps[flow.step_index or 0], y, return_dict=False)[0]
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@exact
def test_as_many_windows_as_steps_are_ddim():
    ddim = DDIMScheduler(**PROCESS, timestep_spacing="trailing")
    for number in (2, 5, 10):
        scheduler = perflow("ddim_eps", number)
        scheduler.set_timesteps(number)
        ddim.set_timesteps(number)
        assert (scheduler.timesteps - 1).tolist() == ddim.timesteps.tolist()
        x = y = start()
        for ours, theirs in zip(scheduler.timesteps, ddim.timesteps, strict=True):
            x = scheduler.step(network(x, ours), ours, x, return_dict=False)[0]
            y = ddim.step(network(y, ours), theirs, y, return_dict=False)[0]
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@exact
def test_a_time_between_two_windows_is_in_the_one_that_it_starts():
    first, last = perflow().windows_of(torch.tensor([1.0, 0.751, 0.75, 0.74999, 0.5, 0.25, 0.001]))
    assert first.tolist() == [1.0, 1.0, 0.75, 0.75, 0.5, 0.25, 0.25]
    assert last.tolist() == [0.75, 0.75, 0.5, 0.5, 0.25, 0.0, 0.0]
    for t in (0.0, -0.1, 1.01):
        with pytest.raises(ValueError, match="allowed are times over 0 and up to 1"):
            perflow().windows_of(torch.tensor([0.5, t]))


@exact
def test_the_loss_vanishes_for_the_target_alone():
    scheduler, (z_s, z_e), t = perflow(), ends(3), torch.tensor([0.9, 0.5, 0.001])
    target = scheduler.target(z_s, z_e, *scheduler.windows_of(t))
    asked = []

    def denoise(z, timesteps):
        asked.append((z, timesteps))
        return target

    assert perflow_loss(denoise, scheduler, z_s, z_e, t) == 0
    z, timesteps = asked[0]
    assert torch.allclose(timesteps, 1000 * t)
    torch.testing.assert_close(z[1], z_s[1])  # 0.5 starts a window
    torch.testing.assert_close(z[0], torch.lerp(z_s[0], z_e[0], 0.4), rtol=0, atol=1e-6)  # 1 to 0.75
    assert perflow_loss(lambda z, t: target + 0.5, scheduler, z_s, z_e, t).item() == pytest.approx(0.25)


@exact
def test_too_few_steps_and_the_base_models_type_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps"):
        perflow().set_timesteps(3)
    with pytest.raises(ValueError, match="prediction_type"):
        dx.PeRFlowScheduler.from_config(DDIMScheduler(prediction_type="epsilon").config)
    with pytest.raises(ValueError, match="t_clean"):
        perflow(t_clean=0.25)


@exact
def test_a_difference_of_weights_is_carried_to_another_fine_tune():
    torch.manual_seed(0)
    base, student, other = (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(3))
    delta = dx.delta_weights(student, base)
    assert "1.num_batches_tracked" not in delta
    wanted = {name: other.state_dict()[name] + delta[name] for name in delta}
    dx.merge_delta_weights(other, delta)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in wanted.items())
    dx.merge_delta_weights(base, delta)
    torch.testing.assert_close(base.state_dict(), student.state_dict())
    dx.merge_delta_weights(base, delta, scale=-1.0)
    half = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
    assert dx.merge_delta_weights(half, delta)[0].weight.dtype == torch.float16
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for wrong in (
        {name: value for name, value in delta.items() if "bias" not in name},
        delta | {"more": torch.ones(1)},
    ):
        with pytest.raises(ValueError, match="`delta` does not have the tensors of `model`"):
            dx.merge_delta_weights(other, wrong)
    with pytest.raises(ValueError, match="no such file"):
        dx.merge_delta_weights(other, "nowhere.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@reference
def test_the_timesteps_are_the_authors(golden):
    for windows, number in GRIDS:
        scheduler = perflow(windows=windows)
        scheduler.set_timesteps(number)
        assert scheduler.timesteps.tolist() == golden["grids"][f"{windows} {number}"]
    assert golden["grids"]["4 4"] == [1000, 750, 500, 250]


@reference
def test_the_windows_are_the_authors(golden):
    times = torch.tensor(TIMES)
    for windows, (first, last, at_first, at_last) in golden["windows"].items():
        scheduler = perflow(windows=int(windows))
        ours = scheduler.windows_of(times)
        assert [edge.tolist() for edge in ours] == [first, last]
        for edge, alphas in zip(ours, (at_first, at_last), strict=True):
            assert scheduler.alphas_cumprod[scheduler.indices_of(edge)].tolist() == alphas


@reference
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_the_states_are_the_authors(golden, case):
    """Theirs are of coefficients in float32."""
    kind, windows, number = case
    scheduler, x = perflow(kind, windows), start()
    scheduler.set_timesteps(number)
    for t, expected in zip(scheduler.timesteps, golden["runs"][f"{kind} {windows} {number}"], strict=True):
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        assert numbers(x) == pytest.approx(expected, abs=2e-5, rel=2e-5)


@reference
def test_noised_data_are_the_authors(golden):
    assert numbers(perflow().add_noise(*noised_inputs())) == pytest.approx(golden["noised"], abs=1e-6)


@reference
def test_the_teachers_solution_is_the_authors(golden):
    """In the last window theirs takes its sub-steps from one timestep on to -1, whose level it takes for that of 0."""
    pipe, given = tiny_sd.make(DDIMScheduler(**PROCESS)), solver_inputs()
    teacher, scheduler = Teacher(pipe), perflow()
    first, last = scheduler.indices_of(given["start"]), scheduler.indices_of(given["end"])
    conditions = Conditions({"encoder_hidden_states": given["states"]}, {"encoder_hidden_states": given["empty"]})
    for (scale, steps), expected in zip(SOLVED, golden["solved"], strict=True):
        found = teacher.solve(given["x"], first, last, conditions, steps, scale)
        for row, theirs, within in zip(found, expected, (1e-5, 1e-5, 5e-3), strict=True):
            assert numbers(row) == pytest.approx(theirs, abs=within, rel=within)


# --- loads -----------------------------------------------------------------------------------------------------------

PROMPT = "a person with tan skin and short brown hair, a happy smile, yellow clothes"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """On two prompts, of which the teacher makes pictures: 2 steps, and 1 step resumed to 2. On pictures: 1 step."""
    root = tmp_path_factory.mktemp("perflow")
    (root / "prompts.txt").write_text(f"{PROMPT}\na person\n")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(root / "pictures.npz", image=pictures, text=np.array(["a person"] * 3))

    def train(output: str, steps: int, *flags: str) -> None:
        main([
            f"--pretrained_model_name_or_path={dx.zoo_path('avatars-sd')}", f"--output_dir={root / output}",
            f"--max_train_steps={steps}", "--train_batch_size=2", "--learning_rate=1e-3", "--windows=2", "--solving_steps=1",
            "--seed=3", *flags,
        ])  # fmt: skip

    prompts = (
        f"--prompts={root / 'prompts.txt'}",
        "--teacher_steps=2",
        "--guidance_scale=3",
        "--checkpointing_steps=1",
    )
    shared = (*prompts, f"--pairs_dir={root / 'pairs'}", "--use_ema")
    train("straight", 2, *shared, "--save_delta_weights")
    train("resumed", 1, *shared)
    train("resumed", 2, *shared, "--resume_from_checkpoint=latest")
    shown = ("--validation_prompts", PROMPT, "--num_validation_images=1", "--validation_inference_steps=2")
    train("pictures", 1, f"--train_data_dir={root / 'pictures.npz'}", "--cfg_sync", "--cache_latents", "--center_crop",
          "--perflow_type=velocity", *shown)  # fmt: skip
    return root


@loads
def test_a_resumed_training_is_bit_equal(trained):
    straight, resumed = (load_file(trained / name / "unet" / WEIGHTS) for name in ("straight", "resumed"))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    base = load_file(Path(dx.zoo_path("avatars-sd")) / "unet" / WEIGHTS)
    assert any(not torch.equal(value.float(), base[name].float()) for name, value in straight.items())
    assert (trained / "pictures" / "samples" / "step-000001.png").is_file()


WEIGHTS = "diffusion_pytorch_model.safetensors"


@loads
def test_the_result_loads_here_and_without_this_package(trained, tmp_path):
    pipe = dx.Pipeline.from_pretrained(trained / "straight", dtype=torch.float32)
    assert type(pipe.scheduler) is dx.PeRFlowScheduler
    assert pipe.scheduler.config.num_time_windows == 2 and pipe.scheduler.config.prediction_type == "ddim_eps"
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images
    run_fresh(f"""
        import sys
        sys.modules["diffusers_ext"] = None
        import torch
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained({str(trained / "straight")!r}, dtype=torch.float32, trust_remote_code=True)
        torch.save(pipe({PROMPT!r}, generator=torch.Generator().manual_seed(0), **{call!r}).images, {str(tmp_path / "x")!r})
    """)
    torch.testing.assert_close(torch.load(tmp_path / "x"), expected, rtol=0, atol=1e-5)


@loads
def test_the_difference_of_weights_makes_the_base_the_result(trained):
    pipe = dx.Pipeline.from_pretrained(dx.zoo_path("avatars-sd"), dtype=torch.float32)
    dx.merge_delta_weights(pipe.unet, trained / "straight" / DELTA)
    wanted = load_file(trained / "straight" / "unet" / WEIGHTS)
    for name, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


@loads
def test_bad_arguments_of_the_trainer_are_refused():
    start = ["--pretrained_model_name_or_path=x"]
    for flags, message in (
        ([], "exactly one of `--prompts`, `--train_data_dir` and `--dataset_name`"),
        (["--prompts=a", "--train_data_dir=b"], "exactly one of"),
        (["--prompts=a", "--windows=0"], "`--windows` is 0"),
        (["--prompts=a", "--windows=5"], "`--validation_inference_steps` is 4"),
        (["--prompts=a", "--guidance_scale=0.5"], "`--guidance_scale` is 0.5"),
        (["--prompts=a", "--proportion_empty_prompts=2"], "proportion_empty_prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_args([*start, *flags])


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippet_of_the_card_runs(trained, monkeypatch):
    from diffusers_ext.cards import method_card

    monkeypatch.chdir(trained)
    (trained / "my-perflow").symlink_to(trained / "straight")
    card = method_card("perflow")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet.replace("num_inference_steps=4", "num_inference_steps=2"), "card", "exec"), names)
    assert names["image"].size == (32, 32)
    for flag in re.findall(r"--(\w+)", re.findall(r"```bash\n(.*?)```", card, flags=re.DOTALL)[0]):
        assert hasattr(parse_args(["--pretrained_model_name_or_path=x", "--prompts=a"]), flag)
    assert "2405.07510" in card
