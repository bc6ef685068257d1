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

    rows: list[dict[str, Any]] = [
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


def validate(recipe: Any, skip_unknown: bool = False) -> list[tuple[str | None, Any]]:
    """Check a recipe before anything is loaded. Returns `(component, config)` for each method, in order.

    Args:
        recipe: content of the key `_dx_recipe`.
        skip_unknown: leave out, with a warning, methods that this installation does not have, instead of refusing.

    Raises:
        ValueError: the recipe is malformed, of a newer schema, names a method that is not installed, or holds settings
            that the method does not take.
    """
    schema = recipe.get("schema") if isinstance(recipe, dict) else None
    if type(schema) is not int or not isinstance(recipe.get("methods"), list):
        raise ValueError(
            f"The recipe is {recipe!r}; it must be an object with an integer `schema` and a list `methods`."
        )
    if schema > SCHEMA:
        raise ValueError(
            f"The recipe has schema {schema}, and this diffusers_ext reads up to {SCHEMA}: update diffusers_ext."
        )
    result: list[tuple[str | None, Any]] = []
    for row in recipe["methods"]:
        method, version, component, config = _fields(row)
        config_class = _config_class(method)
        if config_class is None or version > config_class.version:
            have = "is not installed" if config_class is None else f"is installed up to version {config_class.version}"
            problem = f"The recipe asks for method {method!r}, version {version}, which {have}."
            if not skip_unknown:
                raise ValueError(f"{problem} Install what brings it, or pass `skip_unknown=True` to load without it.")
            warnings.warn(f"{problem} It is left out.", stacklevel=2)
            continue
        fields = {field.name for field in dataclasses.fields(config_class)}
        unknown = sorted(set(config) - fields)
        if unknown:
            raise ValueError(f"The recipe gives {method!r} the settings {unknown}; allowed are {sorted(fields)}.")
        result.append((component, config_class(**config)))
    return result


def _fields(row: Any) -> tuple[str, int, str | None, dict[str, Any]]:
    fields = row if isinstance(row, dict) else {}
    method, version = fields.get("method"), fields.get("version", 1)
    component, config = fields.get("component"), fields.get("config", {})
    if (
        not isinstance(method, str)
        or type(version) is not int
        or not isinstance(component, str | None)
        or not isinstance(config, dict)
    ):
        raise ValueError(
            f"The recipe holds {row!r}; each method needs a name `method` and may have an integer `version`, a name "
            "`component` and an object `config`."
        )
    return method, version, component, config


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
