"""What every training script keeps, on tiny models: exact resume, results that stock classes load, early refusals."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    FluxPipeline,
)
from transformers import (
    AutoTokenizer,
)

from diffusers_ext.training._data import load_dataset
from diffusers_ext.training._text import TextWindows, load_documents
from diffusers_ext.training.train_masked_diffusion_lm import masked_diffusion_loss
from tests.tiny_models import VERSES, class_conditional, draw_classes, draw_text, flux, masked_lm, unconditional


@dataclass(frozen=True)
class Case:
    """A training script on a tiny model.

    Attributes:
        start: writes the untrained model.
        flags: besides those that all scripts get.
        load: loads the result with stock classes and uses it.
        refused: arguments that are refused, with the message.
    """

    start: Callable[[Path], None]
    flags: dict[str, Any]
    load: Callable[[Path], Any]
    refused: tuple[tuple[dict[str, Any], str], ...]


CASES = {
    "unconditional": Case(
        unconditional,
        {"snr_gamma": 5, "validation_inference_steps": 2},
        lambda folder: DDPMPipeline.from_pretrained(folder)(num_inference_steps=1),
        (
            ({"resolution": 24}, "`--resolution` is 24; this UNet draws 16"),
            ({"snr_gamma": -1}, "`--snr_gamma` is -1"),
            ({"image_column": "rgb"}, "The pictures have 3 channels; this UNet takes 1"),
        ),
    ),
    "class_conditional": Case(
        class_conditional,
        {"proportion_empty_labels": 0.3, "validation_inference_steps": 2},
        draw_classes,
        (
            ({"resolution": 32}, "takes 8"),
            ({"label_column": "large"}, r"`--label_column` 'large' holds \[1000"),
            ({"proportion_empty_labels": 2}, "`--proportion_empty_labels` is 2.0"),
            ({"cache_latents": True}, "use it with `--center_crop`"),
        ),
    ),
    "text_to_image_flux": Case(
        flux,
        {
            "train_text_encoder": True, "image_column": "rgb", "max_sequence_length": 8, "proportion_empty_prompts": 0.3,
            "validation_prompts": "a", "validation_inference_steps": 2,
        },
        lambda folder: FluxPipeline.from_pretrained(folder)(
            "a", negative_prompt="", true_cfg_scale=2.0, height=16, width=16, max_sequence_length=8, num_inference_steps=1
        ),
        (
            ({"resolution": 14}, "needs a multiple of 4"),
            ({"logit_std": 0}, "`--logit_std` is 0.0"),
        ),
    ),
    "masked_diffusion_lm": Case(
        masked_lm,
        {"max_seq_length": 16, "random_length_probability": 0.5, "num_validation_texts": 1},
        draw_text,
        (
            ({"min_mask_ratio": 0}, "`--min_mask_ratio` is 0.0"),
            ({"random_length_probability": 2}, "`--random_length_probability` is 2.0"),
            ({"train_data_dir": "nowhere"}, "'nowhere', which is no .txt"),
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve grey and twelve coloured pictures of 16x16 with captions and labels, and two texts."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(
        folder / "pictures.npz", image=pictures[..., 0], rgb=pictures, text=["a"] * 12, label=np.arange(12) % 3,
        large=np.arange(12) + 995,
    )  # fmt: skip
    (folder / "texts").mkdir()
    for i, text in enumerate(VERSES):
        (folder / "texts" / f"{i}.txt").write_text(text)
    return folder


def run(name: str, start: Path, data: Path, output: Path, **options: Any) -> None:
    base: dict[str, Any] = {
        "pretrained_model_name_or_path": start, "output_dir": output, "train_batch_size": 2, "max_train_steps": 4,
        "checkpointing_steps": 2, "learning_rate": 1e-3, "use_ema": True, "seed": 3,
    }  # fmt: skip
    if name == "masked_diffusion_lm":
        base["train_data_dir"] = data / "texts"
    else:
        base |= {"train_data_dir": data / "pictures.npz", "resolution": 16, "num_validation_images": 2}
    flags: list[str] = []
    for key, value in {**base, **CASES[name].flags, **options}.items():
        flags += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    importlib.import_module(f"diffusers_ext.training.train_{name}").main(flags)


@pytest.fixture(scope="module")
def start(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    CASES[request.param].start(folder)
    return request.param, folder


def weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


every_script = pytest.mark.parametrize("start", sorted(CASES), indirect=True)


@every_script
def test_a_resumed_run_is_bit_equal_and_its_result_loads(start, data, tmp_path):
    name, folder = start
    run(name, folder, data, tmp_path / "straight")
    run(name, folder, data, tmp_path / "resumed", max_train_steps=2)
    run(name, folder, data, tmp_path / "resumed", resume_from_checkpoint="latest")
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert straight == resumed
    untrained = weights(folder)
    trained = {key for key, value in untrained.items() if straight[key] != value}
    frozen = {key for key in untrained if key.startswith("vae")}
    assert trained == set(untrained) - frozen, "all but the autoencoder is trained"
    CASES[name].load(tmp_path / "straight")
    assert list((tmp_path / "straight" / "samples").iterdir())
    card = (tmp_path / "straight" / "README.md").read_text()
    assert f"train_{name}" in card and str(tmp_path) not in card


@every_script
def test_bad_arguments_are_refused_before_work(start, data, tmp_path):
    name, folder = start
    for options, message in (
        *CASES[name].refused,
        ({"train_batch_size": 0}, "`--train_batch_size` is 0"),
        ({"dataset_name": "x"}, "exactly one of `--train_data_dir` and `--dataset_name`"),
    ):
        with pytest.raises(ValueError, match=message):
            run(name, folder, data, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/*.json"))


def test_splits_are_rows_or_a_range(data, tmp_path):
    from diffusers_ext.training.train_unconditional import parse_args

    (tmp_path / "splits.json").write_text(json.dumps({"rows": [5, 1], "range": {"start": 2, "stop": 5}}))
    with np.load(data / "pictures.npz") as arrays:
        images, labels = arrays["image"], arrays["label"]
    for split, rows in (("rows", [5, 1]), ("range", [2, 3, 4])):
        flags = [f"--train_data_dir={data / 'pictures.npz'}", f"--split_file={tmp_path / 'splits.json'}"]
        args = parse_args([*flags, f"--split={split}", "--resolution=16", "--pretrained_model_name_or_path=x"])
        dataset = load_dataset(args, annotations=("label",))
        assert dataset.labels == labels[rows].tolist()
        for i, row in enumerate(rows):
            torch.testing.assert_close(dataset[i]["pixel_values"][0], torch.tensor(images[row]) / 127.5 - 1.0)


def test_classes_are_the_folders(tmp_path):
    from PIL import Image

    from diffusers_ext.training.train_class_conditional import parse_args

    for name in ("shoe", "bag"):
        (tmp_path / name).mkdir()
        Image.new("L", (16, 16)).save(tmp_path / name / "0.png")
    args = parse_args([f"--train_data_dir={tmp_path}", "--resolution=16", "--pretrained_model_name_or_path=x"])
    dataset = load_dataset(args, annotations=("label",))
    assert dataset.labels == [0, 1] and dataset[0]["pixel_values"].shape == (1, 16, 16)
    Image.new("L", (16, 16)).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="outside its class folders"):
        load_dataset(args, annotations=("label",))


def test_windows_start_at_lines_and_end_with_the_end_of_text(data, tmp_path):
    masked_lm(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    windows = TextWindows(VERSES, tokenizer, 16)
    assert len(windows) == 5
    decoded = [tokenizer.decode(windows[i]["input_ids"]) for i in range(5)]
    assert decoded[0] == "In the beginning" and decoded[1] == "And the earth wa"
    assert decoded[3] == "Abraham begat Is"
    whole = TextWindows(VERSES, tokenizer, 400)[3]["input_ids"]
    text = "Abraham begat Isaac;\nand Isaac begat Jacob."
    assert tokenizer.decode(whole, skip_special_tokens=True) == text
    assert (whole[len(text) :] == tokenizer.eos_token_id).all(), "no text of another document follows"


@pytest.mark.parametrize("kind", ["folder", "file", "lines"])
def test_documents_come_from_folders_files_and_lines(kind, data, tmp_path):
    from diffusers_ext.training.train_masked_diffusion_lm import parse_args

    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"verse": text}) + "\n" for text in VERSES))
    source = {"folder": data / "texts", "file": data / "texts" / "0.txt", "lines": tmp_path / "x.jsonl"}[kind]
    args = [f"--train_data_dir={source}", "--text_column=verse", "--pretrained_model_name_or_path=x"]
    assert load_documents(parse_args(args)) == (VERSES[:1] if kind == "file" else VERSES)
    if kind == "lines":
        with pytest.raises(ValueError, match="needs 'text'"):
            load_documents(parse_args([args[0], args[2]]))


def test_the_masked_loss_bounds_the_likelihood_of_independent_tokens():
    """A model that knows the exact distribution of independent tokens: the bound is their entropy, for each t."""
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])  # the last is the mask

    class Exact:
        def __call__(self, input_ids, attention_mask):
            self.logits = probabilities.log().expand(*input_ids.shape, 4)
            return self

    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(probabilities, 400 * 50, replacement=True, generator=generator).view(400, 50)
    keep = torch.ones_like(ids)
    keep[:, 40:] = 0
    nll = -probabilities[ids].log()[:, :40].mean().item()
    for t in (0.2, 0.7, 1.0):
        u = torch.rand(400, 50, generator=generator)
        loss = masked_diffusion_loss(Exact(), ids, keep, 3, torch.full((400,), t), u).item()
        assert loss == pytest.approx(nll, rel=0 if t == 1.0 else 0.03, abs=1e-5)
