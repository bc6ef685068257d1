"""What every metric must do: a function, or a class with `update`, `compute` and `reset`.

`COMMON` of a metric: `known`, pairs of arguments (a tuple) and the right value, at least one; `inputs`, `(seed) ->
arguments` of one update (a tuple), for a class; `settings` of the class.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .models import World
from .suite import Broken, Case, Suite, refused, require

METHODS = ("update", "compute", "reset")


def is_metric(entry: Any) -> bool:
    if isinstance(entry, type):
        return all(callable(getattr(entry, name, None)) for name in METHODS)
    return inspect.isfunction(entry)


SUITE = Suite("metric", "a function, or a class with `update`, `compute` and `reset`", is_metric)


def is_class(case: Case) -> bool:
    return isinstance(case.cls, type)


def near(found: Any, wanted: Any) -> bool:
    """Equal to five digits, also inside of tuples and mappings."""
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict) and found.keys() == wanted.keys() and all(near(found[k], wanted[k]) for k in wanted)
        )
    if isinstance(wanted, (list, tuple)):
        return len(found) == len(wanted) and all(near(a, b) for a, b in zip(found, wanted, strict=True))
    return np.allclose(
        np.asarray(found, dtype=float), np.asarray(wanted, dtype=float), rtol=1e-5, atol=1e-6, equal_nan=True
    )


def value(case: Case, args: tuple) -> Any:
    if not is_class(case):
        return case.cls(*args)
    metric = case.cls(**case.settings[0])
    metric.update(*args)
    return metric.compute()


@SUITE.rule()
def known_answers(case: Case, world: World) -> None:
    """It gives the right value where that is known, and leaves its arguments as they are."""
    require(case.common.known, "give `COMMON` `known`: arguments and the right value")
    for args, wanted in case.common.known:
        before = copy.deepcopy(args)
        found = value(case, args)
        require(near(found, wanted), f"{args} give {found}, not {wanted}")
        for a, b in zip(args, before, strict=True):
            same = torch.equal(a, b) if torch.is_tensor(a) else np.array_equal(a, b)
            require(same, "it writes into its arguments")


@SUITE.rule()
def no_gradient(case: Case, world: World) -> None:
    """Its value holds no gradient graph: a long evaluation does not keep every batch."""
    for args, _ in case.common.known:
        found = value(
            case, tuple(a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
        )
        require(
            not (torch.is_tensor(found) and found.requires_grad) or not is_class(case), "the value requires a gradient"
        )


def _batches(case: Case) -> Callable[[int], tuple]:
    if case.common.inputs is None:
        raise Broken("give `COMMON` `inputs`, (seed) -> arguments of one update")
    return case.common.inputs


@SUITE.rule(when=is_class)
def streaming(case: Case, world: World) -> None:
    """Two updates give a value other than one; the order does not matter; `compute` may be called in between; `reset` resets."""
    batch = _batches(case)
    for settings in case.settings:
        metric = case.cls(**settings)
        metric.update(*batch(0))
        first = metric.compute()
        metric.update(*batch(1))
        both = metric.compute()
        require(near(metric.compute(), both), f"{settings}: `compute` twice gives two values")
        metric.reset()
        metric.update(*batch(1))
        metric.update(*batch(0))
        require(
            near(metric.compute(), both), f"{settings}: the order of the updates matters, or `reset` leaves something"
        )
        metric.reset()
        metric.update(*batch(0))
        require(near(metric.compute(), first), f"{settings}: after `reset` another value")
        require(not near(first, both), f"{settings}: a second update changes nothing")


@SUITE.rule(when=is_class)
def instances_share_nothing(case: Case, world: World) -> None:
    """Two metrics, and a deep copy, do not disturb each other."""
    batch, settings = _batches(case), case.settings[0]
    metric, other = case.cls(**settings), case.cls(**settings)
    metric.update(*batch(0))
    expected = metric.compute()
    clone = copy.deepcopy(metric)
    for one in (other, clone):
        one.update(*batch(1))
    require(near(metric.compute(), expected), "another instance, or a copy, changes the value")


@SUITE.rule(when=is_class)
def nothing_to_compute(case: Case, world: World) -> None:
    """`compute` before any `update` is a ValueError that says so, and not a NaN."""
    refused("`compute` before `update`", case.cls(**case.settings[0]).compute, names=("update",))


@SUITE.rule()
def wrong_inputs(case: Case, world: World) -> None:
    """NaN in its inputs is refused, or gives NaN: it does not vanish."""
    for args, wanted in case.common.known[:1]:
        if not any(torch.is_tensor(a) and a.is_floating_point() for a in args) or not isinstance(wanted, float):
            continue
        try:
            found = value(
                case,
                tuple(
                    torch.full_like(a, math.nan) if torch.is_tensor(a) and a.is_floating_point() else a for a in args
                ),
            )
        except ValueError:
            continue
        require(math.isnan(float(found)), f"inputs that are NaN give {found}")
