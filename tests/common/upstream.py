"""What must be true of the classes that diffusers already has for a paper: they are there, and do what ours must do.

Schedulers and guiders follow the rules of their form that are not about our own packaging. `FAULTS` lists rules that
a class of diffusers is known to break; the day it does not, its test fails and the entry goes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance

from . import guider, scheduler
from .models import World
from .suite import Case, CommonCase, Suite, is_class_of, require

_REPEATS = "1000 steps repeat a timestep, and the step in between divides by its length, zero"
FAULTS: dict[tuple[str, str], str] = {
    ("CycleDiffusionPipeline", "public"): "diffusers keeps it among its deprecated pipelines",
    ("DEISMultistepScheduler", "any_number_of_steps"): _REPEATS,
    ("DEISMultistepScheduler", "config_round_trip"): "it writes 'logrho' over some values of `solver_type`",
    ("DPMSolverMultistepScheduler", "any_number_of_steps"): _REPEATS,
}


def _run(scheduler: Any, num_steps: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A sampling loop with a model that predicts a part of its input."""
    scheduler.set_timesteps(num_steps)
    x = torch.randn(2, 3, 4, 4, generator=generator).to(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
    return x


# What introspection cannot know of diffusers' own classes.
TOLD: dict[str, CommonCase] = {
    "IPNDMScheduler": CommonCase(process="other", inputs=_run),  # a schedule of its own
    "PerturbedAttentionGuidance": CommonCase(settings=[{"perturbed_guidance_layers": [0]}]),
}


class _Upstream(Suite):
    def cases_of(self, row: Any, common: CommonCase) -> list[Case]:
        cases = super().cases_of(row, common)
        return [
            dataclasses.replace(case, common=TOLD.get(getattr(case.cls, "__name__", ""), case.common)) for case in cases
        ]


SUITE = _Upstream("upstream", "a class of diffusers or transformers", lambda entry: isinstance(entry, type))
SUITE.include(scheduler.SUITE, when=lambda case: is_class_of(SchedulerMixin)(case.cls))
SUITE.include(guider.SUITE, when=lambda case: is_class_of(BaseGuidance)(case.cls))


@SUITE.rule()
def public(case: Case, world: World) -> None:
    """It is a public class of diffusers or transformers, of a kind that they load."""
    module, name = case.cls.__module__.partition(".")[0], case.cls.__name__
    library = {"diffusers": diffusers, "transformers": transformers}.get(module)
    require(getattr(library, name, None) is case.cls, f"{name} is no public name of {module}")
    kinds = (DiffusionPipeline, ModelMixin, SchedulerMixin, BaseGuidance, transformers.PreTrainedModel)
    require(issubclass(case.cls, kinds), f"{name} is none of {', '.join(kind.__name__ for kind in kinds)}")
    deprecated = ".deprecated." in case.cls.__module__
    require(not deprecated, f"{name} is deprecated")
