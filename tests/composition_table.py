"""Which methods combine on `avatars-sd`, and what a pair costs and changes: found by trying, written as tables.

    python -m tests.composition_table          # writes docs/composition.md; minutes on an idle core

`tests/test_composition.py` tries again and compares. Every registered method that goes on the pipeline takes part, with its
default settings, or, where it needs more to be made, with what its tests give it.
"""

from __future__ import annotations

import atexit
import copy
import functools
import itertools
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import diffusers_ext as dx
from diffusers_ext.cards import table
from diffusers_ext.enabling import HookConfig
from diffusers_ext.metrics import psnr
from diffusers_ext.quantization.methods import METHODS

from . import ptq
from .common import adapter, attn_processor, guider, hook, models, quantizer, scheduler
from .common.models import World
from .common.suite import Broken, Case

FILE = Path(__file__).parents[1] / "docs" / "composition.md"
STOCK = models.STOCKS["avatars-sd"]
# In the order in which parts go on a pipeline: what changes weights first, what watches calls last.
KINDS = {
    "quantizer": "Quantizers", "adapter": "Adapters", "sampler": "Samplers", "hook": "Other hooks", "cache": "Caches",
    "guidance": "Guidance",
}  # fmt: skip
GUIDANCE: dict[str, dict[str, float]] = {
    "guidance_scale=3": {"guidance_scale": 3.0},
    "guidance_rescale=0.7": {"guidance_scale": 3.0, "guidance_rescale": 0.7},
}
YES, NO, FAILS = "yes", "no", "fails"
STEPS, REPEATS = 10, 3
_HEAD = """\
# What combines

Pairs of methods on the zoo's `avatars-sd`, found by trying: both go on, in the order of the headings of a table, and the
pipeline draws. Written by `python -m tests.composition_table`; a test tries all pairs again.

A cell has the time of a run of {steps} steps over that of the plain pipeline, and the PSNR to its picture. Time is that of one
processor, and rough: up to a quarter apart between runs. On small models the overhead of a method counts more. A pair with guidance is
compared with the plain pipeline with that guidance. What has to be trained or collected first has random numbers here, and
its pictures say nothing: adapters, and methods with statistics. Quantizers take plain ranges of two calls, with 8 bits, and
simulate their arithmetic, which costs several times the plain run.
"no" is refused, and the number leads to what the pipeline says.

Two of a kind: a pipeline has one scheduler and its denoiser one quantization; two caches on one model are refused, as each
decides what is computed when. LoRAs go on together as in diffusers. PEFT puts no LoRA on quantized layers: fuse it first
(`pipe.fuse_lora()`, then `pipe.unload_lora_weights()`), and calibrate the result.

"""


@dataclass(frozen=True, eq=False)
class Part:
    """One method, ready to be put on a pipeline.

    Attributes:
        kind: of `KINDS`.
        name: shown.
        put: puts it on a pipeline, which may change, and returns the pipeline.
        options: arguments of the call, for what is no object.
        is_random: it has random numbers in place of trained ones.
    """

    kind: str
    name: str
    put: Callable[[Any], Any] = lambda pipe: pipe
    options: Mapping[str, Any] = field(default_factory=dict)
    is_random: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt.

    Attributes:
        label: `YES`, `NO` where it is refused, `FAILS` where it breaks or gives nonsense.
        reason: why not.
        picture: `(batch, 3, height, width)` in [0, 1].
        seconds: of processor time, for the call.
    """

    label: str
    reason: str = ""
    picture: torch.Tensor | None = None
    seconds: float = 0.0


@functools.cache
def _world() -> World:
    folder = tempfile.mkdtemp(prefix="composition-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return World(Path(folder))


# --- what there is ---------------------------------------------------------------------------------------------------


def _ours(cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if case.cls is not None and case.cls.__module__.partition(".")[0] != "tests"]


def _quantizers() -> Iterator[Part]:
    @functools.cache
    def quantized(key: str) -> Any:
        plain = {"weight_range": "minmax", "act_range": "minmax", "rounding": "nearest", "scale_iterations": 0}
        return ptq.quantized(_world().pipe(STOCK), method=key, **plain)

    for case in _ours(quantizer.SUITE.cases()):
        if case.row.key in METHODS:
            yield Part("quantizer", case.name, lambda pipe, key=case.row.key: copy.deepcopy(quantized(key)))


def _adapters() -> Iterator[Part]:
    def put(pipe: Any, case: Case) -> Any:
        adapter.put_on(case, _world(), STOCK, pipe)
        return pipe

    for case in _ours(adapter.SUITE.cases()):
        yield Part("adapter", case.name, functools.partial(put, case=case), is_random=True)


def _samplers() -> Iterator[Part]:
    for case in _ours(scheduler.SUITE.cases()):
        if STOCK.process in scheduler.processes(case):
            put = functools.partial(scheduler.put_into, case, STOCK)
            yield Part("sampler", case.cls.__name__, put, is_random=case.common.extras is not None)


def _hooks() -> Iterator[Part]:
    unet = _world().peek(STOCK).unet
    suites = (hook.SUITE, attn_processor.SUITE, guider.SUITE)
    for case in _ours([case for suite in suites for case in suite.cases()]):
        if guider.is_guider(case) or case.cls.supports(unet) is not None:
            continue
        try:
            fitting = [config for config in hook.configs(case, unet) if hook.fits(config, unet, on_pipeline=True)]
        except (Broken, ValueError):
            continue
        kind = "guidance" if case.row.form == "guider" else "cache" if case.cls.family == "cache" else "hook"
        for config in fitting[:1]:
            put = functools.partial(_enable, config=config)
            yield Part(kind, case.name, put, is_random=case.common.make is not None)


def _enable(pipe: Any, config: HookConfig) -> Any:
    return dx.enable(pipe, copy.deepcopy(config))


@functools.cache
def candidates() -> tuple[Part, ...]:
    """Every method that could go on the pipeline, by kind and name."""
    found = [*_quantizers(), *_adapters(), *_samplers(), *_hooks()]
    found += [Part("guidance", name, options=options) for name, options in GUIDANCE.items()]
    once = {(part.kind, part.name): part for part in found}  # two papers may have one class
    return tuple(sorted(once.values(), key=lambda part: (list(KINDS).index(part.kind), part.name)))


def pairs(parts: Sequence[Part]) -> list[tuple[Part, Part]]:
    """All of two kinds, in the order in which they go on."""
    return [(a, b) for a, b in itertools.combinations(parts, 2) if a.kind != b.kind]


# --- trying ----------------------------------------------------------------------------------------------------------


def attempt(*chosen: Part, steps: int = 2, repeats: int = 1) -> Outcome:
    """Put parts on a copy of the pipeline, in this order, and draw a picture without guidance, unless a part says so."""
    options: dict[str, Any] = {**STOCK.call(steps), "guidance_scale": 1.0, "output_type": "pt"}
    seconds = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe = _world().pipe(STOCK)
            for part in chosen:
                pipe = part.put(pipe)
                options |= part.options
            for _ in range(repeats):
                began = time.process_time()
                picture = models.draw(pipe, options)
                seconds.append(time.process_time() - began)
        except ValueError as error:
            return Outcome(NO, " ".join(str(error).split()))
        except Exception as error:
            return Outcome(FAILS, f"{type(error).__name__}: {error}")
    if not picture.isfinite().all():
        return Outcome(FAILS, "the picture is not finite")
    return Outcome(YES, picture=picture, seconds=min(seconds))


# --- the page --------------------------------------------------------------------------------------------------------


def cell(pair: tuple[Part, Part], reasons: list[str]) -> str:
    """One cell; a reason that is new is added to `reasons`. The plain run is next to the other, for both take the machine as it is."""
    found = attempt(*pair, steps=STEPS, repeats=REPEATS)
    if found.label != YES:
        if found.reason not in reasons:
            reasons.append(found.reason)
        return f"{found.label} ({reasons.index(found.reason) + 1})"
    plain = attempt(*(part for part in pair if part.name in GUIDANCE), steps=STEPS, repeats=REPEATS)
    assert found.picture is not None and plain.picture is not None
    ratio = f"{found.seconds / plain.seconds:.2f} x"
    if any(part.is_random for part in pair):
        return ratio
    value = float(psnr(found.picture, plain.picture).mean())
    return f"{ratio}, equal" if value == float("inf") else f"{ratio}, {value:.1f} dB"


def page() -> str:
    """The whole file, by trying."""
    parts = [part for part in candidates() if attempt(part).label == YES]
    reasons: list[str] = []
    cells: dict[tuple[str, str], str] = {}
    for a, b in tqdm(pairs(parts), desc="Pairs", unit="pair", mininterval=5.0, file=sys.stderr):
        cells[a.name, b.name] = cell((a, b), reasons)
    return text(parts, cells, reasons)


def text(parts: Sequence[Part], cells: Mapping[tuple[str, str], str], reasons: Sequence[str]) -> str:
    """The whole file."""
    sections = []
    for first, second in itertools.combinations(KINDS, 2):
        down, across = ([part.name for part in parts if part.kind == kind] for kind in (first, second))
        if not down or not across:
            continue
        rows = [[f"`{a}`", *(cells[a, b] for b in across)] for a in down]
        head = [first, *(f"`{b}`" for b in across)]
        if len(across) > len(down):  # pages are longer than wide
            rows = [[f"`{b}`", *(cells[a, b] for a in down)] for b in across]
            head = [second, *(f"`{a}`" for a in down)]
        sections.append(f"## {KINDS[first]} and {KINDS[second].lower()}\n\n{table(head, rows)}\n")
    if reasons:
        sections.append("## Why not\n\n" + "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1)) + "\n")
    return _HEAD.format(steps=STEPS) + "\n".join(sections)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(page(), encoding="utf-8")
