"""Pairs of methods on one pipeline run or are refused with a reason, and `docs/composition.md` says what is so."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import diffusers_ext as dx

from . import composition_table
from .composition_table import FAILS, FILE, KINDS, NO, YES, Outcome, Part, attempt, candidates, pairs

needs_page = pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is not there: python -m tests.composition_table")


def written() -> dict[frozenset[str], str]:
    """The cells of the committed page by the names of both methods."""
    cells: dict[frozenset[str], str] = {}
    across: list[str] = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            across = []
        if not line.startswith("|") or line.startswith("| ---"):
            continue
        down, *found = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        if across:
            cells |= {frozenset((down, name)): cell for name, cell in zip(across, found, strict=True)}
        else:
            across = found
    return cells


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    """Those that work alone; the others say what they lack."""
    found = {part: attempt(part) for part in candidates()}
    broken = {part.name: outcome.reason for part, outcome in found.items() if outcome.label == FAILS}
    assert not broken
    return [part for part, outcome in found.items() if outcome.label == YES]


@pytest.fixture(scope="module")
def tried(parts) -> dict[frozenset[str], Outcome]:
    """What became of each pair."""
    return {frozenset((a.name, b.name)): attempt(a, b) for a, b in pairs(parts)}


@pytest.mark.slow
def test_every_pair_runs_or_is_refused_with_a_reason(tried):
    assert len(tried) > 50
    for pair, found in tried.items():
        assert found.label != FAILS, f"{sorted(pair)}: {found.reason}"
        assert found.label == YES or len(found.reason.split()) >= 5, f"{sorted(pair)}: {found.reason}"


@needs_page
@pytest.mark.slow
def test_what_the_page_says_of_a_pair_is_so(tried):
    labels = {pair: NO if cell.startswith(NO) else YES for pair, cell in written().items()}
    assert labels == {pair: found.label for pair, found in tried.items()}, "write it again: tests.composition_table"


def test_two_caches_on_one_model_are_refused():
    caches = [part for part in candidates() if part.kind == "cache"]
    assert len(caches) > 2
    for a, b in itertools.permutations(caches, 2):
        found = attempt(a, b)
        assert found.label == NO and "cannot be on together with" in found.reason, (a.name, b.name)


@needs_page
def test_the_page_has_every_pair_and_none_that_breaks():
    cells = written()
    known = {part.name: part.kind for part in candidates()}
    names = {name for pair in cells for name in pair}
    assert names <= known.keys(), "write it again: python -m tests.composition_table"
    assert {"deepcache", "EVODiffScheduler", "guidance_scale=3"} <= names
    assert cells.keys() == {frozenset((a, b)) for a, b in itertools.combinations(names, 2) if known[a] != known[b]}
    assert not [pair for pair, cell in cells.items() if cell.startswith(FAILS)]
    reasons = re.findall(r"^(\d+)\. .+", FILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {cell for cell in cells.values() if cell.startswith(NO)} <= {f"{NO} ({number})" for number in reasons}


def test_what_breaks_is_told_apart_from_what_is_refused():
    def refuses(pipe):
        raise ValueError("No,  never.")

    def breaks(pipe):
        raise TypeError("Oh.")

    assert attempt(Part("hook", "refuses", refuses)).label == NO
    assert attempt(Part("hook", "refuses", refuses)).reason == "No, never."
    broken = attempt(Part("hook", "breaks", breaks))
    assert (broken.label, broken.reason) == (FAILS, "TypeError: Oh.")


def test_cells_tell_time_and_likeness_and_number_the_reasons(monkeypatch):
    plain = Outcome(YES, picture=torch.zeros(1, 3, 2, 2), seconds=2.0)
    other = Outcome(YES, picture=torch.full((1, 3, 2, 2), 0.1), seconds=1.0)
    a, b, c = Part("cache", "a"), Part("guidance", "b"), Part("adapter", "c", is_random=True)
    found = iter([other, plain, plain, plain, other, plain, *[Outcome(NO, "Not here.")] * 2])
    monkeypatch.setattr(composition_table, "attempt", lambda *pair, **options: next(found))
    reasons: list[str] = []
    cells = [composition_table.cell(pair, reasons) for pair in ((a, b), (a, b), (c, a), (a, b), (c, b))]
    assert cells == ["0.50 x, 20.0 dB", "1.00 x, equal", "0.50 x", "no (1)", "no (1)"] and reasons == ["Not here."]
    table = composition_table.text([c, a, b], {("c", "a"): "x", ("c", "b"): "y", ("a", "b"): "z"}, reasons)
    assert f"## {KINDS['cache']} and guidance\n\n| cache | `b` |\n| --- | --- |\n| `a` | z |\n" in table
    assert table.endswith("## Why not\n\n1. Not here.\n")


def test_a_fused_lora_is_quantized_with_its_layers(pipe):
    """What the page advises, as PEFT puts no LoRA on quantized layers."""
    from peft import LoraConfig

    before = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.clone()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.clone()
    config = dx.PTQConfig(method="minmax", weight_bits=8, act_bits=None)
    pipe = dx.quantization.calibrate(pipe, config, prompts=["a person"], num_inference_steps=1)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert type(layer).__name__ == "QuantizedLayer" and (fused - before).abs().max() > 0.1 * before.abs().max()
    step = 2 * fused.abs().amax(1) / 255
    assert (layer.weight - fused).abs().le(step[:, None]).all()
