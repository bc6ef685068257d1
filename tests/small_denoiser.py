"""A denoiser of a few layers, with all that quantizers look for: a time embedding, projections, attention, feed-forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from diffusers_ext.quantization.recording import Call
from tests.unets import fill

CHANNELS, EMBEDDED = 4, 12


def embedding(timestep: torch.Tensor) -> torch.Tensor:
    """`(n, 8)`: sines and cosines."""
    angles = timestep.float()[:, None] * torch.tensor([0.5, 0.05, 0.005, 0.0005])
    return torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.time_proj = nn.Linear(EMBEDDED, CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.conv1(x)) + self.time_proj(F.silu(emb))[:, :, None, None]
        return x + self.conv2(F.silu(h))


class SmallDenoiser(nn.Module):
    """Takes `(n, 4, h, w)`; `classes` of them are added to the embedding before the projections."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.time_1, self.time_2 = nn.Linear(8, EMBEDDED), nn.Linear(EMBEDDED, EMBEDDED)
        self.labels = nn.Embedding(classes, EMBEDDED) if classes else None
        self.blocks = nn.ModuleList([Block(), Block()])
        self.attention = Attention(CHANNELS, heads=2, dim_head=2)
        self.ff = FeedForward(CHANNELS, mult=2)
        self.last = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        timestep = torch.as_tensor(timestep).expand(len(sample)) if torch.as_tensor(timestep).ndim == 0 else timestep
        emb = self.time_2(F.silu(self.time_1(embedding(timestep))))
        if self.labels is not None:
            emb = emb + self.labels(class_labels)
        for block in self.blocks:
            sample = block(sample, emb)
        tokens = sample.flatten(2).mT
        tokens = tokens + self.attention(tokens)
        tokens = tokens + self.ff(tokens)
        return (self.last(tokens.mT.reshape(sample.shape)),)


def small(classes: int = 0) -> SmallDenoiser:
    return fill(SmallDenoiser(classes))  # type: ignore[return-value]


def calls(times: tuple[float, ...] = (900.0, 600.0, 300.0), rows: int = 4, classes: int = 0) -> list[Call]:
    """One call at each timestep, with samples that grow towards the noise."""
    found = []
    for step, time in enumerate(times):
        generator = torch.Generator().manual_seed(step)
        kwargs = {"sample": torch.randn(rows, CHANNELS, 6, 6, generator=generator) * (0.5 + time / 500)}
        if classes:
            kwargs["class_labels"] = torch.arange(rows) % classes
        found.append(Call({**kwargs, "timestep": torch.tensor(time)}, "sample", step, time))
    return found
