"""What every guider must do: a `BaseGuidance`, and where classic pipelines are to have it, a config that `dx.enable` takes.

The guider is given predictions by itself; a config derived from `HookConfig` follows the rules of `hook.py` besides.

`COMMON` of a guider (optional): `settings` of its classes.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import BlockState

from diffusers_ext.enabling import HookConfig

from . import arguments, hook
from .models import World
from .suite import Case, Suite, is_class_of, refused, require

SUITE = Suite("guider", "a class derived from BaseGuidance", is_class_of(BaseGuidance, HookConfig))
STEPS = 10
SHAPE = (2, 4, 8, 8)


def is_guider(case: Case) -> bool:
    return is_class_of(BaseGuidance)(case.cls)


SUITE.include(hook.SUITE, when=lambda case: not is_guider(case))
SUITE.pack = hook.SUITE.pack


def batches(
    guider: BaseGuidance, step: int, equal: bool = False, dtype: torch.dtype = torch.float32
) -> list[BlockState]:
    """What a pipeline hands over at one step: one batch a prediction that the guider asked for, with the prediction."""
    guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(900 - 50 * step))
    prepared = guider.prepare_inputs({"condition": (torch.ones(SHAPE), torch.zeros(SHAPE))})
    for number, batch in enumerate(prepared):
        generator = torch.Generator().manual_seed(100 * step + (0 if equal else number))
        batch.noise_pred = torch.randn(SHAPE, generator=generator).to(dtype)
    return prepared


def guide(guider: BaseGuidance, step: int, **options: Any) -> torch.Tensor:
    return guider(batches(guider, step, **options)).pred


@SUITE.rule(when=is_guider)
def guider_config_round_trip(case: Case, world: World) -> None:
    """Constructor, from_config, save_pretrained and from_pretrained keep every argument and guide alike."""
    arguments.check_config_survives(case, world.folder(), lambda guider: {"pred": guide(copy.deepcopy(guider), 3)})


@SUITE.rule(when=is_guider)
def guidance_arguments(case: Case, world: World) -> None:
    """It takes `start`, `stop` and `enabled` of `BaseGuidance`, and refuses a start or stop that is no fraction."""
    parameters = inspect.signature(case.cls).parameters
    missing = [name for name in ("start", "stop", "enabled") if name not in parameters]
    require(not missing, f"its constructor does not take {missing}")
    for wrong in ({"start": 1.5}, {"start": -0.1}, {"stop": 2.0}, {"start": 0.6, "stop": 0.3}):
        refused(f"{wrong}", case.cls, **{**case.settings[0], **wrong}, names=tuple(wrong)[-1:])


@SUITE.rule(when=is_guider)
def guidance(case: Case, world: World) -> None:
    """Its prediction is finite and of the kind of its inputs; off, before `start` and after `stop`, it is the conditional one."""
    for settings in case.settings:
        for dtype in (torch.float32, torch.bfloat16):
            guider = case.cls(**settings)
            for step in range(STEPS):
                found = guide(guider, step, dtype=dtype)
                right = found.dtype == dtype and found.shape == SHAPE
                require(
                    right and found.isfinite().all(),
                    f"{settings}: step {step} gives {found.dtype} {tuple(found.shape)}",
                )
        for off in ({"enabled": False}, {"start": 0.0, "stop": 0.0}, {"start": 0.9, "stop": 0.9}):
            guider = case.cls(**{**settings, **off})
            given = batches(guider, 2)
            require(
                torch.equal(guider(given).pred, given[0].noise_pred),
                f"{settings}, {off}: not the conditional prediction",
            )


@SUITE.rule(when=is_guider)
def nothing_to_guide(case: Case, world: World) -> None:
    """Where all predictions are equal, so is the result: guidance amplifies differences."""
    for settings in case.settings:
        guider = case.cls(**settings)
        for step in range(3):
            given = batches(guider, step, equal=True)
            error = (guider(given).pred - given[0].noise_pred).abs().max().item()
            require(error < 1e-4, f"{settings}: equal predictions become another one (off by {error:.2g})")


@SUITE.rule(when=is_guider)
def guided_runs_leave_nothing(case: Case, world: World) -> None:
    """A run is the same after another, and two guiders whose steps alternate give what each gives alone."""
    for settings in case.settings:
        guider = case.cls(**settings)
        expected = [guide(guider, step) for step in range(STEPS)]
        require(
            hook.equal([guide(guider, step) for step in range(STEPS)], expected), f"{settings}: the second run differs"
        )
        guide(guider, 0), guide(guider, 1)
        require(
            hook.equal([guide(guider, step) for step in range(STEPS)], expected), f"{settings}: after a run broken off"
        )
        pair = case.cls(**settings), case.cls(**settings)
        found = [[guide(one, step) for one in pair] for step in range(STEPS)]
        require(hook.equal([row[0] for row in found], expected), f"{settings}: alternating with another, it differs")
        clone = copy.deepcopy(guider)
        require(hook.equal([guide(clone, step) for step in range(STEPS)], expected), f"{settings}: a deep copy differs")
