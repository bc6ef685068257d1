"""`calibrate`: from a full-precision pipeline to one whose denoiser is quantized."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .. import _compat
from .attention import attach
from .backends import MODULES, backend
from .config import PTQConfig
from .cost import measured
from .layers import is_quantizable
from .loader import mark_quantized
from .methods import method_of
from .recording import record
from .session import Session, put
from .temporal import noted_timesteps
from .timing import attach_clocks

T = TypeVar("T")


def calibrate(
    pipe: T,
    config: PTQConfig,
    prompts: Sequence[Any] | None = None,
    *,
    num_samples: int | None = None,
    num_inference_steps: int = 20,
    batch_size: int = 8,
    seed: int = 0,
    component: str | None = None,
    **call: Any,
) -> T:
    """Quantize the denoiser of a pipeline, calibrated on the inputs that the pipeline itself makes.

        pipe = dx.quantization.calibrate(pipe, dx.PTQConfig(method="q_diffusion", weight_bits=4), prompts=prompts)
        pipe.save_pretrained("small")        # loads again with `import diffusers_ext` and stock `from_pretrained`

    The pipeline runs once for each batch of prompts, then the methods' stages run on what was recorded. If anything fails on
    the way, the pipeline is as it was. Backends that find ranges while the model is used look at the first batch alone, for
    the layers that run.

    What backend "torchao" makes is saved as diffusers' own: stock `from_pretrained` loads it without this package. It must be
    given the `dtype` that the model had, or takes bfloat16.

    Args:
        pipe: a pipeline with a `unet` or a `transformer`, called once a step or, for guidance, more than once.
        config: what to do; the model gets a copy of it, with what was quantized filled in.
        prompts: prompts or class labels to calibrate with, one a sample.
        num_samples: for a pipeline without either: samples to calibrate with. Where neither is given, `call` says all, for
            example `prompt_embeds`.
        num_inference_steps: of the runs; those that the model is used with.
        batch_size: samples in one call of the pipeline.
        seed: of all noise.
        component: name of the denoiser; None takes `unet` or `transformer`.
        call: more arguments of the pipeline's call: `guidance_scale`, `height`, ...

    Returns:
        The same pipeline.

    Raises:
        ValueError: there is no such component, it is quantized already, has adapters or hooks or nothing to quantize, or
            there are no prompts.
        ImportError: the backend is not installed.
    """
    if not isinstance(config, PTQConfig):
        raise ValueError(f"`config` is {type(config).__name__}; a PTQConfig is needed.")
    model = _denoiser(pipe, component)
    for name, value in (("num_inference_steps", num_inference_steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least 1.")
    unknown = sorted(set(config.exclude) - dict(model.named_modules()).keys())
    if unknown:
        raise ValueError(f"`exclude` names {unknown}, which are no modules of this {type(model).__name__}.")
    runs = _runs(pipe, prompts, num_samples, batch_size, seed, call)
    if config.backend in MODULES:
        other = backend(config.backend)
        other.package()  # or an error now, before any work
        runs = runs if other.CALIBRATES else runs[:1]
    config = dataclasses.replace(config, layers={}, attentions=[], exclude=list(config.exclude), calibration={})
    with measured(next(model.parameters()).device) as cost:
        _calibrate(pipe, model, config, runs, num_inference_steps, seed)
    config.calibration |= cost
    mark_quantized(model, config)
    return pipe


def _calibrate(
    pipe: Any, model: nn.Module, config: PTQConfig, runs: list[tuple[int, dict[str, Any]]], num_steps: int, seed: int
) -> None:
    """Quantize a model; `config` is filled in."""
    method = method_of(config.method)
    generator = torch.Generator().manual_seed(seed)
    kept = [method.kept_steps(config, num_steps, count, generator) for count, _ in runs]
    with noted_timesteps(model) as times:
        calls = record(pipe, model, runs, num_steps, kept, each=config.timesteps == "normal")
    if not calls:
        raise ValueError(
            f"`num_inference_steps` is {num_steps} and `timesteps` {config.timesteps!r}: nothing was recorded."
        )
    if config.backend in MODULES:
        backend(config.backend).calibrate(model, config, calls)
        return
    session = Session(model, config, calls, seed, times)
    with session.in_place():
        method.calibrate(session)
        packed = session.packed()
    for name, layer in packed.items():
        put(model, name, layer)
    for name, inputs in session.attentions.items():
        attach(model.get_submodule(name), inputs)
    attach_clocks(model, session.clocks)


def _denoiser(pipe: Any, component: str | None) -> nn.Module:
    """The model to quantize.

    Raises:
        ValueError: see `calibrate`.
    """
    names = ("unet", "transformer") if component is None else (component,)
    found = [getattr(pipe, name, None) for name in names]
    models = [model for model in found if isinstance(model, nn.Module)]
    if not models:
        what = f"`component` is {component!r}" if component is not None else "`pipe` has no `unet` or `transformer`"
        raise ValueError(f"{what}; {type(pipe).__name__} needs a denoiser of that name.")
    model = models[0]
    kind, takes = type(model).__name__, inspect.signature(type(model).forward).parameters
    if "timestep" not in takes or not {"sample", "hidden_states"} & set(takes):
        raise ValueError(f"{kind} is no denoiser: it is not called with a noisy sample and a `timestep`.")
    if _compat.unwrap(model) is not model:
        raise ValueError("The denoiser is compiled; quantize it first, and compile it then.")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{kind} is quantized already; load it in full precision, or call its `dequantize()` first.")
    if getattr(model, "peft_config", None):
        raise ValueError(f"{kind} has LoRA adapters {sorted(model.peft_config)}; fuse or unload them first.")
    for name, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")  # pipelines leave an empty one on transformers
        hooked = "_hf_hook" in vars(module) or (registry is not None and registry.hooks)
        if is_quantizable(module):  # a layer that is replaced would lose them
            hooked = hooked or module._forward_hooks or module._forward_pre_hooks
        if hooked:
            raise ValueError(
                f"{kind} has hooks on {name or 'itself'}: it is offloaded, or a method is on. Quantize first, and put "
                "them on then."
            )
    return model


def _runs(
    pipe: Any,
    prompts: Sequence[Any] | None,
    num_samples: int | None,
    batch_size: int,
    seed: int,
    call: dict[str, Any],
) -> list[tuple[int, dict[str, Any]]]:
    """Number of samples, and keyword arguments, of each call of the pipeline.

    Raises:
        ValueError: there is nothing to calibrate with, or the pipeline does not take it.
    """
    names = inspect.signature(pipe.__call__).parameters
    fixed = {"output_type": "latent"} if "output_type" in names else {}
    if prompts is None and num_samples is None:
        if not call:
            raise ValueError("`prompts` and `num_samples` are None; give what to calibrate with.")
        given = next((v for k, v in call.items() if torch.is_tensor(v)), None)
        count = 1 if given is None else given.shape[0]
        generator = {"generator": torch.Generator().manual_seed(seed)} if "generator" in names else {}
        return [(count, {**fixed, **generator, **call})]
    if prompts is not None:
        if isinstance(prompts, str):
            raise ValueError(f"`prompts` is the string {prompts!r}; a list of prompts is needed.")
        name = next((name for name in ("prompt", "class_labels") if name in names), None)
        items: list[Any] | None = list(prompts)
        total = len(prompts)
    else:
        assert num_samples is not None
        name, items, total = ("batch_size" if "batch_size" in names else None), None, num_samples
    if total < 1:
        raise ValueError(f"`{'prompts' if items is not None else 'num_samples'}` is empty; at least one is needed.")
    if name is None:
        wanted = "`num_samples`" if items is not None else "`prompts`"
        raise ValueError(f"{type(pipe).__name__} takes no such input to calibrate with; use {wanted}.")
    runs = []
    for start in range(0, total, batch_size):
        count = min(batch_size, total - start)
        conditions = count if items is None else items[start : start + count]
        generator = {"generator": torch.Generator().manual_seed(seed + start)} if "generator" in names else {}
        runs.append((count, {name: conditions, **fixed, **generator, **call}))
    return runs
