"""Search for the compensation ratios of DC-Solver, in any pipeline (section 3.3 of Zhao et al. 2024, arXiv 2409.03755).

The pipeline itself is the denoiser. It is called once, with a scheduler that decides what it is asked next: the steps of
a long reference run, then the steps of DC-Solver, each again and again while its ratio is fitted. So text, classes,
guidance and packing of latents are the pipeline's own, and gradients flow through its call of the network.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import logging
from tqdm.auto import tqdm

from ._model_statistics import same_marks, weight_marks
from ._statistics import denoiser_of
from .dc_solver import DC_ORDER, GRID_SETTINGS, DCSolverMultistepScheduler
from .ghvb import GHVBScheduler

logger = logging.get_logger(__name__)

_MARKS = 16  # numbers of the model's fingerprint in the config
# Asks the pipeline for its prediction at a state, and gets it: a walk yields states and is sent predictions.
_Walk = Generator[torch.Tensor, torch.Tensor, None]


def search_dc_ratios(
    pipe: Any,
    conditions: Any,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    *,
    seed: int = 0,
    iterations: int = 20,
    learning_rate: float = 0.1,
    reference_steps: int = 200,
    file: str | os.PathLike | None = None,
    **call: Any,
) -> dict[str, Any]:
    """Find the ratios of `DCSolverMultistepScheduler` for a pipeline, a number of steps and a scale of guidance.

        found = search_dc_ratios(pipe, prompts, 5, guidance_scale=7.5)
        pipe.scheduler = DCSolverMultistepScheduler.from_config(pipe.scheduler.config, **found)

    Step by step, the ratio is the one for which the next state, corrected, is nearest to a DDIM run of many steps from
    the same noise, of all that AdamW came to from 1 on, 1 among them. So no step's loss is higher than that of UniPC
    there.

    Args:
        pipe: any pipeline whose loop is `model_output = ...; sample = scheduler.step(model_output, t, sample)`, as those
            of Stable Diffusion, DiT, DDPM, Stable Diffusion 3 and Flux. Its scheduler's config tells the grid.
        conditions: prompts; or for a pipeline with `class_labels` these; or for one with neither the number of pictures.
            The paper takes 10. They are one batch. None where `call` has `prompt_embeds`.
        num_inference_steps: that the ratios are for; at least 3.
        guidance_scale: that they are for; None for pipelines without.
        seed: of the noise.
        iterations: of AdamW, for each ratio; each costs a call of the network, and its gradient.
        learning_rate: of AdamW.
        reference_steps: of the DDIM run, at least about.
        file: JSON file to which each ratio is written when it is found, and from which a search that was cut off goes on.
        call: other arguments of the pipeline's call, such as `height`, `negative_prompt` or `true_cfg_scale`.

    Returns:
        `{"dc_ratios": [...], "dc_key": {...}}`, for `from_config`.

    Raises:
        ValueError: a wrong argument, a pipeline that is none of those, or `file` is of another search.
    """
    for name, value, least in (
        ("num_inference_steps", num_inference_steps, DC_ORDER + 1), ("iterations", iterations, 1),
        ("reference_steps", reference_steps, num_inference_steps),
    ):  # fmt: skip
        if type(value) is not int or value < least:
            raise ValueError(f"`{name}` is {value!r}; allowed are integers of at least {least}.")
    if not learning_rate > 0:
        raise ValueError(f"`learning_rate` is {learning_rate!r}; it must be positive.")
    arguments = _call_arguments(pipe, conditions, guidance_scale, call)
    scheduler = DCSolverMultistepScheduler.from_config(pipe.scheduler.config, dc_ratios=None, dc_key=None)
    guidance = call.get("true_cfg_scale", guidance_scale)
    key = {
        "model": _short_marks(pipe), "num_inference_steps": num_inference_steps, "guidance_scale": guidance,
        "grid": {name: _plain(scheduler.config[name]) for name in GRID_SETTINGS},
    }  # fmt: skip
    settings = {
        "seed": seed, "iterations": iterations, "learning_rate": learning_rate, "reference_steps": reference_steps,
        "conditions": repr(conditions), "call": {name: _described(value) for name, value in sorted(call.items())},
    }  # fmt: skip
    record = _Record(file, {"dc_key": key, "settings": settings})
    if len(record.ratios) < num_inference_steps:
        driver = _Driver(scheduler, record, iterations, learning_rate, reference_steps)
        arguments["generator"] = torch.Generator().manual_seed(seed)
        _drive(pipe, driver, {**arguments, "num_inference_steps": num_inference_steps})
    return {"dc_ratios": record.ratios, "dc_key": key}


def check_dc_ratios(pipe: Any, guidance_scale: float | None = None) -> bool:
    """Whether the ratios of a pipeline's DC-Solver belong to its network and to a scale of guidance; warns where not.

    Args:
        pipe: a pipeline with a `DCSolverMultistepScheduler`.
        guidance_scale: that it will be called with.

    Raises:
        ValueError: it has another scheduler, or one without `dc_key`.
    """
    key = pipe.scheduler.config.get("dc_key")
    if not key:
        raise ValueError(f"`pipe` has a {type(pipe.scheduler).__name__} without `dc_key`; there is nothing to check.")
    matches = True
    if not same_marks(torch.tensor(key["model"]), torch.tensor(_short_marks(pipe))):
        matches = False
        logger.warning("`dc_ratios` were found for another model; search again.")
    if key["guidance_scale"] != guidance_scale:
        matches = False
        logger.warning(
            f"`dc_ratios` were found for guidance {key['guidance_scale']!r}, and this is {guidance_scale!r}; search again."
        )
    return matches


# --- the pipeline as denoiser ----------------------------------------------------------------------------------------


class _Done(Exception):
    """The search is over; the pipeline need not go on."""


class _Driver(SchedulerMixin, ConfigMixin):
    """Stands where a pipeline's scheduler does and leads it through the search."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self, scheduler: Any, record: _Record, iterations: int, learning_rate: float, reference_steps: int
    ) -> None:
        self.scheduler, self.record, self.reference_steps = scheduler, record, reference_steps
        self.iterations, self.learning_rate = iterations, learning_rate
        self.register_to_config(**scheduler.config)
        self.bar: tqdm | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """All timesteps at which the pipeline will be asked, in turn."""
        self.scheduler.set_timesteps(num_inference_steps, None, sigmas, mu)
        own = self.scheduler.timesteps.tolist()
        levels, times, self.nodes = reference_levels(self.scheduler, self.reference_steps)
        names, config = inspect.signature(GHVBScheduler).parameters, self.scheduler.config
        # The levels of a flow are shifted already.
        changes = {"order": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False}
        self.reference = GHVBScheduler(**{name: config[name] for name in names if name in config} | changes)
        self.reference.set_timesteps(sigmas=levels)
        self.reference.set_begin_index(0)
        asked = [own[0]]
        for i in range(len(own) - 1):
            asked += [own[i + 1]] * self.trials(i)
        self.timesteps = torch.tensor([*times, *asked]).to(device)
        self.bar = tqdm(total=len(self.timesteps), desc="ratios of DC-Solver")
        self.walk: _Walk | None = None

    def trials(self, i: int) -> int:
        """How often the network is asked at the state after step `i`."""
        corrected = i not in self.scheduler.config.disable_corrector
        return self.iterations if i >= DC_ORDER and i >= len(self.record.ratios) and corrected else 1

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if self.walk is None:
            self.walk = self.search(sample.detach(), model_output.dtype)
            next(self.walk)
        if self.bar is not None:
            self.bar.update()
        try:
            following = self.walk.send(model_output)
        except StopIteration:
            raise _Done from None
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def search(self, noise: torch.Tensor, dtype: torch.dtype) -> _Walk:
        """The reference run, then DC-Solver step by step."""
        reached, state = {}, noise.float()
        for j, t in enumerate(self.reference.timesteps):
            output = yield state.to(dtype)
            # kept in float32: hundreds of roundings to half precision would add up
            state = self.reference.step(output.float(), t, state).prev_sample
            reached[j + 1] = state
        targets = [reached[j] for j in self.nodes]
        x = noise.to(dtype)
        output = (yield x).detach()
        for i in range(len(targets)):
            x, output = yield from self.fit(i, x, output, targets[i])

    def fit(
        self, i: int, x: torch.Tensor, output: torch.Tensor, target: torch.Tensor
    ) -> Generator[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor | None]]:
        """Find the ratio of step `i` from state `x`; returns the next state and the prediction there."""
        last = i + 1 == len(self.scheduler.timesteps)
        corrected = not last and i not in self.scheduler.config.disable_corrector
        known = i < DC_ORDER or i < len(self.record.ratios)
        ratio = torch.tensor(self.record.ratios[i] if i < len(self.record.ratios) else 1.0, dtype=torch.float64)
        optimizer = torch.optim.AdamW([ratio.requires_grad_(not known)], lr=self.learning_rate)
        losses: list[float] = []
        best: tuple[float, torch.Tensor | None] = 1.0, None
        for _ in range(1 if known else self.iterations):
            value = float(ratio.detach())
            trial = copy.deepcopy(self.scheduler)
            trial.dc_ratios[i] = value if known else ratio
            following = trial.step(output, trial.timesteps[i], x, return_dict=False)[0]
            state, prediction = following, None
            if corrected:
                prediction = yield following
                # A step begins with the correction of the state that it is given.
                trial.step(prediction, trial.timesteps[i + 1], following)
                state, prediction = trial.last_sample, prediction.detach()
            squares = (state.float() - target).square()
            loss = float(squares.detach().mean())
            if not known:
                # The sum and not the mean: it is the same to AdamW, and gradients in half precision do not vanish.
                (ratio.grad,) = torch.autograd.grad(squares.sum(), ratio)
                optimizer.step()
            if not losses or loss < min(losses):
                best = value, prediction
            losses.append(loss)
        self.scheduler.dc_ratios[i], prediction = best
        following = self.scheduler.step(output, self.scheduler.timesteps[i], x, return_dict=False)[0]
        self.record.add(i, best[0], losses[0], min(losses))
        if prediction is None and not last:
            prediction = (yield following).detach()
        return following, prediction

    # What else pipelines ask of a scheduler.

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        if begin_index:
            raise ValueError(f"`begin_index` is {begin_index!r}; ratios are searched from pure noise on: 0.")


def _drive(pipe: Any, driver: _Driver, arguments: Mapping[str, Any]) -> None:
    """Call a pipeline with gradients, for its scheduler's sake, and leave it as it was."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    wanted = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    scheduler, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        pipe.scheduler = driver
        with torch.enable_grad():
            inspect.unwrap(type(pipe).__call__)(pipe, **arguments)  # under the decorator that turns gradients off
        raise ValueError(f"`pipe` is {type(pipe).__name__}, which does not ask for all the timesteps of its scheduler.")
    except _Done:
        pass
    finally:
        pipe.scheduler = scheduler
        for parameter in wanted:
            parameter.requires_grad_(True)
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar
        if driver.bar is not None:
            driver.bar.close()
        pipe.maybe_free_model_hooks()


def _call_arguments(
    pipe: Any, conditions: Any, guidance_scale: float | None, call: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of the pipeline's call for these conditions."""
    names = inspect.signature(type(pipe).__call__).parameters
    missing = {"generator", "num_inference_steps", *call} - set(names)
    if missing:
        raise ValueError(f"`pipe` is {type(pipe).__name__}; its call does not take {', '.join(sorted(missing))}.")
    if conditions is None and "prompt_embeds" in call:
        arguments: dict[str, Any] = {}
    elif "prompt" in names or "class_labels" in names:
        name = "prompt" if "prompt" in names else "class_labels"
        if not isinstance(conditions, Sequence) or isinstance(conditions, str) or not conditions:
            raise ValueError(f"`conditions` is {conditions!r}; a list for `{name}` of {type(pipe).__name__} is needed.")
        arguments = {name: list(conditions)}
    else:
        if type(conditions) is not int or conditions < 1:
            raise ValueError(f"`conditions` is {conditions!r}; {type(pipe).__name__} needs a number of pictures.")
        arguments = {"batch_size": conditions}
    if guidance_scale is not None:
        if "guidance_scale" not in names:
            raise ValueError(f"`guidance_scale` is {guidance_scale!r}; {type(pipe).__name__} has no guidance.")
        arguments["guidance_scale"] = guidance_scale
    return {**arguments, **call}


# --- the reference ---------------------------------------------------------------------------------------------------


def reference_levels(scheduler: Any, count: int) -> tuple[list[float], list[float], list[int]]:
    """A fine grid that passes through each noise level of a coarse one.

    Args:
        scheduler: UniPC or DC-Solver, after `set_timesteps`.
        count: levels there should be, at least about. Between two of the coarse grid they are spread evenly in the
            timestep; where it is whole, they are at whole ones.

    Returns:
        the levels as sigma / alpha, or for flow sigma; their timesteps; and for each level of the coarse grid but the
        first, the last being the end, its place in the fine one.
    """
    levels, times = scheduler.sigmas.double().numpy(), scheduler.timesteps.tolist()
    train, flow = scheduler.config.num_train_timesteps, scheduler.config.use_flow_sigmas
    if flow:
        places = levels
    else:
        table = 0.5 * np.log(1 / scheduler.alphas_cumprod.double().numpy() - 1)
        clean = -1.0 if levels[-1] == 0 else 0.0  # clean data lie a step below the first timestep
        places = np.append(np.interp(np.log(levels[:-1]), table, np.arange(train)), clean)
    fine, when, nodes = [], [], []
    for i, (high, low) in enumerate(itertools.pairwise(places)):
        number = max(1, math.ceil(count * (high - low) / (places[0] - places[-1])))
        inner = np.linspace(high, low, number + 1)[1:-1]
        if not flow:
            inner = np.unique(np.round(inner))[::-1]
            inner = inner[(inner < high - 1e-6) & (inner > low + 1e-6)]
        fine += [float(levels[i]), *(inner if flow else np.exp(np.interp(inner, np.arange(train), table))).tolist()]
        when += [times[i], *(train * inner if flow else inner.astype(int)).tolist()]
        nodes.append(len(fine))
    return fine, when, nodes


# --- records ---------------------------------------------------------------------------------------------------------


class _Record:
    """Ratios found so far, in a file if wanted, with the settings that they follow from."""

    def __init__(self, file: str | os.PathLike | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = None if file is None else Path(file), settings
        self.ratios: list[float] = []
        self.losses: list[list[float]] = []
        if self.path is not None and self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if {name: found.get(name) for name in settings} != json.loads(json.dumps(settings)):
                raise ValueError(f"`file` is {file!r}, which is of another search; name another or remove it.")
            self.ratios, self.losses = found["dc_ratios"], found["losses"]

    def add(self, i: int, ratio: float, plain: float, best: float) -> None:
        """Note the ratio of step `i`, with the mean squared error with ratio 1 and with this one."""
        if i < len(self.ratios):
            return
        self.ratios.append(ratio)
        self.losses.append([plain, best])
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        content = {**self.settings, "dc_ratios": self.ratios, "losses": self.losses}
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self.path)


def _short_marks(pipe: Any) -> list[float]:
    """Fingerprint of a pipeline's network, short enough for a config."""
    marks = weight_marks(denoiser_of(pipe))
    return marks[torch.linspace(0, len(marks) - 1, min(_MARKS, len(marks))).long()].tolist()


def _described(value: Any) -> str:
    """A text by which equal arguments of a call are known again; of tensors and the like the kind must do."""
    return repr(value) if isinstance(value, (str, int, float, list, tuple, type(None))) else type(value).__name__


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
