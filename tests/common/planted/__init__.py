"""Methods planted for the test of the suites: right ones, and broken ones with the rule that each must break.

Their modules live in `diffusers_ext.planted` while they are installed, as the classes of the package do, so that they are
exported, registered and found in recipes as those are.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch

PACKAGE = "diffusers_ext.planted"
MODULES = ("scheduling", "hooking", "pipelining", "modeling", "guiding", "learning", "quantizing")
ROWS = {
    "planted_scheduler": ("scheduler", "PlantedScheduler"),
    "planted_hook": ("hook", "PlantedHookConfig"),
    "planted_attention": ("attn_processor", "PlantedAttentionConfig"),
    "planted_pipeline": ("pipeline", "PlantedPipeline"),
    "planted_model": ("model", "PlantedModel"),
    "planted_adapter": ("adapter", "PlantedAdapter"),
    "planted_lora": ("adapter", "planted_loss"),
    "planted_quantizer": ("quantizer", "PlantedInt8Config"),
    "planted_guider": ("guider", "PlantedGuider"),
    "planted_noise": ("latent_optimizer", "PlantedNoise, PlantedNoiseConfig"),
    "planted_trainer": ("trainer", "planted_loss"),
    "planted_error": ("metric", "PlantedError"),
}


def install() -> dict[str, Any]:
    """Put the planted classes and rows into `diffusers_ext`; the classes and functions by name."""
    import diffusers
    import diffusers.pipelines.pipeline_loading_utils  # registers `diffusers_ext` with it

    from diffusers_ext import registry

    package: Any = types.ModuleType(PACKAGE)
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules[PACKAGE] = package
    found: dict[str, Any] = {}
    for stem in MODULES:
        module = importlib.import_module(f"{PACKAGE}.{stem}")
        mine = {name: it for name, it in vars(module).items() if getattr(it, "__module__", "") == module.__name__}
        found |= {f"{stem}.{name}": it for name, it in mine.items()}
        # A name may be planted twice, for two forms: entries say which (`guiding.Remembers`); public ones are unique.
        registry.LAZY_NAMES.update({name: module.__name__ for name in mine if name not in registry.LAZY_NAMES})
    for key, (form, entry) in ROWS.items():
        names = tuple(name.strip() for name in entry.split(","))
        registry._catalogue()[key] = registry.Method(key, key, "other", form, entry=names)
    names = ("PlantedPipeline", "PlantedModel", "PlantedAdapter")
    registry.PIPELINES_AND_MODELS += names
    for name in names:
        setattr(diffusers, name, registry.load_entry(name))
    found["quantizing.register"]()
    return found


def uninstall() -> None:
    """Undo `install`."""
    import diffusers

    import diffusers_ext
    from diffusers_ext import registry

    for name in [name for name, module in registry.LAZY_NAMES.items() if module.startswith(PACKAGE)]:
        del registry.LAZY_NAMES[name]
        vars(diffusers_ext).pop(name, None)
    for key in ROWS:
        del registry._catalogue()[key]
    for name in ("PlantedPipeline", "PlantedModel", "PlantedAdapter"):
        delattr(diffusers, name)
    registry.PIPELINES_AND_MODELS = tuple(
        name for name in registry.PIPELINES_AND_MODELS if not name.startswith("Planted")
    )
    sys.modules[f"{PACKAGE}.quantizing"].unregister()
    for module in [module for module in sys.modules if module == PACKAGE or module.startswith(f"{PACKAGE}.")]:
        del sys.modules[module]


def vectors(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of the planted model."""
    return {"sample": torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))}


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the planted metric."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4 + seed, generator=generator), torch.randn(4 + seed, generator=generator)


def write_lora(pipe: Any, folder: Path, scale: float = 1.0) -> None:
    """A LoRA for the attention of a denoiser, in `folder`, with weights `scale` times random."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    name = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    denoiser = getattr(pipe, name)
    if not hasattr(denoiser, "add_adapter") or not hasattr(pipe, "save_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA.")
    torch.manual_seed(0)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "planted")
    layers = {k: scale * v for k, v in get_peft_model_state_dict(denoiser, adapter_name="planted").items()}
    denoiser.delete_adapters("planted")
    denoiser.unload_lora()
    type(pipe).save_lora_weights(folder, **{f"{name}_lora_layers": layers})
