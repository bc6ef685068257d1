"""Which cache works on which stock denoiser: found by trying, written as a table.

    python -m tests.caches_table          # writes docs/caches.md

`tests/test_caches_table.py` tries again and compares. Every hook of family "cache" that is registered has a column.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

import diffusers_ext as dx
from diffusers_ext.enabling import HookConfig

from .common import hook, models
from .common.models import Model
from .common.suite import Broken, Case
from .transformers import TRANSFORMERS
from .unets import UNETS

FILE = Path(__file__).parents[1] / "docs" / "caches.md"
LENGTHS = (3, 8)  # of runs: some settings of tests are for a few steps, some methods start later
DENOISERS: dict[str, Model] = {**{name: models.MODELS[name] for name in UNETS}, **TRANSFORMERS}
YES, NO, TRAINED, FAILS = "yes", "-", "trained", "fails"
_HEAD = f"""\
# Caches

Methods that leave parts of a denoiser out on some steps, and the stock classes of diffusers that they work on, found by
trying: each is enabled on a tiny model of the class, runs, and is disabled. One at a time goes on a model. Written by
`python -m tests.caches_table`; a test tries it again. Classes that are not here may work as well: methods look at the
structure of a model, not at its name, and `dx.enable` says so where they do not fit.

- {YES}: its outputs are finite and differ from the plain model's, and off again they are bit-equal to before.
- {TRAINED}: it fits, and needs weights or statistics that are made for the model, by the method's own trainer or search.
- {NO}: it does not fit, and `dx.enable` says why.

"""
_TAIL = """
## By diffusers' own `enable_cache`

Transformers of diffusers with caches of its own are switched by `model.enable_cache(config)`. It knows its own configs only.
For ours as well, and on models that have no such method, ask for it once in a program:

```python
import diffusers_ext as dx

dx.allow_enable_cache()
pipe.unet.enable_cache(dx.DeepCacheConfig(interval=3))
pipe.unet.is_cache_enabled        # True
pipe.unet.disable_cache()         # bit-equal to before
dx.allow_enable_cache(False)      # diffusers as it was
```

It is `dx.enable` on the model alone: settings that need a pipeline are refused, no recipe is written, and a run that was
broken off is noticed by its timesteps only. Nothing of diffusers is replaced; its own caches go on to work, one at a time on a
model, theirs or ours.
"""


def cases() -> list[Case]:
    """Our hooks of family "cache"."""
    return [
        case
        for case in hook.SUITE.cases()
        if case.cls is not None and case.cls.family == "cache" and case.cls.__module__.partition(".")[0] != "tests"
    ]


def cell(case: Case, model: Model, bare: nn.Module, plain: list[torch.Tensor]) -> str:
    """One cell. `bare` is as before afterwards, where the method keeps its word."""
    if case.cls.supports(bare) is not None:
        return NO
    try:
        configs = [config for config in hook.configs(case, bare) if hook.fits(config, bare, on_pipeline=False)]
    except (Broken, ValueError):
        return TRAINED
    if not configs:
        return TRAINED
    return YES if any(_works(model, bare, config, plain) for config in configs) else FAILS


def _works(model: Model, bare: nn.Module, config: HookConfig, plain: list[torch.Tensor]) -> bool:
    for steps in LENGTHS:
        try:
            found = model.run(dx.enable(bare, copy.deepcopy(config)), steps)
        except Exception:
            found = []
        finally:
            if dx.status(bare):
                dx.disable(bare)
        if not found or hook.equal(found, plain[:steps]):
            continue
        return all(output.isfinite().all() for output in found) and torch.equal(model.predict(bare), plain[0])
    return False


def row(name: str) -> dict[str, str]:
    """Key of each method -> its cell, for one class of denoisers."""
    model = DENOISERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = model.make()
        plain = model.run(bare, max(LENGTHS))
        return {case.name: cell(case, model, bare, plain) for case in cases()}


def text(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The whole file."""
    columns = list(next(iter(rows.values())))
    lines = [["denoiser", *(f"`{column}`" for column in columns)], ["---"] * (len(columns) + 1)]
    lines += [[f"`{name}`", *cells.values()] for name, cells in rows.items()]
    return _HEAD + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + _TAIL


def table() -> dict[str, dict[str, str]]:
    """Class -> its cells, by trying."""
    return {name: row(name) for name in tqdm(DENOISERS, desc="Denoisers", unit="class", file=sys.stderr)}


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(table()), encoding="utf-8")
