"""U-Nets under a plan: their encoder and decoder, and steps on which one encoder serves several decoders.

The encoder is all up to the middle, the decoder all after it. What the decoder reads of the encoder is stored where it
enters the up blocks, so that residuals of a ControlNet or a T2I-Adapter are in it.

In the parallel form the decoder of a full step and of all steps up to the next full one runs as one batch, rows of one
timestep after the other: their embeddings are computed for all timesteps, the encoder takes the rows of its own, and each
step gets its part of the prediction. Nothing here is about classifier-free guidance: the rows of a call stay in order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from diffusers.hooks import ModelHook
from torch import nn

from .. import _compat
from ._blocks import forward_parameters
from ._plan import Action, CacheRun, Call, PlanBuilder, _ActionHook, first_input

FULL, DECODER, PART = "full", "decoder", "part"
# Embeddings beside that of the timestep, one row a sample, which U-Nets add to it.
_EMBEDDINGS = ("class_embedding", "add_embedding", "fps_embedding")
_ONE_TIME = "diffusers_ext.agd"  # hooks that take the time embedding of a call for all its rows


# --- structure -------------------------------------------------------------------------------------------------------


def unsupported(model: nn.Module) -> str | None:
    """None where `model` is a U-Net whose encoder and decoder can be left out, else the reason why not."""
    needed = ("conv_in", "time_proj", "time_embedding", "down_blocks", "up_blocks", "conv_out")
    missing = [name for name in needed if not isinstance(getattr(model, name, None), nn.Module)]
    if missing:
        return f"it is no U-Net with skip connections (it has no {', '.join(missing)})"
    wanted = {"down_blocks": ["hidden_states"], "up_blocks": ["hidden_states", "res_hidden_states_tuple"]}
    for name, first in wanted.items():
        for block in getattr(model, name):
            found = forward_parameters(block)
            if found[: len(first)] != first or "skip_sample" in found:
                return f"its block {type(block).__name__} takes other inputs than {' and '.join(first)}"
    return None


def check_parallel(model: nn.Module, on_pipeline: bool, name: str) -> None:
    """Refuse the parallel form where it cannot work.

    Raises:
        ValueError: the method is not enabled on a pipeline, or adapters are on that take one time a call.
    """
    if not on_pipeline:
        raise ValueError(
            "`parallel` is True, which needs the timesteps: enable it on the pipeline, not on its model, or give "
            "`parallel=False`."
        )
    if any(_compat.has_hook(module, _ONE_TIME) for module in model.modules()):
        raise ValueError(
            f"`parallel` is True, with which {name} decodes several steps in one call, and AGD adapters are on, which take one "
            "time a call: give `parallel=False`."
        )


def encoder_names(unet: nn.Module) -> list[str]:
    """Names of the modules of the encoder, in forward order."""
    downs = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]  # type: ignore[arg-type]
    names = ["conv_in", "transformer_in", *downs, "mid_block"]
    return [name for name in names if "." in name or getattr(unet, name, None) is not None]


def decoder_names(unet: nn.Module) -> list[str]:
    """Names of the modules of the decoder, in forward order; the last, `conv_out`, makes the output."""
    ups = [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]  # type: ignore[arg-type]
    return [*ups, *(["conv_norm_out"] if getattr(unet, "conv_norm_out", None) is not None else []), "conv_out"]


def input_scale(scheduler: Any) -> float:
    """Factor by which a running pipeline scales its latents for the denoiser; 1 for no scheduler, or one without any."""
    # A scheduler that scales by its step has a step index from the pipeline's call of `scale_model_input` on.
    if not hasattr(scheduler, "scale_model_input") or getattr(scheduler, "step_index", 0) is None:
        return 1.0
    probe = copy.copy(scheduler)  # it notes that it was called
    return float(probe.scale_model_input(torch.ones((), dtype=torch.float64), scheduler.timesteps[0]))


# --- one encoder, several decoders -----------------------------------------------------------------------------------


class PropagationPlan:
    """Full steps run everything; those between run the decoder on what the last full step's encoder left.

    Args:
        is_full: `(step, number of steps or None) -> bool`; the first step has to be full.
        parallel: run the decoders of a full step and of the steps after it as one batch, at the full step. Needs the
            scheduler of the pipeline that runs, for the timesteps to come.
        name: of the method, for messages.
    """

    def __init__(self, is_full: Callable[[int, int | None], bool], parallel: bool, name: str) -> None:
        self.is_full, self.parallel, self.name = is_full, parallel, name
        self.run: CacheRun | None = None

    def mode(self, call: Call) -> str:
        memory = call.memory
        if call.step == 0:
            memory["scale"] = input_scale(call.scheduler)
        full = self.is_full(call.step, call.num_steps)
        if not self.parallel:
            return FULL if full else DECODER
        if full:
            memory["timesteps"], memory["next"] = self._timesteps(call), 1
            return FULL
        if memory["next"] == len(memory["parts"]):
            self._refuse(call)
        memory["part"] = memory["parts"][memory["next"]]
        memory["next"] += 1
        return PART

    def _timesteps(self, call: Call) -> torch.Tensor:
        """The timestep of a full step, and those of the steps after it up to the next."""
        if call.scheduler is None:  # a model shared with a pipeline that the method was not enabled on
            raise ValueError(
                f"`parallel` is True, which needs the timesteps to come: enable {self.name} on this pipeline as well."
            )
        assert self.run is not None and torch.is_tensor(self.run.timesteps)
        now = self.run.timesteps.flatten()[0]
        schedule = call.scheduler.timesteps.to(now)
        if call.step == 0:  # image-to-image begins late
            found = (schedule == now).nonzero()
            call.memory["offset"] = int(found[0]) if len(found) else -1
        start = call.memory["offset"] + call.step
        if call.memory["offset"] < 0 or start >= len(schedule) or bool(schedule[start] != now):
            self._refuse(call)
        end = start + 1
        while end < len(schedule) and not self.is_full(call.step + end - start, call.num_steps):
            end += 1
        return schedule[start:end]

    def _refuse(self, call: Call) -> NoReturn:
        raise ValueError(
            f"`parallel` is True, and the denoiser is called in step {call.step} at a timestep that is not the one of "
            f"{type(call.scheduler).__name__} there: use `parallel=False` with this pipeline."
        )


def propagate_encoder(builder: PlanBuilder, plan: PropagationPlan) -> CacheRun:
    """Put a `PropagationPlan`, which `builder` was made with, on a U-Net.

    Modes are FULL, and DECODER or, in the parallel form, PART.
    """
    unet, run = builder.root, builder.run
    plan.run = run
    idle = PART if plan.parallel else DECODER
    for name in encoder_names(unet):
        kind = _InputHook if name == "conv_in" else _EncoderHook
        builder.hook(
            name, kind(run, {FULL: Action.COMPUTE, idle: Action.SKIP}, builder.slot(), unet.get_submodule(name))
        )
    *ups, last = decoder_names(unet)
    for name in ups:
        if name.startswith("up_blocks"):
            builder.hook(name, _DecoderHook(run, builder.slot(), unet.get_submodule(name), name == "up_blocks.0"))
        elif plan.parallel:
            builder.act(name, {FULL: Action.COMPUTE, PART: Action.PASS})
    if not plan.parallel:
        return builder.install("conv_in", "time_proj")
    builder.hook(last, _OutputHook(run))
    builder.hook("time_embedding", _TimeHook(run, unet.time_proj))  # type: ignore[arg-type]
    for name in _EMBEDDINGS:
        if getattr(unet, name, None) is not None:
            builder.hook(name, _EmbeddingHook(run))
    # The embedding has to know the mode, so that steps are counted there.
    return builder.install("time_embedding", "time_proj")


def _copies(run: CacheRun) -> int:
    """On how many timesteps the decoder of this call runs at once."""
    state = run.state
    return len(state.memory["timesteps"]) if state.mode == FULL and "timesteps" in state.memory else 1


def _tile(value: Any, copies: int) -> Any:
    """All tensors in `value`, repeated along the batch axis."""
    if copies == 1:
        return value
    if torch.is_tensor(value):
        return value.repeat(copies, *[1] * (value.ndim - 1))
    if isinstance(value, (tuple, list)):
        return type(value)(_tile(part, copies) for part in value)
    if isinstance(value, dict):
        return {key: _tile(part, copies) for key, part in value.items()}
    return value


class _EncoderHook(_ActionHook):
    """On a module of the encoder, which takes the embedding of its own timestep, the first of several."""

    def __init__(self, run: CacheRun, actions: dict[str, Action], slot: int, module: nn.Module) -> None:
        super().__init__(run, actions, slot, None)
        self.names = forward_parameters(module)

    def pre_forward(self, module, *args, **kwargs):
        copies = _copies(self.run)
        if copies == 1 or "temb" not in self.names:
            return args, kwargs
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if inputs.get("temb") is not None:
            inputs["temb"] = inputs["temb"][: len(inputs["temb"]) // copies]
        return (), inputs


class _InputHook(_EncoderHook):
    """On `conv_in`: keeps the input of the first call of a run."""

    def pre_forward(self, module, *args, **kwargs):
        memory = self.run.state.memory
        if "first_input" not in memory:
            memory["first_input"] = first_input(args, kwargs)
        return args, kwargs


class _DecoderHook(ModelHook):
    """On an up block: stores what it reads of the encoder, and gives it that of the last full step.

    Args:
        is_first: whether it reads the output of the middle.
    """

    def __init__(self, run: CacheRun, slot: int, module: nn.Module, is_first: bool) -> None:
        super().__init__()
        self.run, self.slot, self.is_first, self.names = run, slot, is_first, forward_parameters(module)
        self.stored = ("hidden_states", "res_hidden_states_tuple") if is_first else ("res_hidden_states_tuple",)

    def new_forward(self, module, *args, **kwargs):
        state = self.run.state
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if state.mode == PART:
            return inputs["hidden_states"]
        slot = state.slots[self.slot]
        if state.mode == DECODER:
            inputs.update(slot.value)
        elif "timesteps" not in state.memory:
            slot.value = {name: inputs[name] for name in self.stored}
        copies = _copies(self.run)
        for name, value in inputs.items():
            if name != "temb" and (name != "hidden_states" or self.is_first):
                inputs[name] = _tile(value, copies)
        if self.is_first and copies == 1:
            inputs["hidden_states"] = inputs["hidden_states"].clone()  # FreeU scales it in place
        return self.fn_ref.original_forward(**inputs)


class _OutputHook(ModelHook):
    """On `conv_out`: hands each step its part."""

    def __init__(self, run: CacheRun) -> None:
        super().__init__()
        self.run = run

    def new_forward(self, module, *args, **kwargs):
        memory = self.run.state.memory
        if self.run.state.mode == PART:
            return memory["part"]
        output = self.fn_ref.original_forward(*args, **kwargs)
        memory["parts"] = output.unflatten(0, (_copies(self.run), -1))
        return memory["parts"][0]


class _TimeHook(ModelHook):
    """On `time_embedding`: rows for all timesteps of the decoder, those of one timestep after the other."""

    def __init__(self, run: CacheRun, time_proj: nn.Module) -> None:
        super().__init__()
        self.run, self.time_proj = run, [time_proj]  # in a list: a hook owns no modules

    def pre_forward(self, module, *args, **kwargs):
        copies = _copies(self.run)
        if copies == 1:
            return args, kwargs
        (sample, *rest), kwargs = args, _tile(kwargs, copies)
        times = self.run.state.memory["timesteps"].repeat_interleave(len(sample))
        return (self.time_proj[0](times).to(sample.dtype), *_tile(rest, copies)), kwargs


class _EmbeddingHook(ModelHook):
    """On an embedding that does not know the timestep; of what more it returns, only the first is added to that."""

    def __init__(self, run: CacheRun) -> None:
        super().__init__()
        self.run = run

    def post_forward(self, module, output):
        copies = _copies(self.run)
        return (_tile(output[0], copies), *output[1:]) if isinstance(output, tuple) else _tile(output, copies)
