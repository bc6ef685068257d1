"""What must be true of every method whose config names a part that was learned: a folder, or a repository of the Hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusers_ext as dx
from tests.fresh import run_fresh
from tests.hub_server import HubServer


def check_other_weights_are_told(pipe: Any, denoiser: torch.nn.Module, config: Any) -> None:
    """Enabling is silent on the weights that the part was trained for, and warns on others.

    Args:
        pipe: with the weights that the part was trained for; its weights are changed.
        denoiser: the model of `pipe` whose weights count.
        config: names the part.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dx.enable(pipe, config)
    dx.disable(pipe)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.5)
    with pytest.warns(UserWarning, match="trained for other weights"):
        dx.enable(pipe, config)


def check_recipe_names_the_part(
    folder: Path, base: Path, call: str, part: str, trained: Path, config: str, change: str = "", exact: bool = True
) -> None:
    """In a fresh process with a Hub: a pipeline saved with a part of the Hub finds it again; a local folder is refused.

    Args:
        folder: empty, to work in.
        base: folder of the pipeline.
        call: arguments of the pipeline's call, as text, without the generator and the output's type.
        part: public name of its class.
        trained: folder of the part.
        config: text with `{}` for where the part is, such as `"dx.HarmonicaConfig({})"`.
        change: statements about `part`, before it is pushed, that make it matter.
        exact: whether two pictures of it are equal to the bit.
    """
    code = f"""
        import pathlib, torch
        import diffusers_ext as dx
        from diffusers import DiffusionPipeline
        def draw(pipe):
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            return pipe({call}, output_type="np", generator=generator).images
        folder, part = pathlib.Path({str(folder)!r}), dx.{part}.from_pretrained({str(trained)!r})
        with torch.no_grad():
            {change or "pass"}
        part.push_to_hub("me/part")
        part.save_pretrained(folder / "part")
        pipe = DiffusionPipeline.from_pretrained({str(base)!r})
        plain = draw(pipe)
        dx.enable(pipe, {config.format('"me/part"')})
        picture = draw(pipe)
        assert abs(picture - plain).max() > 1e-3
        dx.save_pretrained(pipe, folder / "repo")
        again = dx.Pipeline.from_pretrained(folder / "repo")
        assert [entry.config for entry in dx.status(again)] == [{config.format('"me/part"')}]
        assert abs(draw(again) - picture).max() <= {0 if exact else 1e-5}
        assert (draw(dx.disable(again)) == plain).all()
        dx.enable(pipe, {config.format('str(folder / "part")')})
        assert abs(draw(pipe) - picture).max() <= {0 if exact else 1e-5}
        try:
            dx.save_pretrained(pipe, folder / "local")
        except ValueError as error:
            assert "a path of this machine" in str(error)
        else:
            raise AssertionError("a recipe with a local folder was saved")
    """
    with HubServer() as hub:
        run_fresh(code, env=hub.env)
