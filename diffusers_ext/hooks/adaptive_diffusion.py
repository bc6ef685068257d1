"""AdaptiveDiffusion (Ye et al. 2024, arXiv 2410.09873): skip a whole prediction where the latents move smoothly.

Before each call of the denoiser the last three changes of the latents are compared. Where the middle one is nearly the mean
of its neighbours, the last prediction is taken again; the scheduler steps on with it, so that the latents still move.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ..enabling import HookConfig
from . import _blocks, _unets
from ._plan import Action, Call, PlanBuilder, find_run, first_input, uninstall
from ._values import is_count, is_number

_FULL, _SKIP = "full", "skip"
# Parts that make the output of a transformer out of what its last block leaves.
_OUTPUT = re.compile(r"(^|_)(out|final|head)(_|$)")
_MIN_WARMUP = 4  # three changes of the latents, and the starting noise is left out


@dataclass
class AdaptiveDiffusionConfig(HookConfig):
    r"""Settings of AdaptiveDiffusion.

    With y_k the latents after step k, :math:`D_k = \mathrm{mean}|y_k - y_{k-1}|` over the whole batch, prediction k is
    skipped where :math:`|(D_{k-1} + D_{k-3})/2 - D_{k-2}| \le \delta D_{k-2}` (section 3.3). What is taken again is the
    output of the network as it is, in its own parametrisation, with both halves of guidance.

    Args:
        threshold: delta. The larger, the more is skipped; a negative one skips nothing. The authors take 0.01 for Stable
            Diffusion, and 0.004 for latent diffusion models.
        max_skip_steps: C, at most so many predictions are skipped in a row. The authors take 4, and 6.
        warmup_steps: so many predictions at the beginning are computed, at least 4.
        cap: "strict" keeps to C always. "reference" is the authors' code, which begins to count after five decisions: its
            first run of skips may have five.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "adaptive_diffusion"
    family: ClassVar[str] = "cache"

    threshold: float = 0.01
    max_skip_steps: int = 4
    warmup_steps: int = _MIN_WARMUP
    cap: str = "strict"

    def __post_init__(self) -> None:
        if not is_number(self.threshold):
            raise ValueError(f"`threshold` is {self.threshold!r}; it must be a finite number.")
        for name, least in (("max_skip_steps", 1), ("warmup_steps", _MIN_WARMUP)):
            value = getattr(self, name)
            if not is_count(value, least):
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")
        if self.cap not in ("strict", "reference"):
            raise ValueError(f"`cap` is {self.cap!r}; allowed are 'strict' and 'reference'.")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where AdaptiveDiffusion works on `module`, else the reason why not."""
        if (reason := _unets.unsupported(module)) is None:
            return None
        if not _blocks.block_lists(module):
            return f"{reason}, and it has no list of transformer blocks"
        if (reason := _blocks.unsupported(module)) is not None:
            return reason
        if _blocks.sample_module(module) is None:
            return "it is not known which of its parts takes the noisy input"
        return None if _output_names(module) else "it is not known which of its parts makes the output"

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := self.supports(module)) is not None:
            raise ValueError(f"AdaptiveDiffusion does not work on {type(module).__name__}: {reason}.")

    def apply(self, module: nn.Module) -> None:
        if _unets.unsupported(module) is None:
            _apply_to_unet(module, self)
        else:
            _apply_to_transformer(module, self)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_adaptive_diffusion(module: nn.Module, config: AdaptiveDiffusionConfig | None = None) -> None:
    """Put AdaptiveDiffusion on a U-Net or a transformer.

    On a bare model the noisy input is compared as it comes. On a pipeline (`diffusers_ext.enable`) its scheduler's scaling
    of the input is undone first, which the rule needs with schedulers of the Euler kind.

    Raises:
        ValueError: the model is none that it works on.
    """
    from ..enabling import enable

    enable(module, config if config is not None else AdaptiveDiffusionConfig())


def remove_adaptive_diffusion(module: nn.Module) -> None:
    """Take AdaptiveDiffusion off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, AdaptiveDiffusionConfig.key)


@dataclass(frozen=True)
class AdaptiveDiffusionStats:
    """What was skipped in a run.

    Attributes:
        num_steps: predictions that were asked for, the two of guidance counted as one.
        skipped: numbers of those that were taken from before, counted from 0.
    """

    num_steps: int
    skipped: tuple[int, ...]


def adaptive_diffusion_stats(target: Any) -> AdaptiveDiffusionStats:
    """What AdaptiveDiffusion skipped in the last run, or in one that still runs.

    Args:
        target: a pipeline or model on which it is on.

    Raises:
        ValueError: it is not on, or it is on two models of the pipeline: then ask for one of them.
    """
    from ..enabling import status

    carriers = [entry.component for entry in status(target) if entry.key == AdaptiveDiffusionConfig.key]
    if len(carriers) != 1:
        raise ValueError(
            f"`target` is {type(target).__name__}, with AdaptiveDiffusion on {carriers}; it must be on one."
        )
    run = find_run(target if carriers[0] is None else getattr(target, carriers[0]), AdaptiveDiffusionConfig.key)
    assert run is not None and isinstance(run.plan, _Plan)
    log = run.plan.log
    return AdaptiveDiffusionStats(len(log), tuple(step for step, mode in enumerate(log) if mode == _SKIP))


class _Plan:
    """Which predictions are skipped.

    Args:
        channels: how many of the first channels of the sample are latents, the rest being conditions; None for all.

    Attributes:
        sample: the noisy input of the call, where it is not the clock's.
        log: mode of each step of the last run, for the user only.
    """

    def __init__(self, config: AdaptiveDiffusionConfig, channels: int | None = None) -> None:
        self.config, self.channels = config, channels
        self.sample: torch.Tensor | None = None
        self.log: list[str] = []

    def mode(self, call: Call) -> str:
        sample, self.sample = call.sample if self.sample is None else self.sample, None
        mode = _SKIP if self._skips(call, sample) else _FULL
        if call.step == 0:
            self.log = []
        self.log[call.step :] = [mode]  # the second call of guidance writes what the first did
        return mode

    def _skips(self, call: Call, sample: torch.Tensor) -> bool:
        changes = call.memory.setdefault("changes", [])
        if call.step == 0:
            return False
        # Both halves of guidance get the same latents: the mean over them is that over one.
        latents = sample if self.channels is None else sample[:, : self.channels]
        latents = latents.detach().to(torch.promote_types(sample.dtype, torch.float32)) / _unets.input_scale(
            call.scheduler
        )
        if "latents" in call.memory:
            changes[:] = [*changes[-2:], (latents - call.memory["latents"]).abs().mean()]
        call.memory["latents"] = latents
        if call.step < self.config.warmup_steps:
            return False
        skips = call.memory.setdefault("skips", [])
        skip = not self._capped(skips)
        if skip:
            first, second, third = changes
            skip = bool(((third + first) / 2 - second).abs() <= self.config.threshold * second)
        skips.append(skip)
        return skip

    def _capped(self, skips: list[bool]) -> bool:
        """Whether the decisions so far rule out another skip."""
        cap = self.config.max_skip_steps
        if self.config.cap == "reference":
            return len(skips) > 4 and all(skips[-cap:])
        return len(skips) >= cap and all(skips[-cap:])


class _SampleHook(ModelHook):
    """On the part that takes the noisy input, which runs before the clock."""

    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        self.plan = plan

    def pre_forward(self, module, *args, **kwargs):
        self.plan.sample = first_input(args, kwargs)
        return args, kwargs


def _apply_to_unet(unet: nn.Module, config: AdaptiveDiffusionConfig) -> None:
    channels = min(unet.conv_in.in_channels, unet.conv_out.out_channels)  # type: ignore[union-attr]
    builder = PlanBuilder(unet, config.key, _Plan(config, channels))
    for name in _unets.encoder_names(unet):
        builder.act(name, {_FULL: Action.COMPUTE, _SKIP: Action.SKIP})
    *passed, last = _unets.decoder_names(unet)
    for name in passed:
        builder.act(name, {_FULL: Action.COMPUTE, _SKIP: Action.PASS})
    builder.act(last, {_FULL: Action.COMPUTE, _SKIP: Action.REUSE})
    builder.install("conv_in", "time_proj")


def _apply_to_transformer(model: nn.Module, config: AdaptiveDiffusionConfig) -> None:
    plan = _Plan(config)
    builder = PlanBuilder(model, config.key, plan)
    blocks = _blocks.BlockPlan(builder, _FULL)
    blocks.leave_out(_SKIP, _blocks.block_names(model), order=None)
    for name in _output_names(model):
        builder.act(name, {_FULL: Action.COMPUTE, _SKIP: Action.REUSE})
    # Steps are counted on the first block: only there the timesteps are known, which tell a new run of a bare model.
    builder.hook(_blocks.sample_module(model) or "", _SampleHook(plan))
    blocks.install()


def _output_names(model: nn.Module) -> list[str]:
    """Parts after the blocks of a transformer from which its output follows without the blocks."""
    children = [name for name, _ in model.named_children()]
    last = max(children.index(name) for name in _blocks.block_lists(model))
    found = [
        name for name in children[last + 1 :]
        if _OUTPUT.search(name) and not isinstance(getattr(model, name), (nn.ModuleList, nn.ModuleDict))
    ]  # fmt: skip
    # A norm is last only where nothing comes after it.
    return [name for name in found if "norm" not in name] or found
