r"""Guided runs of a pipeline on disk: what the denoiser was given at a step, and what it gave with and without the condition.

    record_guided_runs(pipe, "runs", prompts, num_runs=256, num_inference_steps=999, guidance_scales=(1, 12), kept_steps=50)
    GuidedRuns("runs")[0]     # {"x": ..., "t": ..., "scale": w, "guided": ..., "inputs/encoder_hidden_states": ...}

The pipeline's own loop makes the runs, each guided by a scale w of its own; one that stops goes on where it was. No picture is
needed. A run is a row of a safetensors file, with a few of its steps or all of them. For pipelines that guide by one call of
twice the batch: Stable Diffusion and relatives, DiT, Stable Diffusion 3.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .. import _compat
from ..schedulers._model_statistics import same_marks, weight_marks
from ._data import SampleNoise
from ._trajectories import Walk, count_steps, travel

_INDEX, _INPUT = "runs.json", "inputs/"
KEPT = {"guided": ("guided",), "both": ("cond", "uncond")}  # what is kept of the two predictions
_ANY_SCALE = 2.0  # makes the pipeline guide; which scale it thinks to have does not matter


def denoiser_of(pipe: Any) -> nn.Module:
    """The `unet` or `transformer` of a pipeline, a compiled one unwrapped.

    Raises:
        ValueError: it has neither.
    """
    for name in ("unet", "transformer"):
        found = getattr(pipe, name, None)
        if isinstance(found, nn.Module):
            return _compat.unwrap(found)
    raise ValueError(f"`pipe` is a {type(pipe).__name__}; one with a `unet` or a `transformer` is needed.")


def guide(cond: torch.Tensor, uncond: torch.Tensor, scales: torch.Tensor, channels: int) -> torch.Tensor:
    """:math:`u + w (c - u)` in the first channels; the rest, such as a learned variance, is of the condition.

    Args:
        cond, uncond: predictions `(batch, ...)` with the condition and without.
        scales: w, `(batch,)`.
        channels: how many are guided.
    """
    c, u = cond[:, :channels], uncond[:, :channels]
    w = scales.to(c).view(-1, *[1] * (c.ndim - 1))
    return torch.cat([u + w * (c - u), cond[:, channels:]], dim=1)


class _Watch:
    """A forward hook of a denoiser: guides each run by its own scale, and keeps the steps that are asked for."""

    def __init__(self, scales: torch.Tensor, chosen: torch.Tensor, keep: str, cond_first: bool, dtype: torch.dtype):
        self.scales, self.chosen, self.keep, self.cond_first, self.dtype = scales, chosen, keep, cond_first, dtype
        self.step, self.found = 0, {}  # type: ignore[var-annotated]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        x, t = given.pop(names[0]), given.pop("timestep")
        count = len(self.scales)
        if len(x) != 2 * count:
            raise ValueError(
                f"`pipe` called its {type(module).__name__} with {len(x)} rows for {count} pictures; a pipeline that guides by "
                f"one call of twice the batch is needed."
            )
        halves = output[0].chunk(2)
        cond, uncond = halves if self.cond_first else halves[::-1]
        channels = x.shape[1] if cond.shape[1] == 2 * x.shape[1] else cond.shape[1]
        guided = guide(cond, uncond, self.scales, channels)
        kept = {"guided": guided} if self.keep == "guided" else {"cond": cond, "uncond": uncond}
        now = torch.as_tensor(t, dtype=torch.float32).reshape(-1)[-1:].expand(2 * count)
        self._store({"x": self._half(x), "t": self._half(now)} | kept, given)
        self.step += 1
        both = torch.cat([guided, guided])  # the pipeline guides as well: u + s (c - u) is c where both are equal
        return (both, *output[1:]) if isinstance(output, tuple) else type(output)(both)

    def _half(self, value: torch.Tensor) -> torch.Tensor:
        return value.chunk(2)[0 if self.cond_first else 1]

    def _store(self, tensors: dict[str, torch.Tensor], given: Mapping[str, Any]) -> None:
        rows, places = (self.chosen == self.step).nonzero(as_tuple=True)
        for name, value in tensors.items():
            dtype = torch.float32 if name == "t" else self.dtype
            if name not in self.found:
                self.found[name] = torch.zeros(*self.chosen.shape, *value.shape[1:], dtype=dtype)
            self.found[name][rows, places] = value.detach().to("cpu", dtype)[rows]
        if self.step == 0:
            for name, value in _flat(given).items():
                floating = value.is_floating_point()
                self.found[_INPUT + name] = (
                    self._half(value).detach().to("cpu", self.dtype if floating else value.dtype)
                )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of nested dictionaries by path."""
    found: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if torch.is_tensor(value):
            found[prefix + name] = value
        elif isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}/")
    return found


def denoiser_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The denoiser's keyword arguments of the condition, out of a batch of rows of `GuidedRuns`."""
    inputs: dict[str, Any] = {}
    for name, value in batch.items():
        if name.startswith(_INPUT):
            *path, last = name.removeprefix(_INPUT).split("/")
            place = inputs
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
    return inputs


@contextmanager
def _watched(denoiser: nn.Module, watch: _Watch):
    handle = denoiser.register_forward_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def record_guided_runs(
    pipe: DiffusionPipeline,
    folder: str | Path,
    conditions: Sequence[Any],
    *,
    num_runs: int,
    num_inference_steps: int,
    guidance_scales: tuple[float, float],
    kept_steps: int | None = None,
    keep: str = "guided",
    batch_size: int = 8,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    process: tuple[int, int] = (0, 1),
) -> None:
    """Record runs, or those that are missing of what another call with the same arguments began.

    Args:
        pipe: guides by one call of twice the batch; its scheduler draws no noise on the way.
        folder: where; each file holds `batch_size` runs.
        conditions: prompts or class labels, taken in turn; or dictionaries of arguments of a call for one picture, in which
            tensors have one row, such as `prompt_embeds`.
        num_runs: a multiple of `batch_size`.
        num_inference_steps: of a run.
        guidance_scales: ends between which w of a run is drawn, uniformly.
        kept_steps: how many steps are kept of a run, one drawn from each of as many equal parts of it; None keeps all.
        keep: `guided` keeps :math:`u + w (c - u)`, `both` keeps c and u.
        dtype: of what is kept; times are float32.
        seed: of noise, scales and steps, with the number of the run.
        call: more keyword arguments of a call of the pipeline.
        process: number of this process, and how many share the work.

    Raises:
        ValueError: an argument is out of range, the pipeline guides in another way or draws noise, or the folder holds runs
            of other arguments or of another model.
    """
    low, high = guidance_scales
    if not 0 <= low <= high < float("inf"):
        raise ValueError(f"`guidance_scales` is {guidance_scales!r}; two numbers from 0 on, in order, are needed.")
    if keep not in KEPT:
        raise ValueError(f"`keep` is {keep!r}; allowed are {', '.join(KEPT)}.")
    if not conditions:
        raise ValueError("`conditions` is empty; prompts or class labels are needed.")
    if batch_size < 1 or num_runs < 1 or num_runs % batch_size:
        raise ValueError(f"`num_runs` is {num_runs}; a positive multiple of `batch_size`, {batch_size}, is needed.")
    denoiser, given = denoiser_of(pipe), dict(call or {})
    by_class = "class_labels" in inspect.signature(pipe.__call__).parameters

    def arguments(ids: Sequence[int], generators: list[torch.Generator]) -> dict[str, Any]:
        made = {name: [value] * len(ids) if name == "negative_prompt" and isinstance(value, str) else value for name, value in given.items()}  # fmt: skip
        made |= _together(
            [conditions[number % len(conditions)] for number in ids], "class_labels" if by_class else "prompt"
        )
        return made | {
            "guidance_scale": _ANY_SCALE,
            "num_inference_steps": num_inference_steps,
            "generator": generators,
        }

    steps = count_steps(pipe, arguments([0], [torch.Generator()]))
    kept = steps if kept_steps is None else kept_steps
    if not 1 <= kept <= steps:
        raise ValueError(f"`kept_steps` is {kept_steps}; a run has {steps} steps, and allowed are 1 to {steps}.")
    settings = {
        "pipeline": type(pipe).__name__, "scheduler": _plain(pipe.scheduler.config), "batch_size": batch_size, "keep": keep,
        "num_inference_steps": num_inference_steps, "guidance_scales": [float(low), float(high)], "kept_steps": kept,
        "dtype": str(dtype), "seed": seed, "conditions": _digest(list(conditions)), "call": _digest(given),
    }  # fmt: skip
    folder = Path(folder)
    _begin(folder, settings, weight_marks(denoiser))
    edges = torch.arange(kept + 1) * steps // kept
    for shard in tqdm(range(process[0], num_runs // batch_size, process[1]), desc="Guided runs", mininterval=1.0):
        file = folder / f"runs-{shard:06d}.safetensors"
        if file.is_file():
            continue
        ids = torch.arange(shard * batch_size, (shard + 1) * batch_size)
        noise = SampleNoise(seed, ids)
        scales = low + (high - low) * noise.uniform()
        chosen = edges[:-1] + (noise.uniform(kept) * (edges[1:] - edges[:-1])).long()
        watch = _Watch(scales, chosen, keep, by_class, dtype)
        state = _random_states()
        with _watched(denoiser, watch):
            travel(pipe, arguments(ids.tolist(), noise.generators), _all_steps(steps))
        if not all(map(torch.equal, state, _random_states())):
            raise ValueError(
                f"`pipe` has a {type(pipe.scheduler).__name__}, which draws noise on the way; take one that does not."
            )
        write_guided_runs(file, watch.found | {"scale": scales, "condition": ids % len(conditions)})


def _random_states() -> list[torch.Tensor]:
    """Of torch's own generators, from which a scheduler that is given none draws."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _together(conditions: list[Any], name: str) -> dict[str, Any]:
    """Arguments of one call for several pictures."""
    if not isinstance(conditions[0], Mapping):
        return {name: conditions}
    columns = {key: [condition[key] for condition in conditions] for key in conditions[0]}
    return {key: torch.cat(values) if torch.is_tensor(values[0]) else values for key, values in columns.items()}


def _digest(value: Any) -> str:
    """Hash of nested lists and dictionaries of plain values and tensors."""

    def plain(part: Any) -> Any:
        if torch.is_tensor(part):
            return hashlib.sha256(part.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
        if isinstance(part, Mapping):
            return {key: plain(part[key]) for key in sorted(part)}
        return [plain(each) for each in part] if isinstance(part, (list, tuple)) else part

    return hashlib.sha256(json.dumps(plain(value)).encode()).hexdigest()


def _all_steps(steps: int) -> Walk:
    for _ in range(steps):
        yield True


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({name: value for name, value in config.items() if not name.startswith("_")}))


def _begin(folder: Path, settings: dict[str, Any], marks: torch.Tensor) -> None:
    """Note what the folder holds, or check that it holds just that."""
    index = folder / _INDEX
    if index.is_file():
        found = json.loads(index.read_text(encoding="utf-8"))
        other = [name for name in settings if found["settings"].get(name) != settings[name]]
        if other:
            raise ValueError(
                f"`folder` {folder.name!r} holds runs with another {', '.join(other)}; take another folder."
            )
        if not same_marks(torch.tensor(found["marks"]), marks):
            raise ValueError(f"`folder` {folder.name!r} holds runs of other weights; take another folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{_INDEX}.{os.getpid()}"
    aside.write_text(json.dumps({"settings": settings, "marks": marks.tolist()}, indent=1), encoding="utf-8")
    aside.replace(index)


def write_guided_runs(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One file of runs, whole or not at all.

    Args:
        tensors: `x`, `t` and what was predicted, `(runs, steps, ...)`; `scale`, `condition` and `inputs/...`, `(runs, ...)`.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, aside)
    aside.replace(file)


class GuidedRuns(Dataset):
    """The steps of recorded runs as rows: `x`, `t`, `scale`, what was predicted, `inputs/...`, `condition`, `step`.

    `step` is the place among the steps that were kept of its run. Rows of one run follow each other, from noise to picture.

    Args:
        folder: of `record_guided_runs`.

    Raises:
        ValueError: there are no runs.
    """

    def __init__(self, folder: str | Path) -> None:
        files = sorted(Path(folder).glob("runs-*.safetensors"))
        if not files:
            raise ValueError(f"`folder` is {str(folder)!r}, and there are no recorded runs.")
        self._files = [safe_open(file, framework="pt") for file in files]
        shapes = [file.get_slice("t").get_shape() for file in self._files]
        if len({tuple(shape) for shape in shapes}) > 1:
            raise ValueError(
                f"`folder` is {str(folder)!r}, with files of different sizes: it holds different recordings."
            )
        self.runs_a_file, self.steps = shapes[0]
        self.columns = list(self._files[0].keys())
        self._by_step = [name for name in self.columns if name in ("x", "t", "guided", "cond", "uncond")]

    @property
    def num_runs(self) -> int:
        return len(self._files) * self.runs_a_file

    def __len__(self) -> int:
        return self.num_runs * self.steps

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, sample_id = item if isinstance(item, tuple) else (item, item)
        run, step = divmod(index, self.steps)
        number, row = divmod(run, self.runs_a_file)
        file = self._files[number]
        found: dict[str, Any] = {"index": index, "sample_id": sample_id, "step": step}
        for name in self.columns:
            part = file.get_slice(name)
            found[name] = part[row, step] if name in self._by_step else part[row]
        return found
