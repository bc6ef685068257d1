"""What a call holds in memory, and what weights take on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The files that diffusers, transformers, peft and their exporters keep weights in.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data")


def peak_memory(fn: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Bytes that one call `fn()` holds at most, on top of what was held when it began.

    Weights that are in memory before are therefore not counted; `model.get_memory_footprint()` tells them. `fn` is
    really run, so call it once before where a first call does extra work.

    On a CPU, counted is what torch's allocator gives out and takes back, as its profiler records it: all tensors,
    and what operators hold inside, in the thread that calls and in torch's own. Not counted: what numpy, PIL or
    Python allocate, what libraries such as oneDNN and MKL allocate past torch, other threads, what the allocator
    wastes, and the room made where the call frees what was held before. The record grows with each operator, so
    measure a few steps, not hours.

    On CUDA it is the difference of `torch.cuda.max_memory_allocated` and `torch.cuda.memory_allocated`, in blocks of
    512 bytes: without the context of CUDA, and without what the caching allocator keeps for later. What the call frees
    of what was held before makes room. The counter of the peak is reset.

    Args:
        fn: function without arguments.
        device: whose memory: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: `device` is of another kind, or there is none.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"`device` is {str(device)!r}; allowed are cpu, and cuda where there is a CUDA device.")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines to stderr at each call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fn()
    record = recorded.profiler.kineto_results
    changes = sorted(
        (event.start_ns(), place, event.nbytes())
        for place, event in enumerate(record.events())
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    )
    held = torch.tensor([0, *(size for _, _, size in changes)]).cumsum(0)
    return int(held.max())


def bytes_on_disk(folder: str | Path) -> dict[str, int]:
    """Bytes of the weights in a saved model or pipeline, by component.

    Counted are files with an ending of `WEIGHT_SUFFIXES`, all of them: where a folder has a model in two precisions,
    both. Configurations, tokenizers and pictures are not.

    Args:
        folder: of a pipeline, with one folder a component, or of a single model.

    Returns:
        Bytes by name of the folder, those without weights left out; "" is what lies in `folder` itself. The sum is
        `sum(bytes_on_disk(folder).values())`.

    Raises:
        ValueError: there is no such folder, or it has no weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}; it must be a folder.")
    sizes: dict[str, int] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in WEIGHT_SUFFIXES and file.is_file():
            inside = file.relative_to(folder).parts[:-1]
            component = inside[0] if inside else ""
            sizes[component] = sizes.get(component, 0) + file.stat().st_size
    if not sizes:
        raise ValueError(f"`folder` is {str(folder)!r}; it has no file of weights ({', '.join(WEIGHT_SUFFIXES)}).")
    return sizes
