"""TiUE, a time-independent unified encoder (Liu et al. 2025, arXiv 2505.21960): a whole run in one pass of a U-Net's encoder.

The encoder runs once, on the starting noise at the first timestep. The decoder runs on its features for each timestep of the
run, all of them as one batch; what it predicts is taken by the scheduler step by step, and no step needs another call. That is
for U-Nets that were distilled to work like this, by `diffusers_ext.training.train_tiue_loopfree`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..enabling import HookConfig
from . import _unets
from ._plan import PlanBuilder, uninstall
from ._values import is_count


@dataclass
class TiUELoopfreeConfig(HookConfig):
    """Settings of TiUE. The pipeline is called without guidance (`guidance_scale=1`): the student has it inside.

    Args:
        parallel: run the decoders of all steps as one batch, in the first step. It takes less time where single calls do not
            fill the device, and the memory of that batch. The result is the same up to rounding. Needs a pipeline, for the
            timesteps to come.
        steps: of the runs that the U-Net was distilled for; runs of another number are refused where a pipeline tells it.
            None takes any.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "tiue_loopfree"
    family: ClassVar[str] = "cache"

    parallel: bool = True
    steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.parallel, bool):
            raise ValueError(f"`parallel` is {self.parallel!r}; allowed are True and False.")
        if self.steps is not None and not is_count(self.steps, 1):
            raise ValueError(f"`steps` is {self.steps!r}; it must be None or an integer of at least 1.")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where TiUE works on `module`, else the reason why not."""
        return _unets.unsupported(module)

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := self.supports(module)) is not None:
            raise ValueError(f"TiUE (tiue_loopfree) does not work on {type(module).__name__}: {reason}.")
        if self.parallel:
            _unets.check_parallel(module, on_pipeline, "TiUE")

    def apply(self, module: nn.Module) -> None:
        plan = _unets.PropagationPlan(self._is_full, self.parallel, "TiUE")
        _unets.propagate_encoder(PlanBuilder(module, self.key, plan), plan)

    def _is_full(self, step: int, num_steps: int | None) -> bool:
        if step == 0 and self.steps is not None and num_steps not in (None, self.steps):
            raise ValueError(
                f"`num_inference_steps` is {num_steps}; this U-Net was distilled for runs of {self.steps} steps."
            )
        return step == 0

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_tiue_loopfree(module: nn.Module, config: TiUELoopfreeConfig | None = None) -> None:
    """Put TiUE on a U-Net.

    A bare model has no scheduler: `parallel` is False unless `config` is given. It notices a new run by its timestep going up
    or its input changing shape.

    Raises:
        ValueError: the model is no U-Net of this kind, or `config` does not fit it.
    """
    from ..enabling import enable

    enable(module, config if config is not None else TiUELoopfreeConfig(parallel=False))


def remove_tiue_loopfree(module: nn.Module) -> None:
    """Take TiUE off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, TiUELoopfreeConfig.key)
