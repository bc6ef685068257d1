r"""Pictures by the reverse SDE, each with step sizes of its own (Jolicoeur-Martineau et al. 2021, arXiv 2105.14080).

The data diffuse by :math:`dx = f x\,dt + g\,dw` from t = 0 to 1, and from noise the way back is
:math:`dx = (f x - g^2 s)\,dt + g\,d\bar w` with the score s. One attempt takes two denoiser calls: an Euler-Maruyama step
and, of the same noise, a step of the stochastic improved Euler method. How far they are apart, relative to a tolerance,
decides whether the attempt counts and how long the next step is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline, ScoreSdeVeScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

FIRST_STEP = 0.01  # section 3.1.6 and algorithm 1 of the paper, as are the next two
SAFETY = 0.9
EXPONENT = 0.9
_SMALLEST_STEP = 1e-10  # of time; below, t - h is t in the precision that the denoiser gets it in


@dataclass
class AdaptiveSDEOutput(BaseOutput):
    """Output of `AdaptiveSDEPipeline`.

    Attributes:
        images: a list of PIL pictures, an array `(batch, height, width, channels)` in [0, 1], or a tensor `(batch,
            channels, height, width)` in [0, 1].
        num_calls: denoiser calls that each picture took, 1 + 2 an attempt. The batch took the largest of them, in
            ever smaller batches.
        num_rejected: attempts of each picture that did not count.
    """

    images: Any
    num_calls: list[int]
    num_rejected: list[int]


class Level(NamedTuple):
    """The SDE at one time for each picture; `(batch,)`, float64, on the CPU.

    The score is `of_output * model_output + of_state * x`.
    """

    timestep: torch.Tensor  # what the denoiser is told
    sigma: torch.Tensor  # deviation of the noise in x
    f: torch.Tensor
    g: torch.Tensor
    of_output: torch.Tensor
    of_state: torch.Tensor


class VariancePreserving:
    r"""The SDE of a beta schedule: :math:`f = -\beta / 2,\ g = \sqrt{\beta}`.

    At timestep :math:`\tau = (T - 1) t`. Between whole timesteps :math:`\log \bar\alpha` is linear, so beta is constant
    there. Pictures are in [-1, 1].

    Args:
        alphas_cumprod: :math:`\bar\alpha_0, \ldots, \bar\alpha_{T-1}`.
        prediction_type: "epsilon", "v_prediction" or "sample".
    """

    end, level, sigma_start = 1e-3, 2 / 256, 1.0

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str) -> None:
        self.log_bar = alphas_cumprod.double().cpu().log()
        self.prediction_type = prediction_type

    def at(self, t: torch.Tensor) -> Level:
        timestep = t * (len(self.log_bar) - 1)
        low = timestep.floor().long().clamp(0, len(self.log_bar) - 2)
        slope = self.log_bar[low + 1] - self.log_bar[low]
        log_bar = self.log_bar[low] + (timestep - low) * slope
        alpha, sigma = (log_bar / 2).exp(), (-torch.expm1(log_bar)).sqrt()
        # The noise in x is `of_output * model_output + of_state * x`; the score is that over -sigma.
        of_output, of_state = {
            "epsilon": (torch.ones_like(alpha), torch.zeros_like(alpha)),
            "v_prediction": (alpha, sigma),
            "sample": (-alpha / sigma, 1 / sigma),
        }[self.prediction_type]
        beta = -slope * (len(self.log_bar) - 1)
        return Level(timestep, sigma, -beta / 2, beta.sqrt(), -of_output / sigma, -of_state / sigma)

    def to_unit(self, x: torch.Tensor) -> torch.Tensor:
        return (x / 2 + 0.5).clamp(0, 1)


class VarianceExploding:
    r"""The SDE of `ScoreSdeVeScheduler`, :math:`\sigma(t) = \sigma_{min} (\sigma_{max} / \sigma_{min})^t`.

    :math:`f = 0,\ g^2 = d\sigma^2 / dt`. The denoiser is told sigma and gives the score. Pictures are in [0, 1].
    """

    end, level = 1e-5, 1 / 256

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        self.sigma_min, self.sigma_start = sigma_min, sigma_max
        self.growth = float(np.log(sigma_max / sigma_min))

    def at(self, t: torch.Tensor) -> Level:
        sigma = self.sigma_min * (self.growth * t).exp()
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return Level(sigma, sigma, zero, sigma * (2 * self.growth) ** 0.5, one, zero)

    def to_unit(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(0, 1)


def read_process(scheduler: Any) -> VariancePreserving | VarianceExploding:
    """The SDE whose steps a scheduler of diffusers takes.

    Raises:
        ValueError: it has neither `alphas_cumprod` nor is it a `ScoreSdeVeScheduler`, or its schedule ends in pure noise,
            where the SDE is singular.
    """
    if isinstance(scheduler, ScoreSdeVeScheduler):
        return VarianceExploding(scheduler.config.sigma_min, scheduler.config.sigma_max)
    kind = scheduler.config.get("prediction_type", "epsilon")
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or scheduler.config.get("use_flow_sigmas") or kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__} with `prediction_type` {kind!r}; allowed are schedulers of a beta "
            "schedule (with `alphas_cumprod`) with 'epsilon', 'v_prediction' or 'sample', and `ScoreSdeVeScheduler`."
        )
    if scheduler.config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "`scheduler` has `rescale_betas_zero_snr` True; the SDE of a schedule that ends in pure noise is singular."
        )
    return VariancePreserving(table, kind)


def proposals(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    process: VariancePreserving | VarianceExploding,
    x: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states at t - h by Euler-Maruyama and by stochastic improved Euler, which share the noise (algorithm 1).

    Args:
        denoise: takes states and timesteps, `(batch,)` in float64 on the CPU.
        process: the SDE.
        x, noise: `(batch, channels, height, width)`.
        t, h: time and step of each picture, `(batch,)`, float64, on the CPU.
    """

    def increment(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = process.at(t)
        squared = level.g**2
        state, output, diffusion = (
            _like(weight, x)
            for weight in (
                h * (squared * level.of_state - level.f),
                h * squared * level.of_output,
                h.sqrt() * level.g,
            )
        )
        return state * x + output * denoise(x, level.timestep) + diffusion * noise

    first = increment(x, t)
    second = increment(x + first, t - h)
    return x + first, x + (first + second) / 2


class AdaptiveSDEPipeline(DiffusionPipeline):
    """Unconditional pictures by the adaptive SDE solver; loads from any folder of a `DDPMPipeline` or `ScoreSdeVePipeline`.

    A tolerance takes the place of a number of steps. Steps, rejections and noise of a picture are its own: it is the same
    in every batch, up to rounding.

    Args:
        unet: a denoiser that takes real timesteps, one a picture, such as `UNet2DModel`. Of an output with twice the
            channels, as of learned variances, the first half is used.
        scheduler: only its process is used: any scheduler of a beta schedule, or `ScoreSdeVeScheduler`.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        eps_rel: float = 0.02,
        eps_abs: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> AdaptiveSDEOutput | tuple:
        r"""Draw pictures.

        Args:
            batch_size: how many.
            eps_rel: relative tolerance. The paper uses 0.01 to 0.05 for quality, up to 0.5 for speed.
            eps_abs: absolute tolerance; None is one level of an 8-bit picture (1/256 of the range).
            generator: one, of which seeds of the pictures are drawn, or one a picture.
            output_type: "pil", "np" or "pt".
            return_dict: False gives a tuple.

        Raises:
            ValueError: an argument is out of range, or the process of the scheduler is none of those above.
            FloatingPointError: the denoiser gives NaN or infinity, or no step is small enough for the tolerance.
        """
        process = read_process(self.scheduler)
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"`batch_size` is {batch_size!r}; a positive integer is needed.")
        for name, tolerance in (("eps_rel", eps_rel), ("eps_abs", process.level if eps_abs is None else eps_abs)):
            if not (isinstance(tolerance, (int, float)) and 0 < tolerance < float("inf")):
                raise ValueError(f"`{name}` is {tolerance!r}; it must be a positive number.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` is {output_type!r}; allowed are 'pil', 'np' and 'pt'.")
        generators = _one_each(generator, batch_size)

        x, calls, rejected = self._solve(process, eps_rel, process.level if eps_abs is None else eps_abs, generators)
        images = process.to_unit(x)
        if output_type != "pt":
            images = images.float().cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, calls, rejected
        return AdaptiveSDEOutput(images=images, num_calls=calls, num_rejected=rejected)

    def _solve(
        self,
        process: VariancePreserving | VarianceExploding,
        eps_rel: float,
        eps_abs: float,
        generators: list[torch.Generator],
    ) -> tuple[torch.Tensor, list[int], list[int]]:
        """Algorithm 1. States live on the device, times and steps on the CPU: one wait for the device an attempt."""
        device, side = self._execution_device, self.unet.config.sample_size
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        shape = (self.unet.config.in_channels, *((side, side) if isinstance(side, int) else side))

        def draw(of: list[torch.Generator]) -> torch.Tensor:
            return randn_tensor((len(of), *shape), generator=of, device=device, dtype=dtype)

        def denoise(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            real = timestep.to(device=device, dtype=dtype)
            return self.unet(x.to(self.unet.dtype), real, return_dict=False)[0][:, : shape[0]].to(dtype)

        x = draw(generators) * process.sigma_start
        previous = x.clone()  # the low-order state before the last accepted step
        left = torch.full((len(generators),), 1 - process.end, dtype=torch.float64)  # time to go: t - end
        h = left.clamp(max=FIRST_STEP)
        attempts, accepted = torch.zeros_like(left, dtype=torch.long), torch.zeros_like(left, dtype=torch.long)
        with self.progress_bar(total=100) as bar:
            shown = 0
            while (running := left.nonzero().flatten()).numel():
                index = running.to(device)
                here, step = x[index], h[running]
                noise = draw([generators[i] for i in running.tolist()])
                low, high = proposals(denoise, process, here, noise, process.end + left[running], step)
                delta = (eps_rel * torch.maximum(low.abs(), previous[index].abs())).clamp(min=eps_abs)
                error = ((high - low) / delta).square().flatten(1).mean(1).sqrt().double().cpu()
                accept = error <= 1
                move = accept.to(device).view(-1, *[1] * (x.ndim - 1))
                x[index] = torch.where(move, high, here)
                previous[index] = torch.where(move, low, previous[index])
                left[running] -= torch.where(accept, step, 0.0)
                h[running] = torch.minimum(left[running], SAFETY * step * error.clamp(min=1e-10) ** -EXPONENT)
                attempts[running] += 1
                accepted[running] += accept.long()
                if not bool(error.isfinite().all()) or bool(((h < _SMALLEST_STEP) & (left > _SMALLEST_STEP)).any()):
                    raise FloatingPointError(
                        f"At time {float(left.max()) + process.end:.6g} the error is {error.tolist()} times the tolerance: "
                        "the denoiser is not finite there, or not smooth enough for `eps_rel` and `eps_abs`."
                    )
                done = int(100 * (1 - left.mean() / (1 - process.end)))
                bar.update(done - shown)
                shown = done
        end = torch.full_like(left, process.end)
        level = process.at(end)
        score = _like(level.of_output, x) * denoise(x, level.timestep) + _like(level.of_state, x) * x
        x = x + _like(level.sigma**2, x) * score  # appendix D: Tweedie's formula, without the division by alpha
        return x, (1 + 2 * attempts).tolist(), (attempts - accepted).tolist()


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`(batch,)` float64 values for a product with x."""
    return values.to(device=x.device, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))


def _one_each(generator: torch.Generator | list[torch.Generator] | None, number: int) -> list[torch.Generator]:
    """A generator for each picture; those of seeds drawn from one generator do not depend on how many there are."""
    if isinstance(generator, list):
        if len(generator) != number:
            raise ValueError(
                f"`generator` has {len(generator)} generators for `batch_size` {number}; one each is needed."
            )
        return generator
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (number,), generator=generator, device=device)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
