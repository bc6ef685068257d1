"""Share of energy in fine detail: cosines, waves and noise, whose spectra are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusers_ext.metrics import high_frequency_energy_ratio, high_frequency_share


def cosine(size: int, down: int, across: int) -> torch.Tensor:
    """One function of the transform's basis, `(size, size)`."""
    x = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    return torch.cos(down * x)[:, None] * torch.cos(across * x)


def picture(wave: torch.Tensor) -> torch.Tensor:
    return (0.5 + wave).expand(1, 3, *wave.shape)


class TestShare:
    @pytest.mark.parametrize(
        ("down", "across", "share"),
        [(15, 0, 0), (0, 15, 0), (16, 0, 1), (0, 16, 1), (11, 11, 0), (12, 12, 1), (3, 16, 1)],
    )
    def test_one_cosine_is_on_one_side_of_the_radius(self, down, across, share):
        """The radius is a circle: (12, 12) of 32 is 0.53 of the Nyquist frequency, and (11, 11) is 0.49."""
        found = high_frequency_share(picture(0.4 * cosine(32, down, across)))
        assert found.item() == pytest.approx(share, abs=1e-9)

    def test_two_cosines_share_as_their_squared_amplitudes(self):
        wave = 0.3 * cosine(32, 2, 0) + 0.1 * cosine(32, 0, 20)
        assert high_frequency_share(picture(wave)).item() == pytest.approx(0.01 / 0.1, rel=1e-5)

    @pytest.mark.parametrize(("frequency", "low", "high"), [(0.2, 0, 0.05), (0.3, 0.95, 1)])
    def test_a_sinusoid_of_any_phase(self, frequency, low, high):
        """In cycles a pixel; the radius 0.5 is at 0.25."""
        for phase in (0.0, 1.0, 2.0):
            wave = 0.4 * torch.sin(2 * math.pi * frequency * torch.arange(64) + phase)
            assert low <= high_frequency_share(picture(wave.expand(64, 64))).item() <= high

    @pytest.mark.parametrize("radius", [0.25, 0.5, 0.9])
    def test_white_noise(self, radius):
        noise = torch.rand(8, 3, 64, 48, generator=torch.Generator().manual_seed(0))
        found = high_frequency_share(noise, radius).mean().item()
        high = sum(math.hypot(i / 64, j / 48) >= radius for i in range(64) for j in range(48))
        assert found == pytest.approx(high / (64 * 48 - 1), abs=0.01)
        assert found == pytest.approx(1 - math.pi * radius**2 / 4, abs=0.02)

    def test_opposite_edges_that_differ_are_no_detail(self):
        """A ramp is smooth; a Fourier transform would see a jump from its end to its start: 2 % at these frequencies."""
        ramp = torch.linspace(-0.5, 0.5, 64).expand(64, 64)
        assert high_frequency_share(picture(ramp)).item() < 1e-3

    def test_each_picture_alone_whatever_its_brightness_and_contrast(self):
        pictures = torch.rand(40, 3, 12, 20, generator=torch.Generator().manual_seed(0))  # more than one batch
        found = high_frequency_share(pictures)
        assert found.shape == (40,) and found.dtype == torch.float64
        torch.testing.assert_close(high_frequency_share(pictures.flip(0)).flip(0), found)
        torch.testing.assert_close(high_frequency_share(0.3 * pictures + 0.2), found, rtol=1e-5, atol=0)
        assert found.std() > 0

    def test_one_colour_has_no_energy(self):
        pictures = torch.tensor([0.1, 0.7, 1 / 3])[:, None, None, None].expand(3, 3, 17, 17)
        assert high_frequency_share(pictures).tolist() == [0, 0, 0]

    @pytest.mark.parametrize("radius", [0, -1, 1.5, math.nan, True])
    def test_refuses(self, radius):
        with pytest.raises(ValueError, match="`radius` is"):
            high_frequency_share(torch.zeros(1, 3, 4, 4), radius)


class TestRatio:
    def test_known_shares(self):
        a = picture(0.3 * cosine(32, 2, 0) + 0.1 * cosine(32, 0, 20))
        b = torch.cat([picture(0.4 * cosine(32, 1, 1)), picture(0.4 * cosine(32, 30, 1))])
        assert high_frequency_energy_ratio(a, b) == pytest.approx(0.1 / 0.5, rel=1e-5)
        assert high_frequency_energy_ratio(b, b) == 1

    def test_blur_is_below_one_and_noise_above(self):
        generator = torch.Generator().manual_seed(0)
        sharp = F.interpolate(torch.rand(4, 3, 8, 8, generator=generator), scale_factor=4)
        blurred = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, 1)
        noisy = (sharp + 0.1 * torch.randn(sharp.shape, generator=generator)).clamp(0, 1)
        assert high_frequency_energy_ratio(blurred, sharp) < 0.5
        assert high_frequency_energy_ratio(noisy, sharp) > 1.2

    @pytest.mark.parametrize(
        ("a", "reference", "message"),
        [
            (
                torch.zeros(1, 3, 4, 4),
                torch.zeros(1, 3, 4, 8),
                r"`a` is \(4, 4\) pixels .* and `reference` is \(4, 8\)",
            ),
            (torch.zeros(0, 3, 4, 4), torch.zeros(1, 3, 4, 4), "`a` is empty"),
            (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), "`reference` has no energy at 0.5"),
            (np.zeros((1, 4, 4, 3), np.int64), torch.zeros(1, 3, 4, 4), "`a` is an array of int64"),
        ],
    )
    def test_refuses(self, a, reference, message):
        with pytest.raises(ValueError, match=message):
            high_frequency_energy_ratio(a, reference)
