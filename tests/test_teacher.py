"""The shared teacher, its pairs, and what the training loop offers to distillations: callbacks and the optimizer."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

from diffusers_ext.training import _loop
from diffusers_ext.training._data import SampleNoise, collate
from diffusers_ext.training._loop import Callback, Task, add_run_arguments, train
from diffusers_ext.training._teacher import (
    CLEAN,
    Conditions,
    Pairs,
    Process,
    Teacher,
    guidance_embedding,
    substeps,
)
from tests import tiny_sd, unets
from tests.common.models import dit
from tests.tiny_models import tiny_vae

TYPES = ("epsilon", "v_prediction", "sample")


def ddim(kind: str = "epsilon", **more: Any) -> DDIMScheduler:
    return DDIMScheduler(prediction_type=kind, clip_sample=False, steps_offset=1, timestep_spacing="trailing", **more)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditions(count: int) -> Conditions:
    given = tiny_sd.inputs()
    waves = torch.linspace(0.5, 1.5, count, dtype=torch.float64).reshape(-1, 1, 1)
    return Conditions(
        {"encoder_hidden_states": waves * given["prompt_embeds"]},
        {"encoder_hidden_states": given["negative_prompt_embeds"].expand(count, -1, -1)},
    )


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(tiny_sd.make(ddim()), tiny_sd.GUIDANCE)


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_a_jump_is_a_step_of_ddim_and_each_sample_has_its_own_times(kind):
    stock = ddim(kind)
    stock.set_timesteps(10)
    process, x, prediction = Process.of(stock), draws(3, 2, 4, 4), draws(3, 2, 4, 4, seed=1)
    t, s = torch.tensor([999, 499, 99]), torch.tensor([899, 399, CLEAN])
    found = process.jump(x, prediction, t, s)
    for i in range(3):
        step = stock.step(prediction[i], int(t[i]), x[i]).prev_sample
        torch.testing.assert_close(found[i], step, rtol=0, atol=2e-6)  # theirs is of float32 tables


@pytest.mark.parametrize("kind", TYPES)
def test_predictions_data_and_noise_are_one_another(kind):
    process, data, noise = Process.of(ddim(kind)), draws(3, 2, 4, 4), draws(3, 2, 4, 4, seed=1)
    t = torch.tensor([999, 500, 0])
    x = process.add_noise(data, noise, t)
    found = process.data_and_noise(x, process.prediction(data, noise, t), t)
    torch.testing.assert_close(found, (data, noise), rtol=0, atol=1e-9)
    assert torch.equal(process.add_noise(data, noise, torch.tensor(CLEAN)), data)


def test_jumped_data_lead_to_where_two_steps_led():
    process, x, s = Process.of(ddim()), draws(2, 2, 4, 4), torch.tensor([100, CLEAN])
    t, end = torch.tensor([900, 300]), draws(2, 2, 4, 4, seed=2)
    data = process.jumped_data(x, end, t, s)
    alpha, sigma = process.alpha_sigma(t, x)
    torch.testing.assert_close(process.jump(x, (x - alpha * data) / sigma, t, s), end, rtol=0, atol=1e-9)
    assert torch.equal(data[1], end[1])


def test_substeps_are_even_and_end_where_they_should():
    found = substeps(torch.tensor([999, 10]), torch.tensor([CLEAN, 4]), 4)
    assert found.tolist() == [[999, 10], [749, 8], [499, 7], [249, 6], [-1, 4]]


def test_a_scheduler_without_a_beta_schedule_is_refused():
    with pytest.raises(ValueError, match="alphas_cumprod"):
        Process.of(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="prediction_type"):
        Process(torch.linspace(0.9, 0.1, 5), "flow_prediction")


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_a_sample_is_that_of_the_stock_pipeline():
    pipe = tiny_sd.make(ddim())
    given = tiny_sd.inputs()
    states, empty = ({"encoder_hidden_states": given[name]} for name in ("prompt_embeds", "negative_prompt_embeds"))
    found = Teacher(pipe, tiny_sd.GUIDANCE).sample(given["latents"], Conditions(states, empty), 5)
    torch.testing.assert_close(found, tiny_sd.draw(pipe, 5)[-1], rtol=0, atol=1e-5)


def test_guidance_and_times_of_each_sample_are_its_own(teacher):
    x, both = draws(2, 4, 8, 8), conditions(2)
    t, s, scales = torch.tensor([900, 300]), torch.tensor([500, CLEAN]), torch.tensor([1.0, 5.0])
    together = teacher.solve(x, t, s, both, 3, scales)
    for i in range(2):
        one = Conditions(
            *({"encoder_hidden_states": part["encoder_hidden_states"][i : i + 1]} for part in (both.given, both.empty))
        )
        alone = teacher.solve(x[i : i + 1], int(t[i]), int(s[i]), one, 3, float(scales[i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)
    dropped = both.dropped(torch.tensor([True, False]))
    plain = teacher.predict(x, t, dropped, 1.0)
    torch.testing.assert_close(plain[:1], teacher.predict(x, t, both, torch.tensor([0.0, 0.0]))[:1])
    torch.testing.assert_close(plain[1:], teacher.predict(x, t, both, 1.0)[1:])


def test_the_teacher_is_frozen_and_its_student_is_not(teacher):
    student = teacher.student()
    assert student is not teacher.denoiser and not any(p.requires_grad for p in teacher.denoiser.parameters())
    x, given = draws(1, 4, 8, 8), conditions(1).given
    teacher.call(student, x, torch.tensor(500), given).square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.denoiser.parameters())
    with pytest.raises(ValueError, match="guidance_scale"):
        Teacher(tiny_sd.make(ddim()), 0.5)


def test_a_denoiser_that_takes_the_scale_is_called_once():
    pipe = tiny_sd.make(ddim())
    pipe.unet = unets.fill(UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=16)).double()
    teacher, x, both = Teacher(pipe), draws(2, 4, 8, 8), conditions(2)
    batches = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    found = teacher.predict(x, torch.tensor(500), both, torch.tensor([3.0, 8.0]))
    assert batches == [2]
    wanted = pipe.get_guidance_scale_embedding(torch.tensor([2.0, 7.0]), 16)
    torch.testing.assert_close(guidance_embedding(torch.tensor([2.0, 7.0]), 16), wanted)
    given = pipe.unet(x, 500, both.given["encoder_hidden_states"], timestep_cond=wanted.double()).sample
    torch.testing.assert_close(found, given)


def test_prompts_are_encoded_as_the_pipeline_does(avatars_sd):
    teacher = Teacher(copy.copy(avatars_sd), 3.0)
    found = teacher.encode(["a person", ""])
    given, empty = avatars_sd.encode_prompt(["a person", ""], "cpu", 1, True)
    assert torch.equal(found.given["encoder_hidden_states"], given)
    torch.testing.assert_close(found.empty["encoder_hidden_states"], empty)
    assert teacher.shape == (4, 16, 16)


def test_stable_diffusion_xl_gets_its_sizes_and_pooled_states(monkeypatch):
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )  # fmt: skip
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(vae=tiny_vae(3), unet=unets.fill(unet).double(), scheduler=ddim(), **none)
    pipe.set_progress_bar_config(disable=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    shapes = ((1, 5, 8), (1, 5, 8), (1, 8), (1, 8))
    encoded = {name: draws(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))}
    latents = draws(1, 4, 8, 8)
    call = {"latents": latents, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    wanted = pipe(**encoded, height=16, width=16, **call).images
    monkeypatch.setattr(pipe, "encode_prompt", lambda **kwargs: tuple(encoded.values()))
    teacher = Teacher(pipe, 2.0)
    torch.testing.assert_close(teacher.sample(latents, teacher.encode(["a"]), 4), wanted, rtol=1e-5, atol=1e-5)


def test_classes_of_a_dit_are_guided_by_none():
    pipe = DiTPipeline(dit(), tiny_vae(1), ddim())
    pipe.vae.register_to_config(shift_factor=None)  # which that pipeline leaves out
    pipe.set_progress_bar_config(disable=True)
    teacher, call = Teacher(pipe, 2.0), {"guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "pt"}
    noise = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(0))
    found = teacher.decode(teacher.sample(noise, teacher.encode([1, 5]), 4))
    wanted = pipe([1, 5], generator=torch.Generator().manual_seed(0), **call).images
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), wanted, rtol=0, atol=1e-5)
    assert not any(getattr(module, "dropout_prob", 0) for module in teacher.student().modules())


# --- pairs -----------------------------------------------------------------------------------------------------------


def pairs(folder: Path, count: int = 7, seed: int = 0, shard: int = 3) -> Pairs:
    return Pairs(folder, ["a", "b"], count, (1, 2, 2), seed, shard)


def doubled(noise: torch.Tensor, given: Any) -> torch.Tensor:
    return 2 * noise + torch.tensor([ord(text) for text in given]).reshape(-1, 1, 1, 1)


def made(rows: Pairs, solver: Any = doubled, **more: Any) -> Pairs:
    return rows.make(solver, lambda given: given, {"steps": 4, **more}, batch_size=2)


def test_pairs_are_functions_of_seed_and_number(tmp_path):
    one, more, other = made(pairs(tmp_path / "a")), made(pairs(tmp_path / "b", 5)), made(pairs(tmp_path / "c", seed=1))
    assert len(one) == 7 and sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "pairs-00000.safetensors", "pairs-00001.safetensors", "pairs-00002.safetensors", "pairs.json",
    ]  # fmt: skip
    for i in (0, 4, 2):
        row = one[i, 70 + i]
        assert row["condition"] == "ab"[i % 2] and (row["index"], row["sample_id"]) == (i, 70 + i)
        torch.testing.assert_close(row["clean"], 2 * row["noise"] + ord(row["condition"]))
        assert torch.equal(row["noise"], more[i]["noise"]) and not torch.equal(row["noise"], other[i]["noise"])
        assert not torch.equal(row["noise"], SampleNoise(0, torch.tensor([i])).normal(1, 2, 2)[0]), (
            "as in a training step"
        )
    assert collate([one[0], one[1]])["clean"].shape == (2, 1, 2, 2)


def test_pairs_are_made_once_and_go_on_after_a_kill(tmp_path):
    calls = []

    def killed(noise: torch.Tensor, given: Any) -> torch.Tensor:
        calls.append(len(noise))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return doubled(noise, given)

    with pytest.raises(KeyboardInterrupt):
        made(pairs(tmp_path / "a"), killed)
    rows, whole = made(pairs(tmp_path / "a"), killed), made(pairs(tmp_path / "b"))
    assert calls == [2, 1, 2, 1, 2, 1, 1]
    for i in range(7):
        assert torch.equal(rows[i]["clean"], whole[i]["clean"])
    made(pairs(tmp_path / "a"), None), made(pairs(tmp_path / "a", 5), None)  # nothing is left to make
    for wrong, name in ((pairs(tmp_path / "a", seed=5), "seed"), (pairs(tmp_path / "a", shard=4), "shard")):
        with pytest.raises(ValueError, match=f"with another {name}"):
            made(wrong)
    with pytest.raises(ValueError, match="with another steps"):
        made(pairs(tmp_path / "a"), steps=5)
    with pytest.raises(ValueError, match="`conditions` is empty"):
        Pairs(tmp_path, [], 3, (1,))


# --- the loop --------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """Two numbers that learn to be the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def save_pretrained(self, folder: str) -> None:
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True)
        save_file(self.state_dict(), Path(folder, "x.safetensors"))


class Watch(Callback):
    """Doubles gradients, and steps twice; its state is how often."""

    def __init__(self, line: Line) -> None:
        self.line, self.count, self.seen = line, 0, []

    def on_gradients(self) -> None:
        self.seen.append(self.line.weight.grad.clone())
        self.line.weight.grad *= 2
        self.count += 1

    def around_step(self, step: Any) -> None:
        step()
        if self.count % 2 == 0:
            step()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class LineTask(Task):
    on_device = ("x",)

    def __init__(self, callbacks: Callable[[Line], list[Callback]]) -> None:
        self.line = Line()
        self.trained = {"line": self.line}
        self.callbacks = callbacks(self.line)

    def dataset(self, args: Any) -> Any:
        class Rows(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 5

            def __getitem__(self, item: Any) -> dict[str, Any]:
                return {"x": torch.tensor([1.0, float(item[0])]), "index": item[0], "sample_id": item[1]}

        return Rows()

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        return (self.line.weight - batch["x"] + 0.1 * noise.normal(2)).square().mean()

    def save(self, folder: Path) -> None:
        pass


def trained(folder: Path, steps: int, callbacks: Callable[[Line], list[Callback]], *flags: str) -> LineTask:
    args = add_run_arguments(argparse.ArgumentParser()).parse_args([
        f"--output_dir={folder}", f"--max_train_steps={steps}", "--train_batch_size=2", "--checkpointing_steps=3",
        "--learning_rate=0.1", "--gradient_accumulation_steps=2", *flags,
    ])  # fmt: skip
    args.train_data_dir, args.dataset_name = "x", None
    task = LineTask(callbacks)
    train(args, task)
    return task


def no_callbacks(line: Line) -> list[Callback]:
    return []


def watch(line: Line) -> list[Callback]:
    return [Watch(line)]


def test_callbacks_see_gradients_of_whole_steps_and_go_on_after_a_resume(tmp_path):
    plain, idle = (
        trained(tmp_path / name, 5, make)
        for name, make in (("plain", no_callbacks), ("idle", lambda line: [Callback()]))
    )
    assert torch.equal(plain.line.weight, idle.line.weight), "a callback that does nothing changes no bit"
    watched = trained(tmp_path / "watched", 5, watch)
    (seen,) = watched.callbacks
    assert seen.count == 5 and len(seen.seen) == 5
    assert not torch.equal(plain.line.weight, watched.line.weight)
    trained(tmp_path / "resumed", 3, watch)
    resumed = trained(tmp_path / "resumed", 5, watch, "--resume_from_checkpoint=latest")
    assert resumed.callbacks[0].count == 5 and len(resumed.callbacks[0].seen) == 2
    assert torch.equal(resumed.line.weight, watched.line.weight)


def test_eight_bit_adam_says_what_it_lacks(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`--use_8bit_adam` needs a GPU, and this run is on 'cpu'"):
        trained(tmp_path, 1, no_callbacks, "--use_8bit_adam")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install 'diffusers_ext\\[quant\\]'"):
        _loop._adamw_8bit()
    made = []
    monkeypatch.setitem(
        sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=lambda *a, **k: made.append((a, k)))
    )
    args = SimpleNamespace(use_8bit_adam=True, learning_rate=1.0, adam_beta1=0.9, adam_beta2=0.99, adam_weight_decay=0.1, adam_epsilon=1e-8)  # fmt: skip
    _loop._optimizer(args, [])
    assert made == [(([],), {"lr": 1.0, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8})]
