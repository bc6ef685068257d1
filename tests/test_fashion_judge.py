"""The Fashion-MNIST judge: what it answers, what it refuses, and that the stored one is as good as its card says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffusers_ext as dx
from benchmarks.data import FASHION_CLASSES, load_fashion_mnist
from benchmarks.judges import train_fashion
from diffusers_ext.metrics import FashionJudge, frechet_distance, to_tensor


@pytest.fixture(scope="module")
def folder() -> Path:
    return dx.zoo_path("fashion-judge")


@pytest.fixture(scope="module")
def judge(folder) -> FashionJudge:
    return FashionJudge.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def accuracy(folder) -> dict:
    return json.loads((folder / "accuracy.json").read_text())


@pytest.fixture(scope="module")
def reference() -> tuple[np.ndarray, np.ndarray]:
    """Pictures `uint8 (n, 28, 28, 1)` and labels that neither the judge nor a generator was trained on."""
    try:
        images, labels = load_fashion_mnist("reference")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return images[..., None], labels


@pytest.fixture
def pictures() -> np.ndarray:
    """Pictures of nothing, `uint8 (300, 28, 28, 1)`: more than one internal batch."""
    return np.random.default_rng(0).integers(256, size=(300, 28, 28, 1), dtype=np.uint8)


class TestAnswers:
    def test_all_forms_of_the_same_pictures_agree(self, judge, pictures):
        array = pictures[:40]
        tensor = torch.from_numpy(array).permute(0, 3, 1, 2) / 255
        expected = judge(array)
        assert len(expected) == 40 and all(type(label) is int and label in range(10) for label in expected)
        grey = [Image.fromarray(picture[..., 0]) for picture in array]
        for form in (array / 255.0, tensor, tensor.double(), tensor.expand(-1, 3, -1, -1), array.repeat(3, 3), grey):
            assert judge(form) == expected

    def test_the_same_again_and_in_any_batch(self, judge, pictures):
        expected = judge(pictures)
        assert judge(pictures[::-1])[::-1] == expected
        assert [judge(pictures[i : i + 1])[0] for i in range(0, 300, 60)] == expected[::60]
        torch.testing.assert_close(judge.features(pictures[::-1]).flip(0), judge.features(pictures))

    def test_training_mode_changes_no_answer_and_is_kept(self, folder, judge, pictures):
        other = FashionJudge.from_pretrained(folder, dtype=torch.float32).train()
        before = {name: value.clone() for name, value in other.state_dict().items()}
        assert other(pictures) == judge(pictures)
        torch.testing.assert_close(other.features(pictures), judge.features(pictures))
        assert other.training
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())

    def test_no_pictures_no_answers(self, judge):
        assert judge(torch.zeros(0, 1, 28, 28)) == []
        assert judge.features(torch.zeros(0, 1, 28, 28)).shape == (0, judge.config.width)

    def test_logits_are_differentiable(self, judge):
        pixels = torch.rand(2, 1, 28, 28, requires_grad=True)
        logits = judge.logits(pixels)
        assert logits.shape == (2, 10)
        logits.sum().backward()
        assert pixels.grad.abs().sum() > 0

    def test_the_class_is_read_from_the_features(self, judge, pictures):
        features = judge.features(pictures)
        assert features.shape == (300, 64) and features.dtype == torch.float32
        assert judge.head(features).argmax(1).tolist() == judge(pictures)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (torch.zeros(1, 1, 32, 28), "`pictures` are 32 pixels high and 28 wide; the judge reads 28x28"),
            (torch.zeros(1, 28, 28), r"`pictures` is a tensor of torch.float32 and shape \(1, 28, 28\)"),
            (np.zeros((5, 28, 28), np.uint8), r"`pictures` is an array of uint8 and shape \(5, 28, 28\)"),
            (torch.rand(1, 3, 28, 28), "`pictures` have colours"),
            (torch.full((1, 1, 28, 28), -1.0), "`pictures` has values from -1 to -1"),
        ],
    )
    def test_refuses(self, judge, wrong, message):
        for function in (judge, judge.features, lambda pictures: judge.accuracy(pictures, [0])):
            with pytest.raises(ValueError, match=message):
                function(wrong)


class TestAccuracy:
    def test_by_hand(self, judge, monkeypatch):
        monkeypatch.setattr(FashionJudge, "forward", lambda self, pictures: [3, 1, 4, 1])
        for labels in ([3, 1, 4, 2], np.array([3, 1, 4, 2]), torch.tensor([3, 1, 4, 2])):
            assert judge.accuracy(torch.zeros(4, 1, 28, 28), labels) == 0.75

    @pytest.mark.parametrize(
        ("count", "labels", "message"),
        [
            (2, [1], "`labels` has 1 entries for 2 pictures"),
            (1, [10], "`labels` has 10; allowed are 0 to 9"),
            (1, ["bag"], "`labels` has 'bag'; allowed"),
            (0, [], "`pictures` is empty"),
        ],
    )
    def test_refuses(self, judge, count, labels, message):
        with pytest.raises(ValueError, match=message):
            judge.accuracy(torch.zeros(count, 1, 28, 28), labels)


class TestStored:
    def test_accuracy_on_unseen_pictures_is_what_the_card_says(self, judge, accuracy, reference):
        images, labels = reference
        assert (accuracy["split"], accuracy["pictures"]) == ("reference", len(labels))
        assert judge.accuracy(images, labels) == pytest.approx(accuracy["accuracy"], abs=1e-3)

    def test_good_enough_to_judge_with(self, accuracy):
        assert accuracy["accuracy"] >= 0.90
        assert accuracy["accuracy_damaged"] >= 0.87
        assert accuracy["accuracy"] == pytest.approx(sum(accuracy["recall"].values()) / 10)  # all classes equally many

    def test_features_tell_real_pictures_from_damaged_ones(self, judge, reference):
        real, other = to_tensor(reference[0][:1000])[:, :1], to_tensor(reference[0][1000:2000])[:, :1]
        generator = torch.Generator().manual_seed(0)
        noisy = (other + 0.1 * torch.randn(other.shape, generator=generator)).clamp(0, 1)
        one_class = to_tensor(reference[0][reference[1] != 9][:1000])[:, :1]
        same, *damaged = (
            frechet_distance(judge.features(pictures), judge.features(real), resamples=2)
            for pictures in (other, noisy, one_class)
        )
        assert same.value < 2 * same.noise  # noise is measured on half the pictures, and so has about twice the bias
        assert all(result.value > 2 * same.value for result in damaged)

    def test_splits_share_no_picture(self, reference):
        splits = {name: {image.tobytes() for image in load_fashion_mnist(name)[0]} for name in ("generator", "judge")}
        splits["reference"] = {image.tobytes() for image in reference[0]}
        assert not splits["judge"] & splits["generator"]
        assert not splits["judge"] & splits["reference"]
        assert not splits["generator"] & splits["reference"]

    def test_files(self, folder):
        assert {file.name for file in folder.iterdir()} == {
            "README.md", "accuracy.json", "config.json", "diffusion_pytorch_model.safetensors",
        }  # fmt: skip
        weights = folder / "diffusion_pytorch_model.safetensors"
        assert weights.stat().st_size <= 500_000
        for name, value in load_file(weights).items():
            assert value.isfinite().all() and value.dtype in (torch.float16, torch.int64), name
        assert json.loads((folder / "config.json").read_text())["_class_name"] == "FashionJudge"

    def test_card_tells_the_recorded_numbers(self, folder, accuracy):
        card = (folder / "README.md").read_text()
        rows = dict(re.findall(r"^\| \d \| ([\w -]+) \| ([\d.]+) \|$", card, re.MULTILINE))
        assert tuple(rows) == FASHION_CLASSES
        for name, recall in rows.items():
            assert float(recall) == pytest.approx(accuracy["recall"][name], abs=5e-4)
        assert f"{accuracy['accuracy']:.3f} of the 10,000 pictures" in card and "license: apache-2.0" in card

    def test_saved_and_loaded_again_it_answers_the_same(self, judge, pictures, tmp_path):
        judge.save_pretrained(tmp_path)
        assert FashionJudge.from_pretrained(tmp_path)(pictures) == judge(pictures)


class TestTraining:
    def test_it_repeats_bit_for_bit_and_sees_the_seed(self):
        generator = torch.Generator().manual_seed(0)
        pixels, labels = torch.rand(64, 1, 28, 28, generator=generator), torch.arange(64) % 10
        first, again, other = (
            train_fashion.train(pixels, labels, epochs=2, batch_size=16, seed=seed).state_dict() for seed in (0, 0, 1)
        )
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        assert not torch.equal(first["head.1.weight"], other["head.1.weight"])
        assert all(value.dtype == torch.float16 for value in first.values() if value.is_floating_point())

    def test_augmented_pictures_are_still_pictures(self):
        pixels = torch.zeros(200, 1, 28, 28)
        pixels[:, :, 5, 9] = 1.0
        changed = train_fashion.augment(pixels, torch.Generator().manual_seed(0))
        assert changed.shape == pixels.shape and changed.min() >= 0 and changed.max() <= 1
        brightest = changed.flatten(1).argmax(1)
        rows, columns = brightest // 28, brightest % 28
        assert set(rows.tolist()) == {4, 5, 6}
        assert set(columns.tolist()) == {8, 9, 10, 17, 18, 19}
