"""Methods that can be put on a pipeline, with their settings, as the registry, dataclasses and signatures tell them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from . import registry
from .cards import name_of
from .enabling import HookConfig
from .registry import Method, load_entry

REQUIRED = inspect.Parameter.empty
_KINDS = ("bool", "int", "float", "str")
_ARGUMENT = re.compile(r" {4}(\w[\w, ]*?)(?: \(.*\))?: *(.*)")
_ROLE = re.compile(r":\w+:`([^`]*)`")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of a method.

    Attributes:
        name: of the argument.
        kind: "bool", "int", "float", "str", or "literal" for whatever else, which is written as Python.
        default: its default, or `REQUIRED`.
        help: what the docstring says of it.
    """

    name: str
    kind: str
    default: Any
    help: str

    @property
    def shown(self) -> Any:
        """The default as a form shows it, which has no infinite numbers."""
        infinite = isinstance(self.default, float) and not math.isfinite(self.default)
        if self.default is REQUIRED or infinite or (self.default is None and self.kind != "literal"):
            return None
        return self.default if self.kind != "literal" or isinstance(self.default, str) else repr(self.default)

    def read(self, value: Any) -> Any:
        """The value of what a form has. Of what cannot be right, the method itself says what is allowed.

        Raises:
            ValueError: nothing is given, and there is no default.
        """
        if value is None or value == "":
            if self.default is REQUIRED:
                raise ValueError(f"`{self.name}` is empty; it has no default.")
            return self.default
        if self.kind == "int" and isinstance(value, float) and value.is_integer():
            return int(value)
        if self.kind == "float" and type(value) is int:
            return float(value)
        if self.kind == "literal" and isinstance(value, str):
            with contextlib.suppress(ValueError, SyntaxError):  # a name, such as that of a rule
                return ast.literal_eval(value)
        return value


@dataclasses.dataclass(frozen=True)
class Option:
    """A method that can be chosen: settings that `enable` takes, or a sampler.

    Attributes:
        cls: the config or the scheduler.
        place: its public name, as rows of the registry have it.
        row: of its paper.
        settings: what can be set.
    """

    cls: Any
    place: str
    row: Method
    settings: tuple[Setting, ...]

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def label(self) -> str:
        """Methods by what their papers call them, samplers by the names that users of diffusers know."""
        return name_of(self.row) if issubclass(self.cls, HookConfig) else self.name

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that differ from the defaults, of what a form has."""
        found = {setting.name: setting.read(values.get(setting.name)) for setting in self.settings}
        return {s.name: found[s.name] for s in self.settings if s.default is REQUIRED or found[s.name] != s.default}


@functools.cache
def configs() -> dict[str, Option]:
    """Class name -> each method that `enable` takes."""
    found: dict[str, Option] = {}
    for row, place, cls in _entries(HookConfig, upstream=False):
        settings = tuple(
            _setting(field.name, field.type, default_of(field), _documented(cls)) for field in dataclasses.fields(cls)
        )
        found.setdefault(cls.__name__, Option(cls, place, row, settings))
    return dict(sorted(found.items()))


@functools.cache
def samplers() -> dict[str, Option]:
    """Class name -> each sampler for the processes of stock pipelines, those of papers that diffusers has included.

    Of their settings, `from_config` takes those that describe the process from the pipeline's own scheduler.
    """
    of_the_model = {
        name for cls in (DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler) for name in parameters(cls)
    } - {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"} | {"use_flow_sigmas", "flow_shift"}
    found: dict[str, Option] = {}
    for row, place, cls in _entries(SchedulerMixin, upstream=True):
        if not processes(cls):
            continue
        settings = tuple(
            _setting(name, parameter.annotation, parameter.default, _documented(cls))
            for name, parameter in parameters(cls).items()
            if name not in of_the_model
        )
        found.setdefault(cls.__name__, Option(cls, place, row, settings))
    return dict(sorted(found.items()))


def _entries(base: type, upstream: bool) -> Iterator[tuple[Method, str, Any]]:
    for row in registry.methods():
        if row.form == "upstream" and not upstream:
            continue
        for place in row.entry:
            entry = load_entry(place)
            if isinstance(entry, type) and issubclass(entry, base):
                yield row, place, entry


def parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    """Arguments that a class is made with, by name."""
    found = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def default_of(field: Any) -> Any:
    """The default of a field of a dataclass, or `REQUIRED`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _setting(name: str, annotation: Any, default: Any, documented: Mapping[str, str]) -> Setting:
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return Setting(name, kind if kind in _KINDS else "literal", default, documented.get(name, ""))


def _documented(cls: type) -> dict[str, str]:
    """Argument -> what the docstring of its class says of it."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (inspect.getdoc(cls) or "").partition("Args:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if match := _ARGUMENT.fullmatch(line):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return {name: _ROLE.sub(r"\1", text) for name, text in found.items()}


def processes(cls: Any) -> set[str]:
    """Processes that samplers of a class are for, as its arguments tell."""
    names = parameters(cls)
    found = {"diffusion"} if "beta_start" in names else set()
    return found | ({"flow"} if "use_flow_sigmas" in names or ("shift" in names and not found) else set())
