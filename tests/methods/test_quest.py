"""QuEST, by the five proofs. What it shares with the others is in `test_ptq4dm` and `test_q_diffusion`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.quantization import PTQConfig
from diffusers_ext.quantization.finetuning import _Stage, sensitive_layers
from diffusers_ext.quantization.grids import FloatGrid, UniformGrid, spread
from diffusers_ext.quantization.observers import InputObserver, weight_place
from diffusers_ext.quantization.session import Session
from diffusers_ext.quantization.timing import Clock
from tests import ptq
from tests.common.suite import CommonCase
from tests.golden.make_quest import tokens
from tests.small_denoiser import calls, small

FEW = {"rounding": "nearest", "scale_iterations": 0, "stages": ["time_embedding"], "time_epochs": 1}
COMMON = CommonCase(make=ptq.maker("tiny-ddpm", "tiny-flux", method="quest", **FEW))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "quest.json").read_text())["runs"]
TIMES = (900.0, 600.0, 300.0)
PROJECTIONS = ["blocks.0.time_proj", "blocks.1.time_proj"]
SENSITIVE = ["ff.net.0.proj", "ff.net.2", "attention.to_q", "attention.to_k", "attention.to_v"]
QUICK = {
    "method": "quest", "weight_bits": 4, "act_bits": 4, "rounding": "nearest", "search_from": 0.8, "time_epochs": 4,
    "layer_epochs": 4,
}  # fmt: skip

exact = pytest.mark.proof("exact")
reference = pytest.mark.proof("reference")


def placed(**settings):
    """A session whose weights and activations are quantized."""
    session = Session(small(), PTQConfig(**{**QUICK, **settings}), calls(), 0)
    session.inside = session.in_place()  # held, or it would end here
    session.inside.__enter__()
    session.place_weights()
    session.round_weights()
    session.place_inputs()
    return session


def state_of(session):
    """All that a stage may change."""
    state = {}
    for name, layer in session.layers.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = layer.weight, layer.bias
        state[f"{name}.scales"], state[f"{name}.zeros"] = layer.input_place[0], layer.input_place[1]
    for name, inputs in session.attentions.items():
        state[f"{name}.attention.scales"], state[f"{name}.attention.zeros"] = inputs.places[0], inputs.places[1]
    return {name: value.detach().clone() for name, value in state.items() if value is not None}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@torch.no_grad()
def output_error(session):
    with session.full_precision():
        wanted = [call.run(session.model)[0] for call in session.calls]
    return sum(
        float((call.run(session.model)[0] - y).square().mean()) for call, y in zip(session.calls, wanted, strict=True)
    )


# --- exact: scales ---------------------------------------------------------------------------------------------------


@exact
def test_a_step_takes_the_scales_of_the_first_step_of_its_group():
    """Step i of n, in G groups: those of step (n/G) * floor(i / (n/G))."""
    times = [float(t) for t in range(950, -50, -50)]
    clock = Clock(times[::4])
    for i, time in enumerate(times):
        clock.read(torch.tensor(time))
        assert clock.times[clock.index] == times[4 * (i // 4)]


@exact
def test_scales_of_each_step_and_channel():
    """The range of each channel in the calls of one step, number by number."""
    session = placed(act_range="minmax")
    layer, seen = session.layers["blocks.0.conv1"], []
    assert layer.input_place.shape == (2, 4, 3) and session.config.group_times == list(TIMES)
    for call in session.calls:
        call.run(session.model)
        x = call.kwargs["sample"]
        quantized = layer.quantized_input(x)
        for channel in range(4):
            part = x[:, channel]
            slow = torch.tensor(ptq.slow_uniform(part, float(part.min()), float(part.max()), 4))
            assert torch.allclose(quantized[:, channel].flatten(), slow, atol=1e-5)
        seen.append(layer.input_place[0, :, int(session.group_clock.index)])
    assert (seen[0] > seen[2]).all(), "noise has larger ranges"
    assert session.attentions["attention"].places.shape == (2, 4, 3)


@exact
def test_one_group_is_static():
    found = calls((600.0,))
    outputs = []
    for step_scales in (True, False):
        session = Session(small(), PTQConfig(**{**QUICK, "step_scales": step_scales, "stages": []}), found, 0)
        with session.in_place(), torch.no_grad():
            session.place_weights()
            session.place_inputs()
            outputs.append(found[0].run(session.model)[0])
        assert bool(session.config.group_times) == step_scales
    assert torch.equal(*outputs)


@exact
def test_up_to_4_bits_have_scales_for_channels():
    assert (
        PTQConfig(method="quest", act_bits=4).channel_scales
        and not PTQConfig(method="quest", act_bits=8).channel_scales
    )
    place = torch.stack([torch.arange(1.0, 7), torch.arange(6.0)])  # (2, channels)
    x = torch.zeros(2, 6, 3, 3)
    assert spread(place, x.shape, 1, 0).shape == (2, 1, 6, 1, 1)
    by_row = spread(torch.stack([place, place + 1], -1), x.shape, 1, 0)
    assert by_row.shape == (2, 2, 6, 1, 1) and torch.equal(by_row[:, 1, :, 0, 0], place + 1)
    assert torch.equal(spread(place, (2, 5, 6), -1, 0)[:, 0, 0], place)


# --- exact: weights under their grid ---------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("grid", [UniformGrid(4), UniformGrid(3, True), FloatGrid(4), FloatGrid(8)])
def test_floor_and_direction_are_the_rounded_weights(grid):
    weight = ptq.formula(4, 24)
    place = grid.fit(weight.amin(1), weight.amax(1))[..., None]
    up = grid.goes_up(weight, place)
    assert torch.equal(grid.between(weight, up.float(), place), grid.quantize(weight, place))


@exact
def test_before_training_nothing_changes():
    session = placed(rounding="adaround", rounding_iterations=20, rounding_rate=3e-2)
    layers = [session.layers[name] for name in (*PROJECTIONS, *SENSITIVE)]
    assert any(layer.rounded is not None for layer in layers) and any(layer.up is not None for layer in layers)
    before = state_of(session)
    _Stage(session, "sensitive_layers", layers, [])._freed()
    assert not changed(before, state_of(session)), "bit for bit"
    with session.full_precision(), torch.no_grad():
        call = session.calls[0]
        assert torch.equal(call.run(session.model)[0], call.run(small())[0])


@exact
def test_the_gradient_goes_through_the_floor():
    grid, weight = UniformGrid(3), ptq.formula(4, 24)
    place = grid.fit(weight.amin(1) * 0.5, weight.amax(1) * 0.5)[..., None]
    free = weight.clone().requires_grad_(True)
    up = grid.goes_up(weight, place).float()
    (gradient,) = torch.autograd.grad((grid.between(free, up, place) * ptq.formula(4, 24, 1.0)).sum(), free)
    codes = (weight / place[0]).floor() + up + place[1]
    inside = (codes >= 0) & (codes <= 7)
    assert 0 < inside.float().mean() < 1
    assert torch.allclose(gradient, ptq.formula(4, 24, 1.0) * inside, atol=1e-6)


# --- exact: stages ---------------------------------------------------------------------------------------------------


@exact
def test_what_the_stages_are_about():
    session = placed()
    assert session.time_projections == PROJECTIONS
    assert session.time_layers == ["time_1", "time_2", *PROJECTIONS]
    assert session.sensitive == SENSITIVE
    labelled = Session(small(3), PTQConfig(**QUICK), calls(classes=3), 0)
    assert labelled.time_projections == PROJECTIONS, "with a label, they see the timestep all the same"
    text = {**calls()[0].kwargs, "encoder_hidden_states": torch.zeros(1)}
    call = type(calls()[0])(text, "sample", 0, 900.0)
    assert sensitive_layers(small(), call, ["attention"], []) == SENSITIVE[:2], "with text, feed-forward layers alone"


@exact
def test_each_stage_trains_its_own_and_lowers_the_error():
    session = placed(weight_bits=8, finetune_rate=3e-3, finetune_scale_rate=3e-2, time_epochs=8)
    floats = {name: value.clone() for name, value in small().state_dict().items()}
    errors, states = [output_error(session)], [state_of(session)]
    for stage in session.config.stages:
        session.config.stages = [stage]
        session.finetune()
        errors.append(output_error(session))
        states.append(state_of(session))
        assert session.config.calibration["trained_parameters"] > 0
    assert errors[0] > errors[1] > errors[2]
    first, second = changed(*states[:2]), changed(*states[1:])
    assert {name.rpartition(".")[0] for name in first} == set(PROJECTIONS)
    weights = {name.rpartition(".")[0] for name in second if name.endswith((".weight", ".bias"))}
    assert weights <= set(SENSITIVE) | {"attention"} and weights
    scales = {name.rpartition(".")[0] for name in second if name.endswith(".scales")}
    assert scales and not scales & set(session.time_layers) and "attention.attention" in scales
    assert not {name for name in first | second if name.endswith(".zeros")}, "zero points stay"
    kept = {name.replace(".float_layer", ""): value for name, value in session.model.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in floats.items()), "the float layers are never changed"
    assert all(layer.clock is session.group_clock for layer in session.layers.values())
    assert not any(value.requires_grad for value in state_of(session).values())
    for name, layer in session.packed().items():
        trained = session.layers[name]
        assert torch.allclose(layer.weight, trained.weight, atol=1e-6), "what is kept is what was trained"
        assert layer.bias is trained.bias or torch.equal(layer.bias, trained.bias)


@exact
def test_the_stages_run_in_their_order_with_what_is_theirs(monkeypatch):
    """First projections, all epochs of a timestep at once. Then sensitive layers, with the scales of all but the layers of time,
    all timesteps in each epoch."""
    session = placed(finetune_rate=2e-3, finetune_scale_rate=5e-2, time_epochs=3, layer_epochs=2)
    found = {holder: name for name, holder in {**session.layers, **session.attentions}.items()}
    visits, about = [], []

    def visit(stage, time, batches, optimizer, weights, bar):
        visits.append((time, len(batches)))
        (group,) = optimizer.param_groups
        what = [found[layer] for layer in stage.layers], {found[holder] for holder, _ in stage.holders}
        if what not in about:
            about.append(what)
        assert (group["lr"], stage.scale_rate) == pytest.approx((2e-3, 5e-3 if stage.first else 5e-2))

    monkeypatch.setattr(_Stage, "_visit", visit)
    session.finetune()
    others = {*session.layers, "attention"} - set(session.time_layers)
    assert about == [(PROJECTIONS, set(PROJECTIONS)), (SENSITIVE, others)]
    assert visits == [(time, 3 * 2) for time in TIMES] + 2 * [(time, 1) for time in TIMES]


@exact
@pytest.mark.parametrize(("name", "share"), [("time_embedding", 0.1), ("sensitive_layers", 1.0)])
def test_the_first_step_of_adam_is_as_long_as_the_rates_say(name, share):
    """Weights move by `finetune_rate`, the logarithms of scales by `finetune_scale_rate`, a tenth of it in the first stage.

    The scales of other timesteps stay.
    """
    session = placed(finetune_rate=2e-3, finetune_scale_rate=5e-2)
    names = PROJECTIONS if name == "time_embedding" else SENSITIVE
    layers = [session.layers[each] for each in names]
    stage = _Stage(session, name, layers, layers)
    before = [layer.input_place for layer in layers]
    weights = stage._freed()
    starts = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=stage.rate)
    stage._visit(600.0, stage._batches(600.0)[:1], optimizer, weights, tqdm(disable=True))
    moved = torch.cat(
        [(weight.detach() - start).abs().flatten() for weight, start in zip(weights, starts, strict=True)]
    )
    assert float(moved.max()) == pytest.approx(2e-3, rel=1e-2) and float(moved.median()) > 1e-3
    logs = torch.cat([(a.input_place[0] / b[0]).log().abs() for a, b in zip(layers, before, strict=True)])
    assert float(logs[:, 1].max()) == pytest.approx(5e-2 * share, rel=0.1)
    assert not logs[:, [0, 2]].any(), "those of other steps"


@exact
def test_a_stage_that_is_not_better_is_undone():
    session = placed(finetune_rate=10.0, finetune_scale_rate=10.0, time_epochs=1, layer_epochs=1)
    before = state_of(session)
    session.finetune()
    assert not changed(before, state_of(session))
    assert session.config.calibration == {"trained_parameters": 0, "changed_weights": 0}


@exact
def test_the_loss_of_each_stage():
    """The output's error counts once for each projection in the first stage, and alone in the second."""
    session = placed()
    for stage, names in (("time_embedding", PROJECTIONS), ("sensitive_layers", [])):
        layers = [session.layers[name] for name in names]
        runner = _Stage(session, stage, layers, [])
        batches = runner._batches(600.0)
        assert [batch.call.rows for batch in batches] == ([2, 2] if names else [4])
        call, found = batches[0].call, []
        with torch.no_grad():
            for quantized in (True, False):
                seen = {}
                handles = [
                    layer.register_forward_hook(lambda m, a, y, seen=seen: seen.__setitem__(m, y)) for layer in layers
                ]
                if quantized:
                    output = call.run(session.model)[0]
                else:
                    with session.full_precision():
                        output = call.run(session.model)[0]
                for handle in handles:
                    handle.remove()
                found.append([output, *(seen[layer] for layer in layers)])
        errors = [float(((a - b) ** 2).mean()) for a, b in zip(*found, strict=True)]
        expected = sum(error + errors[0] for error in errors[1:]) if names else errors[0]
        assert float(runner._loss(batches[0]).detach()) == pytest.approx(expected, rel=1e-5)


# --- refusals --------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ["all"]}, r"`stages` is \['all'\]; allowed are lists of time_embedding, sensitive_layers"),
        ({"stages": ["sensitive_layers", "time_embedding"]}, "in this order"),
        ({"time_epochs": 0}, "`time_epochs` is 0"),
        ({"finetune_rate": -1.0}, "`finetune_rate` is -1.0"),
        ({"act_range": "search"}, "`channel_scales` is True and `act_range` 'search'"),
        ({"arithmetic": "int8"}, "`arithmetic` is 'int8' and `channel_scales` True"),
        ({"backend": "quanto", "act_bits": 8, "stages": ["time_embedding"]}, "backend 'quanto' allows"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PTQConfig(**{**QUICK, **settings})


# --- reference -------------------------------------------------------------------------------------------------------


@reference
def test_reference_weights():
    """Weights that were trained away from where their rounding was learnt, and the gradient that reaches them."""
    weight, grid = ptq.formula(4, 24), UniformGrid(4)
    place = weight_place(weight, grid, 0, "minmax", [1.0], 2.0)[:, 0, :, None]
    up = (torch.tensor(GOLDEN["alpha"]).view(4, 24) >= 0).float()
    free = (weight + 0.3 * ptq.formula(4, 24, 2.0)).requires_grad_(True)
    hard = grid.between(free, up, place)
    assert torch.allclose(hard.flatten(), torch.tensor(GOLDEN["hard"]), atol=1e-6)
    (gradient,) = torch.autograd.grad((hard * ptq.formula(4, 24, 3.0)).sum(), free)
    assert torch.allclose(gradient.flatten(), torch.tensor(GOLDEN["gradient"]), atol=1e-5)


@reference
@pytest.mark.parametrize("kind", ["tokens", "pixels"])
def test_reference_scales(kind):
    """A channel that has values of one sign only is left out: the release's range leaves 0 out, its zero point does not."""
    grid = UniformGrid(4)
    for i in range(3):
        x, y = tokens(float(i)), tokens(i + 0.5)
        axis = -1
        if kind == "pixels":
            x, y, axis = x.mT.reshape(2, 6, 2, 4), y.mT.reshape(2, 6, 2, 4), 1
        observer = InputObserver(axis, 0, "minmax", channels=True)
        observer(x)
        found = grid.quantize(y, spread(observer.place(grid, [1.0], 2.0, False), y.shape, axis, 0))
        flat = x.movedim(axis, 0).flatten(1)
        two_sided = (flat.amin(1) < 0) & (flat.amax(1) > 0)
        assert two_sided.sum() >= 3
        wanted = torch.tensor(GOLDEN[kind][i]).view_as(found).movedim(axis, 0)[two_sided]
        assert torch.allclose(found.movedim(axis, 0)[two_sided], wanted, atol=1e-5)


# --- loads and card --------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_scales_of_steps_and_channels_come_back(tmp_path):
    pipe, stock = ptq.tiny()
    ptq.quantized(pipe, steps=3, **{**QUICK, "scale_iterations": 0, "time_epochs": 1, "layer_epochs": 1})
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    ours, theirs = pipe.unet.state_dict(), loaded.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(stock.draw(loaded, 3), stock.draw(pipe, 3))
    layer = loaded.unet.mid_block.resnets[0].conv1
    assert layer.input_place.shape == (2, layer.in_channels, 3) and layer.clock.times == (666.0, 333.0, 0.0)
    assert loaded.unet.mid_block.attentions[0].attention_inputs.places.shape == (2, 4, 3)
    stock.draw(loaded, 2)  # steps between take the scales of the noisier one


@pytest.mark.proof("card")
def test_card():
    ptq.run_card(
        "quest",
        "2402.03666",
        rounding="nearest",
        search_from=0.95,
        time_epochs=1,
        layer_epochs=1,
        calibration_steps=1,
        exclude=["down_blocks", "up_blocks"],
    )
