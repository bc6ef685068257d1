"""DeepCache (Ma et al. 2023, arXiv 2312.00858): reuse the deep features of a U-Net on most steps.

A full step runs everything. A cached step runs the outermost layers down to skip connection `b` (the branch), and takes
what comes from below from the last full step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from ..enabling import HookConfig
from ._plan import Action, CacheRun, PlanBuilder, uninstall

# The parts of one layer of a block, in the order in which the block runs them.
_LAYER_PARTS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")
_SAMPLERS = ("downsamplers", "upsamplers")
_FULL, _CACHED = "full", "cached"


@dataclass
class DeepCacheConfig(HookConfig):
    """Settings of DeepCache.

    Args:
        interval: N, full steps are 0, N, 2N, ... of a run (schedule "uniform"), or `ceil(T / N)` of its T steps ("quad").
            1 computes everything.
        branch: b, the deepest skip connection that a cached step recomputes, 0 to M - 1 for M skip connections. They
            are numbered in the order in which the U-Net makes them: 0 is the output of `conv_in`, then one a layer and
            one a downsampler of each down block. The last b + 1 layers of the up path run on a cached step.
        schedule: "uniform", or "quad": full steps denser around `center` (section 3.3). "quad" needs the number of steps,
            so it is enabled on a pipeline, not on a bare model.
        center: c of "quad", the step around which full steps are densest. The paper takes about 15 of 50.
        power: p > 1 of "quad", how much denser. The paper takes 1.2 to 1.4.

    Raises:
        ValueError: a value is out of range.
    """

    key: ClassVar[str] = "deepcache"
    family: ClassVar[str] = "cache"

    interval: int = 3
    branch: int = 0
    schedule: str = "uniform"
    center: int | None = None
    power: float = 1.4

    def __post_init__(self) -> None:
        for name in ("interval", "branch"):
            value, least = getattr(self, name), 1 if name == "interval" else 0
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")
        if self.schedule not in ("uniform", "quad"):
            raise ValueError(f"`schedule` is {self.schedule!r}; allowed are 'uniform' and 'quad'.")
        if self.schedule == "quad":
            if isinstance(self.center, bool) or not isinstance(self.center, int) or self.center < 0:
                raise ValueError(f"`center` is {self.center!r}; schedule 'quad' needs a step number of at least 0.")
            if not self.power > 1:
                raise ValueError(f"`power` is {self.power!r}; it must be greater than 1.")
        elif self.center is not None:
            raise ValueError(f"`center` is {self.center!r}; it has a meaning for schedule 'quad' only.")

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where DeepCache works on `module`, else the reason why not."""
        return _unsupported(module)

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := _unsupported(module)) is not None:
            raise ValueError(f"DeepCache does not work on {type(module).__name__}: {reason}.")
        last = _num_branches(module) - 1
        if self.branch > last:
            raise ValueError(f"`branch` is {self.branch}; this {type(module).__name__} has branches 0 to {last}.")
        if self.schedule == "quad" and not on_pipeline:
            raise ValueError("`schedule` is 'quad', which needs the number of steps: enable it on the pipeline, not on its model.")

    def apply(self, module: nn.Module) -> None:
        _apply(module, self)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        uninstall(module, cls.key)


def apply_deepcache(module: nn.Module, config: DeepCacheConfig | None = None) -> None:
    """Put DeepCache on a U-Net: `UNet2DModel`, `UNet2DConditionModel`, `UNetMotionModel`, spatio-temporal and the like.

    A bare model notices a new run by its timestep going up or its input changing shape; after an aborted run call
    `remove_deepcache`, or enable it on the pipeline (`diffusers_ext.enable`), which also notices that.

    Raises:
        ValueError: the model is no U-Net of this kind, or `config` does not fit it.
    """
    from ..enabling import enable

    enable(module, config if config is not None else DeepCacheConfig())


def remove_deepcache(module: nn.Module) -> None:
    """Take DeepCache off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, DeepCacheConfig.key)


@dataclass
class _Plan:
    """Which steps are full."""

    config: DeepCacheConfig
    _known: tuple[int, frozenset[int]] | None = None

    def mode(self, step: int, num_steps: int | None) -> str:
        if self.config.schedule == "uniform":
            return _FULL if step % self.config.interval == 0 else _CACHED
        if num_steps is None:  # a model shared with a pipeline that DeepCache was not enabled on
            raise ValueError("Schedule 'quad' needs the number of steps: enable DeepCache on this pipeline as well.")
        if self._known is None or self._known[0] != num_steps:
            full = quad_steps(num_steps, self.config.interval, self.config.center or 0, self.config.power)
            self._known = (num_steps, frozenset(full))
        return _FULL if step in self._known[1] or step == 0 else _CACHED


def quad_steps(num_steps: int, interval: int, center: int, power: float) -> list[int]:
    """Full steps of schedule "quad", dense around `center` (arXiv 2312.00858, section 3.3).

    `k = ceil(num_steps / interval)` steps at 0 and at `center + trunc(sgn(l) |l|^power)`, for l spaced evenly in between.
    The exponent is lowered by 0.02 until that many are distinct. The authors' code raises negative numbers to fractional
    powers instead of keeping the sign; its steps are not dense at the centre.

    Raises:
        ValueError: `center` lies outside the run, or no exponent above 1 gives enough steps.
    """
    if not 0 <= center < num_steps:
        raise ValueError(f"`center` is {center}; a run of {num_steps} steps allows 0 to {num_steps - 1}.")
    wanted, exponent = -(-num_steps // interval), power
    while exponent > 1:
        ends = -(center ** (1 / exponent)), (num_steps - center) ** (1 / exponent)
        points = np.linspace(*ends, wanted + 1)
        offsets = np.unique(np.trunc(np.sign(points) * np.abs(points) ** exponent + 1e-9 * np.sign(points)).astype(int))
        steps = sorted({0, *(int(offset) + center for offset in offsets[1:-1])})
        if len(steps) == wanted:
            return steps
        exponent = round(exponent - 0.02, 10)
    raise ValueError(
        f"`power` is {power}: no exponent from there down to 1 gives {wanted} distinct full steps of {num_steps} around {center}."
    )


def _parts(block: nn.Module) -> list[str]:
    return [name for name in _LAYER_PARTS if isinstance(getattr(block, name, None), nn.ModuleList)]


def _num_layers(block: nn.Module) -> int:
    return len(block.resnets)  # type: ignore[arg-type]


def _unsupported(unet: nn.Module) -> str | None:
    needed = ("conv_in", "time_proj", "down_blocks", "up_blocks", "conv_out")
    missing = [name for name in needed if not isinstance(getattr(unet, name, None), nn.Module)]
    if missing:
        return f"it is no U-Net with skip connections (it has no {', '.join(missing)})"
    downs, ups = list(unet.down_blocks), list(unet.up_blocks)  # type: ignore[arg-type]
    if len(downs) != len(ups):
        return f"it has {len(downs)} down blocks and {len(ups)} up blocks"
    for i, (down, up) in enumerate(zip(downs, reversed(ups), strict=True)):
        for block in (down, up):
            lists = {name for name, child in block.named_children() if isinstance(child, nn.ModuleList)}
            if "resnets" not in lists or not lists <= {*_LAYER_PARTS, *_SAMPLERS} or hasattr(block, "skip_conv"):
                return f"its block {type(block).__name__} is not made of layers of one residual block each"
        if _num_layers(up) != _num_layers(down) + 1:
            return f"up block {len(ups) - 1 - i} does not have one layer more than down block {i}"
        if i < len(downs) - 1 and not getattr(down, "downsamplers", None):
            return f"down block {i} has no downsampler"
    return None


def _num_branches(unet: nn.Module) -> int:
    """M: the skip connections; without a mid block, recomputing the last would leave nothing to reuse."""
    skips = sum(_num_layers(block) + 1 for block in unet.down_blocks)  # type: ignore[union-attr]
    return skips if getattr(unet, "mid_block", None) is not None else skips - 1


def _apply(unet: nn.Module, config: DeepCacheConfig) -> CacheRun:
    builder = PlanBuilder(unet, config.key, _Plan(config))
    last = len(unet.down_blocks) - 1  # type: ignore[arg-type]
    b, first_skip = config.branch, 1  # skip 0 is the output of conv_in

    def skip(name: str, action: Action, consumer: nn.Module | None = None) -> None:
        builder.act(name, {_FULL: Action.COMPUTE, _CACHED: action}, consumer)

    for i, down in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        layers = _num_layers(down)
        fresh = min(max(b - first_skip + 1, 0), layers)  # layers that a cached step runs
        if fresh == 0:
            skip(f"down_blocks.{i}", Action.SKIP)
        else:
            for part in _parts(down):
                for j in range(fresh, layers):
                    skip(f"down_blocks.{i}.{part}.{j}", Action.SKIP)
            if i < last and first_skip + layers > b:
                for j in range(len(down.downsamplers)):
                    skip(f"down_blocks.{i}.downsamplers.{j}", Action.SKIP)
        first_skip += layers + 1

    first_skip = 0  # of down block i: conv_in's output or the downsampled one that enters it
    entered = None  # the outermost module whose output is taken from the last full step
    for i, down in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        up, layers = last - i, _num_layers(down)
        block, passed = unet.up_blocks[up], layers + 1 - min(max(b - first_skip + 1, 0), layers + 1)  # type: ignore[index]
        if passed > layers:
            skip(f"up_blocks.{up}", Action.PASS if entered else Action.REUSE, unet.up_blocks[min(up + 1, last)])  # type: ignore[index]
            entered = True
        elif passed:
            parts = _parts(block)
            for part in parts:
                for j in range(passed):
                    ends = j == passed - 1 and part == parts[-1]
                    skip(f"up_blocks.{up}.{part}.{j}", Action.REUSE if ends else Action.PASS, block)
            builder.trim(f"up_blocks.{up}", _CACHED, passed)
            entered = True
        first_skip += layers + 1
    if getattr(unet, "mid_block", None) is not None:
        skip("mid_block", Action.PASS if entered else Action.REUSE, unet.up_blocks[0])  # type: ignore[index]
    return builder.install("conv_in", "time_proj")
