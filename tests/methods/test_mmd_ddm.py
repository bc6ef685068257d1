"""MMD-DDM, by the five proofs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

import diffusers_ext as dx
from diffusers_ext.metrics import EfficientNetLite0
from diffusers_ext.training._chain import backpropagate, last_sample, pipeline_loop
from diffusers_ext.training._data import GlobalBatches, generator_for
from diffusers_ext.training.train_mmd_ddm import (
    KERNELS,
    MMDTask,
    gathered,
    load_extractor,
    main,
    mmd_loss,
    parse_args,
    shown,
)
from tests.card_snippets import run_card
from tests.common.suite import CommonCase
from tests.tiny_models import unconditional

exact = pytest.mark.proof("exact")
GOLDEN = Path(__file__).parents[1] / "golden" / "mmd_ddm.json"


def grey_pictures(folder: Path, side: int = 16) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, side, side), dtype=np.uint8)
    np.savez(folder / "grey.npz", image=pixels)
    return folder / "grey.npz"


def inputs(folder: Path) -> dict:
    if not (folder / "ddpm").is_dir():
        unconditional(folder / "ddpm")
    return {
        "pretrained_model_name_or_path": folder / "ddpm", "train_data_dir": grey_pictures(folder), "resolution": 16,
        "num_inference_steps": 3, "train_batch_size": 4, "num_validation_images": 1,
    }  # fmt: skip


COMMON = CommonCase(inputs=inputs)


def flags(folder: Path, output: str, **more) -> list[str]:
    values = {**inputs(folder), "output_dir": folder / output, "max_train_steps": 2, "seed": 3, **more}
    return [
        part
        for name, value in values.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


# --- exact -----------------------------------------------------------------------------------------------------------


def by_hand(f, g, kind: str) -> float:
    def k(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True)) / len(a)
        if kind == "rbf":
            return math.exp(-sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))
        return (dot + 1) ** (3 if kind == "poly3" else 1)

    m = len(f)
    within = sum(k(each[i], each[j]) for each in (f, g) for i in range(m) for j in range(m) if i != j)
    return within / (m * (m - 1)) - 2 * sum(k(a, b) for a in f for b in g) / m**2


@exact
@pytest.mark.parametrize("kind", KERNELS)
def test_the_estimator_is_the_double_loop_and_has_no_bias(kind):
    generator = torch.Generator().manual_seed(0)
    f, g = torch.randn(2, 6, 3, generator=generator).double()
    assert mmd_loss(f, g, kind).item() == pytest.approx(by_hand(f.tolist(), g.tolist(), kind), rel=1e-9)
    draws = torch.stack([mmd_loss(*torch.randn(2, 8, 3, generator=generator), kind) for _ in range(2000)])
    assert abs(draws.mean()) < 3 * draws.std() / 2000**0.5
    assert (draws < 0).double().mean() > 0.2
    far = torch.stack([mmd_loss(torch.randn(8, 3, generator=generator) + 1, torch.randn(8, 3, generator=generator), kind) for _ in range(200)])  # fmt: skip
    assert far.mean() > 3 * far.std() / 200**0.5


@exact
def test_saturated_pixels_keep_their_gradient():
    sample = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
    pixels = shown(sample)
    assert pixels.tolist() == [0.0, 0.5, 1.0]
    assert torch.autograd.grad(pixels.sum(), sample)[0].tolist() == [0.5, 0.5, 0.5]


def tiny_judge(folder: Path) -> Path:
    """A judge that is cheap to load."""
    torch.manual_seed(0)
    dx.FashionJudge(channels=(4, 4, 4), width=5).save_pretrained(folder / "judge")
    return folder / "judge"


class Flat(torch.nn.Module):
    """Features that need no certain size."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([pixels.flatten(2).mean(2), pixels.flatten(2).square().mean(2), pixels[:, 0, :2, 0]], dim=1)


@exact
def test_the_short_run_is_ddim_on_even_timesteps(tmp_path):
    task = MMDTask(parse_args(flags(tmp_path, "out", feature_extractor=tiny_judge(tmp_path))))
    task.scheduler.set_timesteps(5)
    assert task.scheduler.timesteps.tolist() == [800, 600, 400, 200, 0]
    assert task.scheduler.final_alpha_cumprod == 1 and not task.scheduler.config.clip_sample


@exact
def test_the_gradient_of_the_whole_run(tmp_path):
    """Through the checkpointed run, and through one graph, by every weight of the network."""
    task = MMDTask(parse_args(flags(tmp_path, "out", feature_extractor=tiny_judge(tmp_path))))
    unet = task.pipeline.unet.double()
    parameters, features = list(unet.parameters()), Flat()
    real = features(torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)).double())

    def run(checkpoint):
        call = {"batch_size": 4, "num_inference_steps": 3, "generator": [generator_for(0, i) for i in range(4)]}
        return backpropagate(
            pipeline_loop(task.short, call), task.scheduler, lambda x: mmd_loss(features(shown(x)), real), parameters,
            checkpoint=checkpoint,
        ).gradients  # fmt: skip

    one, other = run(True), run(False)
    scale = max(gradient.abs().max().item() for gradient in other)
    assert max((a - b).abs().max().item() for a, b in zip(one, other, strict=True)) < 1e-6 * scale


@exact
def test_the_trainer_is_the_papers_algorithm(tmp_path, monkeypatch):
    """Two optimizer steps against a loop written out."""
    monkeypatch.setattr("diffusers_ext.training.train_mmd_ddm.load_extractor", lambda name: (Flat(), Flat()))
    main(flags(tmp_path, "ours", learning_rate=1e-3))
    ours = DDIMPipeline.from_pretrained(tmp_path / "ours").unet

    unet = DDPMPipeline.from_pretrained(tmp_path / "ddpm").unet.train()
    pictures = torch.from_numpy(np.load(tmp_path / "grey.npz")["image"]).float()[:, None] / 255
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.0)
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for batch in GlobalBatches(8, 4, 3, 0, 2):
        x = torch.stack([torch.randn(1, 16, 16, generator=generator_for(3, sample)) for _, sample in batch])
        for t, s in ((666, 333), (333, 0), (0, None)):
            after = 1.0 if s is None else bar[s]
            eps = unet(x, t).sample
            clean = (x - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()
            x = after**0.5 * clean + (1 - after) ** 0.5 * eps
        pixels = x / 2 + 0.5
        pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
        loss = mmd_loss(Flat()(pixels), Flat()(pictures[[row for row, _ in batch]]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.5)
        optimizer.step()
    for (name, one), other in zip(ours.named_parameters(), unet.parameters(), strict=True):
        assert (one - other).abs().max() < 2e-5, name


@exact
def test_processes_share_one_discrepancy():
    """The gradients of two processes, each by its own half, add up to that of the whole batch."""
    f, g = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    whole = f.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(mmd_loss(whole, g), whole)
    for rank in range(2):
        own = f[3 * rank : 3 * rank + 3].clone().requires_grad_()
        world = SimpleNamespace(num_processes=2, process_index=rank, gather=lambda _: f)
        loss = mmd_loss(gathered(own, world), g)
        assert torch.allclose(torch.autograd.grad(loss, own)[0], wanted[3 * rank : 3 * rank + 3], atol=1e-6)
    assert gathered(f, SimpleNamespace(num_processes=1)) is f


@exact
def test_extractors_are_differentiable_and_give_what_metrics_measure(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    grey, colour = torch.rand(2, 1, 28, 28), torch.rand(2, 3, 32, 32)
    for name, pictures, wanted in (
        (dx.zoo_path("fashion-judge"), grey, dx.FashionJudge.from_pretrained(dx.zoo_path("fashion-judge")).features(grey)),
        (dx.zoo_path("avatars-judge"), colour, dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge")).features(colour)),
        ("efficientnet", colour, EfficientNetLite0.from_package().features(colour)),
    ):  # fmt: skip
        leaf = pictures.clone().requires_grad_()
        found = load_extractor(str(name))[1](leaf)
        assert torch.allclose(found, wanted, atol=1e-4)
        assert torch.autograd.grad(found.sum(), leaf)[0].abs().max() > 0
    config = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16, projection_dim=4)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    assert load_extractor(str(tmp_path))[1](grey).shape == (2, 4)
    with pytest.raises(ValueError, match=r"`--feature_extractor` is .*, a UNet2DModel"):
        unconditional(tmp_path / "ddpm")
        load_extractor(str(tmp_path / "ddpm" / "unet"))


@exact
@pytest.mark.parametrize(
    ("flag", "value"), [("num_inference_steps", 0), ("train_batch_size", 1), ("gradient_accumulation_steps", 2), ("mixed_precision", "fp16")]
)  # fmt: skip
def test_bad_arguments_are_refused(flag, value, tmp_path):
    with pytest.raises(ValueError, match=f"`--{flag}` is"):
        parse_args([*flags(tmp_path, "out"), f"--{flag}", str(value)])


# --- reference -------------------------------------------------------------------------------------------------------


def golden_features() -> tuple[torch.Tensor, torch.Tensor]:
    wave = torch.arange(15, dtype=torch.float64)
    return torch.sin(wave).reshape(5, 3), torch.cos(1.7 * wave).reshape(5, 3)


def golden_network(x: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
    return 0.5 * x + 0.3 * torch.sin(3 * x + torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1, 1) / 150)


def golden_noise() -> torch.Tensor:
    return 1.5 * torch.sin(2.3 * torch.arange(8, dtype=torch.float64) + 1).reshape(2, 1, 2, 2)


@pytest.mark.proof("reference")
def test_discrepancies_and_runs_are_those_of_the_authors_code():
    wanted = json.loads(GOLDEN.read_text())
    f, g = golden_features()
    for kind in KERNELS:
        assert mmd_loss(f, g, kind).item() == pytest.approx(wanted["mmd"][kind], rel=1e-6)

    def loop(scheduler):
        scheduler.set_timesteps(5)
        x = golden_noise()
        for t in scheduler.timesteps:
            x = scheduler.step(golden_network(x, t), t, x).prev_sample
        return x

    found = last_sample(loop, DDIMScheduler(clip_sample=False))
    assert found.flatten().tolist() == pytest.approx(wanted["sample"], rel=1e-5)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_the_result_is_a_stock_pipeline_for_as_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_ext.training.train_mmd_ddm.load_extractor", lambda name: (Flat(), Flat()))
    for output, more in (("replayed", {}), ("graph", {"keep_graph": True})):
        main(flags(tmp_path, output, max_train_steps=1, **more))
    one, other = (DDIMPipeline.from_pretrained(tmp_path / name) for name in ("replayed", "graph"))
    pictures = [pipe(2, [generator_for(0, i) for i in range(2)], num_inference_steps=3, output_type="np").images for pipe in (one, other)]  # fmt: skip
    assert pictures[0].shape == (2, 16, 16, 1) and abs(pictures[0] - pictures[1]).max() < 1e-3
    for a, b in zip(one.unet.parameters(), other.unet.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6
    assert list((tmp_path / "graph" / "samples").glob("step-*.png"))
    assert "DDIMPipeline" in (tmp_path / "graph" / "README.md").read_text()


# --- card ------------------------------------------------------------------------------------------------------------


@pytest.mark.proof("card")
def test_the_snippets_of_the_card_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card, names = run_card("mmd_ddm")
    assert names["image"].size == (28, 28)
    assert "2301.07969" in card
