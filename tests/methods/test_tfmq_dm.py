"""TFMQ-DM, by the five proofs. What it shares with the others is in `test_ptq4dm` and `test_q_diffusion`."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import nn

from diffusers_ext.cards import pipeline_card
from diffusers_ext.quantization import PTQConfig
from diffusers_ext.quantization.layers import QuantizedLayer
from diffusers_ext.quantization.rounding import (
    Sample,
    beta_at,
    learn_rounding,
    mean_error,
    soft_share,
    start_alpha,
    unit_error,
)
from diffusers_ext.quantization.session import Session, put
from diffusers_ext.quantization.summary import summary
from diffusers_ext.quantization.temporal import FeatureTable, SkippedLayer, TemporalBlock, timestep_only, used_outside
from diffusers_ext.quantization.timing import Clock, attach_clocks, detach_clocks
from tests import ptq
from tests.common.suite import CommonCase
from tests.small_denoiser import calls, small

COMMON = CommonCase(make=ptq.maker("tiny-ddpm", "tiny-flux", method="tfmq_dm", rounding="nearest"))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tfmq_dm.json").read_text())["runs"]
TIMES = (900.0, 600.0, 300.0)
BLOCK = ["time_1", "time_2", "blocks.0.time_proj", "blocks.1.time_proj"]
QUICK = {"method": "tfmq_dm", "search_from": 0.8, "rounding_iterations": 30}

exact = pytest.mark.proof("exact")
reference = pytest.mark.proof("reference")


def session_of(model=None, times=None, classes=0, **settings):
    model = small(classes) if model is None else model
    return Session(model, PTQConfig(**{**QUICK, **settings}), calls(classes=classes), 0, times)


def finished(session):
    """The model as `calibrate` leaves it."""
    with session.in_place():
        session.place_weights()
        session.place_inputs()
        packed = session.packed()
    for name, layer in packed.items():
        put(session.model, name, layer)
    attach_clocks(session.model, session.clocks)
    return session.model


def nothing(*_):
    """A hook of somebody else."""


@torch.no_grad()
def outputs_of(model, names, call):
    """What layers of a model give in a call."""
    found = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: found.__setitem__(n, y)) for n in names
    ]
    call.run(model)
    for handle in handles:
        handle.remove()
    return found


# --- exact: the block ------------------------------------------------------------------------------------------------


@exact
def test_the_block_is_what_sees_the_timestep_alone():
    plain, labelled = small(), small(classes=3)
    call = calls()[0]
    assert timestep_only(plain, call) == BLOCK
    assert used_outside(plain, call, BLOCK) == BLOCK[2:]
    call = calls(classes=3)[0]
    assert timestep_only(labelled, call) == BLOCK[:2]
    assert used_outside(labelled, call, BLOCK[:2]) == BLOCK[1:2], "the part before the sum"


@exact
def test_integers_that_no_embedding_looks_up_are_seen():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def forward(self, sample, timestep, class_labels):
            inner = self.inner
            emb = inner.time_1(torch.ones(len(sample), 8) * timestep / 1000)
            emb = inner.time_2(F.silu(emb) + class_labels[:, None].float())
            return (sample + emb.mean(1)[:, None, None, None],)

    model = Sized()
    found = calls(classes=3)
    assert timestep_only(model, found[0]) == ["inner.time_1", "inner.time_2"]
    layers = dict(model.named_modules())
    assert TemporalBlock(model, found, layers, TIMES).features == ["inner.time_1"]


@exact
def test_the_block_by_itself_gives_what_the_network_gives():
    model, found = small(), calls()
    block = TemporalBlock(model, found, dict(model.named_modules()), TIMES)
    assert block.sources == {
        "time_1": (None, block.sources["time_1"][1]), "time_2": ("time_1", F.silu),
        BLOCK[2]: ("time_2", F.silu), BLOCK[3]: ("time_2", F.silu),
    }  # fmt: skip
    with torch.no_grad():
        features = block(block.all_rows())
    for row, call in enumerate(found):
        seen = outputs_of(model, BLOCK[2:], call)
        for name, feature in zip(block.features, features, strict=True):
            assert torch.allclose(feature[row].expand_as(seen[name]), seen[name], atol=1e-6)
            assert torch.allclose(block.targets[name][row], feature[row], atol=1e-6)


@exact
def test_rounding_is_learnt_together_and_left_alone_later(monkeypatch):
    session = session_of(temporal="reconstruct", weight_bits=3, rounding_rate=3e-2)
    block, then = session.block, {}
    samples = [Sample((block.all_rows(),), {}, [block.targets[name] for name in block.features])]

    def noted(unit, layers, *args, **kwargs):
        few = {} if unit is block else {"iterations": 2}
        kept = learn_rounding(unit, layers, *args, **{**kwargs, **few})
        then[unit] = {layer: layer.weight.clone() for layer in layers}
        return kept

    monkeypatch.setattr("diffusers_ext.quantization.session.learn_rounding", noted)
    with session.in_place():
        session.place_weights()
        nearest = mean_error(block, samples, 2.0)
        session.round_weights()
        assert mean_error(block, samples, 2.0) < 0.9 * nearest
    assert next(iter(then)) is block, "the block comes first"
    assert set(then[block]) == {session.layers[name] for name in BLOCK}
    assert all(torch.equal(layer.weight, weight) for layer, weight in then[block].items())
    others = [layer for unit, layers in then.items() if unit is not block for layer in layers]
    assert not set(others) & set(then[block]) and len(others) + len(BLOCK) == len(session.layers)


# --- exact: grids for each timestep ----------------------------------------------------------------------------------


@exact
def test_each_timestep_has_its_own_range():
    session = session_of(temporal="reconstruct", act_bits=4, act_range="minmax")
    block = session.block
    with session.in_place():
        session.place_weights()
        session.place_inputs()
        layer, inputs = session.layers["time_1"], block.inputs["time_1"]
        assert layer.input_place.shape == (2, 1, 3)
        for row in range(3):
            slow = ptq.slow_uniform(inputs[row], float(inputs[row].min()), float(inputs[row].max()), 4)
            block.clock.read(TIMES[row])
            assert torch.allclose(layer.quantized_input(inputs[row][None])[0], torch.tensor(slow), atol=1e-6)
        block.clock.read(torch.tensor([300.0, 900.0]))
        both = layer.quantized_input(inputs[[2, 0]])
        block.clock.read(900.0)
        assert torch.equal(both[1:], layer.quantized_input(inputs[:1])), "rows at two timesteps"


@exact
def test_one_timestep_is_static():
    """A table with a single entry is the plain range of what the layer gets."""
    settings = {"act_range": "minmax", "weight_range": "minmax", "end_bits": 4, "weight_bits": 4, "act_bits": 4}
    found = calls((600.0,))
    outputs = []
    for temporal in ("reconstruct", "none"):
        session = Session(small(), PTQConfig(**{**QUICK, **settings, "temporal": temporal}), found, 0)
        with session.in_place(), torch.no_grad():
            session.place_weights()
            for name in BLOCK[2:]:
                session.layers[name].weights_on = False  # its output is then the same in both
            session.place_inputs()
            layer = session.layers["time_1"]
            outputs.append(layer.input_place.flatten())
            if temporal == "reconstruct":
                assert layer.input_place.shape == (2, 1, 1)
    assert torch.allclose(*outputs, rtol=1e-5)


@exact
def test_clock():
    clock = Clock((900.0, 600.0, 300.0))
    for time, entry, known in ((950, 0, False), (900, 0, True), (899.0, 0, False), (600, 1, True), (10.0, 2, False)):
        clock.read(time)
        assert (clock.index.tolist(), clock.known.tolist()) == ([entry], [known]), time
    clock.read(torch.tensor(600).expand(4))
    assert clock.index.tolist() == [1], "one timestep for all rows"
    clock.read(torch.tensor([300, 900]))
    table = torch.arange(6.0).reshape(2, 3)
    assert clock.pick(table, 4).tolist() == [[2, 2, 0, 0], [5, 5, 3, 3]]
    with pytest.raises(ValueError, match="3 rows in a call with 2 timesteps"):
        clock.pick(table, 3)
    clock.read(torch.tensor(899.0, dtype=torch.bfloat16))
    assert clock.known.item(), "bfloat16 has no number between"
    strict = Clock((1.0, 0.5), strict=True)
    strict.read(torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"`timestep` is \[0.25\]; the model's temporal features are cached"):
        strict.read(0.25)
    elsewhere = torch.device("meta")
    assert clock._times_on(elsewhere) is clock._times_on(elsewhere), "copied to a device once"


@exact
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_has_clocks_of_its_own(copied):
    """It reads its own timesteps, and what is detached from it stays with the other; hooks of others stay as well."""
    model = small()
    theirs = model.register_forward_pre_hook(nothing)
    attach_clocks(model, [Clock(TIMES)])
    twin = copied(model)
    clock, other = (next(h for h in m._forward_pre_hooks.values() if isinstance(h, Clock)) for m in (model, twin))
    with torch.no_grad():
        calls()[2].run(twin)
        assert (clock.index.item(), other.index.item()) == (0, 2)
        detach_clocks(twin)
        calls()[1].run(twin)
        calls()[1].run(model)
    assert (clock.index.item(), other.index.item()) == (1, 2)
    detach_clocks(model)
    detach_clocks(model)  # nothing is left to do
    for each in (model, twin):
        assert list(each._forward_pre_hooks.values()) == [nothing] and not each._forward_pre_hooks_with_kwargs
    theirs.remove()
    assert not model._forward_pre_hooks and vars(model).keys() == vars(small()).keys()


# --- exact: tables ---------------------------------------------------------------------------------------------------


@exact
def test_a_table_of_16_bits_is_full_precision_and_nothing_else_runs():
    session = session_of(temporal="cache", temporal_bits=16, weight_bits=4)
    full = [outputs_of(session.model, BLOCK[2:], call) for call in calls()]
    model = finished(session)
    assert isinstance(model.time_1, SkippedLayer) and isinstance(model.time_2, SkippedLayer)
    for name in BLOCK[2:]:
        table = model.get_submodule(name)
        assert isinstance(table, FeatureTable) and table.layer is None
    assert not {name for name, _ in model.named_parameters() if name.startswith("time_")}
    assert session.config.tables == BLOCK[2:] and session.config.skipped == BLOCK[:2]
    for call, wanted in zip(calls(), full, strict=True):
        found = outputs_of(model, BLOCK[2:], call)
        assert all(torch.allclose(found[n], wanted[n], atol=1e-3 * float(wanted[n].abs().max())) for n in wanted)
    with pytest.raises(ValueError, match="3 timesteps 900 to 300"):
        model(torch.zeros(1, 4, 6, 6), torch.tensor(500.0))
    mixed = model(torch.zeros(2, 4, 6, 6), torch.tensor([300.0, 900.0]))[0]
    assert torch.allclose(mixed[1:], model(torch.zeros(1, 4, 6, 6), torch.tensor(900.0))[0], atol=1e-5)


@exact
@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_by_slow_rows(bits):
    vectors = ptq.formula(3, 7)
    table = FeatureTable.filled(vectors, bits, None, Clock(TIMES))
    for row in range(3):
        slow = ptq.slow_uniform(vectors[row], float(vectors[row].min()), float(vectors[row].max()), bits)
        assert torch.allclose(table.rows(torch.tensor([row]))[0], torch.tensor(slow), atol=1e-6)
    assert table.codes.numel() * table.codes.element_size() == 3 * (4 if bits == 4 else 7)


@exact
@pytest.mark.parametrize(("temporal_bits", "weight_bits"), [(2, 8), (8, 3)])
def test_selection_is_the_better_of_both(temporal_bits, weight_bits):
    """For every feature and timestep."""
    session = session_of(temporal="auto", temporal_bits=temporal_bits, weight_bits=weight_bits, weight_range="minmax")
    with session.in_place():
        session.place_weights()
        session.place_inputs()
        computed = session.block.errors()
    model, targets = finished(session), session.block.targets
    chosen = []
    for name in BLOCK[2:]:
        table = model.get_submodule(name)
        kept = (table.rows(torch.arange(3)) - targets[name]).norm(dim=1)
        for row, call in enumerate(calls()):
            error = (outputs_of(model, [name], call)[name][0] - targets[name][row]).norm()
            assert error <= min(kept[row], computed[name][row]) * (1 + 1e-4)
        chosen += table.chosen.tolist()
    assert all(chosen) if temporal_bits == 8 else not all(chosen), chosen
    call = calls()[0]
    between = type(call)({**call.kwargs, "timestep": torch.tensor(450.0)}, "sample", 0, 450.0)
    for name, found in outputs_of(model, BLOCK[2:], between).items():
        assert torch.equal(found, outputs_of(model, [f"{name}.layer"], between)[f"{name}.layer"]), "not in the table"


@exact
def test_conditions_do_not_share_a_table():
    """With a label before the sum, the features after it are computed, and differ at one timestep."""
    model = finished(session_of(temporal="cache", classes=3, act_bits=None))
    assert isinstance(model.time_2, FeatureTable) and isinstance(model.blocks[0].time_proj, QuantizedLayer)
    found = outputs_of(model, BLOCK[2:3], calls(classes=3)[0])[BLOCK[2]]
    assert (found[0] - found[1]).abs().max() > 1e-3 and torch.equal(found[0], found[3])


@exact
def test_the_temporal_error_falls_and_so_does_that_of_the_output():
    errors, outputs = {}, {}
    for temporal in ("none", "reconstruct", "cache", "auto"):
        session = session_of(temporal=temporal, weight_bits=3, rounding="nearest", attention=False)
        with torch.no_grad():
            full = [outputs_of(session.model, BLOCK[2:], call) for call in calls()]
            wanted = torch.cat([call.run(session.model)[0] for call in calls()])
            model = finished(session)
            outputs[temporal] = float((torch.cat([call.run(model)[0] for call in calls()]) - wanted).norm())
        seen = [outputs_of(model, BLOCK[2:], call) for call in calls()]
        errors[temporal] = sum(float((a[n] - b[n]).norm()) for a, b in zip(seen, full, strict=True) for n in a)
    assert errors["cache"] < 0.2 * errors["none"] and errors["auto"] <= errors["cache"] * (1 + 1e-5)
    assert outputs["cache"] < outputs["none"] and outputs["auto"] < outputs["none"]


@exact
def test_integer_products_equal_the_simulation():
    found = []
    for arithmetic in ("simulated", "int8"):
        model = finished(session_of(temporal="reconstruct", arithmetic=arithmetic, attention=False))
        with torch.no_grad():
            found.append(torch.cat([call.run(model)[0] for call in calls()]))
    assert torch.allclose(*found, atol=1e-3)


# --- refusals --------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temporal": "table"}, "`temporal` is 'table'; allowed are none, reconstruct, cache, auto"),
        ({"temporal_bits": 1}, "`temporal_bits` is 1"),
        (
            {"method": "minmax", "backend": "quanto", "temporal": "auto"},
            "`temporal` is 'auto'; backend 'quanto' allows",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PTQConfig(**{**QUICK, **settings})


@exact
def test_a_model_without_a_temporal_block_is_refused():
    with pytest.raises(
        ValueError, match="`temporal` needs layers that depend on the timestep alone, and SmallDenoiser"
    ):
        session_of(exclude=["time_1", "time_2", "blocks.0.time_proj", "blocks.1.time_proj"])


# --- reference -------------------------------------------------------------------------------------------------------


@reference
def test_reference():
    """Features with soft weights, the loss, and features with hard weights and inputs whose ranges are each timestep's."""
    config = PTQConfig(
        method="tfmq_dm", temporal="reconstruct", weight_bits=4, act_bits=6, weight_range="minmax", act_range="minmax"
    )
    session = Session(small(), config, calls(), 0, (900.0, 600.0, 300.0, 10.0))
    block = session.block
    layers = [session.layers[name] for name in BLOCK]
    for name, wanted in zip(block.features, GOLDEN["full"], strict=True):
        assert torch.allclose(block.targets[name], torch.tensor(wanted), atol=1e-5)
    with session.in_place(), torch.no_grad():
        session.place_weights()
        penalties, alphas = [], []
        for layer in layers:
            alpha = start_alpha(layer.weight_grid.share(layer.float_weight, layer.spread_weight_place()))
            alphas.append(alpha + torch.sin(torch.arange(alpha.numel(), dtype=torch.float32)).reshape(alpha.shape))
            layer.soft = soft_share(alphas[-1])
        soft = block(block.all_rows())
        assert all(torch.allclose(a, torch.tensor(b), atol=1e-4) for a, b in zip(soft, GOLDEN["soft"], strict=True))
        error = unit_error(soft, [block.targets[name] for name in block.features])
        for count, wanted in zip((1, 20, 40, 60, 99), GOLDEN["loss"], strict=True):
            beta = beta_at(count, 100)
            penalties = [(1 - (2 * layer.soft - 1).abs().pow(beta)).sum() for layer in layers] if beta else [0]
            assert float(error + 0.01 * sum(penalties)) == pytest.approx(wanted, rel=1e-3), count
        for layer, alpha in zip(layers, alphas, strict=True):
            layer.soft = None
            layer.rounded = layer.weight_grid.between(
                layer.float_weight, (alpha >= 0).float(), layer.spread_weight_place()
            )
        block.place_inputs("minmax", [1.0], 2.0, False)
        assert torch.allclose(torch.cat(block(block.all_rows()), 1), torch.tensor(GOLDEN["by_timestep"]), atol=1e-4)


# --- loads and card --------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
@pytest.mark.parametrize("temporal", ["cache", "auto"])
def test_tables_come_back(temporal, tmp_path):
    pipe, stock = ptq.tiny()
    settings = {"temporal": temporal, "rounding": "nearest", "weight_bits": 4}
    ptq.quantized(pipe, steps=3, method="tfmq_dm", **settings)
    expected = stock.draw(pipe, 3)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    ours, theirs = pipe.unet.state_dict(), loaded.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(stock.draw(loaded, 3), expected)
    table = loaded.unet.mid_block.resnets[0].time_emb_proj
    assert isinstance(table, FeatureTable) and len(table.clock.times) == 3
    cost = loaded.unet.config.quantization_config.calibration
    assert cost == pipe.unet.config.quantization_config.calibration and set(cost) == {"minutes", "peak_bytes"}
    assert 0 <= cost["minutes"] < 10 and 0 <= cost["peak_bytes"] < 2**34
    text = summary(tmp_path)
    assert text in pipeline_card(tmp_path)
    assert text == summary(pipe) and text.startswith("- `unet`: `tfmq_dm`, 4-bit weights and 8-bit activations")
    assert f"{cost['minutes']:.1f} min" in text and "simulated" in text and not summary(ptq.tiny()[0])
    half = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    table = half.unet.mid_block.resnets[0].time_emb_proj
    assert table.codes.dtype == torch.int8 and table.weight_place.dtype == torch.float32
    if temporal == "cache":
        assert table.chosen.all() and isinstance(loaded.unet.time_embedding.linear_1, SkippedLayer)
        with pytest.raises(ValueError, match="the model's temporal features are cached for the 3 timesteps 666 to 0"):
            stock.draw(loaded, 2)
        with pytest.raises(ValueError, match="replaced by tables"):
            loaded.unet.dequantize()
    else:
        stock.draw(loaded, 2)
        loaded.unet.dequantize()
        assert isinstance(loaded.unet.mid_block.resnets[0].time_emb_proj, nn.Linear)
        assert not loaded.unet._forward_pre_hooks
        stock.draw(loaded, 2)


@pytest.mark.proof("card")
def test_card():
    ptq.run_card("tfmq_dm", "2407.19547", rounding="nearest", search_from=0.95, exclude=["down_blocks", "up_blocks"])
