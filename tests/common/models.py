"""Stock models and pipelines that methods are put on: the zoo, and tiny ones of the architectures that it lacks.

The process that does without this package imports this too, so `diffusers_ext` is imported inside functions only.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    BlockRefinementScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LLaDA2Pipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import nn

from tests import unets

MASK = 39  # mask token of the tiny language model


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A denoiser with tiny weights.

    Attributes:
        make: builds it, with the same weights each time.
        inputs: `(model, step, batch, seed) -> keyword arguments` of one call; the timestep falls as `step` rises.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int, int, int], dict[str, Any]]

    def call(self, model: nn.Module, step: int = 0, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of one call, in the dtype of the model."""
        dtype = next(parameter.dtype for parameter in _inner(model).parameters() if parameter.is_floating_point())
        given = self.inputs(_inner(model), step, batch, seed)
        return {
            key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in given.items()
        }

    @torch.no_grad()
    def predict(self, model: nn.Module, step: int = 0, batch: int = 2, seed: int = 0) -> torch.Tensor:
        """Output of one call."""
        return model(**self.call(model, step, batch, seed), return_dict=False)[0]

    def run(self, model: nn.Module, steps: int = 4, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
        """Outputs of a run of `steps` calls."""
        return [self.predict(model, step, batch, seed) for step in range(steps)]


def _inner(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _unet_inputs(model: nn.Module, step: int, batch: int, seed: int) -> dict[str, Any]:
    return unets.inputs(model, step, batch, seed)


def dit() -> DiTTransformer2DModel:
    return unets.fill(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            sample_size=8,
            norm_num_groups=4,
        )
    )


def _dit_inputs(model: nn.Module, step: int, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1000 * seed + step, batch, 4, 8, 8),
        "timestep": torch.full((batch,), 900 - 40 * step),
        "class_labels": torch.arange(batch),
    }


def flux() -> FluxTransformer2DModel:
    return unets.fill(
        FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
        )
    )  # fmt: skip


def _flux_inputs(model: nn.Module, step: int, batch: int, seed: int) -> dict[str, Any]:
    places = torch.tensor([[0.0, row, column] for row in range(2) for column in range(2)])
    return {
        "hidden_states": _normal(1000 * seed + step, batch, 4, 4),
        "encoder_hidden_states": _normal(seed, batch, 3, 8),
        "pooled_projections": _normal(seed + 1, batch, 8),
        "timestep": torch.full((batch,), 0.9 - 0.04 * step),
        "img_ids": places,
        "txt_ids": torch.zeros(3, 3),
    }


def sd3() -> SD3Transformer2DModel:
    return unets.fill(
        SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16, out_channels=4,
            pos_embed_max_size=8,
        )
    )  # fmt: skip


def _sd3_inputs(model: nn.Module, step: int, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1000 * seed + step, batch, 4, 8, 8),
        "encoder_hidden_states": _normal(seed, batch, 3, 16),
        "pooled_projections": _normal(seed + 1, batch, 16),
        "timestep": torch.full((batch,), 900 - 40 * step),
    }


def masked_language_model() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=MASK + 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    return unets.fill(BertForMaskedLM(config))


def _language_inputs(model: nn.Module, step: int, batch: int, seed: int) -> dict[str, Any]:
    ids = torch.randint(0, MASK, (batch, 12), generator=torch.Generator().manual_seed(seed))
    ids[:, 2 + 2 * step :] = MASK  # unmasked from left to right
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_OTHER_UNETS = {name: make for name, make in unets.UNETS.items() if name != "UNet2DConditionModel"}

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("UNet2DConditionModel", lambda: unets.conditional(1, 2), _unet_inputs),
        *(Model(name, functools.partial(make, 1), _unet_inputs) for name, make in _OTHER_UNETS.items()),
        Model("DiTTransformer2DModel", dit, _dit_inputs),
        Model("FluxTransformer2DModel", flux, _flux_inputs),
        Model("SD3Transformer2DModel", sd3, _sd3_inputs),
        Model("BertForMaskedLM", masked_language_model, _language_inputs),
    )
}


# --- pipelines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stock:
    """A stock pipeline.

    Attributes:
        make: builds it.
        call: `number of steps -> keyword arguments` of a call, without a generator.
        process: "diffusion", "flow" or "text".
        absent: components that it does without, to be passed as None where it is loaded.
        zoo: whether it is a checkpoint of the zoo.
    """

    name: str
    make: Callable[[], Any]
    call: Callable[[int], dict[str, Any]]
    process: str = "diffusion"
    absent: tuple[str, ...] = ()
    zoo: bool = False

    @property
    def only_numpy(self) -> bool:
        """Whether it hands its tensors to numpy as they are, which knows no bfloat16."""
        return self.call(1).get("output_type") == "np" and "ddpm" in self.name

    def draw(self, pipe: Any, steps: int = 3, seed: int = 0, **changes: Any) -> torch.Tensor:
        """What one call gives."""
        return draw(pipe, {**self.call(steps), **changes}, seed)


def draw(pipe: Any, call: Mapping[str, Any], seed: int = 0) -> torch.Tensor:
    """What one call of a pipeline gives, as a tensor; random numbers come from a generator with `seed`."""
    pipe.set_progress_bar_config(disable=True)
    generator = {"generator": torch.Generator().manual_seed(seed)} if "generator" in _parameters(pipe.__call__) else {}
    result = pipe(**call, **generator, return_dict=False)[0]
    if isinstance(result, list) and result and not torch.is_tensor(result[0]):
        result = np.stack([np.asarray(picture) for picture in result])
    elif isinstance(result, list):
        result = torch.stack(result)
    return torch.as_tensor(result).clone()


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def vae(channels: int = 3) -> AutoencoderKL:
    return unets.fill(
        AutoencoderKL(
            in_channels=channels, out_channels=channels, block_out_channels=(4,), norm_num_groups=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        )
    )  # fmt: skip


def _none(pipeline: type, **components: Any) -> Any:
    """The pipeline with `components`, and None for the others."""
    needed = [name for name, parameter in _parameters(pipeline).items() if parameter.default is parameter.empty]
    return pipeline(**{**dict.fromkeys(needed), **components})


def _from_zoo(pipeline: type, name: str) -> Any:
    import diffusers_ext as dx

    return pipeline.from_pretrained(dx.zoo_path(name), dtype=torch.float32)


def _language_pipeline_from_zoo(name: str) -> Any:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    import diffusers_ext as dx

    model = AutoModelForMaskedLM.from_pretrained(dx.zoo_path(name), dtype=torch.float32)
    return LLaDA2Pipeline(model.eval(), BlockRefinementScheduler(), AutoTokenizer.from_pretrained(dx.zoo_path(name)))


def _text_call(steps: int) -> dict[str, Any]:
    return {"gen_length": 8, "block_length": 4, "num_inference_steps": steps, "temperature": 1.0, "output_type": "seq"}


_WITHOUT_TEXT = ("text_encoder", "tokenizer", "vae")
_PROMPT = "a person with tan skin and short brown hair, a happy smile, yellow clothes"

STOCKS: dict[str, Stock] = {
    stock.name: stock
    for stock in (
        Stock(
            "avatars-sd",
            lambda: _from_zoo(StableDiffusionPipeline, "avatars-sd"),
            lambda steps: {"prompt": _PROMPT, "num_inference_steps": steps, "output_type": "latent"},
            zoo=True,
        ),
        Stock(
            "avatars-flow",
            lambda: _from_zoo(FluxPipeline, "avatars-flow"),
            lambda steps: {
                "prompt": _PROMPT, "height": 32, "width": 32, "num_inference_steps": steps, "output_type": "latent",
                "max_sequence_length": 32, "true_cfg_scale": 2.0, "negative_prompt": "",
            },
            process="flow",
            zoo=True,
        ),
        Stock(
            "fashion-dit",
            lambda: _from_zoo(DiTPipeline, "fashion-dit"),
            lambda steps: {"class_labels": [3], "num_inference_steps": steps, "output_type": "np"},
            zoo=True,
        ),
        Stock(
            "fashion-ddpm",
            lambda: _from_zoo(DDPMPipeline, "fashion-ddpm"),
            lambda steps: {"batch_size": 1, "num_inference_steps": steps, "output_type": "np"},
            zoo=True,
        ),
        Stock(
            "verses-mdlm",
            lambda: _language_pipeline_from_zoo("verses-mdlm"),
            lambda steps: {"prompt": "In the beginning", "use_chat_template": False, **_text_call(steps)},
            process="text",
            zoo=True,
        ),
        Stock(
            "tiny-ddpm",
            lambda: DDPMPipeline(unets.unconditional(1), DDPMScheduler(clip_sample=False)),
            lambda steps: {"batch_size": 1, "num_inference_steps": steps, "output_type": "np"},
        ),
        Stock(
            "tiny-dit",
            lambda: DiTPipeline(dit(), vae(), DDIMScheduler(clip_sample=False)),
            lambda steps: {"class_labels": [3], "num_inference_steps": steps, "output_type": "np"},
        ),
        Stock(
            "tiny-animatediff",
            lambda: _none(AnimateDiffPipeline, unet=unets.motion(1), scheduler=DDIMScheduler(clip_sample=False)),
            lambda steps: {
                "prompt_embeds": _normal(0, 1, 5, 8), "negative_prompt_embeds": _normal(1, 1, 5, 8), "height": 64,
                "width": 64, "num_frames": 2, "num_inference_steps": steps, "output_type": "latent",
            },
            absent=_WITHOUT_TEXT,
        ),
        Stock(
            "tiny-flux",
            lambda: _none(
                FluxPipeline,
                transformer=flux(),
                scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            ),
            lambda steps: {
                "prompt_embeds": _normal(0, 1, 3, 8), "pooled_prompt_embeds": _normal(1, 1, 8), "height": 32, "width": 32,
                "num_inference_steps": steps, "output_type": "latent",
            },
            process="flow",
            absent=(*_WITHOUT_TEXT, "text_encoder_2", "tokenizer_2"),
        ),
        Stock(
            "tiny-sd3",
            lambda: _none(StableDiffusion3Pipeline, transformer=sd3(), scheduler=FlowMatchEulerDiscreteScheduler()),
            lambda steps: {
                "prompt_embeds": _normal(0, 1, 3, 16), "negative_prompt_embeds": _normal(1, 1, 3, 16),
                "pooled_prompt_embeds": _normal(2, 1, 16), "negative_pooled_prompt_embeds": _normal(3, 1, 16),
                "height": 64, "width": 64, "num_inference_steps": steps, "output_type": "latent",
            },
            process="flow",
            absent=(*_WITHOUT_TEXT, "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        ),
        Stock(
            "tiny-text",
            lambda: LLaDA2Pipeline(masked_language_model(), BlockRefinementScheduler()),
            lambda steps: {"input_ids": torch.tensor([[1, 2, 3, 4]]), "mask_token_id": MASK, **_text_call(steps)},
            process="text",
            absent=("tokenizer",),
        ),
    )
}  # fmt: skip


class World:
    """What rules work with: fresh copies of stock models and pipelines, folders, and the journey.

    Args:
        root: folder for everything that is written.
        travellers: pairs (suite, case) that go on the journey together.
        install: "module:function" to call in the fresh process before anything is loaded with this package there.
        only: names of the models and pipelines that there are; empty: all.
    """

    def __init__(
        self,
        root: Path,
        travellers: list[tuple[Any, Any]] | None = None,
        install: str = "",
        only: tuple[str, ...] = (),
    ) -> None:
        self.root, self.install, self.only = root, install, only
        self.travellers = travellers or []
        self._known: dict[Any, Any] = {}

    def model(self, model: Model) -> nn.Module:
        """A copy that belongs to the rule."""
        return copy.deepcopy(_made(model))

    def pipe(self, stock: Stock) -> Any:
        """A copy that belongs to the rule."""
        return copy.deepcopy(_made(stock))

    def peek(self, of: Model | Stock) -> Any:
        """The original, to look at and not to change: a copy takes time."""
        return _made(of)

    def once(self, *key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave for this key the first time."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def models(self) -> list[Model]:
        """The models that are here."""
        return [model for model in MODELS.values() if not self.only or model.name in self.only]

    def stocks(self, *processes: str) -> list[Stock]:
        """The pipelines that are here, of certain processes or all."""
        found = [stock for stock in STOCKS.values() if not self.only or stock.name in self.only]
        found = [stock for stock in found if not processes or stock.process in processes]
        return [stock for stock in found if not stock.zoo or is_here(stock.name)]

    def folder(self) -> Path:
        """A new empty folder."""
        self.root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.root))

    @functools.cached_property
    def journey(self) -> Any:
        from .journey import Journey

        return Journey(self)


@functools.cache
def _made(of: Model | Stock) -> Any:
    return of.make()


@functools.cache
def is_here(name: str) -> bool:
    """Whether the zoo has the checkpoint."""
    import diffusers_ext as dx

    try:
        folder = dx.zoo_path(name)
    except ValueError:
        return False
    return any((folder / file).is_file() for file in ("model_index.json", "config.json"))


# --- what happens to models and pipelines ----------------------------------------------------------------------------


def offload(model: nn.Module, kind: str) -> None:
    """Offload a model, as pipelines do it: "model", "sequential" (accelerate) or "group" (diffusers)."""
    from accelerate import cpu_offload, cpu_offload_with_hook
    from diffusers.hooks import apply_group_offloading

    device = torch.device("cpu")
    if kind == "sequential":
        cpu_offload(model, device)
    elif kind == "group":
        apply_group_offloading(model, onload_device=device, offload_device=device, offload_type="leaf_level")
    else:
        cpu_offload_with_hook(model, device)


class Abort(Exception):
    """Breaks off a run."""


def abort(stock: Stock, pipe: Any, after: int = 1, **changes: Any) -> None:
    """A run that breaks off with an exception after `after` steps of the scheduler."""
    step, count = pipe.scheduler.step, itertools.count()

    @functools.wraps(step)
    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(count) == after:
            raise Abort
        return step(*args, **kwargs)

    pipe.scheduler.step = failing
    try:
        stock.draw(pipe, **{"steps": 4, **changes})
    except Abort:
        return
    finally:
        del pipe.scheduler.step
    raise AssertionError(f"{stock.name} called the scheduler's `step` not more than {after} times")


class Updates:
    """Stands in for a pipeline's progress bar and counts its updates."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, iterable: Any = None, total: int | None = None) -> Updates:
        self.iterable = iterable
        return self

    def __enter__(self) -> Updates:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            self.count += 1
            yield item

    def update(self, n: int = 1) -> None:
        self.count += n
