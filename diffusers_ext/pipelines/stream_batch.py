r"""A stream of frames at one denoiser call a frame (StreamDiffusion, Kodaira et al. 2023, arXiv 2312.12491).

A frame is denoised in n sub-timesteps :math:`\tau_0 > \ldots > \tau_{n-1}`. Row i of the batch, slot i, holds the frame
that came i calls ago at :math:`\tau_i`, so that every call takes in one frame and gives back the one of n - 1 calls before.
Residual guidance takes, in place of a second prediction, the noise s that leads from an anchor z to the row:
:math:`x_i = \sqrt{\bar\alpha_i} z + \sqrt{1 - \bar\alpha_i}\, s_i`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ImagePipelineOutput,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor, is_valid_image
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor

CFG_TYPES = ("none", "full", "self", "initialize")
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Levels(NamedTuple):
    r"""The sub-timesteps; all but `timesteps` are `(n, 1, 1, 1, 1)`.

    The noise in x is `of_output * model_output + of_state * x`.
    """

    timesteps: torch.Tensor  # (n,)
    alpha: torch.Tensor  # sqrt of alpha_bar
    sigma: torch.Tensor  # sqrt of 1 - alpha_bar
    c_out: torch.Tensor
    c_skip: torch.Tensor
    of_output: torch.Tensor
    of_state: torch.Tensor


def read_levels(scheduler: Any, t_index_list: Sequence[int], num_inference_steps: int) -> Levels:
    """The sub-timesteps of a latent consistency model with the betas of a scheduler; float64, on the CPU.

    Args:
        scheduler: an `LCMScheduler`, or any other of a beta schedule (one with `alphas_cumprod`).
        t_index_list: places of the sub-timesteps in the schedule, from 0.
        num_inference_steps: length of the schedule.

    Raises:
        ValueError: the scheduler is none of these, a place lies outside the schedule, or at a sub-timestep there is only
            noise.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or scheduler.config.get("use_flow_sigmas") or kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__} with `prediction_type` {kind!r}; allowed are schedulers of a beta "
            "schedule (with `alphas_cumprod`) with 'epsilon', 'v_prediction' or 'sample'."
        )
    lcm = LCMScheduler(
        num_train_timesteps=len(table),
        original_inference_steps=scheduler.config.get("original_inference_steps", 50),
        timestep_scaling=scheduler.config.get("timestep_scaling", 10.0),
    )
    lcm.set_timesteps(num_inference_steps)
    if t_index_list[-1] >= num_inference_steps:
        raise ValueError(
            f"`t_index_list` is {list(t_index_list)}; with `num_inference_steps` {num_inference_steps} its numbers go up to "
            f"{num_inference_steps - 1}."
        )
    timesteps = lcm.timesteps[list(t_index_list)]
    alpha_bar = table.double().cpu()[timesteps]
    if alpha_bar.min() < 1e-6:
        raise ValueError(
            f"`t_index_list` is {list(t_index_list)}; at timestep {int(timesteps[0])} of this scheduler there is no signal "
            "left, so that a later start is needed."
        )
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(timesteps.double())
    of_output, of_state = {
        "epsilon": (torch.ones_like(alpha), torch.zeros_like(alpha)),
        "v_prediction": (alpha, sigma),
        "sample": (-alpha / sigma, 1 / sigma),
    }[kind]
    columns = (column.view(-1, 1, 1, 1, 1) for column in (alpha, sigma, c_out, c_skip, of_output, of_state))
    return Levels(timesteps, *columns)


class SimilarityFilter:
    r"""Stochastic similarity filter: a frame like the last computed one is skipped, the likelier the more alike.

    The probability is :math:`\max(0, (\cos - \eta) / (1 - \eta))` of the cosine between the two, in [-1, 1] of pixels.
    Which frames are computed depends on the frames and on `seed` only.
    """

    def __init__(self, threshold: float, max_skip: int, seed: int) -> None:
        self.threshold, self.max_skip, self.seed = threshold, max_skip, seed
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        self._last: torch.Tensor | None = None
        self._skipped = 0  # since a frame was last computed because of `max_skip`
        self._random = random.Random(self.seed)

    def skips(self, x: torch.Tensor) -> bool:
        """Whether to skip the frame `x`; where not, it is the one to compare with from now on."""
        x = x.detach().cpu().double().flatten()
        if self._last is not None and self._random.random() < self._probability(x):
            if self._skipped <= self.max_skip:
                self._skipped += 1
                return True
            self._skipped = 0
        self._last = x
        return False

    def _probability(self, x: torch.Tensor) -> float:
        if self.threshold >= 1:
            return 0.0
        cosine = torch.nn.functional.cosine_similarity(self._last, x, dim=0)
        return (float(cosine) - self.threshold) / (1 - self.threshold)


class Flight(NamedTuple):
    """Frames in flight, newest first. The first dimension is the slot, the second the place in the frame buffer."""

    x: torch.Tensor  # (slots, m, channels, height, width)
    anchor: torch.Tensor  # z, same shape
    text: torch.Tensor  # (slots, 1 or 2, tokens, width): prompt, and negative prompt where it is used


@dataclass
class _Run:
    """A prepared stream: what `prepare` fixed, and what changes from call to call."""

    levels: Levels
    noise: torch.Tensor  # (n, 1, channels, height, width)
    guidance: str  # "none" where the scale is not above 1
    scale: float
    delta: float
    size: tuple[int, int]  # of pictures
    generator: torch.Generator | None
    output_type: str
    condition: torch.Tensor | None  # embedded guidance scale of a distilled denoiser, (1, width)
    text: torch.Tensor  # of frames that enter from now on, (1 or 2, tokens, width)
    flight: Flight
    calls: int = 0
    shown: torch.Tensor | None = None

    def clear(self) -> None:
        """Drop the frames in flight."""
        self.calls, self.shown = 0, None
        self.flight = Flight(*(torch.zeros_like(part) for part in self.flight))


class StreamBatchPipeline(StableDiffusionImg2ImgPipeline):
    """Image-to-image and text-to-image streams by a Stable Diffusion model; loads from any folder of one.

    `prepare` sets up a stream, each `stream(frame)` takes in a frame and gives back a picture, `flush` gives the last ones.
    A call of the pipeline does all three for a list of frames.

    Args:
        vae: `AutoencoderKL`, or the faster `AutoencoderTiny`. Frames are encoded to the mean of the posterior.
        text_encoder, tokenizer, unet, safety_checker, feature_extractor, image_encoder: as in Stable Diffusion.
        scheduler: only its betas, its `prediction_type` and what an `LCMScheduler` has of its own are used.
        requires_safety_checker: as in Stable Diffusion.
        t_index_list: places of the n sub-timesteps in a schedule of `num_inference_steps` timesteps, increasing. Early
            ones change frames more; text-to-image starts at 0.
        cfg_type: which negative prediction guidance takes: "none"; "self", the noise that leads from the frame to the
            row, without any denoiser row (pictures are moved away from the frame); "initialize", a denoiser row for the
            negative prompt in slot 0; "full", one in every slot.
        frame_buffer_size: m, how many frames are taken in and given back at a time.
        do_add_noise: whether a row is noised again for its next slot. Without, it is only scaled.

    Raises:
        ValueError: an option is out of range.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: Any,
        tokenizer: Any,
        unet: UNet2DConditionModel,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
        t_index_list: list[int] | tuple[int, ...] = (22, 32, 45),
        cfg_type: str = "self",
        frame_buffer_size: int = 1,
        do_add_noise: bool = True,
    ) -> None:
        places = list(t_index_list) if isinstance(t_index_list, (list, tuple)) else []
        if not places or not all(map(_is_count, places)) or places != sorted(set(places)):
            raise ValueError(f"`t_index_list` is {t_index_list!r}; increasing integers from 0 on are needed.")
        if cfg_type not in CFG_TYPES:
            raise ValueError(f"`cfg_type` is {cfg_type!r}; allowed are {', '.join(map(repr, CFG_TYPES))}.")
        if not (_is_count(frame_buffer_size) and frame_buffer_size):
            raise ValueError(f"`frame_buffer_size` is {frame_buffer_size!r}; a positive integer is needed.")
        if not isinstance(do_add_noise, bool):
            raise ValueError(f"`do_add_noise` is {do_add_noise!r}; allowed are True and False.")
        super().__init__(
            vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
            requires_safety_checker,
        )  # fmt: skip
        self.register_to_config(
            t_index_list=places, cfg_type=cfg_type, frame_buffer_size=frame_buffer_size, do_add_noise=do_add_noise
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True)
        self._run: _Run | None = None
        self._filter: SimilarityFilter | None = None

    # --- a stream ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(
        self,
        prompt: str | None = None,
        negative_prompt: str = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 1.2,
        delta: float = 1.0,
        generator: torch.Generator | None = None,
        height: int | None = None,
        width: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> None:
        """Begin a stream; one before it ends, and its frames in flight are dropped.

        Args:
            prompt: what pictures show.
            negative_prompt: what they do not show, for `cfg_type` "initialize" and "full".
            num_inference_steps: length of the schedule that `t_index_list` points into.
            guidance_scale: gamma. Up to 1 there is no guidance. A denoiser that takes the scale as an input gets it so.
            delta: weight of the residual noise in `cfg_type` "self" and "initialize". Below 1 the whole prediction grows by
                `gamma - (gamma - 1) delta`, which only a small gamma bears.
            generator: draws the noise of the slots, and the start of text-to-image.
            height, width: of pictures; None takes the size that the model was trained for.
            prompt_embeds, negative_prompt_embeds: `(1, tokens, width)`, in place of the texts.
            noise: of the slots, `(n, channels, height, width)` in latents, in place of what `generator` draws.
            output_type: "pil", "np" or "pt" (both in [0, 1]), or "latent".

        Raises:
            ValueError: an argument is out of range, or the scheduler or denoiser is none that works; the stream before
                it goes on.
        """
        n, unet = len(self.config.t_index_list), self.unet.config
        if not (_is_count(num_inference_steps) and num_inference_steps):
            raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; a positive integer is needed.")
        for name, number in (("guidance_scale", guidance_scale), ("delta", delta)):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
                raise ValueError(f"`{name}` is {number!r}; a finite number of at least 0 is needed.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` is {generator!r}; a stream has one generator.")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; allowed are {', '.join(map(repr, _OUTPUT_TYPES))}.")
        more = (unet.encoder_hid_dim_type, unet.addition_embed_type, unet.class_embed_type, unet.num_class_embeds)
        if unet.in_channels != unet.out_channels or any(kind is not None for kind in more):
            raise ValueError(
                "`unet` takes more than latents, a timestep and a text, as for IP adapters, inpainting and SDXL; a stream has "
                "no more."
            )
        guidance = self.config.cfg_type if guidance_scale > 1 else "none"
        if unet.time_cond_proj_dim is not None and guidance != "none":
            raise ValueError(
                f"`cfg_type` is {guidance!r}; this denoiser takes the guidance scale as an input, which allows 'none'."
            )
        size = self._side("height", height, 0), self._side("width", width, 1)
        shape = (n, unet.in_channels, *(side // self.vae_scale_factor for side in size))
        if noise is not None and noise.shape != shape:
            raise ValueError(f"`noise` has the shape {tuple(noise.shape)}; {shape} is needed.")
        levels = read_levels(self.scheduler, self.config.t_index_list, num_inference_steps)

        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        text = self._encode_text(guidance, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        if noise is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        condition = None
        if unet.time_cond_proj_dim is not None:
            scale = torch.tensor([guidance_scale - 1.0])
            condition = self.get_guidance_scale_embedding(scale, unet.time_cond_proj_dim).to(device, self.unet.dtype)
        x = torch.zeros((n - 1, self.config.frame_buffer_size, *shape[1:]), device=device, dtype=dtype)
        self._run = _Run(
            Levels(levels.timesteps.to(device), *(column.to(device, dtype) for column in levels[1:])),
            noise.to(device, dtype)[:, None], guidance, guidance_scale, delta, size, generator, output_type, condition,
            text, Flight(x, x, text.expand(n - 1, *text.shape)),
        )  # fmt: skip
        if self._filter is not None:
            self._filter.reset()

    @torch.no_grad()
    def update_prompt(
        self,
        prompt: str | None = None,
        negative_prompt: str = "",
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> None:
        """Change the prompt of frames that enter from now on; those in flight keep the one that they entered with.

        Raises:
            ValueError: there is no stream, or the embeddings have another shape than those before.
        """
        run = self._prepared()
        text = self._encode_text(run.guidance, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        if text.shape != run.text.shape:
            raise ValueError(f"`prompt_embeds` give {tuple(text.shape)}; {tuple(run.text.shape)} as before is needed.")
        run.text = text

    @torch.no_grad()
    def stream(self, frame: Any = None) -> Any:
        """Take in a frame, or with `frame_buffer_size` m above 1 a list of m, and give back that of n - 1 calls before.

        Args:
            frame: a PIL picture, an array `(height, width, 3)` or a tensor `(3, height, width)`, of bytes or in [0, 1];
                another size is resized. None makes pictures from text alone, each from new noise.

        Returns:
            A picture, or m of them, by the `output_type` of `prepare`; None while the first n - 1 calls fill the slots.
            A skipped frame gives the last picture again.

        Raises:
            ValueError: there is no stream, or `frame` is no such frame; frames in flight stay. Any other exception drops
                them.
        """
        run = self._prepared()
        pixels = self._pixels(run, frame)
        if pixels is None or self._filter is None or not self._filter.skips(pixels):
            try:
                latents = self._advance(run, *self._enter(run, pixels))
                run.shown = None if latents is None else self._decode(run, latents)
            except BaseException:
                self._clear()
                raise
        if run.shown is None:
            return None
        pictures = self._pictures(run, run.shown)
        return pictures[0] if self.config.frame_buffer_size == 1 else pictures

    @torch.no_grad()
    def flush(self) -> list[Any]:
        """Finish the frames in flight, without new ones, and leave the slots empty.

        Returns:
            What `stream` would give for them, in order; nothing where no frame is in flight.

        Raises:
            ValueError: there is no stream.
        """
        run = self._prepared()
        try:
            finished = [self._pictures(run, self._decode(run, latents)) for latents in self._remaining(run)]
        finally:
            self._clear()
        return [pictures[0] if self.config.frame_buffer_size == 1 else pictures for pictures in finished]

    def enable_similar_image_filter(self, threshold: float = 0.98, max_skip: int = 10, seed: int = 0) -> None:
        """Skip frames that are like the last computed one, at random; see `SimilarityFilter`.

        It also skips before there is a picture to give again: where nothing moves from the start, the first picture
        comes with the n-th computed frame.

        Args:
            threshold: eta, the cosine from which on frames may be skipped. From 1 on none is.
            max_skip: a frame is computed after `max_skip + 1` skips, so that the last picture does not stay for ever.
            seed: of the random decisions.

        Raises:
            ValueError: an argument is out of range.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
            raise ValueError(f"`threshold` is {threshold!r}; a number of at least 0 is needed.")
        for name, number in (("max_skip", max_skip), ("seed", seed)):
            if not _is_count(number):
                raise ValueError(f"`{name}` is {number!r}; an integer of at least 0 is needed.")
        self._filter = SimilarityFilter(threshold, max_skip, seed)

    def disable_similar_image_filter(self) -> None:
        """Compute every frame."""
        self._filter = None

    # --- a list of frames --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | None = None,
        frames: Sequence[Any] | np.ndarray | torch.Tensor | None = None,
        num_frames: int = 1,
        negative_prompt: str = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 1.2,
        delta: float = 1.0,
        generator: torch.Generator | None = None,
        height: int | None = None,
        width: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Stream all frames and flush; a stream that was prepared before ends.

        Args:
            frames: frames as `stream` takes them, or an array or tensor of frames. None makes pictures from text alone.
            num_frames: how many pictures, where there are no `frames`.
            return_dict: False gives a tuple.

        The others are those of `prepare`.

        Returns:
            One picture a frame, in their order. A skipped frame has that of the frame that it is like.

        Raises:
            ValueError: an argument is out of range.
        """
        if not (_is_count(num_frames) and num_frames):
            raise ValueError(f"`num_frames` is {num_frames!r}; a positive integer is needed.")
        m, rest = self.config.frame_buffer_size, len(self.config.t_index_list) - 1
        frames = [None] * num_frames if frames is None else _listed("frames", frames)
        count = len(frames)
        frames += [frames[-1]] * (-count % m)
        self.prepare(
            prompt, negative_prompt, num_inference_steps, guidance_scale, delta, generator, height, width, prompt_embeds,
            negative_prompt_embeds, noise, output_type,
        )  # fmt: skip
        run = self._prepared()
        finished: list[torch.Tensor] = []
        computed: list[int] = []  # for each group of m frames, which of `finished` is its
        try:
            with self.progress_bar(total=len(frames) // m + rest) as bar:
                for start in range(0, len(frames), m):
                    group = frames[start : start + m]
                    pixels = self._pixels(run, None if group[0] is None else group)
                    if pixels is not None and self._filter is not None and self._filter.skips(pixels):
                        computed.append(computed[-1])
                    else:
                        computed.append(computed[-1] + 1 if computed else 0)
                        latents = self._advance(run, *self._enter(run, pixels))
                        finished += [] if latents is None else [self._decode(run, latents)]
                    bar.update()
                for latents in self._remaining(run):
                    finished.append(self._decode(run, latents))
                bar.update(rest)
            images = self._pictures(run, torch.cat([finished[place] for place in computed])[:count])
        finally:
            self._clear()
            self._run = None
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # --- the parts of a call -----------------------------------------------------------------------------------------

    def _prepared(self) -> _Run:
        if self._run is None:
            raise ValueError("There is no stream; call `prepare` first.")
        return self._run

    def _clear(self) -> None:
        if self._run is not None:
            self._run.clear()
        if self._filter is not None:
            self._filter.reset()

    def _side(self, name: str, side: int | None, at: int) -> int:
        trained, factor = self.unet.config.sample_size, self.vae_scale_factor
        if side is None:
            return (trained if isinstance(trained, int) else trained[at]) * factor
        if not _is_count(side) or side < 1 or side % factor:
            raise ValueError(f"`{name}` is {side!r}; a positive multiple of {factor} is needed.")
        return side

    def _encode_text(
        self,
        guidance: str,
        prompt: str | None,
        negative_prompt: str,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """`(1 or 2, tokens, width)`: prompt, and negative prompt where guidance uses it."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(f"`prompt` is {prompt!r}; either it or `prompt_embeds` is needed, and not both.")
        for name, text in (("prompt", prompt or ""), ("negative_prompt", negative_prompt)):
            if not isinstance(text, str):
                raise ValueError(f"`{name}` is {text!r}; a stream has one text.")
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None and (embeds.ndim != 3 or len(embeds) != 1):
                raise ValueError(f"`{name}` has the shape {tuple(embeds.shape)}; (1, tokens, width) is needed.")
        both = guidance in ("full", "initialize")
        if both and prompt is None and negative_prompt_embeds is None:
            raise ValueError(
                f"`negative_prompt_embeds` is None; `cfg_type` {guidance!r} needs them with `prompt_embeds`."
            )
        embeds = self.encode_prompt(
            prompt, self._execution_device, 1, both, negative_prompt if prompt is not None else None,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        return torch.cat(embeds if both else embeds[:1]).to(self.unet.dtype)

    def _pixels(self, run: _Run, frame: Any) -> torch.Tensor | None:
        """A frame or a list of m as `(m, 3, height, width)` in [-1, 1]; None for text-to-image."""
        m = self.config.frame_buffer_size
        if frame is None:
            if run.guidance == "self":
                raise ValueError(
                    "`frame` is None; `cfg_type` 'self' takes the frame for the negative. Text-to-image allows 'none', "
                    "'initialize' and 'full', or a `guidance_scale` up to 1."
                )
            return None
        frames = [frame] if is_valid_image(frame) else _listed("frame", frame)
        if len(frames) != m:
            raise ValueError(f"`frame` holds {len(frames)} frames; by `frame_buffer_size`, {m} are needed.")
        pixels = torch.cat([self.image_processor.preprocess(_unit(one), *run.size) for one in frames])
        if pixels.shape[1:] != (3, *run.size):
            raise ValueError(
                f"`frame` has {pixels.shape[1]} channels of the size {tuple(pixels.shape[2:])}; 3 are needed."
            )
        return pixels

    def _enter(self, run: _Run, pixels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and anchor of frames in slot 0, `(m, channels, height, width)`."""
        levels, noise = run.levels, run.noise[0]
        if pixels is None:
            shape = (self.config.frame_buffer_size, *noise.shape[1:])
            x = randn_tensor(shape, generator=run.generator, device=noise.device, dtype=noise.dtype)
            return x, torch.zeros_like(x)
        encoded = self.vae.encode(pixels.to(noise.device, self.vae.dtype))
        z = retrieve_latents(encoded, sample_mode="argmax").to(noise.dtype) * self.vae.config.scaling_factor
        return levels.alpha[0] * z + levels.sigma[0] * noise, z

    def _advance(self, run: _Run, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor | None:
        """Every row moves on by a slot. Returns the latents that leave, `(m, channels, height, width)`, if any do."""
        entering = Flight(x, anchor, run.text)
        now = Flight(*(torch.cat([new[None], old]) for new, old in zip(entering, run.flight, strict=True)))
        levels = run.levels
        noise, anchors = self._predict_noise(run, now)
        x0 = levels.c_out * (now.x - levels.sigma * noise) / levels.alpha + levels.c_skip * now.x
        following = levels.alpha[1:] * x0[:-1]
        if self.config.do_add_noise:
            following = following + levels.sigma[1:] * run.noise[1:]
        run.flight = Flight(following, anchors[:-1], now.text[:-1])
        run.calls += 1
        return x0[-1] if run.calls >= len(x0) else None

    def _predict_noise(self, run: _Run, now: Flight) -> tuple[torch.Tensor, torch.Tensor]:
        """Guided noise in all rows by one call of the denoiser, and the anchors."""
        levels, x, (n, m) = run.levels, now.x, now.x.shape[:2]
        negatives = {"full": n, "initialize": 1}.get(run.guidance, 0)

        def with_negatives(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([rows, rows[:negatives]])

        text = torch.cat([now.text[:, 0], now.text[:negatives, -1]])
        output = self.unet(
            with_negatives(x).flatten(0, 1).to(self.unet.dtype),
            with_negatives(levels.timesteps).repeat_interleave(m),
            encoder_hidden_states=text.repeat_interleave(m, 0),
            timestep_cond=run.condition,
            return_dict=False,
        )[0]
        output = output.to(x.dtype).unflatten(0, (-1, m))
        of_output, of_state = with_negatives(levels.of_output), with_negatives(levels.of_state)
        noise, negative = (of_output * output + of_state * with_negatives(x)).split([n, negatives])
        anchor = now.anchor
        if run.guidance == "none":
            return noise, anchor
        if run.guidance == "initialize":
            estimate = (x[:1] - levels.sigma[:1] * negative) / levels.alpha[:1]
            anchor = torch.cat([estimate, anchor[1:]])
        if run.guidance != "full":
            negative = run.delta * (x - levels.alpha * anchor) / levels.sigma
        return negative + run.scale * (noise - negative), anchor

    def _remaining(self, run: _Run) -> Any:
        """The latents of the frames in flight, one call after the other; blank rows follow them."""
        for _ in range(len(run.flight.x) if run.calls else 0):
            blank = torch.zeros_like(run.flight.x[0])
            latents = self._advance(run, blank, blank)
            if latents is not None:
                yield latents

    def _decode(self, run: _Run, latents: torch.Tensor) -> torch.Tensor:
        """Pictures in [-1, 1], `(m, 3, height, width)`; latents as they are where they are asked for."""
        if run.output_type == "latent":
            return latents
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pictures = self.vae.decode(scaled, return_dict=False)[0]
        # What the safety checker finds it makes black, 0 in its range
        checked, found = self.run_safety_checker(pictures, pictures.device, pictures.dtype)
        return (
            checked
            if found is None
            else torch.stack([one - float(bad) for one, bad in zip(checked, found, strict=True)])
        )

    def _pictures(self, run: _Run, pictures: torch.Tensor) -> Any:
        """New objects at each call: who draws on one does not draw on the next."""
        return self.image_processor.postprocess(pictures.clone(), output_type=run.output_type)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _listed(name: str, frames: Any) -> list[Any]:
    """Frames of a list, a tuple, or an array or tensor with one dimension more than a frame."""
    several = isinstance(frames, (list, tuple)) or (isinstance(frames, (np.ndarray, torch.Tensor)) and frames.ndim == 4)
    if not several or not len(frames) or not all(map(is_valid_image, frames)):
        raise ValueError(
            f"`{name}` is a {type(frames).__name__}; frames are PIL pictures, arrays (height, width, 3) or tensors (3, height, "
            "width), and several are a list of them, or an array or tensor with one dimension more."
        )
    return list(frames)


def _unit(frame: Any) -> Any:
    """Bytes as floats in [0, 1]."""
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint8:
        return frame.astype(np.float32) / 255
    if isinstance(frame, torch.Tensor) and frame.dtype == torch.uint8:
        return frame.float() / 255
    return frame
