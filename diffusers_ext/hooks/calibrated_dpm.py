r"""Calibrated diffusion models (Pang et al. 2023, arXiv 2302.10688): take the mean error off every prediction.

The score of the noised data is zero on average, :math:`E_{q_t} \nabla \log q_t = 0`, and a trained network's is not. Subtracting
its mean :math:`\eta_t` lowers the score-matching loss by exactly :math:`\|\eta_t\|^2 / 2` (the paper's equation 13). For what
networks predict that is the mean over the noised data of prediction less target, whose mean is known: 0 for noise,
:math:`E[x_0]` for data, :math:`-\sigma_t E[x_0]` for v, :math:`-E[x_0]` for the velocity of a flow.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..enabling import HookConfig
from ..schedulers._model_statistics import weight_marks
from ..schedulers._statistics import Checkpoint, GuideScheduler, Walk, calls, clean_samples, denoiser_of, lead

_HANDLE = "_diffusers_ext_calibrated_dpm"
_SUMS = 2  # of the mean error of each pair of states, and of its square


@dataclass
class CalibratedDPMConfig(HookConfig):
    """A table of mean errors by timestep. `calibrate` makes it; it belongs to one model and one kind of call.

    Between timesteps of the table the mean error is linear, and outside it is that at the end.

    Args:
        table: the mean errors, `(parts, len(timesteps), *shape)`, as base64 of little-endian float32.
        shape: of one: that of a sample without the batch, or one that broadcasts to it. If predictions have more channels,
            as those with a learned variance, only the first are changed.
        timesteps: as the model gets them, strictly rising.
        parts: the model's batch is made of this many equal parts, each with a table of its own: 2 where a pipeline puts
            the guided and the unguided half into one call. The config is then for guided calls only.

    Raises:
        ValueError: a value is out of range, or the table has another size.
    """

    key: ClassVar[str] = "calibrated_dpm"

    table: str
    shape: list[int]
    timesteps: list[float]
    parts: int = 1

    def __post_init__(self) -> None:
        _check_numbers("shape", self.shape, whole=True)
        _check_numbers("timesteps", self.timesteps)
        if min(self.shape) < 1:
            raise ValueError(f"`shape` is {self.shape!r}; positive integers are needed.")
        if any(b <= a for a, b in zip(self.timesteps[:-1], self.timesteps[1:], strict=True)):
            raise ValueError(f"`timesteps` is {self.timesteps!r}; strictly rising numbers are needed.")
        if isinstance(self.parts, bool) or not isinstance(self.parts, int) or self.parts < 1:
            raise ValueError(f"`parts` is {self.parts!r}; it must be an integer of at least 1.")
        self.shape, self.timesteps = list(self.shape), list(self.timesteps)
        try:
            size = len(base64.b64decode(self.table, validate=True))
        except (TypeError, ValueError, binascii.Error):
            raise ValueError(f"`table` is {str(self.table)[:40]!r}; base64 of float32 is needed.") from None
        wanted = 4 * self.parts * len(self.timesteps) * math.prod(self.shape)
        if size != wanted:
            raise ValueError(
                f"`table` has {size} bytes; with `parts` {self.parts}, {len(self.timesteps)} `timesteps` and `shape` "
                f"{self.shape} it must have {wanted}."
            )

    @classmethod
    def from_tensor(cls, table: torch.Tensor, timesteps: Sequence[float]) -> CalibratedDPMConfig:
        """For mean errors `(parts, len(timesteps), *shape)`, kept in float32."""
        values = np.ascontiguousarray(table.detach().cpu().numpy(), dtype="<f4")
        text = base64.b64encode(values.tobytes()).decode("ascii")
        return cls(text, list(table.shape[2:]), [float(t) for t in timesteps], table.shape[0])

    def tensor(self) -> torch.Tensor:
        """The mean errors, float32 `(parts, len(timesteps), *shape)`."""
        values = np.frombuffer(base64.b64decode(self.table), dtype="<f4").astype(np.float32)
        return torch.from_numpy(values).view(self.parts, len(self.timesteps), *self.shape)

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        """None where the method works on `module`, else the reason why not."""
        names = inspect.signature(type(module).forward).parameters
        if "timestep" not in names or not {"sample", "hidden_states"} & set(names):
            return f"{cls.key} needs a denoiser, called with a noisy sample and a `timestep`"
        return f"{cls.key} needs a denoiser, and it is a ControlNet" if "controlnet_cond" in names else None

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := self.supports(module)) is not None:
            raise ValueError(f"{self.key} does not work on {type(module).__name__}: {reason}.")

    def apply(self, module: nn.Module) -> None:
        # A hook of torch, which accelerate's offloading leaves alone, and which is copied with the module.
        hook = _Calibration(self.tensor(), torch.tensor(self.timesteps, dtype=torch.float32), _timestep_place(module))
        setattr(module, _HANDLE, module.register_forward_hook(hook, with_kwargs=True))

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        getattr(module, _HANDLE).remove()
        delattr(module, _HANDLE)


def apply_calibrated_dpm(module: nn.Module, config: CalibratedDPMConfig) -> None:
    """Put calibration on a denoiser.

    Raises:
        ValueError: the module is no denoiser.
    """
    from ..enabling import enable

    enable(module, config)


def remove_calibrated_dpm(module: nn.Module) -> None:
    """Take calibration off; the model is bit-equal to before."""
    from ..enabling import disable

    disable(module, CalibratedDPMConfig.key)


class _Calibration:
    """Subtracts the mean error at the timesteps of a call."""

    def __init__(self, table: torch.Tensor, timesteps: torch.Tensor, place: int) -> None:
        self.table, self.timesteps, self.place = table, timesteps, place

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        prediction = output[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[self.place]
        calibrated = self._calibrated(module, prediction, timestep)
        if isinstance(output, tuple):
            return (calibrated, *output[1:])
        output.sample = calibrated
        return output

    def _calibrated(self, module: nn.Module, prediction: torch.Tensor, timestep: Any) -> torch.Tensor:
        rows, parts = len(prediction), len(self.table)
        if rows % parts:
            raise ValueError(f"The batch has {rows} samples; a calibration of {parts} parts needs a multiple of that.")
        if self.table.device != prediction.device:
            self.table, self.timesteps = self.table.to(prediction.device), self.timesteps.to(prediction.device)
        times = torch.as_tensor(timestep, dtype=torch.float32, device=prediction.device).reshape(-1).expand(rows)
        last = len(self.timesteps) - 1
        above = torch.searchsorted(self.timesteps, times).clamp(min(1, last), last)
        below = (above - 1).clamp(min=0)
        gap = (self.timesteps[above] - self.timesteps[below]).clamp(min=torch.finfo(torch.float32).tiny)
        share = ((times - self.timesteps[below]) / gap).clamp(0, 1).view(-1, *[1] * (self.table.ndim - 2))
        part = torch.arange(parts, device=prediction.device).repeat_interleave(rows // parts)
        error = torch.lerp(self.table[part, below], self.table[part, above], share).to(prediction.dtype)
        shape = error.shape[1:]
        channels = shape[0] if len(shape) == prediction.ndim - 1 and 1 < shape[0] < prediction.shape[1] else None
        wanted = prediction[:, :channels]
        if len(shape) >= prediction.ndim or any(
            n not in (1, m) for n, m in zip(reversed(shape), reversed(wanted.shape[1:]), strict=False)
        ):
            raise ValueError(
                f"The calibration has `shape` {list(shape)}, and {type(module).__name__} predicts samples of "
                f"{list(prediction.shape[1:])}; it is for samples of another size."
            )
        calibrated = wanted - error.view(rows, *[1] * (prediction.ndim - 1 - len(shape)), *shape)
        return calibrated if channels is None else torch.cat([calibrated, prediction[:, channels:]], 1)


# --- making the table ------------------------------------------------------------------------------------------------


def calibrate(
    pipe: Any,
    conditions: Sequence[Any] | int,
    *,
    samples: torch.Tensor | None = None,
    num_levels: int = 20,
    batch_size: int = 32,
    sample_steps: int = 20,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    **call: Any,
) -> CalibratedDPMConfig:
    """Measure the mean errors of a pipeline's denoiser.

        config = dx.calibrate(pipe, prompts, samples=latents, guidance_scale=3.0)
        dx.enable(pipe, config)

    It costs `2 * len(conditions) * num_levels` calls of the denoiser. The noise of the estimate must be small beside the
    error itself, else calibration does harm: for images the paper takes the whole training set. Each sample is seen with
    a noise and with its negative, which takes much of that noise away. Where it still is the larger half, a warning says so.

    Args:
        pipe: a pipeline with a `unet` or a `transformer`, which calls it once a step. It stays as it is.
        conditions: prompts or class labels, one a sample; for an unconditional pipeline the number of samples. There is
            one mean over all of them, or with guidance one for each half of the batch.
        samples: training data as the denoiser sees them (latents, where it works on latents), one a condition,
            `(n, *shape)`. None takes what the pipeline makes itself, which knows less of the pipeline's errors.
        num_levels: timesteps in the table, from the first to the last of training.
        batch_size, sample_steps, seed, checkpoint, call: as in `collect_statistics`.

    Raises:
        ValueError: the pipeline does not take such conditions or calls its denoiser more than once a step, a number is out
            of range, `samples` does not have one sample a condition, or the checkpoint is one of other settings.
    """
    total = conditions if isinstance(conditions, int) else len(conditions)
    if num_levels < 1 or sample_steps < 1:
        raise ValueError(f"`num_levels` is {num_levels!r} and `sample_steps` {sample_steps!r}; at least 1 is needed.")
    if total < 2:
        raise ValueError(f"`conditions` is {conditions!r}; a mean needs at least 2 samples, and a good one thousands.")
    if samples is not None and len(samples) != total:
        raise ValueError(f"`samples` has {len(samples)} samples and `conditions` {total}; one each is needed.")
    batches = calls(pipe, conditions, batch_size, seed, call)
    model = denoiser_of(pipe)
    guide = GuideScheduler.from_config(pipe.scheduler.config)
    guide.lay_times(num_levels)
    tensors = [weight_marks(model), *([] if samples is None else [samples])]
    settings = ("calibrate", conditions, num_levels, batch_size, sample_steps, seed, sorted(call.items(), key=repr))
    kept = Checkpoint(checkpoint, repr(settings), tensors)
    found, done = kept.load()
    heard: list[tuple[Any, torch.Tensor]] = []
    place = _timestep_place(model)

    def listen(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        heard.append((kwargs["timestep"] if "timestep" in kwargs else args[place], output[0]))

    plan = [level for level in range(num_levels) for _ in range(2)]
    handle = model.register_forward_hook(listen, with_kwargs=True)
    try:
        with tqdm(total=len(batches) * num_levels, initial=done * num_levels, desc="calibration") as bar:
            for number, (count, arguments) in enumerate(batches[done:], start=done):
                first = number * batch_size
                clean = samples[first : first + count] if samples is not None else clean_samples(pipe, arguments, count, sample_steps)  # fmt: skip
                generator = torch.Generator().manual_seed(seed + number)
                noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean.device)
                made: dict[str, list[torch.Tensor]] = {"times": [], "sums": []}
                lead(pipe, guide, _walk(guide, clean, noise, heard, made, bar), plan, arguments, count)
                sums = torch.stack(made["sums"], 2)  # (2, parts, levels, *shape)
                found = {"times": torch.stack(made["times"]), "sums": sums + found["sums"].to(sums) if found else sums}
                kept.save(found, number + 1)
    finally:
        handle.remove()
    mean, square = found["sums"].cpu() / total
    _warn_of_noise(mean, (square - mean**2).clamp(min=0) / max(total - 1, 1))
    times, order = found["times"].sort()
    return CalibratedDPMConfig.from_tensor(mean[:, order], times.tolist())


def _walk(
    guide: GuideScheduler,
    clean: torch.Tensor,
    noise: torch.Tensor,
    heard: list[tuple[Any, torch.Tensor]],
    made: dict[str, list[torch.Tensor]],
    bar: Any,
) -> Walk:
    """At each level look at the samples with their noise and with its negative, and keep what the network itself said."""
    kind = guide.config.prediction_type
    for alpha, sigma in guide.levels:
        target = {"epsilon": 0.0, "sample": 1.0, "v_prediction": -sigma, "flow_prediction": -1.0}[kind] * clean.double()
        errors = []
        for side in (1, -1):
            heard.clear()
            yield alpha * clean + side * sigma * noise
            if len(heard) != 1 or len(heard[0][1]) % len(clean):
                raise ValueError(
                    f"`pipe` calls its denoiser {len(heard)} times a step; calibration needs one call, with all samples: leave "
                    "out guidance that makes more."
                )
            time, prediction = heard[0]
            prediction = prediction.unflatten(0, (-1, len(clean)))
            if prediction.ndim == target.ndim + 1 and prediction.shape[2] == 2 * target.shape[1]:  # learned variance
                prediction = prediction[:, :, : target.shape[1]]
            errors.append(prediction.double() - target)
        pair = (errors[0] + errors[1]) / 2
        made["sums"].append(torch.stack([pair.sum(1), (pair**2).sum(1)]))
        made["times"].append(torch.as_tensor(time, dtype=torch.float32).reshape(-1)[0].cpu())
        bar.update()


def _warn_of_noise(mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Warn where most of the square of the mean error is noise of the estimate."""
    noise, whole = variance.flatten(2).sum((0, 2)), (mean**2).flatten(2).sum((0, 2))
    poor = int((noise > whole / 2).sum())
    if poor:
        warnings.warn(
            f"At {poor} of {len(noise)} timesteps most of the mean error is noise of its estimate, and subtracting it may do "
            f"harm: noise makes up {float((noise / whole).nan_to_num().max()):.0%} at the worst. Take more samples.",
            stacklevel=3,
        )


# --- arguments -------------------------------------------------------------------------------------------------------


def _timestep_place(module: nn.Module) -> int:
    """Which positional argument of its forward the timestep is."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if "timestep" not in names:
        raise ValueError(f"`pipe` has a {type(module).__name__}, which takes no `timestep`.")
    return names.index("timestep")


def _check_numbers(name: str, values: Any, whole: bool = False) -> None:
    kinds = int if whole else (int, float)
    fine = isinstance(values, (list, tuple)) and len(values) > 0
    if not fine or not all(isinstance(v, kinds) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise ValueError(f"`{name}` is {values!r}; a list of {'integers' if whole else 'numbers'} is needed.")
