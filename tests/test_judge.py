"""The avatar judge: what it answers, what it refuses, and that the embedded one is as good as its card says."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.metrics import ATTRIBUTES, CLASSES, AvatarJudge, frechet_distance, to_tensor

DATA = Path(__file__).parents[1] / "benchmarks" / "data"
CAPTION = "a person with tan skin and long red hair, a blue hat, a happy smile, navy clothes"
BALD_CAPTION = "a person with tan skin and short red hair, a blue hat, a happy smile, navy clothes"


@pytest.fixture(scope="module")
def folder() -> Path:
    return dx.zoo_path("avatars-judge")


@pytest.fixture(scope="module")
def judge(folder) -> AvatarJudge:
    return AvatarJudge.from_pretrained(folder)


@pytest.fixture(scope="module")
def accuracy(folder) -> dict:
    return json.loads((folder / "accuracy.json").read_text())


@pytest.fixture(scope="module")
def reference() -> tuple[np.ndarray, list[str]]:
    """Pictures `(n, 32, 32, 3)` and captions that the judge was not trained on."""
    rows = json.loads((DATA / "avatars_splits.json").read_text())["reference"]
    with np.load(DATA / "avatars.npz", allow_pickle=False) as data:
        return data["image"][rows], data["caption"][rows].tolist()


class TestAnswers:
    def test_labels_and_types(self, judge, reference):
        answers = judge(reference[0][:5])
        assert tuple(answers) == ATTRIBUTES
        for name, labels in answers.items():
            assert len(labels) == 5 and set(labels) <= set(CLASSES[name]), name
            assert all(type(label) is type(CLASSES[name][0]) for label in labels), name

    def test_all_forms_of_the_same_pictures_agree(self, judge, reference):
        array = reference[0][:40]
        tensor = torch.from_numpy(array).permute(0, 3, 1, 2) / 255
        expected = judge(array)
        for form in (array / 255.0, tensor, tensor.double(), [Image.fromarray(picture) for picture in array]):
            assert judge(form) == expected

    def test_the_same_again_and_in_any_batch(self, judge, reference):
        pictures = reference[0][:300]  # more than one internal batch
        expected = judge(pictures)
        assert judge(pictures) == expected
        backwards = judge(pictures[::-1])
        one_by_one = [judge(pictures[i : i + 1]) for i in range(0, 300, 60)]
        for name in ATTRIBUTES:
            assert backwards[name][::-1] == expected[name]
            assert [answer[name][0] for answer in one_by_one] == expected[name][::60]

    def test_training_mode_changes_no_answer_and_is_kept(self, folder, judge, reference):
        other = AvatarJudge.from_pretrained(folder).train()
        before = {name: value.clone() for name, value in other.state_dict().items()}
        assert other(reference[0][:64]) == judge(reference[0][:64])
        assert other.training
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())

    def test_no_pictures_no_answers(self, judge):
        assert judge(torch.zeros(0, 3, 32, 32)) == {name: [] for name in ATTRIBUTES}

    def test_logits_are_differentiable(self, judge):
        pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
        logits = judge.logits(pixels)
        assert {name: value.shape for name, value in logits.items()} == {
            name: (2, len(classes)) for name, classes in CLASSES.items()
        }
        sum(value.sum() for value in logits.values()).backward()
        assert pixels.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("pictures", "message"),
        [
            (torch.zeros(1, 3, 64, 48), "`pictures` are 64 pixels high and 48 wide; the judge reads 32x32"),
            (torch.zeros(3, 32, 32), r"`pictures` is a tensor of torch.float32 and shape \(3, 32, 32\)"),
            (torch.full((1, 3, 32, 32), -1.0), "`pictures` has values from -1 to -1"),
            (np.zeros((1, 3, 32, 32), np.uint8), "`pictures` is an array of uint8"),
            ("avatar.png", "`pictures` is str"),
        ],
    )
    def test_refuses(self, judge, pictures, message):
        with pytest.raises(ValueError, match=message):
            judge(pictures)
        with pytest.raises(ValueError, match=message):
            judge.score(pictures, [CAPTION])


class TestFeatures:
    def test_shape_and_that_they_are_of_the_picture_alone(self, folder, judge, reference):
        pictures = reference[0][:300]  # more than one internal batch
        features = judge.features(pictures)
        assert features.shape == (300, 64) and features.dtype == torch.float32 and not features.requires_grad
        torch.testing.assert_close(judge.features(pictures[::-1]).flip(0), features)
        training = AvatarJudge.from_pretrained(folder).train()
        torch.testing.assert_close(training.features(pictures), features)
        assert training.training
        assert judge.features(torch.zeros(0, 3, 32, 32)).shape == (0, 64)

    def test_are_the_mean_of_what_the_heads_read(self, judge, reference):
        pixels = to_tensor(reference[0][:10])
        with torch.no_grad():
            read = judge.trunk(2 * pixels - 1)
            torch.testing.assert_close(judge.heads["skin"](read), judge.logits(pixels)["skin"])
        torch.testing.assert_close(judge.features(pixels), read.reshape(10, 64, 4, 4).mean((2, 3)))

    def test_tell_real_pictures_from_damaged_and_one_sided_ones(self, judge, reference):
        pictures, captions = to_tensor(reference[0]), reference[1]
        real, other = pictures[:500], pictures[500:850]
        blurred = torch.nn.functional.avg_pool2d(other, 3, stride=1, padding=1)
        hatless = pictures[[i for i, caption in enumerate(captions) if i >= 500 and " hat" not in caption][:350]]
        assert len(hatless) == len(other)
        same, *worse = (
            frechet_distance(judge.features(made), judge.features(real), resamples=2).value
            for made in (other, blurred, hatless)
        )
        assert all(value > 1.2 * same for value in worse)

    def test_refuses(self, judge):
        with pytest.raises(ValueError, match="the judge reads 32x32"):
            judge.features(torch.zeros(1, 3, 28, 28))


class TestScore:
    def test_by_hand(self, judge, monkeypatch):
        """Four pictures, one wrong in smile and one in hair colour; the last one's hair is hidden by the hat."""
        captions = [CAPTION, CAPTION.replace("happy smile", "sad mouth").replace("red", "blue"), CAPTION, BALD_CAPTION]
        right = {
            "hat": [True] * 4, "glasses": [False] * 4, "beard": [False] * 4, "smile": [True, False, False, True],
            "long_hair": [True, True, True, False], "hair_color": ["red", "blue", "black", "black"],
            "clothes_color": ["navy"] * 4, "skin": ["tan"] * 4,
        }  # fmt: skip
        monkeypatch.setattr(AvatarJudge, "forward", lambda self, pictures: right)
        expected = dict.fromkeys(ATTRIBUTES, 1.0) | {"smile": (2 / 3 + 1) / 2, "hair_color": (1 / 2 + 1) / 2}
        assert judge.score(torch.zeros(4, 3, 32, 32), captions) == pytest.approx(expected)

    def test_hair_color_is_nan_where_no_hair_can_be_seen(self, judge, reference):
        scores = judge.score(reference[0][:2], [BALD_CAPTION] * 2)
        assert [name for name in ATTRIBUTES if math.isnan(scores[name])] == ["hair_color"]

    @pytest.mark.parametrize(
        ("count", "captions", "message"),
        [
            (2, [CAPTION], "`captions` has 1 entries for 2 pictures"),
            (1, CAPTION, "`captions` is the single string"),
            (1, ["a portrait"], "`caption` is 'a portrait'"),
            (0, [], "`pictures` is empty"),
        ],
    )
    def test_refuses(self, judge, count, captions, message):
        with pytest.raises(ValueError, match=message):
            judge.score(torch.zeros(count, 3, 32, 32), captions)


class TestEmbedded:
    def test_accuracy_on_unseen_captions_is_what_the_card_says(self, judge, accuracy, reference):
        pictures, captions = reference
        assert (accuracy["split"], accuracy["pictures"]) == ("reference", len(captions))
        assert judge.score(pictures, captions) == pytest.approx(accuracy["balanced_accuracy"], abs=1e-3)

    def test_good_enough_to_judge_with(self, accuracy):
        for name in ("hat", "glasses", "smile", "long_hair", "clothes_color", "skin", "hair_color"):
            assert accuracy["balanced_accuracy"][name] >= 0.97, name
            assert accuracy["balanced_accuracy_damaged"][name] >= 0.95, name

    def test_splits_share_no_caption(self):
        splits = json.loads((DATA / "avatars_splits.json").read_text())
        with np.load(DATA / "avatars.npz", allow_pickle=False) as data:
            captions = {name: set(data["caption"][rows].tolist()) for name, rows in splits.items()}
        assert not captions["judge"] & captions["reference"]
        assert not captions["judge"] & captions["generator"]
        assert not captions["generator"] & captions["reference"]

    def test_files(self, folder):
        assert {file.name for file in folder.iterdir()} == {
            "README.md", "accuracy.json", "config.json", "diffusion_pytorch_model.safetensors",
        }  # fmt: skip
        weights = folder / "diffusion_pytorch_model.safetensors"
        assert weights.stat().st_size <= 400_000
        assert all(value.isfinite().all() for value in load_file(weights).values())
        assert json.loads((folder / "config.json").read_text())["_class_name"] == "AvatarJudge"

    def test_card_tells_the_recorded_numbers(self, folder, accuracy):
        card = (folder / "README.md").read_text()
        rows = {name: (float(real), float(damaged)) for name, real, damaged in re.findall(
            r"^\| `(\w+)` \| \d+ \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE
        )}  # fmt: skip
        assert tuple(rows) == ATTRIBUTES
        for name, (real, damaged) in rows.items():
            assert real == pytest.approx(accuracy["balanced_accuracy"][name], abs=5e-4)
            assert damaged == pytest.approx(accuracy["balanced_accuracy_damaged"][name], abs=5e-4)
        assert "license: apache-2.0" in card and "CC0 1.0" in card

    def test_saved_and_loaded_again_it_answers_the_same(self, judge, reference, tmp_path):
        judge.save_pretrained(tmp_path)
        assert AvatarJudge.from_pretrained(tmp_path)(reference[0][:100]) == judge(reference[0][:100])
