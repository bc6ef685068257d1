"""Peak memory of calls that allocate known amounts, and bytes of known files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import diffusers_ext as dx
from diffusers_ext.metrics import bytes_on_disk, peak_memory

MIB = 2**20


def block(mebibytes: float) -> torch.Tensor:
    return torch.empty(int(mebibytes * MIB), dtype=torch.uint8)


class TestPeakMemoryOnCpu:
    def test_what_is_held_together_counts_and_what_was_freed_does_not(self):
        def fn():
            a = block(4)
            b = block(8)
            del a
            c = block(6)
            del b
            return c, block(1)

        assert peak_memory(fn) == 14 * MIB

    def test_a_chain_holds_two_at_a_time(self):
        def chain(length):
            x = torch.zeros(MIB)
            for _ in range(length):
                x = -x

        assert peak_memory(lambda: chain(1)) == peak_memory(lambda: chain(9)) == 2 * 4 * MIB

    def test_what_was_held_before_does_not_count(self):
        held = torch.zeros(10 * MIB, dtype=torch.uint8)
        assert peak_memory(lambda: -held[: 2 * MIB]) == 2 * MIB
        assert peak_memory(lambda: held.neg_()) == 0
        assert peak_memory(lambda: None) == 0

    def test_memory_inside_an_operator_counts(self):
        """The sort of a flipped view: its two outputs are not all that it holds."""
        x = torch.zeros(MIB // 8, 8).flip(0)
        outputs = x.numel() * (4 + 8)
        assert peak_memory(lambda: torch.sort(x, dim=0)) > outputs

    def test_gradients_keep_the_activations(self):
        net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
        x = torch.zeros(4096, 64)  # 1 MiB
        with torch.no_grad():
            inference = peak_memory(lambda: net(x))
        training = peak_memory(lambda: net(x).sum().backward())
        assert inference == pytest.approx(2 * MIB, rel=0.2)
        assert training > 8 * MIB

    def test_calls_once_and_passes_on_what_is_raised(self):
        calls = []
        peak_memory(lambda: calls.append(1))
        assert calls == [1]
        with pytest.raises(KeyError, match="here"):
            peak_memory(lambda: {}["here"])
        assert peak_memory(lambda: block(1)) == MIB

    @pytest.mark.parametrize("device", ["meta", "cuda:99"])
    def test_refuses(self, device):
        called = []
        with pytest.raises(ValueError, match="`device` is"):
            peak_memory(lambda: called.append(1), device)
        assert not called


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda():
    held = torch.zeros(10 * MIB, dtype=torch.uint8, device="cuda")

    def fn():
        a = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
        b = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        del a
        return b, torch.empty(6 * MIB, dtype=torch.uint8, device="cuda")

    assert peak_memory(fn, held.device) == 14 * MIB


class TestBytesOnDisk:
    def test_known_files(self, tmp_path):
        for name, size in {
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors": 100,
            "unet/diffusion_pytorch_model-00002-of-00002.safetensors": 50,
            "unet/diffusion_pytorch_model.safetensors.index.json": 7,
            "vae/deep/model.bin": 20,
            "tokenizer/vocab.json": 1000,
            "lora.safetensors": 3,
            "preview.png": 900,
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x" * size)
        assert bytes_on_disk(tmp_path) == {"": 3, "unet": 150, "vae": 20}

    def test_precision_halves_them(self, tmp_path):
        for name, dtype in (("full", torch.float32), ("half", torch.float16)):
            (tmp_path / name).mkdir()
            save_file({"weight": torch.zeros(100_000, dtype=dtype)}, tmp_path / name / "model.safetensors")
        full, half = (bytes_on_disk(tmp_path / name)[""] for name in ("full", "half"))
        assert full == pytest.approx(2 * half, rel=1e-3)

    def test_a_pipeline_by_component(self):
        folder = dx.zoo_path("avatars-sd")
        sizes = bytes_on_disk(str(folder))
        assert set(sizes) == {"unet", "vae", "text_encoder"}
        assert sizes["unet"] == (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size

    def test_linked_files_count_as_what_they_link_to(self, tmp_path):
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "abc").write_bytes(b"x" * 30)
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
        assert bytes_on_disk(tmp_path / "snapshot") == {"": 30}

    def test_refuses(self, tmp_path):
        with pytest.raises(ValueError, match=r"`folder` is .*; it has no file of weights"):
            bytes_on_disk(tmp_path)
        with pytest.raises(ValueError, match="it must be a folder"):
            bytes_on_disk(tmp_path / "none")
