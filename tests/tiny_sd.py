"""A guided `StableDiffusionPipeline` of formula weights and inputs, in float64, and numbers of its latents at each step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from tests.unets import conditional

GUIDANCE = 3.0


def inputs() -> dict[str, torch.Tensor]:
    """Latents and embeddings of one picture."""
    wave = torch.arange(4 * 8 * 8, dtype=torch.float64)
    return {
        "latents": torch.sin(wave).reshape(1, 4, 8, 8),
        "prompt_embeds": torch.cos(wave[:40]).reshape(1, 5, 8),
        "negative_prompt_embeds": torch.cos(2 * wave[:40]).reshape(1, 5, 8),
    }


def make(scheduler: Any) -> StableDiffusionPipeline:
    """The pipeline, without text encoder and decoder."""
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        unet=conditional(1, 2).double(), scheduler=scheduler, requires_safety_checker=False, **none
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int, callback: Any = None) -> list[torch.Tensor]:
    """Latents after each step; `callback` is one more to call at the end of steps."""
    seen = []

    def note(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(kwargs["latents"])
        return kwargs if callback is None else callback(pipe, step, timestep, kwargs)

    pipe(
        **inputs(), num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="latent", callback_on_step_end=note
    )
    return seen


def numbers(latents: torch.Tensor) -> list[float]:
    """A few numbers of latents."""
    return [latents.mean().item(), latents.std().item(), *latents.flatten()[:3].tolist()]
