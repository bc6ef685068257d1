"""That what is on a pipeline is on again once it was saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

import diffusers_ext as dx
from diffusers_ext.enabling import HookConfig


def check_recipe(pipe: Any, config: HookConfig, folder: Path, steps: int = 6, **inputs: Any) -> None:
    """Save a pipeline with `config` on, load it, and find the same config and the same pictures, which are not the plain ones.

    Args:
        pipe: without hooks.
        config: put on.
        folder: empty, to save into.
        steps: of a run.
        inputs: of the pipeline.
    """

    def pictures(pipe: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            **inputs, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images

    plain = pictures(pipe)
    dx.enable(pipe, copy.deepcopy(config))
    expected = pictures(pipe)
    assert not (expected == plain).all(), "it does something"
    dx.save_pretrained(pipe, folder)
    loaded = dx.Pipeline.from_pretrained(folder)
    assert [entry.config for entry in dx.status(loaded)] == [config]
    assert (pictures(loaded) == expected).all()
