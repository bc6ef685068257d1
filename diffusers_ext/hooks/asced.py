"""ASCED (Cao et al. 2025, arXiv 2503.16218): find local artifacts while they arise, and take them back once.

In the middle of a run the predicted clean picture settles everywhere but where an artifact grows. Regions whose prediction
changes by much more than usual are put back to an earlier prediction, noised again, and given fresh noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from torch.nn import functional as F

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_TRUNCATE = 4.0  # standard deviations of the smoothing kernel to either side


# --- finding them ----------------------------------------------------------------------------------------------------


def detect_artifacts(
    predictions: Sequence[torch.Tensor],
    mad_scale: float = 3.0,
    min_area: float = 100.0,
    max_area: float = 10000.0,
    min_width: int = 5,
    sigma: float = 2.0,
) -> torch.Tensor:
    """Regions in which successive predictions of the clean picture differ by far more than elsewhere.

    The absolute differences of neighbours are smoothed. In each frame of differences a pixel is flagged where one of its
    channels exceeds the median by `mad_scale` robust standard deviations, both over all pixels and channels of the sample.
    Of the pixels that are flagged in any frame those regions are kept, connected over edges, that have the right area and
    somewhere hold a whole square. The numbers are the authors' for pictures of 256 pixels.

    Args:
        predictions: at least two, from early to late, each `(batch, channels, height, width)`.
        mad_scale: deviations from the median, positive.
        min_area, max_area: of a region, in pixels; both ends are left out.
        min_width: side of the square, in pixels.
        sigma: standard deviation of the Gaussian smoothing, in pixels; 0 for none.

    Returns:
        `bool` `(batch, height, width)`.

    Raises:
        ValueError: fewer than two predictions, or they differ in shape.
    """
    if len(predictions) < 2 or any(p.ndim != 4 or p.shape != predictions[0].shape for p in predictions):
        raise ValueError(
            f"`predictions` has the shapes {[tuple(p.shape) for p in predictions]}; at least two of one shape (batch, "
            "channels, height, width) are needed."
        )
    flagged = torch.zeros_like(predictions[0][:, 0], dtype=torch.bool)
    for before, after in itertools.pairwise(predictions):
        change = gaussian_smooth((after.float() - before.float()).abs(), sigma)
        values = change.flatten(1)
        median = values.quantile(0.5, dim=1, keepdim=True)
        deviation = _MAD_TO_DEVIATION * (values - median).abs().quantile(0.5, dim=1, keepdim=True)
        flagged |= change.amax(1) > (median + mad_scale * deviation)[..., None]
    labels = connected_components(flagged)
    areas = torch.bincount(labels.flatten(), minlength=flagged.numel() + 1)
    kept = (areas > min_area) & (areas < max_area)
    # A whole square is connected, so that it lies in one region.
    wide = torch.zeros_like(kept)
    wide[labels[erode(flagged, min_width)]] = True
    kept &= wide
    kept[0] = False
    return kept[labels]


def gaussian_smooth(pictures: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian smoothing of height and width, mirrored at the borders with the outermost pixel repeated.

    Args:
        pictures: `(..., height, width)`.
        sigma: standard deviation in pixels; 0 returns them as they are.
    """
    radius = int(_TRUNCATE * sigma + 0.5)
    if radius == 0:
        return pictures
    steps = torch.arange(-radius, radius + 1, device=pictures.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(pictures.dtype)
    for dim in (-1, -2):
        size = pictures.shape[dim]
        place = torch.arange(-radius, size + radius, device=pictures.device) % (2 * size)
        place = torch.where(place < size, place, 2 * size - 1 - place)
        windows = pictures.index_select(dim, place).unfold(dim, 2 * radius + 1, 1)
        pictures = windows @ kernel
    return pictures


def dilate(mask: torch.Tensor, reach: int) -> torch.Tensor:
    """A `bool` mask `(..., height, width)` grown by `reach` pixels in all directions, diagonals too."""
    if reach == 0:
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return (F.max_pool2d(flat, 2 * reach + 1, stride=1, padding=reach) > 0).reshape(mask.shape)


def erode(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Where a square of side `width` about a pixel lies in a `bool` mask `(..., height, width)`; beyond it nothing does.

    For an even width the square reaches further to the left and to the top.
    """
    flat = (~mask).reshape(-1, 1, *mask.shape[-2:]).float()
    before, after = width // 2, (width - 1) // 2
    padded = F.pad(flat, (before, after, before, after), value=1.0)
    return (F.max_pool2d(padded, width, stride=1) == 0).reshape(mask.shape)


def connected_components(mask: torch.Tensor) -> torch.Tensor:
    """Number the regions of a mask that are connected over edges.

    All pixels of a horizontal run take the largest number in it, then those of a vertical run, until nothing changes.

    Args:
        mask: `bool` `(..., height, width)`.

    Returns:
        `int64` of its shape: 0 outside, and a number from 1 to `mask.numel()` of its own for each region.
    """
    labels = torch.arange(1, mask.numel() + 1, device=mask.device).reshape(mask.shape) * mask
    while True:
        before = labels
        for dim in (-1, -2):
            labels = _largest_of_runs(labels.transpose(dim, -1), mask.transpose(dim, -1)).transpose(dim, -1)
        if torch.equal(labels, before):
            return labels


def _largest_of_runs(labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each run of a mask along its last axis with the largest of its labels."""
    starts = mask & ~F.pad(mask, (1, 0))[..., :-1]
    runs = starts.flatten().cumsum(0).reshape(mask.shape) * mask
    largest = labels.new_zeros(mask.numel() + 1)
    largest.scatter_reduce_(0, runs.flatten(), labels.flatten(), "amax")
    return largest[runs] * mask


# --- taking them back ------------------------------------------------------------------------------------------------


class ASCEDCallback(PipelineCallback):
    r"""Watch a DDIM run, and correct what looks like an artifact, once.

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        asced = dx.ASCEDCallback(detect_step=14, history_start=8)
        images = pipe(prompts, num_inference_steps=25, callback_on_step_end=asced).images
        asced.mask  # what was corrected in the last run: bool (batch, height, width)

    The prediction of a step follows from the states before and after it, since a DDIM step without noise and clipping is
    :math:`x' = \alpha' \hat x_0 + \sigma' \hat\epsilon` for the same two as :math:`x = \alpha \hat x_0 + \sigma \hat\epsilon`.
    Before step `detect_step` regions are found and, widened by `expand`, replaced by an earlier prediction that is noised
    to the level of that step. That step then takes fresh noise, :math:`\eta` of it, in those regions only. Without a region
    a run is bit-equal to one without the callback, and no random number is drawn.

    Lengths and areas are given for pictures whose longer side is `reference_size`, and are scaled to the latents. Half
    precision makes predictions coarse. The authors did not publish their steps: the defaults are ours.

    Args:
        detect_step: k*, the step before which regions are corrected, counted from 0: the end of the phase in which
            artifacts arise.
        history_start: first step whose prediction is looked at; from 1 to `detect_step - 2`.
        mad_scale, min_area, max_area, min_width, sigma: as in `detect_artifacts`.
        reverse_step: which prediction takes the place of a region: 1 for the newest, 2 for the one before it.
        expand: by how many pixels regions are widened.
        noise_scale: standard deviation of noise that is added to that prediction.
        eta: weight of the fresh noise of step k*, as in DDIM: 0 for none, 1 for as much as in DDPM.
        clip_range: bound on the absolute value of predictions in the search, 1 for pixels; None for latents.
        reference_size: see above; None takes the numbers as they are.
        seed: of all noise.

    Attributes:
        mask: regions of the last run before they were widened, `bool` `(batch, height, width)`; None before step k*.

    Raises:
        ValueError: a value is out of range; in a run also where the scheduler is another or the run too short.
    """

    tensor_inputs = ["latents"]  # as in diffusers

    @register_to_config
    def __init__(
        self,
        detect_step: int = 14,
        history_start: int = 8,
        mad_scale: float = 3.0,
        reverse_step: int = 1,
        expand: float = 5.0,
        noise_scale: float = 0.0,
        eta: float = 1.0,
        min_area: float = 100.0,
        max_area: float = 10000.0,
        min_width: float = 5.0,
        sigma: float = 2.0,
        clip_range: float | None = None,
        reference_size: int | None = 256,
        seed: int = 0,
    ) -> None:
        _whole("detect_step", detect_step, 3)
        _whole("history_start", history_start, 1, detect_step - 2)
        _whole("reverse_step", reverse_step, 1, detect_step - 1)
        _whole("seed", seed, 0)
        if reference_size is not None:
            _whole("reference_size", reference_size, 1)
        for name, value in (
            ("expand", expand),
            ("noise_scale", noise_scale),
            ("eta", eta),
            ("min_area", min_area),
            ("sigma", sigma),
        ):
            _number(name, value, zero=True)
        for name, value in (("mad_scale", mad_scale), ("max_area", max_area), ("min_width", min_width)):
            _number(name, value, zero=False)
        if clip_range is not None:
            _number("clip_range", clip_range, zero=False)
        if eta > 1:
            raise ValueError(f"`eta` is {eta!r}; it must be from 0 to 1.")
        self.mask: torch.Tensor | None = None
        self._state: torch.Tensor | None = None
        self._predictions: list[torch.Tensor] = []
        self._region: torch.Tensor | None = None

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What pipelines call after each step."""
        last = self.config.detect_step
        if step_index == 0:
            self._begin(pipeline)
        if step_index > last or (step_index == last and self._region is None):
            self._forget()
            return callback_kwargs
        latents = callback_kwargs["latents"]
        here, there = _levels(pipeline.scheduler, int(timestep))
        if step_index > 0:
            x, y = self._state.float(), latents.float()  # type: ignore[union-attr]
            scale = here[1] * there[0] - there[1] * here[0]
            data, noise = (here[1] * y - there[1] * x) / scale, (there[0] * x - here[0] * y) / scale
            if step_index == last:
                latents = self._with_fresh_noise(latents, data, noise, here, there)
            else:
                self._predictions.append(data)
        if step_index == last - 1:
            latents = self._corrected(latents, there)
        self._state = latents
        return {**callback_kwargs, "latents": latents}

    def _begin(self, pipeline: Any) -> None:
        self._forget()
        self.mask = None
        scheduler = pipeline.scheduler
        wrong = [name for name in ("clip_sample", "thresholding") if scheduler.config.get(name)]
        if not isinstance(scheduler, DDIMScheduler) or wrong:
            raise ValueError(
                f"The pipeline has {type(scheduler).__name__}{''.join(f' with `{name}`' for name in wrong)}; `ASCEDCallback` "
                "needs `DDIMScheduler` with `clip_sample=False` and `thresholding=False`."
            )
        steps = getattr(pipeline, "num_timesteps", len(scheduler.timesteps))
        if steps <= self.config.detect_step:
            raise ValueError(f"`detect_step` is {self.config.detect_step!r}; this run has steps 0 to {steps - 1}.")
        self._generator = torch.Generator().manual_seed(self.config.seed)

    def _forget(self) -> None:
        self._state, self._predictions, self._region = None, [], None

    def _corrected(self, latents: torch.Tensor, level: tuple[float, float]) -> torch.Tensor:
        """The state at k* with regions replaced; `level` is (alpha, sigma) there."""
        config = self.config
        seen = self._predictions[config.history_start - 1 :]
        if config.clip_range is not None:
            seen = [prediction.clamp(-config.clip_range, config.clip_range) for prediction in seen]
        scale = 1.0 if config.reference_size is None else max(latents.shape[-2:]) / config.reference_size
        self.mask = detect_artifacts(
            seen, config.mad_scale, config.min_area * scale**2, config.max_area * scale**2,
            max(round(config.min_width * scale), 1), config.sigma * scale,
        )  # fmt: skip
        if not bool(self.mask.any()):
            return latents
        self._region = dilate(self.mask, round(config.expand * scale))[:, None]
        data = self._predictions[-config.reverse_step]
        if config.noise_scale:
            data = data + config.noise_scale * self._noise(latents)
        return self._inside(level[0] * data + level[1] * self._noise(latents), latents)

    def _with_fresh_noise(
        self,
        latents: torch.Tensor,
        data: torch.Tensor,
        noise: torch.Tensor,
        here: tuple[float, float],
        there: tuple[float, float],
    ) -> torch.Tensor:
        """The end of step k* with the noise of DDIM's eta in the regions (Song et al. 2021, equation 16)."""
        ratio = (here[0] / there[0]) ** 2
        deviation = self.config.eta * there[1] / here[1] * math.sqrt(max(1 - ratio, 0.0))
        if deviation == 0:
            return latents
        kept = math.sqrt(max(there[1] ** 2 - deviation**2, 0.0))
        return self._inside(there[0] * data + kept * noise + deviation * self._noise(latents), latents)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self._generator).to(like.device)

    def _inside(self, new: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return torch.where(self._region, new.to(latents.dtype), latents)  # type: ignore[arg-type]


def _levels(scheduler: Any, timestep: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(alpha, sigma) before and after the DDIM step at a timestep."""
    previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    after = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    pair = (float(scheduler.alphas_cumprod[timestep]), float(after))
    return tuple((math.sqrt(bar), math.sqrt(1 - bar)) for bar in pair)  # type: ignore[return-value]


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}{upper}.")


def _number(name: str, value: Any, zero: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        raise ValueError(f"`{name}` is {value!r}; it must be a number {'of at least' if zero else 'over'} 0.")
