"""The velocity refiner of FlowTurbo (Zhao et al. 2024, arXiv 2409.18128, section 3.2): one block for the late steps.

Late in a run the velocity hardly changes. A block of a flow transformer, given the state and the velocity of the step before,
predicts by how much. It takes the embedded tokens, the time and text conditioning and the positions from the transformer that
it stands in for, whose embedders are a small part of the work, and adds an embedding of the velocity.
"""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn


class VelocityRefiner(ModelMixin, ConfigMixin):
    """Predicts the change of the velocity since the last step. Starts as zero: the velocity is carried on as it is.

    Args:
        velocity_channels: channels of a velocity token: those of the transformer's `proj_out`.
        num_attention_heads, attention_head_dim: as the transformer has them; their product is the width of its tokens.
        mlp_ratio: width of the block's MLP over that of the tokens.

    Raises:
        ValueError: a value is not positive.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        velocity_channels: int = 64,
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        for name in ("velocity_channels", "num_attention_heads", "attention_head_dim"):
            value = self.config[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least 1.")
        if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, (int, float)) or not 0 < mlp_ratio < float("inf"):
            raise ValueError(f"`mlp_ratio` is {mlp_ratio!r}; it must be a positive number.")
        width = num_attention_heads * attention_head_dim
        self.velocity_embedder = nn.Linear(velocity_channels, width)
        self.norm1 = AdaLayerNormZero(width)
        self.attn = FluxAttention(
            query_dim=width, heads=num_attention_heads, dim_head=attention_head_dim, bias=True, eps=1e-6, pre_only=True
        )
        self.attn_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(width, width, mult=mlp_ratio, activation_fn="gelu-approximate")
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, velocity_channels)
        for layer in (self.norm1.linear, self.norm_out.linear, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.gradient_checkpointing = False

    @classmethod
    def config_for(cls, transformer: nn.Module) -> dict[str, int]:
        """Arguments of the refiner that fits a transformer.

        Raises:
            ValueError: `unsupported` says why there is none.
        """
        if (reason := unsupported(transformer)) is not None:
            raise ValueError(f"`transformer` is a {type(transformer).__name__}: {reason}.")
        config = transformer.config
        return {
            "velocity_channels": transformer.proj_out.out_features,  # type: ignore[union-attr,dict-item]
            "num_attention_heads": config.num_attention_heads,  # type: ignore[union-attr,dict-item]
            "attention_head_dim": config.attention_head_dim,  # type: ignore[union-attr,dict-item]
        }

    def forward(
        self,
        tokens: torch.Tensor,
        velocity: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What to add to `velocity`.

        Args:
            tokens: the state as the transformer embeds it, `(batch, tokens, width)`.
            velocity: of the step before, in tokens, `(batch, tokens, velocity_channels)`.
            temb: the transformer's conditioning of time and pooled text, `(batch, width)`.
            image_rotary_emb: cosines and sines of the positions, `(tokens, attention_head_dim)` each, where the transformer
                has rotary ones.
        """
        x = tokens + self.velocity_embedder(velocity)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            x = self._gradient_checkpointing_func(self._block, x, temb, image_rotary_emb)
        else:
            x = self._block(x, temb, image_rotary_emb)
        return self.proj_out(self.norm_out(x, temb))

    def _block(
        self, x: torch.Tensor, temb: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        normed, gate_attention, shift, scale, gate_mlp = self.norm1(x, emb=temb)
        x = x + gate_attention[:, None] * self.attn_out(self.attn(normed, image_rotary_emb=rotary))
        return x + gate_mlp[:, None] * self.ff(self.norm2(x) * (1 + scale[:, None]) + shift[:, None])


def unsupported(transformer: nn.Module) -> str | None:
    """None where a refiner can stand in for `transformer`, else the reason why not."""
    if isinstance(transformer, (FluxTransformer2DModel, SD3Transformer2DModel)):
        return None
    return "it is neither a FluxTransformer2DModel nor an SD3Transformer2DModel"


def rotary_of_state(
    rotary: tuple[torch.Tensor, torch.Tensor] | None, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The rotary positions of the state's tokens, which come after those of the text."""
    return None if rotary is None else (rotary[0][-num_tokens:], rotary[1][-num_tokens:])
