r"""The frozen teacher of a distillation: what it predicts with guidance, where its ODE leads, and pairs of noise and picture.

    teacher = Teacher(pipeline, guidance_scale=7.5)          # StableDiffusion, StableDiffusionXL or DiT
    conditions = teacher.encode(["a cat", "a dog"])          # or class labels
    prediction = teacher.predict(x, t, conditions)           # with guidance, one call of the denoiser
    x_s = teacher.process.jump(x, prediction, t, s)          # one DDIM step, t -> s for each sample
    x_s = teacher.solve(x, t, s, conditions, steps=8)        # the same in 8 steps
    student = teacher.student()                              # a copy of the denoiser to train
    output = teacher.call(student, x, t, conditions.given)   # raw, with gradients

Times are integer timesteps of the training process, `(batch,)` or a single one: `T - 1` is noise, 0 the least noise that the
model knows, and -1 (`CLEAN`) is data without noise, :math:`\alpha = 1, \sigma = 0`. A noisy sample is
:math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.models.embeddings import LabelEmbedding
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..loading import Pipeline
from ..schedulers._model_statistics import weight_marks
from ._data import SampleNoise, load_dataset
from ._diffusion import add_validation_arguments, write_samples
from ._loop import Task, add_common_arguments, check_common_arguments
from ._trajectories import read_prompts

CLEAN = -1
_PAIRS = 0x70616972  # a seed of its own: the noise of a pair is not the noise of a training step
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# From noise `(batch, ...)` and what it is made under to clean latents.
Solver = Callable[[torch.Tensor, "Conditions"], torch.Tensor]


class Process:
    r"""A training process with discrete timesteps: its levels, what a prediction means, and DDIM steps between any two.

    Args:
        alphas_cumprod: :math:`\alpha_t^2` by timestep, `(T,)`, falling.
        prediction_type: "epsilon", "v_prediction" or "sample".

    Raises:
        ValueError: another prediction type.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str = "epsilon") -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"`prediction_type` is {prediction_type!r}; allowed are {', '.join(PREDICTION_TYPES)}.")
        squared = torch.cat(
            [alphas_cumprod.double().cpu(), torch.ones(1, dtype=torch.float64)]
        )  # index -1 is clean data
        self._levels = torch.stack([squared.sqrt(), (1 - squared).sqrt()])
        self.num_timesteps, self.prediction_type = len(alphas_cumprod), prediction_type

    @classmethod
    def of(cls, scheduler: Any) -> Process:
        """Of a scheduler of diffusers with `alphas_cumprod`.

        Raises:
            ValueError: it has none, as those of flow matching.
        """
        if not torch.is_tensor(getattr(scheduler, "alphas_cumprod", None)):
            raise ValueError(
                f"`scheduler` is {type(scheduler).__name__}, which has no `alphas_cumprod`; a process with a schedule of "
                "betas is needed, as that of DDPM."
            )
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def levels_digest(self) -> bytes:
        """Hash of the noise levels."""
        return hashlib.sha256(self._levels.cpu().numpy().tobytes()).digest()

    def alpha_sigma(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r""":math:`\alpha_t` and :math:`\sigma_t` in the dtype of `like`, on its device, in a shape that broadcasts against it.

        Args:
            t: integer timesteps from -1 to T - 1, `(batch,)` or a single one.
            like: `(batch, ...)`.
        """
        if self._levels.device != like.device:
            self._levels = self._levels.to(like.device)
        alpha, sigma = self._levels[:, t.to(like.device)].to(like.dtype)
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.reshape(shape), sigma.reshape(shape)

    def add_noise(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        r""":math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`."""
        alpha, sigma = self.alpha_sigma(t, data)
        return alpha * data + sigma * noise

    def data_and_noise(
        self, x: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean data and noise that a prediction at `x` stands for; `t` is not -1."""
        alpha, sigma = self.alpha_sigma(t, x)
        if self.prediction_type == "epsilon":
            return (x - sigma * prediction) / alpha, prediction
        if self.prediction_type == "sample":
            return prediction, (x - alpha * prediction) / sigma
        return alpha * x - sigma * prediction, alpha * prediction + sigma * x

    def prediction(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What a network should predict for this data and noise."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return data
        alpha, sigma = self.alpha_sigma(t, data)
        return alpha * noise - sigma * data

    def jump(self, x: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        r"""One DDIM step from `t` to `s`, :math:`\alpha_s \hat x_0 + \sigma_s \hat \epsilon`; `s = -1` gives the clean data."""
        data, noise = self.data_and_noise(x, prediction, t)
        alpha, sigma = self.alpha_sigma(s, x)
        return alpha * data + sigma * noise

    def jumped_data(self, x_t: torch.Tensor, x_s: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        r"""The clean data with which one DDIM step from `x_t` ends in `x_s` (Salimans & Ho 2022, appendix G).

        :math:`(x_s - \frac{\sigma_s}{\sigma_t} x_t) / (\alpha_s - \frac{\sigma_s}{\sigma_t} \alpha_t)`; for `s = -1` this is
        `x_s`.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t, x_t), self.alpha_sigma(s, x_t)
        ratio = sigma_s / sigma_t
        return (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)


def substeps(t: torch.Tensor, s: torch.Tensor, steps: int) -> torch.Tensor:
    """Timesteps from `t` to `s` in equal parts, rounded: `(steps + 1, batch)`, the first row `t` and the last `s`."""
    parts = torch.arange(steps + 1, device=t.device, dtype=torch.float64)[:, None] / steps
    return (t + (s - t) * parts).round().long()


def _rows(function: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """A function of tensors on the tensors of nested dictionaries."""
    if isinstance(first, dict):
        return {name: _rows(function, value, *(other[name] for other in rest)) for name, value in first.items()}
    return function(first, *rest)


@dataclass(frozen=True)
class Conditions:
    """Keyword arguments of the denoiser for a batch, nested dictionaries of tensors with the samples as rows.

    Attributes:
        given: under the prompts or labels.
        empty: under the empty prompt, or no label.
    """

    given: dict[str, Any]
    empty: dict[str, Any]

    def dropped(self, drop: torch.Tensor) -> Conditions:
        """The same, `given` being `empty` where `drop`, `(batch,)`, holds: for students that are to be guided themselves."""

        def choose(given: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
            return torch.where(drop.to(given.device).reshape((-1,) + (1,) * (given.ndim - 1)), empty, given)

        return Conditions(_rows(choose, self.given, self.empty), self.empty)

    def both(self) -> dict[str, Any]:
        """Empty rows first, then the given ones, for one call of a doubled batch."""
        return _rows(lambda given, empty: torch.cat([empty, given]), self.given, self.empty)


class Teacher:
    """A frozen guided pipeline. Everything is without gradients, except `call`.

    Args:
        pipeline: with a denoiser `unet` (Stable Diffusion, Stable Diffusion XL) or `transformer` (`DiTPipeline`), and a
            scheduler with `alphas_cumprod`. Its denoiser is frozen and put in evaluation mode; a student is a copy of it.
        guidance_scale: of classifier-free guidance; 1: none.
        latent_size: side of the latents; that of the denoiser's config unless given.

    Attributes:
        pipeline, denoiser, guidance_scale: see above.
        process: see `Process`.
        by_class: whether conditions are class labels, and not prompts.
        shape: `(channels, height, width)` of the latents.

    Raises:
        ValueError: the pipeline or its scheduler does not suit, or `guidance_scale` is below 1.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, guidance_scale: float = 7.5, latent_size: int | None = None
    ) -> None:
        if not guidance_scale >= 1:
            raise ValueError(f"`guidance_scale` is {guidance_scale}; it must be at least 1, which is no guidance.")
        self.name = "unet" if isinstance(getattr(pipeline, "unet", None), nn.Module) else "transformer"
        self.by_class = hasattr(pipeline, "get_label_ids")
        if not (self.by_class or (self.name == "unet" and hasattr(pipeline, "encode_prompt"))):
            raise ValueError(
                f"`pipeline` is a {type(pipeline).__name__}; a teacher is a Stable Diffusion pipeline (1, 2, XL) or a "
                "DiTPipeline."
            )
        self.pipeline, self.guidance_scale = pipeline, guidance_scale
        self.process = self._process()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        config = self.denoiser.config
        size = config.sample_size if latent_size is None else latent_size
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (config.in_channels, height, width)
        self._empty: dict[str, Any] | None = None
        parts = [getattr(pipeline, name, None) for name in (self.name, "text_encoder", "text_encoder_2")]
        # Now: a LoRA that comes later changes the names.
        self._marks = [weight_marks(part) for part in parts if isinstance(part, nn.Module)]

    def _process(self) -> Any:
        return Process.of(self.pipeline.scheduler)

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.name)

    def student(self) -> nn.Module:
        """A copy of the denoiser that can be trained; a DiT's own dropping of labels, which no seed here governs, is off."""
        student = copy.deepcopy(self.denoiser).requires_grad_(True)
        for module in student.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        return student

    def to(self, device: torch.device | str) -> Teacher:
        """Moves the pipeline."""
        self.pipeline.to(device)
        self._empty = None
        return self

    # --- conditions --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, conditions: Sequence[str | int]) -> Conditions:
        """What the denoiser takes for prompts or class labels, and for none."""
        device = self.denoiser.device
        if self.by_class:
            labels = torch.as_tensor(conditions, device=device).long()
            nothing = torch.full_like(labels, self.denoiser.config.num_embeds_ada_norm)
            return Conditions({"class_labels": labels}, {"class_labels": nothing})
        if self._empty is None:
            self._empty = self._encode([""], empty=True)
        count = len(conditions)
        empty = _rows(lambda row: row.expand(count, *row.shape[1:]), self._empty)
        return Conditions(self._encode([str(prompt) for prompt in conditions], empty=False), empty)

    def _encode(self, prompts: list[str], empty: bool) -> dict[str, Any]:
        """Of prompts, or as what the pipeline sets against a prompt where no negative one is given."""
        found = self.pipeline.encode_prompt(
            prompt=prompts, device=self.denoiser.device, num_images_per_prompt=1, do_classifier_free_guidance=empty
        )
        states, *pooled = found[int(empty) :: 2]
        if not pooled:
            return {"encoder_hidden_states": states}
        height, width = (side * self.pipeline.vae_scale_factor for side in self.shape[1:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=states.dtype, device=states.device)
        added = {"text_embeds": pooled[0], "time_ids": sizes.expand(len(prompts), -1)}
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}

    # --- predictions -------------------------------------------------------------------------------------------------

    def call(
        self,
        denoiser: nn.Module,
        x: torch.Tensor,
        t: torch.Tensor,
        condition: dict[str, Any],
        guidance_scale: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One call of a denoiser of this kind, a student or the teacher, with gradients where they are on.

        Args:
            denoiser: the teacher's, or a student in its layout.
            x: `(batch, channels, height, width)`.
            t: timesteps, `(batch,)` or a single one, whole or not.
            condition: `Conditions.given`, `.empty` or `.both()`.
            guidance_scale: for a denoiser with `time_cond_proj_dim`, which takes it as an input; `(batch,)` or one.

        Returns:
            The raw prediction; a variance that a DiT predicts beside it is left out.
        """
        channels = x.shape[1]
        t = t.to(x.device).reshape(-1).expand(len(x))
        dimension = denoiser.config.get("time_cond_proj_dim")
        if dimension is not None:
            scale = torch.as_tensor(self.guidance_scale if guidance_scale is None else guidance_scale, device=x.device)
            scale = scale.reshape(-1).expand(len(x)).float()
            condition = condition | {"timestep_cond": guidance_embedding(scale - 1, dimension).to(x.dtype)}
        return denoiser(x, t, **condition, return_dict=False)[0][:, :channels]

    @torch.no_grad()
    def predict(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        conditions: Conditions,
        guidance_scale: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The guided prediction, in the model's prediction type: `empty + scale (given - empty)`.

        A teacher that takes the scale as an input (`time_cond_proj_dim`) is called once, without empty rows.

        Args:
            x, t: see `call`.
            conditions: of the batch.
            guidance_scale: one, or one a sample, `(batch,)`; the teacher's own unless given.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if self.denoiser.config.get("time_cond_proj_dim") is not None:
            return self.call(self.denoiser, x, t, conditions.given, scale)
        if not isinstance(scale, torch.Tensor) and scale == 1:
            return self.call(self.denoiser, x, t, conditions.given)
        twice = t.reshape(-1).expand(len(x)).repeat(2)
        empty, given = self.call(self.denoiser, torch.cat([x, x]), twice, conditions.both()).chunk(2)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(x).reshape((-1,) + (1,) * (x.ndim - 1))
        return empty + scale * (given - empty)

    @torch.no_grad()
    def solve(
        self,
        x: torch.Tensor,
        t: torch.Tensor | int,
        s: torch.Tensor | int,
        conditions: Conditions,
        steps: int,
        guidance_scale: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The probability-flow ODE from `t` to `s` in DDIM sub-steps that are equal in time, up to rounding.

        Args:
            x: samples at `t`.
            t, s: timesteps, `(batch,)` or one; `s` is below `t`, and at least -1, clean data.
            conditions, guidance_scale: see `predict`.
            steps: sub-steps; at most `t - s`.
        """
        start, end = (torch.as_tensor(time, device=x.device).reshape(-1).expand(len(x)) for time in (t, s))
        times = substeps(start, end, steps)
        for here, there in itertools.pairwise(times):
            x = self.process.jump(x, self.predict(x, here, conditions, guidance_scale), here, there)
        return x

    def sample(
        self,
        noise: torch.Tensor,
        conditions: Conditions,
        steps: int,
        guidance_scale: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Clean latents that the ODE makes of noise, `solve` over all times."""
        return self.solve(noise, self.process.num_timesteps - 1, CLEAN, conditions, steps, guidance_scale)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures `(batch, channels, height, width)` of clean latents, about in [-1, 1], without gradients."""
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0), return_dict=False)[0]

    def marks(self) -> str:
        """A fingerprint of the weights when the teacher was made, with the process and the latents' shape."""
        digest = hashlib.sha256(b"".join(marks.numpy().tobytes() for marks in self._marks))
        digest.update(self.process.levels_digest())
        digest.update(repr((self.process.prediction_type, self.process.num_timesteps, self.shape)).encode())
        return digest.hexdigest()[:16]


def few_step_scheduler(scheduler: Any) -> DDIMScheduler:
    r"""DDIM whose first step begins at the last timestep T, and whose last ends at clean data.

    One step is :math:`z_0 = (z_T - \sigma_T \epsilon) / \alpha_T`, or :math:`\alpha_T z_T - \sigma_T v`. Other settings miss it:
    with "leading" spacing one step is at timestep 1, and without `set_alpha_to_one` it ends at the noise of timestep 0.

    Args:
        scheduler: whose noise levels and prediction type it has.
    """
    return DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, thresholding=False
    )


def guidance_embedding(w: torch.Tensor, dimension: int) -> torch.Tensor:
    """Fourier features of `1000 w` as in `StableDiffusionPipeline`: `(batch, dimension)` in float32.

    Args:
        w: guidance scale less 1, `(batch,)`.
        dimension: even.
    """
    half = dimension // 2
    rates = torch.exp(torch.arange(half, device=w.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * w.float()[:, None] * rates[None, :].to(w.device)
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dimension % 2))


# --- pairs -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _opened(file: Path) -> Any:
    return safe_open(file, framework="pt")


class Pairs(Dataset):
    """Noise and the clean latents that a deterministic solver makes of it, on disk, each made once.

    Pair `i` is under condition `i % len(conditions)`, and its noise depends on `(seed, i)` only. They lie in shards
    `pairs-<number>.safetensors` with tensors `noise` and `clean`, `(pairs, channels, height, width)` in float32, beside
    `pairs.json`, which says what they were made with. A shard is written aside and renamed: where a run was killed, the next
    makes the missing shards, with the same bits.

    Rows are `{"noise", "clean", "condition", "index", "sample_id"}`, asked for by `(index, global sample number)`.

    Args:
        folder: where the shards are, or will be.
        conditions: prompts or class labels.
        count: pairs in all.
        shape: of the latents.
        seed: of the noise.
        shard: pairs a file.

    Raises:
        ValueError: there is no condition, or a count is below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        conditions: Sequence[Any],
        count: int,
        shape: tuple[int, ...],
        seed: int = 0,
        shard: int = 256,
    ) -> None:
        if len(conditions) == 0:
            raise ValueError("`conditions` is empty; prompts or class labels are needed.")
        for name, value in (("count", count), ("shard", shard)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        self.folder, self.conditions, self.count = Path(folder), list(conditions), count
        self.shape, self.seed, self.shard = tuple(shape), seed, shard

    def __len__(self) -> int:
        return self.count

    def file(self, number: int) -> Path:
        return self.folder / f"pairs-{number:05d}.safetensors"

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, sample_id = item if isinstance(item, tuple) else (item, item)
        opened = _opened(self.file(index // self.shard))
        row = index % self.shard
        return {
            "noise": opened.get_slice("noise")[row], "clean": opened.get_slice("clean")[row],
            "condition": self.conditions[index % len(self.conditions)], "index": index, "sample_id": sample_id,
        }  # fmt: skip

    def noise(self, indices: torch.Tensor) -> torch.Tensor:
        """Noise of these pairs, `(len(indices), channels, height, width)`."""
        return SampleNoise(_PAIRS ^ self.seed, indices).normal(*self.shape)

    def make(
        self,
        solver: Solver,
        encode: Callable[[Sequence[Any]], Conditions],
        made_with: dict[str, Any],
        batch_size: int = 32,
        accelerator: Accelerator | None = None,
    ) -> Pairs:
        """Make the shards that are not there. Shards are shared out among the processes of `accelerator`.

        Args:
            solver: from noise and conditions to clean latents; deterministic.
            encode: from conditions of a batch to what the solver takes, such as `Teacher.encode`.
            made_with: what the pairs depend on besides conditions, seed, count and shape, as JSON: a fingerprint of the
                weights, steps, guidance. Pairs in the folder that were made with something else are refused.
            batch_size: pairs made at once.

        Returns:
            Self.

        Raises:
            ValueError: the folder holds other pairs.
        """
        prompts = hashlib.sha256(json.dumps(self.conditions).encode()).hexdigest()[:16]
        facts = {
            **made_with, "conditions": prompts, "seed": self.seed, "shape": list(self.shape), "shard": self.shard,
            "batch_size": batch_size,
        }  # fmt: skip
        self._claim(facts, accelerator)
        numbers = range(-(-self.count // self.shard))
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
        missing = [number for number in numbers[rank::world] if not self._complete(number)]
        for number in tqdm(missing, desc="Pairs", unit="shard", disable=not missing):
            self._make(number, solver, encode, batch_size, accelerator)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        return self

    def _claim(self, facts: dict[str, Any], accelerator: Accelerator | None) -> None:
        """Write down what the pairs are made with, or compare."""
        note = self.folder / "pairs.json"
        if note.is_file():
            there = json.loads(note.read_text())
            other = sorted(name for name in facts.keys() | there.keys() if facts.get(name) != there.get(name))
            if other:
                raise ValueError(
                    f"{self.folder} holds pairs that were made with another {', '.join(other)}; name another folder, or "
                    "delete that one."
                )
        elif accelerator is None or accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".pairs.json.{os.getpid()}"
            partial.write_text(json.dumps(facts, indent=2) + "\n")
            partial.rename(note)
        if accelerator is not None:
            accelerator.wait_for_everyone()

    def _rows_of(self, number: int) -> range:
        return range(number * self.shard, min((number + 1) * self.shard, self.count))

    def _complete(self, number: int) -> bool:
        """Whether a shard is there, with as many pairs as it should have: the last one may be of a smaller count."""
        file = self.file(number)
        if not file.is_file():
            return False
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice("noise").get_shape()[0] >= len(self._rows_of(number))

    def _make(
        self,
        number: int,
        solver: Solver,
        encode: Callable[[Sequence[Any]], Conditions],
        batch_size: int,
        accelerator: Accelerator | None,
    ) -> None:
        noises, cleans, rows = [], [], self._rows_of(number)
        device = accelerator.device if accelerator is not None else "cpu"
        starts = range(rows.start, rows.stop, batch_size)
        for start in tqdm(starts, desc=f"shard {number}", leave=False, mininterval=1.0):
            indices = torch.arange(start, min(start + batch_size, rows.stop))
            noise = self.noise(indices)
            conditions = encode([self.conditions[i % len(self.conditions)] for i in indices.tolist()])
            noises.append(noise)
            cleans.append(solver(noise.to(device), conditions).float().cpu())
        partial = self.folder / f".{self.file(number).name}.{os.getpid()}"
        save_file({"noise": torch.cat(noises), "clean": torch.cat(cleans).contiguous()}, partial)
        partial.rename(self.file(number))
        _opened.cache_clear()


# --- tasks -----------------------------------------------------------------------------------------------------------


class TeacherTask(Task):
    """Base of a distillation; a subclass sets `trained`, and writes `loss`, `student_pipeline`, `save` and `card`.

    Args:
        args: those of `add_teacher_arguments`.

    Attributes:
        teacher: frozen.
        conditions: prompts or class labels, of `--prompts` or of the pictures.
        pictures: the pictures, None where there are none.
    """

    on_device: tuple[str, ...] = ()

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        pipeline = Pipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        if args.vae_path is not None:
            pipeline.vae = AutoencoderKL.from_pretrained(args.vae_path)
        pipeline.set_progress_bar_config(disable=True)
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        if args.resolution is not None and args.resolution % factor:
            raise ValueError(f"`--resolution` is {args.resolution}; this VAE needs a multiple of {factor}.")
        size = None if args.resolution is None else args.resolution // factor
        self.teacher = self.make_teacher(pipeline, args.guidance_scale, size)
        args.resolution = self.teacher.shape[1] * factor
        self.pipeline, self.pictures = pipeline, None
        if args.prompts is not None:
            self.conditions: list[Any] = read_prompts(args.prompts)
            if self.teacher.by_class:
                self.conditions = [_class(pipeline, line) for line in self.conditions]
        else:
            self.pictures = load_dataset(args, annotations=("label",) if self.teacher.by_class else ("caption",))
            self.conditions = self.pictures.labels if self.teacher.by_class else self.pictures.captions

    def make_teacher(self, pipeline: Any, guidance_scale: float, latent_size: int | None) -> Teacher:
        return Teacher(pipeline, guidance_scale, latent_size)

    def dataset(self, args: argparse.Namespace) -> Any:
        """The pictures."""
        if self.pictures is None:
            raise ValueError("This training needs pictures: give `--train_data_dir` or `--dataset_name`.")
        return self.pictures

    def pairs(self, args: argparse.Namespace) -> Pairs:
        """The teacher's pairs, of which shards are yet to be made: for `dataset`."""
        folder = args.pairs_dir or Path(args.output_dir, "checkpoint-pairs")  # of which nothing is ever pushed
        count = args.num_pairs or len(self.conditions)
        seed = args.seed if args.pairs_seed is None else args.pairs_seed
        return Pairs(folder, self.conditions, count, self.teacher.shape, seed)

    def make_pairs(self, pairs: Pairs, accelerator: Accelerator) -> None:
        """Make them with the teacher's ODE: for `prepare`."""
        args = self.args

        def solver(noise: torch.Tensor, conditions: Conditions) -> torch.Tensor:
            return self.teacher.sample(noise, conditions, args.teacher_steps)

        made_with = {
            "teacher": self.teacher.marks(),
            "steps": args.teacher_steps,
            "guidance_scale": args.guidance_scale,
        }
        pairs.make(solver, self.teacher.encode, made_with, args.pairs_batch_size, accelerator)

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        self.teacher.to(accelerator.device)
        self.device = accelerator.device
        if isinstance(dataset, Pairs):
            self.make_pairs(dataset, accelerator)

    def encode(self, batch: dict[str, Any]) -> Conditions:
        """What the rows of a batch, of pairs or of pictures, are made under."""
        name = "condition" if "condition" in batch else "label" if self.teacher.by_class else "caption"
        return self.teacher.encode(batch[name])

    def student_pipeline(self) -> DiffusionPipeline:
        """A pipeline that draws with the student as it is now, as the result will."""
        raise NotImplementedError

    def pipeline_with(self, **parts: Any) -> Any:
        """The teacher's pipeline with other parts; the teacher's own stays as it is."""
        pipeline = copy.copy(self.pipeline)
        for name, part in parts.items():
            setattr(pipeline, name, part)
        return pipeline

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        """One row of pictures a prompt, or a class."""
        args, count = self.args, self.args.num_validation_images
        shown = list(dict.fromkeys(self.conditions))[:4] if self.teacher.by_class else args.validation_prompts or []
        if not shown:
            return {}
        pipeline, pictures = self.student_pipeline(), []
        pipeline.set_progress_bar_config(disable=True)
        for condition in shown:
            call = {"class_labels": [condition] * count} if self.teacher.by_class else {"prompt": [condition] * count}
            if not self.teacher.by_class:
                call |= {"height": args.resolution, "width": args.resolution}
            pictures += pipeline(
                **call, num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)],
            ).images  # fmt: skip
        return write_samples(pictures, count, folder, step)


def _class(pipeline: Any, name: str) -> int:
    """A class label from its number or name."""
    if name.isdigit():
        return int(name)
    if name not in pipeline.labels:
        raise ValueError(f"`--prompts` has {name!r}, which is no number, and no class that the pipeline names.")
    return pipeline.labels[name]


def add_teacher_arguments(
    parser: argparse.ArgumentParser, validation_steps: int, validation_guidance_scale: float, pairs: bool = False
) -> argparse.ArgumentParser:
    """Arguments of a distillation, with those that every script has.

    Args:
        parser: of the script.
        validation_steps, validation_guidance_scale: defaults of the validation pictures.
        pairs: add those of `TeacherTask.pairs`.
    """
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="The teacher, a pipeline.")
    parser.add_argument("--revision")
    parser.add_argument("--vae_path", help="Take the VAE from this folder instead.")
    parser.add_argument("--prompts", help="Text file with one prompt (or class) a line, instead of captioned pictures.")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="Of the teacher.")
    if pairs:
        parser.add_argument("--num_pairs", type=int, help="Pairs of noise and picture; else one a prompt.")
        parser.add_argument(
            "--pairs_dir", help="Where they are kept; else in the output folder. Several runs may share it."
        )
        parser.add_argument("--pairs_seed", type=int, help="Of their noise; else the seed of the run.")
        parser.add_argument("--teacher_steps", type=int, default=25, help="DDIM steps from noise to picture.")
        parser.add_argument("--pairs_batch_size", type=int, default=32, help="Pairs that are made at once.")
    parser.add_argument("--validation_prompts", nargs="*")
    add_validation_arguments(parser, validation_steps, validation_guidance_scale)
    add_common_arguments(parser).set_defaults(resolution=None)
    return parser


def check_teacher_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` where one of them is out of range."""
    check_common_arguments(args)
    if not args.guidance_scale >= 1:
        raise ValueError(f"`--guidance_scale` is {args.guidance_scale}; it must be at least 1, which is no guidance.")
    for name in (
        "num_pairs",
        "teacher_steps",
        "pairs_batch_size",
        "num_validation_images",
        "validation_inference_steps",
    ):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` is {value}; it must be at least 1.")
