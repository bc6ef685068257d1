"""Cases, rules and suites: what the common tests are made of.

A *case* is a class of a registered method. A *rule* is one thing that must hold for all cases of a form: a function
`rule(case, world)` that raises where it does not hold. Its name and its docstring say what must be true, and both are in
the message when it fails. A *suite* holds the rules of a form.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

from diffusers_ext import registry
from diffusers_ext.registry import Method

if TYPE_CHECKING:
    from .models import World

METHODS = Path(__file__).parents[1] / "methods"


@dataclass(frozen=True)
class CommonCase:
    """What introspection cannot know of a method. Every field may be left out; most methods need none.

    Attributes:
        settings: keyword arguments of the class to try beside its defaults, each a mapping. A form that needs more than
            the defaults to be built (required arguments) takes the first of them for its default.
        make: builds what is tested where the class alone cannot, for example after a calibration. What it gets and
            returns is said in the file of the form.
        inputs: inputs for what is tested; what it gets and returns is said in the file of the form.
        extras: schedulers: `() -> keyword arguments of from_config`, such as `{"statistics": ...}`.
        process: schedulers: "diffusion" (a discrete beta schedule), "flow" (rectified flow), "both", or "other".
        models: more models to put the method on, where it supports none of `models.MODELS`.
        known: metrics: pairs of arguments (a tuple) and the right value.
        free_text: names of string arguments that take any text.
        changes_output: whether the method changes what the model computes, with at least one of its settings.
        skips: rule -> why it has no meaning for this method. Shown as a skipped test.
        upstream_skips: test of diffusers' own suites -> why it does not hold for this method.
    """

    settings: Sequence[Mapping[str, Any]] = ()
    make: Callable[..., Any] | None = None
    inputs: Callable[..., Any] | None = None
    extras: Callable[[], Mapping[str, Any]] | None = None
    process: str | None = None
    models: Sequence[Any] = ()
    known: Sequence[tuple[tuple, Any]] = ()
    free_text: Sequence[str] = ()
    changes_output: bool = True
    skips: Mapping[str, str] = field(default_factory=dict)
    upstream_skips: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One class of a method, under test.

    Attributes:
        row: the method.
        cls: the class (or function) that the rules are about; None where the row's entry has none of the right kind.
        entries: all that the row's entry names.
        common: what the method told.
        name: shown in test names.
    """

    row: Method
    cls: Any
    entries: tuple[Any, ...]
    common: CommonCase
    name: str

    @property
    def own(self) -> bool:
        """Ours or a third party's, and not diffusers' own."""
        return self.row.form != "upstream"

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Keyword arguments of the class to try: the defaults, where they suffice, then those that the method told."""
        names = inspect.signature(self.cls).parameters.keys()
        told = [dict(settings) for settings in self.common.settings if names >= set(settings)]  # of this of its classes
        try:
            needed = None if _takes_defaults(self.cls) else "arguments without defaults"
        except Exception as error:
            needed = str(error)
        if needed is not None and not told:
            raise Broken(f"it cannot be made from defaults ({needed}): give `COMMON` `settings` to try")
        return told if needed is not None else [{}, *told]


def _takes_defaults(cls: type) -> bool:
    """Whether the class can be made without arguments. A network is not made: its defaults may be huge."""
    parameters = inspect.signature(cls).parameters.values()
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return False
    if not issubclass(cls, nn.Module):
        cls()
    return True


class Broken(AssertionError):
    """A rule does not hold."""


def require(condition: Any, message: str) -> None:
    """Raise `Broken` with `message` unless `condition` holds."""
    if not condition:
        raise Broken(message)


def refused(message: str, call: Callable[..., Any], *args: Any, names: Sequence[str] = (), **kwargs: Any) -> None:
    """`call` must raise a `ValueError` whose text has all of `names`; `message` says what was tried."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        absent = [name for name in names if name not in str(error)]
        require(not absent, f"{message}: the ValueError does not name {', '.join(absent)}: {error}")
    except Exception as error:
        raise Broken(f"{message}: {type(error).__name__} instead of a ValueError that says why: {error}") from error
    else:
        raise Broken(f"{message}: accepted, where a ValueError should say what is allowed")


@dataclass(frozen=True)
class Rule:
    """One rule of a suite.

    Attributes:
        own: asked of our methods only, not of diffusers' classes.
        when: whether the rule has a meaning for a case.
    """

    name: str
    check: Callable[[Case, World], None]
    slow: bool = False
    own: bool = False
    when: Callable[[Case], bool] | None = None

    @property
    def says(self) -> str:
        """The first sentence of the docstring."""
        text = " ".join((self.check.__doc__ or "").split())
        return text.partition(". ")[0].rstrip(".")


class Suite:
    """The rules of one form.

    Args:
        form: the form of the rows.
        kind: what the class of a case is, for messages.
        fits: whether something that a row's entry names is of that kind.
    """

    def __init__(self, form: str, kind: str, fits: Callable[[Any], bool]) -> None:
        self.form, self.kind, self.fits = form, kind, fits
        self.rules: dict[str, Rule] = {}
        self.pack: Callable[[Case, World, Path], Any] | None = None
        self._add(Rule("entry", self._entry))

    def _entry(self, case: Case, world: World) -> None:
        """The entry of the row names a class of the form."""
        names = ", ".join(case.row.entry)
        require(case.cls is not None, f"`entry` is {names}; one of them must be {self.kind}")

    def _add(self, rule: Rule) -> None:
        if rule.name in self.rules:
            raise ValueError(f"The suite of form {self.form!r} has two rules {rule.name!r}.")
        self.rules[rule.name] = rule

    def rule(self, **options: Any) -> Callable:
        """Decorator that makes a function `(case, world)` a rule; options are those of `Rule`."""

        def add(check: Callable[[Case, World], None]) -> Callable[[Case, World], None]:
            self._add(Rule(check.__name__, check, **options))
            return check

        return add

    def include(self, other: Suite, when: Callable[[Case], bool] | None = None) -> None:
        """Take over the rules of another suite, for the cases of which `when` holds."""

        def both(rule: Rule) -> Callable[[Case], bool]:
            return lambda case: all(condition is None or condition(case) for condition in (when, rule.when))

        for rule in other.rules.values():
            if rule.name not in self.rules:
                self._add(replace(rule, when=both(rule)))

    # --- cases ---------------------------------------------------------------------------------------------------

    def cases(self) -> list[Case]:
        """Every class of every registered method of the form that has an entry, third-party methods included."""
        rows = [row for row in registry.methods() if row.form == self.form and row.entry]
        return [case for row in rows for case in self.cases_of(row, told_by(row))]

    def cases_of(self, row: Method, common: CommonCase) -> list[Case]:
        """The cases of one row: one a class that fits, or one without a class."""
        unknown = sorted(set(common.skips) - set(self.rules))
        if unknown:
            raise ValueError(f"`skips` of {row.key!r} has {unknown}; the rules are {', '.join(self.rules)}.")
        entries = tuple(registry.load_entry(name) for name in row.entry)
        classes = [entry for entry in entries if self.fits(entry)]
        if len(classes) < 2:
            return [Case(row, classes[0] if classes else None, entries, common, row.key)]
        return [Case(row, cls, entries, common, f"{row.key}.{cls.__name__}") for cls in classes]

    def params(self, cases: Sequence[Case] | None = None, faults: Mapping[tuple[str, str], str] | None = None) -> list:
        """Parameters `(case, rule)` for `pytest.mark.parametrize`.

        Args:
            cases: None takes all that are registered.
            faults: (class name, rule) -> a known fault of a class that is not ours. Its test must fail.
        """
        cases = self.cases() if cases is None else cases
        if not cases:
            reason = f"no method of form {self.form!r} has an entry yet"
            return [pytest.param(None, None, id="none", marks=pytest.mark.skip(reason=reason))]
        return [
            pytest.param(case, rule, id=f"{case.name}-{rule.name}", marks=list(_marks(case, rule, faults or {})))
            for case in cases
            for rule in self.rules_of(case)
        ]

    def rules_of(self, case: Case) -> Iterator[Rule]:
        """The rules that have a meaning for a case."""
        for rule in self.rules.values():
            asked = case.cls is not None and (case.own or not rule.own) and (rule.when is None or rule.when(case))
            if rule.name == "entry" or asked:
                yield rule

    # --- running -------------------------------------------------------------------------------------------------

    def run(self, case: Case, rule: Rule, world: World) -> None:
        """Check one rule.

        Raises:
            Broken: it does not hold; the message names the method and the rule and says what the rule is.
        """
        try:
            rule.check(case, world)
        except Exception as error:
            told = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            raise Broken(
                f"{case.name} breaks the rule `{rule.name}` of form {self.form} ({rule.says}): {told}"
            ) from error

    def broken(self, case: Case, world: World, leave_out: Sequence[str] = ()) -> dict[str, str]:
        """Runs every rule that is not slow; the messages of those that do not hold, by rule."""
        messages = {}
        for rule in self.rules_of(case):
            if rule.slow or rule.name in case.common.skips or rule.name in leave_out:
                continue
            try:
                self.run(case, rule, world)
            except Broken as error:
                messages[rule.name] = str(error)
            except pytest.skip.Exception:
                pass
        return messages


def _marks(case: Case, rule: Rule, faults: Mapping[tuple[str, str], str]) -> Iterator[pytest.MarkDecorator]:
    if rule.slow:
        yield pytest.mark.slow
    if rule.name in case.common.skips:
        yield pytest.mark.skip(reason=f"{case.name}: {case.common.skips[rule.name]}")
    if case.cls is not None and (case.cls.__name__, rule.name) in faults:
        yield pytest.mark.xfail(reason=faults[case.cls.__name__, rule.name], strict=True)


def told_by(row: Method) -> CommonCase:
    """The constant `COMMON` of the method's own tests, or one that tells nothing."""
    file = METHODS / f"test_{row.key}.py"
    if not file.is_file() or "\nCOMMON = " not in file.read_text(encoding="utf-8"):
        return CommonCase()
    return importlib.import_module(f"tests.methods.{file.stem}").COMMON


def is_class_of(*bases: type) -> Callable[[Any], bool]:
    """Whether something is a subclass of one of `bases`."""
    return lambda entry: isinstance(entry, type) and issubclass(entry, bases)
