"""Values to try for the arguments of a constructor, found by introspection, and the rules that every constructor follows.

Works for dataclasses and for classes whose `__init__` has `@register_to_config`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .suite import Broken, refused, require

# Tried for string arguments of classes that do not say what they allow.
COMMON_WORDS = (
    "scaled_linear", "squaredcos_cap_v2", "v_prediction", "sample", "trailing", "leading", "linspace", "zero", "sigma_min",
    "midpoint", "heun", "learned", "exponential",
)  # fmt: skip
WRONG_TEXT = "no such value"


def arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Arguments of the constructor, without `*args` and `**kwargs`."""
    parameters = inspect.signature(cls).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _candidates(make: Callable[..., Any], name: str, value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value + 2, 2 * value, max(value - 1, 0), value // 2)
    elif isinstance(value, float):
        yield from (0.9 * value + 0.01, 1.1 * value, 0.5 * value)
    elif isinstance(value, str):
        yield from (word for word in (*_allowed_words(make, name), *COMMON_WORDS) if word != value)
    elif value is None:
        yield from (1, 0.5, 2, True)
    elif isinstance(value, (list, tuple)) and value:
        yield type(value)(reversed(value))


def _allowed_words(make: Callable[..., Any], name: str) -> list[str]:
    """The words in quotes in the message by which a wrong text is refused."""
    try:
        make(**{name: WRONG_TEXT})
    except Exception as error:
        return [word for word in re.findall(r"['\"]([\w+.-]+)['\"]", str(error)) if word != WRONG_TEXT]
    return []


def variations(cls: type, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """For each argument one other value that the constructor takes, where one was found."""

    def make(**changes: Any) -> Any:
        return cls(**{**settings, **changes})

    for name, parameter in arguments(cls).items():
        current = settings.get(name, parameter.default)
        for value in _candidates(make, name, current):
            try:
                make(**{name: value})
            except Exception:  # a class that is not ours may say no in any way
                continue
            yield name, value
            break


def check_wrong_values(case: Any, free_text: Sequence[str] = ()) -> None:
    """A wrong value of any argument is a ValueError that names it, under at least one of the settings.

    Under one of them only: an argument may have no meaning with the others.
    """
    for name, parameter in arguments(case.cls).items():
        values: list[Any] = [object()]
        if isinstance(parameter.default, str) and name not in free_text:
            values.append(WRONG_TEXT)
        if isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
            values += [math.nan, "three"]
        for value in values:
            problems = []
            for settings in case.settings:
                try:
                    refused(f"`{name}` is {value!r}", case.cls, names=(name,), **{**settings, name: value})
                except Broken as problem:
                    problems.append(problem)
            if len(problems) == len(case.settings):
                raise problems[0]


def check_positional(
    cls: type, settings: dict[str, Any], values_of: Callable[[Any], dict[str, Any]], again: Any
) -> None:
    """Arguments given by position are refused, or mean the same as by name and survive `again`.

    diffusers' `register_to_config` notes arguments given by position as defaults, and so `from_config` drops them. Making
    them keyword-only (`def __init__(self, *, ...)`) is the way out.
    """
    for name, value in variations(cls, settings):
        names = list(arguments(cls))
        position = names.index(name)
        given = {key: settings.get(key, arguments(cls)[key].default) for key in names[:position]}
        by_name = {key: item for key, item in settings.items() if key not in given and key != name}
        try:
            made = cls(*given.values(), value, **by_name)
        except TypeError:
            continue
        for when, it in (("given by position", made), ("given by position and copied by its config", again(made))):
            found = values_of(it)[name]
            require(same(found, value), f"`{name}` = {value!r} {when} becomes {found!r}")


def same(a: Any, b: Any) -> bool:
    """Equal as JSON has it: a tuple is a list."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and same_tensor(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b if isinstance(a, bool) or isinstance(b, bool) else a == b


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, kind and device; NaN equals NaN."""
    return (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and torch.equal(
        torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach())
    )


def public_config(it: Any) -> dict[str, Any]:
    """The config of a diffusers object without what diffusers itself keeps in it."""
    return {key: value for key, value in it.config.items() if not key.startswith("_")}


def check_config_survives(case: Any, folder: Path, contents: Callable[[Any], dict[str, Any]], **extras: Any) -> None:
    """Constructor, `from_config`, `save_pretrained` and `from_pretrained` give equal configs and equal contents.

    Checked for every setting of the case, and for one other value of each argument. `contents` gives all that two equal
    objects have in common beside their config, for example tensors. `extras` go to `from_config` beside the config.
    """
    cls = case.cls
    for settings in case.settings:
        for changes in [{}, *({name: value} for name, value in variations(cls, settings))]:
            given = {**settings, **changes}
            said = f"with {given}" if given else "with defaults"
            made = cls(**given)
            config = public_config(made)
            for name, value in given.items():
                require(
                    name in config and same(config[name], value),
                    f"{said}: its config has {config.get(name)!r} as `{name}`",
                )
            made = cls.from_config(made.config, **extras) if extras else made
            made.save_pretrained(folder)
            copies = {
                "from_config": cls.from_config(made.config, **extras),
                "from_pretrained": cls.from_pretrained(folder),
            }
            for name, copy in copies.items():
                found = public_config(copy)
                wrong = [key for key in config if key not in found or not same(found[key], config[key])]
                wrong += [key for key in found if key not in config]
                require(
                    not wrong, f"{said}: after `{name}` the config has other {', '.join(f'`{key}`' for key in wrong)}"
                )
                before, after = contents(made), contents(copy)
                wrong = [key for key in {**before, **after} if not same(before.get(key), after.get(key))]
                require(not wrong, f"{said}: after `{name}` other {', '.join(f'`{key}`' for key in wrong)}")


def check_dataclass_survives(case: Any) -> None:
    """A dataclass of settings keeps what it is given, and JSON gives an equal one."""
    cls = case.cls
    require(dataclasses.is_dataclass(cls), f"{cls.__name__} is no dataclass")
    for settings in case.settings:
        for changes in [{}, *({name: value} for name, value in variations(cls, settings))]:
            config = cls(**{**settings, **changes})
            for name, value in {**settings, **changes}.items():
                require(
                    same(getattr(config, name), value), f"`{name}` = {value!r} is kept as {getattr(config, name)!r}"
                )
            values = json.loads(json.dumps(dataclasses.asdict(config)))
            require(cls(**values) == config, f"{config} is not equal after JSON: {cls(**values)}")
