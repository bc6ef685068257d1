"""The training scripts: exact resume, samples keyed by number, checkpoints, data, and one run as users start it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import diffusers_ext as dx
from diffusers_ext.training import train_autoencoder, train_text_to_image
from diffusers_ext.training._data import GlobalBatches, ImageCaptionDataset, SampleNoise, load_dataset
from diffusers_ext.training._diffusion import diffusion_loss, flow_matching_loss

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve real pictures with captions, as .npz."""
    with np.load(ROOT / "benchmarks" / "data" / "avatars.npz") as avatars:
        file = tmp_path_factory.mktemp("data") / "few.npz"
        np.savez(file, image=avatars["image"][:12], text=avatars["caption"][:12])
    return file


def arguments(data, output_dir, **options):
    base = {
        "pretrained_model_name_or_path": dx.zoo_path("avatars-sd"), "train_data_dir": data, "resolution": 32,
        "output_dir": output_dir, "train_batch_size": 2, "max_train_steps": 4, "learning_rate": 1e-3, "seed": 3,
    }  # fmt: skip
    flags = []
    for name, value in {**base, **options}.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }


FULL = {
    "train_text_encoder": True,
    "use_ema": True,
    "snr_gamma": 5,
    "proportion_empty_prompts": 0.3,
    "checkpointing_steps": 2,
}


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(data, tmp_path):
    train_text_to_image.main(arguments(data, tmp_path / "straight", **FULL))
    train_text_to_image.main(arguments(data, tmp_path / "resumed", **{**FULL, "max_train_steps": 2}))
    train_text_to_image.main(arguments(data, tmp_path / "resumed", **FULL, resume_from_checkpoint="latest"))
    straight, resumed = digests(tmp_path / "straight"), digests(tmp_path / "resumed")
    assert straight == resumed
    assert {
        "checkpoint-4/unet_ema/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    } <= set(straight)
    start = digests(Path(dx.zoo_path("avatars-sd")))
    assert straight["unet/diffusion_pytorch_model.safetensors"] != start["unet/diffusion_pytorch_model.safetensors"]
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "straight") is not None
    card = (tmp_path / "straight" / "README.md").read_text()
    assert str(tmp_path) not in card and str(ROOT) not in card and "train_text_to_image" in card


def test_accumulation_sees_the_samples_of_the_larger_batch(data, tmp_path):
    results = []
    for name, options in (
        ("one", {"train_batch_size": 4}),
        ("two", {"train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ):
        train_text_to_image.main(arguments(data, tmp_path / name, max_train_steps=2, adam_epsilon=1e-3, **options))
        results.append(StableDiffusionPipeline.from_pretrained(tmp_path / name).unet.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], atol=1e-5, rtol=1e-4)


def test_checkpoints_are_pruned_after_the_new_one_is_safe(data, tmp_path):
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "max_train_steps": 3}
    train_autoencoder.main(arguments(data, tmp_path, **options))
    assert sorted(folder.name for folder in tmp_path.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-3"]
    vae = AutoencoderKL.from_pretrained(tmp_path)
    pixels = ImageCaptionDataset(np.load(data)["image"], [""] * 12, 32)
    with torch.no_grad():
        latents = vae.encode(torch.stack([pixels[i]["pixel_values"] for i in range(12)])).latent_dist.mode()
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("script", ["train_text_to_image", "train_autoencoder"])
def test_bad_arguments_are_refused_before_work(script, data, tmp_path):
    main = {"train_text_to_image": train_text_to_image.main, "train_autoencoder": train_autoencoder.main}[script]
    for options, message in (
        ({"train_batch_size": 0}, "`--train_batch_size` is 0"),
        ({"dataset_name": "x"}, "exactly one of `--train_data_dir` and `--dataset_name`"),
        ({"push_to_hub": True}, "needs `--hub_model_id`"),
        ({"ema_decay": 1.0}, "`--ema_decay` is 1.0"),
        ({"image_column": "picture"}, "`--image_column` is 'picture'"),
        ({"train_data_dir": tmp_path / "nowhere"}, "neither a folder of pictures nor an .npz file"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "'latest' and \\[\\]"),
        ({"resolution": 33}, "needs a multiple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments(data, tmp_path / "out", **options))
    assert not list(tmp_path.glob("out/*.json"))


def test_a_folder_with_captions_loads_like_the_array(data, tmp_path):
    few = np.load(data)
    for i, picture in enumerate(few["image"]):
        Image.fromarray(picture).save(tmp_path / f"{i:02d}.png")
    rows = [{"file_name": f"{i:02d}.png", "text": str(caption)} for i, caption in enumerate(few["text"])]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    from_array, from_folder = (
        load_dataset(train_autoencoder.parse_args(arguments(source, tmp_path / "out"))) for source in (data, tmp_path)
    )
    for i in range(12):
        assert torch.equal(from_array[i]["pixel_values"], from_folder[i]["pixel_values"])
        assert from_array[i]["caption"] == from_folder[i]["caption"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.png", "text": ""}))
    with pytest.raises(ValueError, match=r"gone\.png"):
        load_dataset(train_autoencoder.parse_args(arguments(tmp_path, tmp_path / "out")))


@settings(max_examples=100, deadline=None)
@given(
    num=st.integers(1, 40),
    batch=st.integers(1, 7),
    world=st.integers(1, 4),
    first=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_processes_and_resuming_only_cut_one_sequence_of_samples(num, batch, world, first, seed):
    last = first + 4
    whole = [pair for rows in GlobalBatches(num, batch * world, seed, 0, last) for pair in rows]
    assert [sample for _, sample in whole] == list(range(len(whole)))
    for epoch in range(len(whole) // num):  # each picture once an epoch
        assert sorted(index for index, _ in whole[epoch * num : (epoch + 1) * num]) == list(range(num))
    shards = [list(GlobalBatches(num, batch, seed, first, last, rank, world)) for rank in range(world)]
    joined = [pair for micro in zip(*shards, strict=True) for rows in micro for pair in rows]
    assert joined == whole[first * batch * world :]


def test_noise_belongs_to_the_sample_and_not_to_its_batch():
    together = SampleNoise(0, torch.tensor([5, 9]))
    alone = SampleNoise(0, torch.tensor([9]))
    assert torch.equal(together.normal(3, 4)[1:], alone.normal(3, 4))
    assert torch.equal(together.integers(1000)[1:], alone.integers(1000))
    many = SampleNoise(1, torch.arange(4000)).normal(4)
    assert abs(many.mean().item()) < 0.03 and abs(many.std().item() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([many[:-1, 0], many[1:, 0]]))[0, 1].item()) < 0.06
    assert not torch.equal(many, SampleNoise(2, torch.arange(4000)).normal(4))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_of_an_exact_denoiser_is_zero(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 3, 4, 4, 4), generator=generator)
    timesteps = torch.tensor([10, 500, 990])
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)

    def off_by(offset):
        return lambda x, t: target + offset

    assert diffusion_loss(off_by(0.0), scheduler, latents, noise, timesteps).item() == 0.0
    assert diffusion_loss(off_by(0.5), scheduler, latents, noise, timesteps).item() == pytest.approx(0.25)
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    weight = snr.clamp(max=5.0) / (snr if prediction_type == "epsilon" else snr + 1)
    weighted = diffusion_loss(off_by(0.5), scheduler, latents, noise, timesteps, snr_gamma=5.0)
    assert weighted.item() == pytest.approx(0.25 * weight.mean().item(), rel=1e-5)


def test_the_flow_matching_loss_of_the_exact_velocity_is_zero():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 3, 4, 4, 4), generator=generator)
    sigmas = torch.tensor([0.0, 0.3, 1.0])
    seen = []

    def velocity(noisy, at):
        seen.append(noisy)
        return noise - clean

    assert flow_matching_loss(velocity, clean, noise, sigmas).item() == 0.0
    torch.testing.assert_close(seen[0][0], clean[0])
    torch.testing.assert_close(seen[0][2], noise[2])
    assert flow_matching_loss(lambda *_: noise - clean + 0.5, clean, noise, sigmas).item() == pytest.approx(0.25)


def launch(*flags, processes=1):
    """As `accelerate launch`; several CPU processes by torchrun, since accelerate starts those with MPI only."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "0", "OMP_NUM_THREADS": "1"}
    starter = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    if processes > 1:
        starter = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", *starter, "-m", *flags]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr


def test_the_script_as_a_user_starts_it(data, tmp_path):
    flags = arguments(
        data, tmp_path, max_train_steps=3, checkpointing_steps=2, validation_steps=2, cache_latents=True, center_crop=True,
        validation_prompts="a person", validation_inference_steps=2, num_validation_images=2, report_to="tensorboard",
    )  # fmt: skip
    output = launch("diffusers_ext.training.train_text_to_image", *flags)
    assert "3/3" in output, "the progress bar ends"
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "model_index.json").is_file()
    assert (tmp_path / "samples" / "step-000002.png").is_file() and (tmp_path / "samples" / "step-000003.png").is_file()
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(data, tmp_path):
    for name, processes, batch in (("one", 1, 4), ("two", 2, 2)):
        flags = arguments(
            data, tmp_path / name, train_batch_size=batch, max_train_steps=3, adam_epsilon=1e-3, lr_scheduler="cosine"
        )
        launch("diffusers_ext.training.train_text_to_image", *flags, processes=processes)
    one, two = (StableDiffusionPipeline.from_pretrained(tmp_path / name).unet.state_dict() for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=1e-5, rtol=1e-4)
