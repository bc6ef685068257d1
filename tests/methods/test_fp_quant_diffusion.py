"""Floating-point quantization, by the five proofs. What it shares with the others is in `test_ptq4dm`."""

from __future__ import annotations

import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffusers_ext.quantization.grids import FLOAT_MANTISSAS, FloatGrid, UniformGrid
from diffusers_ext.quantization.layers import CalibratedLayer, LayerForm
from diffusers_ext.quantization.observers import _KEPT, InputObserver, search, shrinks, weight_place
from diffusers_ext.quantization.packing import pack, unpack
from diffusers_ext.quantization.rounding import Sample, learn_rounding
from tests import ptq
from tests.common.suite import CommonCase
from tests.fresh import run_fresh

COMMON = CommonCase(make=ptq.maker("tiny-ddpm", "tiny-flux", method="fp_quant_diffusion"))
exact = pytest.mark.proof("exact")


def place_of(bits: int, mantissa: int, bias: float) -> torch.Tensor:
    return torch.tensor([2.0**-bias, mantissa])


@exact
@pytest.mark.parametrize(
    ("mantissa", "bias", "dtype", "largest"),
    [(3, 7, torch.float8_e4m3fn, 448.0), (2, 15, torch.float8_e5m2, 57344.0)],
)
def test_fp8_is_that_of_torch(mantissa, bias, dtype, largest):
    """E4M3 has 480 here, which torch's type keeps for NaN."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(4000) * 10.0 ** torch.randint(-6, 4, (4000,)), torch.linspace(-largest, largest, 4001)])
    x = x.clamp(-largest, largest)
    assert torch.equal(FloatGrid(8).quantize(x, place_of(8, mantissa, bias)), x.to(dtype).float())


@exact
@pytest.mark.parametrize(("bits", "mantissa"), [(b, m) for b, found in FLOAT_MANTISSAS.items() for m in found])
@pytest.mark.parametrize("bias", [1.0, 2.37])
def test_values_of_the_grid(bits, mantissa, bias):
    grid, place = FloatGrid(bits), place_of(bits, mantissa, bias)
    values = torch.tensor(ptq.float_values(bits - 1 - mantissa, mantissa, bias))
    assert len(values) == 2**bits - 1
    assert torch.allclose(grid.quantize(values, place), values, rtol=1e-6)
    codes = torch.arange(2**bits, dtype=torch.int32)
    decoded = grid.decode(codes, place)
    assert torch.allclose(decoded.unique(), values, rtol=1e-6)
    known = decoded[codes != 2 ** (bits - 1)]  # the code of -0 is never made
    assert torch.equal(grid.encode(known, place), codes[codes != 2 ** (bits - 1)])
    x = torch.randn(2000) * values[-1] / 2
    nearest = values[(x[:, None] - values).abs().argmin(1)]
    y = grid.quantize(x, place)
    assert ((y - x).abs() <= (nearest - x).abs() + 1e-6 * x.abs()).all(), "no value of the grid is nearer"
    assert torch.equal(grid.quantize(y, place), y)
    codes = grid.encode(y, place).view(8, -1)
    assert torch.equal(grid.decode(unpack(pack(codes, bits), codes.shape, bits), place).flatten(), y + 0.0)


@exact
def test_e2m1():
    values = ptq.float_values(2, 1, 1)
    assert [v for v in values if v >= 0] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@exact
def test_neighbours():
    """Rounded up or down a weight is on the grid, also across a power of two and at the largest value."""
    for bits, mantissas in FLOAT_MANTISSAS.items():
        for mantissa in mantissas:
            grid, place = FloatGrid(bits), place_of(bits, mantissa, 1.3)
            values = torch.tensor(ptq.float_values(bits - 1 - mantissa, mantissa, 1.3))
            x = torch.cat([torch.randn(500) * values[-1] / 2, values])
            for share in (0.0, 1.0):
                y = grid.between(x, torch.full_like(x, share), place)
                assert torch.equal(grid.quantize(y, place), y)
            below = grid.between(x, torch.zeros_like(x), place)
            clipped = x.clamp(values[0], values[-1])
            assert (below <= clipped * (1 + 1e-6 * clipped.sign())).all()
            assert torch.allclose(grid.between(x, grid.share(x, place), place), clipped, rtol=1e-5, atol=1e-7)


@exact
@pytest.mark.proof("reference")
def test_the_search_takes_the_best_pair_of_format_and_clip():
    """An independent derivation: every format and clip value, number by number."""
    weight = ptq.formula(2, 30)
    factors = [1.0, 0.9, 0.8, 0.7, 0.6]
    place = weight_place(weight, FloatGrid(4), 0, "search", factors, 2.0)
    for row in range(2):
        best = None
        for mantissa in FLOAT_MANTISSAS[4]:
            exponents = 3 - mantissa
            for factor in factors:
                top = float(weight[row].abs().max()) * factor
                reach = ptq.float_values(exponents, mantissa, 0.0)[-1]
                values = torch.tensor(ptq.float_values(exponents, mantissa, 0.0), dtype=torch.float64) * top / reach
                error = float((weight[row].double()[:, None] - values).abs().min(1).values.square().sum())
                if best is None or error < best[0] - 1e-9:
                    best = (error, mantissa)
        found = FloatGrid(4).quantize(weight[row], place[:, 0, row])
        assert float((found - weight[row]).double().square().sum()) == pytest.approx(best[0], rel=1e-4)
        assert float(place[1, 0, row]) == best[1]


@exact
def test_e1m2_is_the_uniform_grid_of_15_values():
    weight = ptq.formula(3, 50)
    grid = FloatGrid(4)
    chosen = weight_place(weight, grid, 0, "search", shrinks(0.05), 2.0)
    even = search(weight, grid, [grid.place(weight.abs().amax(1) * f, 2) for f in shrinks(0.05)], 2.0)
    errors = [(grid.quantize(weight, p[..., None]) - weight).square().sum(1) for p in (chosen[:, 0], even)]
    assert (errors[0] <= errors[1] + 1e-6).all(), "the search over formats is never worse"
    scale = weight.abs().amax(1, keepdim=True) / 7
    uniform = (weight / scale).round().clamp(-7, 7) * scale
    full = grid.quantize(weight, grid.place(weight.abs().amax(1), 2)[..., None])
    assert torch.allclose(full, uniform, atol=1e-6)


@exact
def test_gaussian_errors():
    """Of a unit Gaussian with the best clip: INT4 .0119, E2M1 .0128, E1M2 .0129, E3M0 .038."""
    x = torch.randn(1, 200000, generator=torch.Generator().manual_seed(0))
    top = x.abs().amax(1)
    factors = [f for f in shrinks(0.3) if round(100 * f) % 2 == 0]
    for mantissa, expected in ((1, 0.0128), (2, 0.0129), (0, 0.038)):
        grid = FloatGrid(4)
        place = search(x, grid, [grid.place(top * f, mantissa) for f in factors], 2.0)
        assert float((grid.quantize(x, place[..., None]) - x).square().mean()) == pytest.approx(expected, rel=0.05)
    grid = UniformGrid(4)
    place = search(x, grid, grid.places(-top, top, factors), 2.0)
    assert float((grid.quantize(x, place[..., None]) - x).square().mean()) == pytest.approx(0.0119, rel=0.05)


@exact
def test_learnt_weights_are_neighbours():
    torch.manual_seed(0)
    linear = nn.Linear(12, 6)
    layer = CalibratedLayer(linear, LayerForm(4, 8, weight_format="float", act_format="float"))
    layer.weight_place = weight_place(linear.weight, layer.weight_grid, 0, "search", shrinks(0.5), 2.0)
    x = torch.randn(64, 12)
    samples = [Sample((x,), {}, linear(x).detach())]
    generator = torch.Generator().manual_seed(0)
    assert learn_rounding(layer, [layer], samples, iterations=200, rate=3e-2, weight=0.01, generator=generator)
    grid, place, weight = layer.weight_grid, layer.spread_weight_place(), layer.float_weight
    below, above = (grid.between(weight, torch.full_like(weight, share), place) for share in (0.0, 1.0))
    assert ((layer.rounded == below) | (layer.rounded == above)).all()


@pytest.mark.proof("loads")
def test_formats_come_back(tmp_path):
    from diffusers import DiffusionPipeline

    pipe, stock = ptq.tiny()
    ptq.quantized(pipe, method="fp_quant_diffusion", weight_bits=8, rounding="nearest")
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(stock.draw(loaded), stock.draw(pipe))
    mantissas = {
        int(m) for n, v in loaded.unet.state_dict().items() if n.endswith("weight_place") for m in v[1].flatten()
    }
    assert len(mantissas) > 1, "the format is chosen row by row"


@pytest.mark.proof("card")
def test_card():
    ptq.run_card(
        "fp_quant_diffusion",
        "2408.06995",
        rounding_iterations=1,
        search_from=0.95,
        exclude=["down_blocks", "up_blocks"],
    )


@pytest.mark.proof("exact")
def test_a_search_sees_all_calls_and_all_channels_alike():
    """Of many calls with more values than are kept: as many of each, and of every channel."""
    observer, calls, channels = InputObserver(-1, 0, "search"), 6, 64
    for call in range(calls):
        x = torch.arange(channels).float().expand(2 * _KEPT // channels, channels) + call * channels
        observer(x)
    most = 2 * _KEPT // calls
    kept = torch.cat([parts[0][:most] for parts in observer.values])
    assert torch.equal(torch.bincount((kept / channels).long()), torch.full((calls,), most))
    assert len((kept % channels).unique()) == channels


@pytest.mark.proof("exact")
def test_the_config_may_be_what_is_used_first():
    run_fresh("import diffusers_ext as dx\ndx.PTQConfig()")


@pytest.mark.proof("loads")
def test_half_precision_pickle_and_wrong_names(pipe, tmp_path):
    """Places of grids stay in float32 in a model loaded in half precision; a quantized model is pickled; names that match
    nothing are refused before anything is done."""
    with pytest.raises(ValueError, match=r"`exclude` names \['conv_outt'\]"):
        ptq.quantized(pipe, method="minmax", exclude=["conv_outt"])
    ptq.quantized(pipe, method="minmax", attention=True)
    state = pipe.unet.state_dict()
    pipe.unet.save_pretrained(tmp_path)
    half = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16).state_dict()
    places = [name for name in state if name.endswith(("weight_place", "input_place", "places"))]
    assert places and all(torch.equal(half[name], state[name]) and half[name].dtype == torch.float32 for name in places)
    copied = pickle.loads(pickle.dumps(pipe.unet))
    x, t, states = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 3, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        assert torch.equal(copied(x, t, states).sample, pipe.unet(x, t, states).sample)
