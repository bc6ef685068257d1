"""Other packages that quantize, behind the same settings: what their modules here have in common.

Each is a module with

- `SETTINGS`: settings that have one value with it, whatever the method; other values are refused.
- `FORMATS`: (format, bits) of weights -> those of activations that go with them, None for float.
- `EXTRA`: values of settings that no other backend has.
- `CALIBRATES`: whether it looks at the whole calibration set; else at one call, for which layers there are.
- `package()`: the package itself.
- `calibrate(model, config, calls)`: quantize a model in place, and fill in `config.layers`. If that fails, the model is as before.

and, where a model is saved with our `PTQConfig`, with what `loader` needs: `lay_out`, `is_extra`, `is_part`, `set_part`, `finish`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .recording import Call
from .structure import trace

if TYPE_CHECKING:
    from .config import PTQConfig

MODULES = {"quanto": "quanto", "torchao": "_torchao", "bitsandbytes": "_bitsandbytes"}  # backend -> module beside this
Format = tuple[str | None, int] | None
COMMON: Mapping[str, Any] = {
    "attention": False, "split": False, "symmetric": True, "rounding": "nearest", "scale_iterations": 0,
    "weight_range": "minmax", "end_bits": None, "temporal": "none", "step_scales": False, "channel_scales": False,
    "stages": [],
}  # fmt: skip


def backend(name: str) -> Any:
    """The module of a backend other than "native"."""
    return importlib.import_module(f"{__package__}.{MODULES[name]}")


def imported(module: str, name: str, package: str) -> Any:
    """A module of another package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        found = False
    if not found:
        raise ImportError(f"`backend` is {name!r}, and {package} is not installed: pip install {package}.")
    return importlib.import_module(module)


def check_settings(config: PTQConfig) -> None:
    """Refuse what the backend cannot do.

    Raises:
        ValueError: a setting is another than the backend's.
    """
    name, module = config.backend, backend(config.backend)
    if config.arithmetic != "simulated":
        raise ValueError(
            f"`arithmetic` is {config.arithmetic!r}; allowed is 'simulated', its default: what backend {name!r} computes in "
            "is decided by the package, the formats and the device."
        )
    for setting, value in module.SETTINGS.items():
        if getattr(config, setting) != value:
            raise ValueError(f"`{setting}` is {getattr(config, setting)!r}; backend {name!r} allows {value!r}.")
    weights = (config.weight_format, config.weight_bits)
    acts = None if config.act_bits is None else (config.act_format, config.act_bits)
    if weights not in module.FORMATS:
        raise ValueError(
            f"`weight_bits` is {weights[1]!r} of `weight_format` {weights[0]!r}; backend {name!r} has "
            f"{_listed(module.FORMATS)}."
        )
    if acts not in module.FORMATS[weights]:
        found = "None" if acts is None else f"{acts[1]!r} of `act_format` {acts[0]!r}"
        raise ValueError(
            f"`act_bits` is {found}; backend {name!r} has, with weights of {_listed([weights])} bits, "
            f"{_listed(module.FORMATS[weights])}."
        )


def _listed(formats: Iterable[Format]) -> str:
    return ", ".join("None" if form is None else f"{form[0]!r} {form[1]}" for form in formats)


def layers_of(model: nn.Module, config: PTQConfig, calls: Sequence[Call], *, linear: bool) -> list[str]:
    """Names of the layers to quantize: all that run, or the linear ones.

    Raises:
        ValueError: there is none.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,) if linear else (nn.Linear, nn.Conv2d)
    names = [
        name
        for name in trace(model, calls[0]).layers
        if isinstance(model.get_submodule(name), kinds) and not config.excludes(name)
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no {'linear' if linear else 'linear or convolution'} layer to quantize, besides "
            f"those that `exclude` names; `backend` is {config.backend!r}, which quantizes no others."
        )
    return names
