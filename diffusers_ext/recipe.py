"""A recipe: what is enabled on a pipeline, as JSON in its `model_index.json`, so that it can be shared and applied again.

    {"schema": 1, "methods": [{"method": "deepcache", "version": 1, "component": "unet", "config": {...}, "files": []}]}

It names methods of the registry only; nothing is imported by a name found in a file.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

RECIPE_KEY = "_dx_recipe"
SCHEMA = 1


def collect(pipe: Any) -> dict[str, Any] | None:
    """What is enabled on `pipe` now, or None."""
    from .enabling import status

    rows = [
        {
            "method": entry.key,
            "version": entry.config.version,
            "component": entry.component,
            "config": dataclasses.asdict(entry.config),
            "files": [],
        }
        for entry in status(pipe)
    ]
    return {"schema": SCHEMA, "methods": rows} if rows else None


def validate(recipe: Any, skip_unknown: bool = False) -> list[tuple[str, Any]]:
    """Check a recipe before anything is loaded. Returns `(component, config)` for each method, in order.

    Args:
        recipe: content of the key `_dx_recipe`.
        skip_unknown: leave out, with a warning, methods that this installation does not have, instead of refusing.

    Raises:
        ValueError: the recipe is malformed, of a newer schema, names a method that is not installed, or holds settings
            that the method does not take.
    """
    if not isinstance(recipe, dict) or not isinstance(recipe.get("schema"), int) or not isinstance(recipe.get("methods"), list):
        raise ValueError(f"The recipe is {recipe!r}; it must be an object with an integer `schema` and a list `methods`.")
    if recipe["schema"] > SCHEMA:
        raise ValueError(
            f"The recipe has schema {recipe['schema']}, and this diffusers_ext reads up to {SCHEMA}: update diffusers_ext."
        )
    result = []
    for row in recipe["methods"]:
        if not isinstance(row, dict) or not isinstance(row.get("method"), str) or not isinstance(row.get("config", {}), dict):
            raise ValueError(f"The recipe holds {row!r}; each method needs a name `method` and an object `config`.")
        config_class = _config_class(row["method"])
        if config_class is None or row.get("version", 1) > config_class.version:
            have = "is not installed" if config_class is None else f"is installed up to version {config_class.version}"
            problem = f"The recipe asks for method {row['method']!r}, version {row.get('version', 1)}, which {have}."
            if not skip_unknown:
                raise ValueError(f"{problem} Install what brings it, or pass `skip_unknown=True` to load without it.")
            warnings.warn(f"{problem} It is left out.", stacklevel=2)
            continue
        fields = {field.name for field in dataclasses.fields(config_class)}
        unknown = sorted(set(row.get("config", {})) - fields)
        if unknown:
            raise ValueError(f"The recipe gives {row['method']!r} the settings {unknown}; allowed are {sorted(fields)}.")
        result.append((row.get("component"), config_class(**row.get("config", {}))))
    return result


def apply(pipe: Any, recipe: dict[str, Any], skip_unknown: bool = False) -> Any:
    """Enable on `pipe` what the recipe says, and return it.

    Raises:
        ValueError: as `validate`, or the pipeline has no such component.
    """
    from .enabling import enable_on

    pairs = validate(recipe, skip_unknown)
    return enable_on(pipe, pairs) if pairs else pipe


def _config_class(key: str) -> Any | None:
    """The config class of a registered method that `enable` takes, or None."""
    from .enabling import HookConfig
    from .registry import get_method, load_entry

    try:
        row = get_method(key)
    except ValueError:
        return None
    if row.form == "upstream":
        return None
    for name in row.entry:
        entry = load_entry(name)
        if isinstance(entry, type) and issubclass(entry, HookConfig):
            return entry
    return None
