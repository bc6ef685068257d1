"""Run functions out of a file that was written for another version of diffusers, without importing the file.

For `make_adaptive_diffusion` and `make_faster_diffusion`: the authors replace the call of `StableDiffusionPipeline`.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from tests import tiny_sd
from tests.unets import conditional


def functions(file: Path, of_class: str | None = None) -> dict[str, Any]:
    """The functions of a file, or of one of its classes, without their decorators."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if of_class is not None:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == of_class)
    found = [node for node in body if isinstance(node, ast.FunctionDef)]
    for node in found:
        node.decorator_list = []
    scope = {name: getattr(typing, name) for name in ("Any", "Callable", "Dict", "List", "Optional", "Tuple", "Union")}
    scope |= {
        "torch": torch,
        "np": np,
        "deepcopy": copy.deepcopy,
        "retrieve_timesteps": retrieve_timesteps,
        "PipelineImageInput": Any,
    }
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.fix_missing_locations(ast.Module([*future, *found], [])), str(file), "exec"), scope)
    return scope


class Pipe:
    """What the authors' call uses of a pipeline, on formula weights and inputs; `seen` has the latents of each step."""

    vae_scale_factor = 8
    _execution_device = torch.device("cpu")
    do_classifier_free_guidance, guidance_scale, guidance_rescale = True, tiny_sd.GUIDANCE, 0.0
    cross_attention_kwargs = clip_skip = None
    interrupt = False

    def __init__(self, scheduler: Any) -> None:
        self.unet, self.scheduler = conditional(1, 2).double(), scheduler
        self.image_processor = SimpleNamespace(postprocess=lambda image, **_: image)
        self.seen: list[list[float]] = []
        step = scheduler.step

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.seen.append(tiny_sd.numbers(result[0]))
            return result

        scheduler.step = noted

    def check_inputs(self, *_: Any) -> None:
        pass

    def maybe_free_model_hooks(self) -> None:
        pass

    def prepare_extra_step_kwargs(self, *_: Any) -> dict[str, Any]:
        return {}

    def encode_prompt(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given = tiny_sd.inputs()
        return given["prompt_embeds"], given["negative_prompt_embeds"]

    def prepare_latents(self, *_: Any) -> torch.Tensor:
        return tiny_sd.inputs()["latents"] * self.scheduler.init_noise_sigma

    def progress_bar(self, total: int) -> Any:
        return contextlib.nullcontext(SimpleNamespace(update=lambda: None))
