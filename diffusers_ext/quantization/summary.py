"""What a card says of a quantized pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import QUANT_METHOD

_METHODS = (QUANT_METHOD, "torchao")  # models of the backend "torchao" are saved as diffusers' own


def summary(source: Any) -> str:
    """How the parts of a pipeline are quantized, and what their calibration took: markdown, a line for each part.

    Args:
        source: a pipeline, or a folder that `save_pretrained` wrote.

    Returns:
        "" where nothing is quantized by this package or torchao.
    """
    return "\n".join(f"- `{name}`: {_line(config)}" for name, config in _configs(source))


def _configs(source: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(source, (str, os.PathLike)):
        for file in sorted(Path(source).glob("*/config.json")):
            config = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
            if config.get("quant_method") in _METHODS:
                yield file.parent.name, config
        return
    for name, part in sorted(source.components.items()):
        config = getattr(getattr(part, "config", None), "quantization_config", None)
        if getattr(config, "quant_method", None) in _METHODS:
            yield name, config.to_dict()  # type: ignore[union-attr]


def _line(config: dict[str, Any]) -> str:
    if config["quant_method"] != QUANT_METHOD:
        return f"by torchao, `{config['quant_type']['default']['_type']}`."
    acts = f"{config['act_bits']}-bit" if config["act_bits"] is not None else "float"
    how = f"`{config['method']}`, {config['weight_bits']}-bit weights and {acts} activations"
    if config["backend"] != "native":
        how += f", by {config['backend']}"
        if config["act_bits"] is not None:
            how += ", whose arithmetic is in integers or simulated in float, by the device"
    elif config["arithmetic"] == "simulated" and config["act_bits"] is not None:
        how += ", whose arithmetic is simulated in float"
    cost = config.get("calibration", {})
    if "minutes" not in cost:
        return f"{how}."
    return (
        f"{how}. Calibration took {cost['minutes']:.1f} min and {cost['peak_bytes'] / 2**20:.0f} MiB above the model."
    )
