"""Small U-Nets of every class that the hooks support, with weights that are the same everywhere, and inputs for them."""

from __future__ import annotations

import math

import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNetMotionModel, UNetSpatioTemporalConditionModel


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Weights by formula instead of by random generator, so that recorded numbers hold on every version and machine."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7548776662 * (i + 1) + i)
            scale = 1.5 / math.sqrt(max(parameter[0].numel(), 1)) if parameter.ndim > 1 else 0.1
            parameter.copy_((wave * scale).reshape(parameter.shape) + (parameter.ndim == 1) * 0.5)
    return module.eval()


def conditional(layers: int | tuple[int, ...] = 2, levels: int = 3) -> UNet2DConditionModel:
    downs, ups = ("CrossAttnDownBlock2D",) * (levels - 1), ("CrossAttnUpBlock2D",) * (levels - 1)
    return fill(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16)[:levels],
            layers_per_block=layers,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
            down_block_types=(*downs, "DownBlock2D"),
            up_block_types=("UpBlock2D", *ups),
        )
    )


def unconditional(layers: int = 2) -> UNet2DModel:
    return fill(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            layers_per_block=layers,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    )


def motion(layers: int = 2) -> UNetMotionModel:
    return fill(
        UNetMotionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=layers,
            norm_num_groups=4,
            cross_attention_dim=8,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=4,
            use_motion_mid_block=True,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        )
    )


def spatio_temporal(layers: int = 2) -> UNetSpatioTemporalConditionModel:
    return fill(
        UNetSpatioTemporalConditionModel(
            sample_size=8,
            in_channels=8,
            block_out_channels=(32, 64),
            layers_per_block=layers,
            cross_attention_dim=8,
            num_attention_heads=(2, 2),
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
            num_frames=2,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        )
    )


UNETS = {
    "UNet2DConditionModel": conditional,
    "UNet2DModel": unconditional,
    "UNetMotionModel": motion,
    "UNetSpatioTemporalConditionModel": spatio_temporal,
}


def inputs(unet, step: int, batch: int = 2, seed: int = 0) -> dict:
    """Keyword arguments of one denoiser call; the timestep falls as `step` rises."""
    generator = torch.Generator().manual_seed(1000 * seed + step)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    call = {"timestep": torch.tensor(900 - 40 * step)}
    if isinstance(unet, UNet2DModel):
        return {**call, "sample": normal(batch, 3, 8, 8)}
    states = torch.randn((batch, 5, 8), generator=torch.Generator().manual_seed(seed))
    if isinstance(unet, UNetMotionModel):
        return {**call, "sample": normal(batch, 4, 2, 8, 8), "encoder_hidden_states": states.repeat_interleave(2, 0)}
    if isinstance(unet, UNetSpatioTemporalConditionModel):
        ids = torch.tensor([[6.0, 127.0, 0.02]] * batch)
        return {**call, "sample": normal(batch, 2, 8, 8, 8), "encoder_hidden_states": states, "added_time_ids": ids}
    return {**call, "sample": normal(batch, 4, 8, 8), "encoder_hidden_states": states}


@torch.no_grad()
def predict(unet, step: int, **options) -> torch.Tensor:
    return unet(**inputs(unet, step, **options), return_dict=False)[0]
