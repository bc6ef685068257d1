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
from ._plan import Action, Call, PlanBuilder, uninstall

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
            if (
                isinstance(self.power, bool)
                or not isinstance(self.power, (int, float))
                or not 1 < self.power < float("inf")
            ):
                raise ValueError(f"`power` is {self.power!r}; it must be a number greater than 1.")
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
            raise ValueError(
                "`schedule` is 'quad', which needs the number of steps: enable it on the pipeline, not on its model."
            )

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

    def mode(self, call: Call) -> str:
        step, num_steps = call.step, call.num_steps
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


@dataclass(frozen=True)
class _Part:
    """A layer or sampler of a block: its modules in forward order, and the skip connection that it makes or reads."""

    names: tuple[str, ...]
    skip: int


def _layout(unet: nn.Module) -> tuple[dict[str, list[_Part]], dict[str, list[_Part]]]:
    """Down blocks and up blocks by name, in forward order. A cached step runs the parts with `skip <= branch`."""
    downs: dict[str, list[_Part]] = {}
    ups: dict[str, list[_Part]] = {}
    last, offset = len(unet.down_blocks) - 1, 0  # type: ignore[arg-type]
    for i, down in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        name, mirror, layers = f"down_blocks.{i}", f"up_blocks.{last - i}", _num_layers(down)
        up = unet.up_blocks[last - i]  # type: ignore[index]
        downs[name] = [_Part(_layer(down, name, j), offset + j + 1) for j in range(layers)]
        downs[name] += _samplers(down, name, "downsamplers", offset + layers + 1)
        ups[mirror] = [_Part(_layer(up, mirror, j), offset + layers - j) for j in range(layers + 1)]
        ups[mirror] += _samplers(up, mirror, "upsamplers", offset)
        offset += layers + 1
    return downs, dict(reversed(ups.items()))


def _layer(block: nn.Module, name: str, j: int) -> tuple[str, ...]:
    lists = [part for part in _LAYER_PARTS if isinstance(getattr(block, part, None), nn.ModuleList)]
    return tuple(f"{name}.{part}.{j}" for part in lists)


def _samplers(block: nn.Module, name: str, kind: str, skip: int) -> list[_Part]:
    samplers = getattr(block, kind, None)
    return [_Part(tuple(f"{name}.{kind}.{j}" for j in range(len(samplers))), skip)] if samplers else []


def cached_modules(unet: nn.Module, branch: int) -> list[str]:
    """Names of the modules that a cached step runs, in forward order: whole layers, samplers and embeddings.

    Args:
        unet: a U-Net that DeepCache supports.
        branch: b, as in `DeepCacheConfig`.
    """
    before = ("time_proj", "time_embedding", "class_embedding", "add_time_proj", "add_embedding", "conv_in")
    after = ("conv_norm_out", "conv_act", "conv_out")
    here = {name for name, _ in unet.named_children()}
    layers = [
        name for blocks in _layout(unet) for parts in blocks.values() for part in parts if part.skip <= branch for name in part.names
    ]  # fmt: skip
    return [name for name in before if name in here] + layers + [name for name in after if name in here]


def _apply(unet: nn.Module, config: DeepCacheConfig) -> None:
    builder = PlanBuilder(unet, config.key, _Plan(config))
    downs, ups = _layout(unet)

    for block, parts in downs.items():
        idle = [name for part in parts if part.skip > config.branch for name in part.names]
        # No part of it runs: skip it whole, its loop included.
        for name in [block] if all(part.skip > config.branch for part in parts) else idle:
            builder.act(name, {_FULL: Action.COMPUTE, _CACHED: Action.SKIP})

    # All that is skipped from the middle up, in forward order, each with the block that reads its output.
    idle_up: list[tuple[str, str]] = []
    if getattr(unet, "mid_block", None) is not None:
        idle_up.append(("mid_block", next(iter(ups))))
    for i, (block, parts) in enumerate(ups.items()):
        passed = [part for part in parts if part.skip > config.branch]
        if len(passed) == len(parts):
            idle_up.append((block, f"up_blocks.{i + 1}"))
        elif passed:
            builder.trim(block, _CACHED, len(passed))
            idle_up += [(name, block) for part in passed for name in part.names]
    # The last of them holds U_{b+1}, all that a cached step needs of the last full step.
    for name, _ in idle_up[:-1]:
        builder.act(name, {_FULL: Action.COMPUTE, _CACHED: Action.PASS})
    name, consumer = idle_up[-1]
    builder.act(name, {_FULL: Action.COMPUTE, _CACHED: Action.REUSE}, unet.get_submodule(consumer))
    builder.install("conv_in", "time_proj")
