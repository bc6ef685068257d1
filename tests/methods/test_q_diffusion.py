"""Q-Diffusion, by the five proofs. What it shares with the others is in `test_ptq4dm`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusers_ext.quantization import PTQConfig
from diffusers_ext.quantization.attention import AttentionInputs
from diffusers_ext.quantization.grids import UniformGrid, spread
from diffusers_ext.quantization.layers import CalibratedLayer, LayerForm
from diffusers_ext.quantization.observers import InputObserver, shrinks, weight_place
from diffusers_ext.quantization.rounding import (
    Sample,
    beta_at,
    learn_rounding,
    learn_scales,
    mean_error,
    soft_share,
    start_alpha,
    unit_error,
)
from diffusers_ext.quantization.session import Session
from tests import ptq
from tests.common.suite import CommonCase
from tests.methods.test_ptq4dm import recorded
from tests.unets import conditional, inputs

COMMON = CommonCase(make=ptq.maker("tiny-ddpm", "tiny-flux", method="q_diffusion"))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "q_diffusion.json").read_text())["runs"]

exact = pytest.mark.proof("exact")
reference = pytest.mark.proof("reference")


def calibrated(layer, bits=4, split=0, **form):
    found = CalibratedLayer(layer, LayerForm(bits, 8, split, **form))
    found.weight_place = weight_place(layer.weight, found.weight_grid, split, "minmax", [1.0], 2.0)
    return found


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
def test_split_with_equal_places_is_unsplit():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 5, 3, padding=1), torch.randn(2, 6, 4, 4)
    one, two = calibrated(layer), calibrated(layer, split=2)
    two.weight_place = one.weight_place.expand(-1, 2, -1).clone()
    observer = InputObserver(1, 0, "minmax")
    observer(x)
    one.input_place = observer.place(one.input_grid, [1.0], 2.0, False)
    two.input_place = one.input_place.expand(-1, 2).clone()
    for both in (one, two):
        both.weights_on = both.inputs_on = True
    with torch.no_grad():
        assert torch.equal(one(x), two(x)) and torch.equal(one.packed()(x), two.packed()(x))


@exact
def test_split_gives_each_part_its_own_range():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(2, 2, 4, 4) * 20, torch.randn(2, 4, 4, 4)], 1)
    observers = [InputObserver(1, split, "minmax") for split in (0, 2)]
    errors = []
    for split, observer in zip((0, 2), observers, strict=True):
        observer(x)
        grid = UniformGrid(4)
        place = observer.place(grid, [1.0], 2.0, False)
        quantized = grid.quantize(x, spread(place, x.shape, 1, split))
        errors.append((quantized - x)[:, 2:].norm())
        parts = (x[:, :2], x[:, 2:]) if split else (x,)
        expected = [ptq.slow_uniform(part, float(part.min()), float(part.max()), 4) for part in parts]
        for part, slow in zip(quantized.split([p.shape[1] for p in parts], 1), expected, strict=True):
            assert torch.allclose(part.flatten(), torch.tensor(slow), atol=1e-5)
    assert errors[1] < errors[0] / 3


@exact
def test_the_split_is_where_the_unet_concatenates():
    """Channels that come from below: counted by hooks on `torch.cat` of the up path, which the core does not look at."""
    unet = conditional(2)
    seen: list[int] = []
    cat = torch.cat

    def noted(tensors, dim=0, **kwargs):
        if dim == 1 and len(tensors) == 2 and tensors[0].ndim == 4:
            seen.append(tensors[0].shape[1])
        return cat(tensors, dim, **kwargs)

    from diffusers_ext.quantization.recording import Call
    from diffusers_ext.quantization.structure import trace

    call = Call(inputs(unet, 0), "sample", 0, 900.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", noted)
        with torch.no_grad():
            call.run(unet)
    splits = trace(unet, call).splits
    up = [f"up_blocks.{i}.resnets.{j}" for i, block in enumerate(unet.up_blocks) for j in range(len(block.resnets))]
    assert [splits[f"{name}.conv1"] for name in up] == seen
    assert [splits[f"{name}.conv_shortcut"] for name in up] == seen
    assert len(splits) == 2 * len(up)


@exact
def test_units_are_blocks_in_the_order_of_use():
    pipe, stock = ptq.tiny()
    session = Session(pipe.unet, PTQConfig(method="q_diffusion"), recorded(pipe, stock), 0)
    units = session.units()
    assert sorted(name for names in units.values() for name in names) == sorted(session.layers)
    order = list(units)
    assert order.index("conv_in") < order.index("down_blocks.0.resnets.0") < order.index("mid_block.resnets.0")
    assert order[-1] == "conv_out" and "time_embedding" in order
    assert set(units["mid_block.attentions.0"]) == {f"mid_block.attentions.0.to_{k}" for k in ("q", "k", "v", "out.0")}


@exact
@pytest.mark.parametrize("symmetric", [False, True])
def test_adaround_starts_at_the_weight_and_ends_on_the_grid(symmetric):
    torch.manual_seed(0)
    layer = calibrated(nn.Linear(12, 6), bits=3, symmetric=symmetric)
    place, grid, weight = layer.spread_weight_place(), layer.weight_grid, layer.float_weight
    share = grid.share(weight, place)
    alpha = start_alpha(share)
    soft = grid.between(weight, soft_share(alpha), place)
    ends = [grid.decode(torch.full_like(weight, code), place) for code in (0, 7)]
    inside = (weight >= ends[0]) & (weight <= ends[1])
    assert torch.allclose(soft[inside], weight[inside], atol=1e-6)
    assert torch.equal(
        grid.between(weight, (share >= 0.5).float(), place)[share != 0.5], grid.quantize(weight, place)[share != 0.5]
    )
    x = torch.randn(64, 3) @ torch.randn(3, 12)  # correlated: errors of weights can cancel
    target = layer.float_layer(x).detach()
    samples = [Sample((x,), {}, target)]
    better = learn_rounding(
        layer, [layer], samples, iterations=300, rate=3e-2, weight=0.01, generator=torch.Generator().manual_seed(0)
    )
    assert better and layer.rounded is not None
    assert torch.equal(grid.quantize(layer.rounded, place), layer.rounded)
    assert ((layer.rounded - weight).abs() <= place[0] * (1 + 1e-5))[inside].all()
    learnt = mean_error(layer, samples, 2.0)
    layer.rounded = None
    assert learnt < 0.8 * mean_error(layer, samples, 2.0), "nearest rounding is not the best one"


@exact
def test_what_is_not_better_is_not_kept():
    layer = calibrated(nn.Linear(4, 3))
    x = torch.zeros(2, 4)
    samples = [Sample((x,), {}, layer.float_layer(x).detach())]
    generator = torch.Generator().manual_seed(0)
    assert not learn_rounding(layer, [layer], samples, iterations=2, rate=1.0, weight=1.0, generator=generator)
    assert layer.rounded is None and layer.soft is None and layer.weights_on


@exact
def test_gradient_of_the_scale_is_that_of_lsq():
    """d x_q / d s = round(x/s) - x/s inside the range; outside, the bound."""
    x = ptq.formula(3, 20).double().float()
    grid = UniformGrid(3)
    place = grid.fit(x.min() * 0.6, x.max() * 0.6).requires_grad_(True)
    (gradient,) = torch.autograd.grad(grid.quantize(x, place).sum(), place)
    s, z = place.detach()
    codes = (x / s).round() + z
    inside = (codes >= 0) & (codes <= 7)
    slow = torch.where(inside, (x / s).round() - x / s, codes.clamp(0, 7) - z).sum()
    assert torch.allclose(gradient[0], slow, rtol=1e-4)


@exact
def test_scales_are_learnt():
    torch.manual_seed(0)
    layer = calibrated(nn.Linear(16, 8), bits=8)
    layer.weights_on = layer.inputs_on = True
    layer.input_grid = UniformGrid(3)
    x = torch.randn(256, 16)
    layer.input_place = layer.input_grid.fit(x.min(), x.max())[:, None]
    before = layer.input_place
    samples = [Sample((x,), {}, layer.float_layer(x).detach())]
    worse = mean_error(layer, samples, 2.4)
    generator = torch.Generator().manual_seed(0)
    assert learn_scales(layer, [layer], [], samples, iterations=60, rate=2e-2, power=2.4, generator=generator)
    assert mean_error(layer, samples, 2.4) < 0.95 * worse
    assert torch.equal(layer.input_place[1], before[1]) and not layer.input_place.requires_grad


@exact
def test_attention_inputs():
    """Quantized q, k, v and softmax by a slow formula; masks, scales and grouped heads as torch has them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.rand(2, 1, 5, 5) > 0.7, -1e4)
    inputs_ = AttentionInputs(8, 8)
    inputs_.observe("minmax")
    inputs_.on = False
    found = inputs_.attend(q, k, v, attn_mask=mask)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(found, plain, atol=1e-6), "while ranges are observed, nothing is quantized"
    for i, observer in enumerate(inputs_.observers):
        inputs_.places[:, i] = observer.place(inputs_.grids[i], [1.0], 2.0, False)[:, 0]
    inputs_.observers, inputs_.on = None, True
    low, high = (torch.tensor(0.0), torch.tensor(0.0))
    quantized = []
    for x in (q, k, v):
        low, high = x.min(), x.max()
        quantized.append(torch.tensor(ptq.slow_uniform(x, float(low), float(high), 8)).view_as(x))
    probabilities = (quantized[0] @ quantized[1].transpose(-2, -1) / 8**0.5 + mask).softmax(-1)
    grid, place = inputs_.grids[3], inputs_.places[:, 3]
    assert place[1] == 0
    expected = grid.quantize(probabilities, place) @ quantized[2]
    assert torch.allclose(inputs_.attend(q, k, v, attn_mask=mask), expected, atol=2e-3)
    wide = AttentionInputs(16, 16)
    wide.places = torch.stack([torch.full((4,), 2e-4), torch.tensor([32768.0, 32768.0, 32768.0, 0.0])])
    for options in ({"is_causal": True}, {"scale": 0.3}, {"attn_mask": mask > -1}):
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        assert torch.allclose(wide.attend(q, k, v, **options), plain, atol=2e-3), options
    few = wide.attend(q, k[:, :2], v[:, :2], enable_gqa=True)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert torch.allclose(few, plain, atol=2e-3)


@exact
def test_attention_of_a_pipeline_is_reached_and_a_silent_miss_is_an_error():
    from diffusers.models.attention_processor import AttnProcessor

    pipe, _ = ptq.tiny("tiny-flux")
    ptq.quantized(pipe, method="minmax")
    names = pipe.transformer.config.quantization_config.attentions
    assert len(names) == 4
    places = [pipe.transformer.get_submodule(name).attention_inputs.places for name in names]
    assert all((place[0] > 0).all() for place in places)
    pipe, stock = ptq.tiny()
    ptq.quantized(pipe, method="minmax")
    for module in pipe.unet.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())  # computes attention by itself
    with pytest.raises(RuntimeError, match="AttnProcessor did not call scaled_dot_product_attention"):
        stock.draw(pipe)


# --- reference -------------------------------------------------------------------------------------------------------


@reference
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("theirs", "how"), [("max", "minmax"), ("mse", "search")])
def test_reference_grids(bits, theirs, how):
    """Rows with values of both signs: for one-sided ones the release's range leaves 0 out and its zero point does not."""
    weight, grid = ptq.formula(4, 24), UniformGrid(bits)
    place = weight_place(weight, grid, 0, how, shrinks(0.21), 2.4)
    found = grid.quantize(weight, place[:, 0, :, None])
    assert torch.allclose(found.flatten(), torch.tensor(GOLDEN[f"weight_{theirs}_{bits}"]), atol=1e-6)


@reference
def test_reference_rounding():
    weight, grid = ptq.formula(4, 24), UniformGrid(4)
    place = weight_place(weight, grid, 0, "minmax", [1.0], 2.4)[:, 0, :, None]
    alpha = start_alpha(grid.share(weight, place))
    assert torch.allclose(alpha.flatten(), torch.tensor(GOLDEN["alpha"]), atol=2e-3, rtol=1e-3)
    alpha = torch.tensor(GOLDEN["alpha"]).view(4, 24) + ptq.formula(4, 24, 1.0)
    hard, soft = (grid.between(weight, share, place) for share in ((alpha >= 0).float(), soft_share(alpha)))
    assert torch.allclose(hard.flatten(), torch.tensor(GOLDEN["hard"]), atol=1e-6)
    assert torch.allclose(soft.flatten(), torch.tensor(GOLDEN["soft"]), atol=1e-6)
    share = soft_share(alpha)
    error = unit_error(ptq.formula(2, 4), ptq.formula(2, 4, 2.0))
    for count, expected in zip((1, 20, 40, 60, 99), GOLDEN["loss"], strict=True):
        beta = beta_at(count, 100)
        penalty = 0 if beta is None else 0.01 * (1 - (2 * share - 1).abs().pow(beta)).sum()
        assert float(error + penalty) == pytest.approx(expected, rel=1e-4), count


# --- loads and card --------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_split_and_attention_come_back(tmp_path):
    from diffusers import DiffusionPipeline

    pipe, stock = ptq.tiny()
    ptq.quantized(pipe, method="q_diffusion", weight_bits=4)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(stock.draw(loaded), stock.draw(pipe))
    layer = loaded.unet.get_submodule("up_blocks.0.resnets.0.conv1")
    assert layer.form.split == 16 and layer.weight_place.shape == (2, 2, 16)
    assert isinstance(loaded.unet.mid_block.attentions[0].attention_inputs, AttentionInputs)


@pytest.mark.proof("card")
def test_card():
    ptq.run_card(
        "q_diffusion",
        "2302.04304",
        rounding_iterations=1,
        scale_iterations=1,
        search_from=0.95,
        exclude=["down_blocks", "up_blocks"],
    )
