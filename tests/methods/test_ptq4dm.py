"""PTQ4DM and the core of calibrated quantization that it shares with the others, by the five proofs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import diffusers_ext as dx
from diffusers_ext import quantization
from diffusers_ext.quantization import PTQConfig, calibrate
from diffusers_ext.quantization.grids import UNIFORM_BITS, UniformGrid
from diffusers_ext.quantization.int8 import int8_product
from diffusers_ext.quantization.layers import CalibratedLayer, LayerForm, QuantizedLayer
from diffusers_ext.quantization.observers import InputObserver, search, shrinks, weight_place
from diffusers_ext.quantization.packing import pack, unpack
from diffusers_ext.quantization.recording import evenly, normal_steps, record
from diffusers_ext.quantization.session import Session
from tests import ptq
from tests.common.models import STOCKS
from tests.common.suite import CommonCase
from tests.common.traces import require_unchanged, trace

COMMON = CommonCase(make=ptq.maker("tiny-ddpm", "tiny-flux", "tiny-animatediff", method="ptq4dm"))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ptq4dm.json").read_text())["runs"]

exact = pytest.mark.proof("exact")
reference = pytest.mark.proof("reference")


# --- exact -----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("bits", UNIFORM_BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_grid(bits, symmetric):
    """The formula number by number, idempotent bit for bit, and kept whole by packing."""
    grid, x = UniformGrid(bits, symmetric), ptq.formula(4, 25)
    low, high = x.amin(1) * 0.7, x.amax(1) * 0.9
    place = grid.fit(low, high)
    y = grid.quantize(x, place[..., None])
    assert torch.equal(grid.quantize(y, place[..., None]), y)
    for row in range(4):
        c = max(-float(low[row]), float(high[row]))
        bounds = (-c, c) if symmetric else (float(low[row]), float(high[row]))
        slow = torch.tensor(ptq.slow_uniform(x[row], *bounds, bits, symmetric))
        assert torch.allclose(y[row], slow, atol=2e-6 if bits < 16 else 1e-4)
    codes = grid.encode(y, place[..., None])
    assert codes.min() >= 0 and codes.max() < 2**bits
    packed = pack(codes, bits)
    assert packed.element_size() * packed.numel() == (4 * 13 if bits <= 4 else 4 * 25 * (1 if bits <= 8 else 2))
    assert torch.equal(grid.decode(unpack(packed, codes.shape, bits), place[..., None]), y)


@exact
def test_symmetric_grid_is_that_of_the_paper():
    """s = 2 c / (2^b - 1), integers -2^(b-1) to 2^(b-1) - 1; without negative values [0, c], integers 0 to 2^b - 1."""
    c, x = 1.5, torch.linspace(-2, 2, 401)
    scale = 2 * c / 255
    place = UniformGrid(8, True).fit(torch.tensor(-c), torch.tensor(c))
    assert torch.allclose(UniformGrid(8, True).quantize(x, place), scale * (x / scale).round().clamp(-128, 127))
    for symmetric_range, values, want in ((True, x, (c + 0.5) * 2 / 255), (True, x.abs(), 2 / 255)):
        observer = InputObserver(-1, 0, "minmax")
        observer(values)
        found = observer.place(UniformGrid(8), [1.0], 2.0, symmetric_range)
        assert found[0, 0].item() == pytest.approx(want, rel=1e-6)
        assert found[1, 0].item() == (128 if (values < 0).any() else 0)


@exact
def test_ndtc():
    """Normal steps: their moments, their end, and the same from the same seed."""
    generator = torch.Generator().manual_seed(0)
    t = 999 - normal_steps(1000, 20000, 0.4, 0.1, generator)
    assert abs(t.double().mean() - 400) < 4 and abs(t.double().std() - 100) < 3
    wide = normal_steps(10, 1000, 0.4, 0.4, torch.Generator().manual_seed(1))
    assert wide.min() == 0 and wide.max() == 9
    assert torch.equal(wide, normal_steps(10, 1000, 0.4, 0.4, torch.Generator().manual_seed(1)))
    assert evenly(20, 20).tolist() == list(range(20)) and evenly(20, 5).tolist() == [0, 4, 8, 12, 16]


@exact
def test_inputs_keep_their_own_timesteps():
    """Run again from the seed, the chain has just the recorded input at the recorded timestep: labels are not mirrored."""
    pipe, _ = ptq.tiny()
    kept = torch.tensor([0, 2, 3, 3])
    run = {"batch_size": 4, "output_type": "np", "generator": torch.Generator().manual_seed(3)}
    calls = record(pipe, pipe.unet, [(4, run)], 4, [kept], each=True)
    seen: list[tuple[float, torch.Tensor]] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append((float(args[1]), args[0].clone())))
    pipe(**{**run, "generator": torch.Generator().manual_seed(3)}, num_inference_steps=4)
    assert [call.step for call in calls] == [0, 2, 3] and [call.rows for call in calls] == [1, 1, 2]
    for call in calls:
        timestep, sample = seen[call.step]
        assert call.timestep == timestep
        rows = (kept == call.step).nonzero().flatten()
        assert torch.equal(call.kwargs["sample"], sample[rows])


def recorded(pipe, stock, steps=2):
    """A calibration set of a small pipeline: one batch of two samples."""
    runs = [(2, {**stock.call(1), "batch_size": 2, "generator": torch.Generator().manual_seed(0)})]
    return record(pipe, pipe.unet, runs, steps, [torch.arange(steps)], each=False)


@exact
def test_off_is_bit_equal_and_failure_leaves_nothing():
    pipe, stock = ptq.tiny()
    calls = recorded(pipe, stock)
    with torch.no_grad():
        plain = [call.run(pipe.unet).sample for call in calls]
    before = trace(pipe)
    session = Session(pipe.unet, PTQConfig(method="ptq4dm", attention=True, search_from=0.8), calls, 0)
    with session.in_place(), torch.no_grad():
        assert all(torch.equal(call.run(pipe.unet).sample, y) for call, y in zip(calls, plain, strict=True))
        session.place_weights()
        session.place_inputs()
        assert not torch.equal(calls[0].run(pipe.unet).sample, plain[0])
        with session.full_precision():
            assert all(torch.equal(call.run(pipe.unet).sample, y) for call, y in zip(calls, plain, strict=True))
    require_unchanged(pipe, before, "after a session")
    with pytest.raises(RuntimeError, match="mid"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "place_inputs", lambda self: (_ for _ in ()).throw(RuntimeError("mid")))
        ptq.quantized(pipe, method="ptq4dm")
    require_unchanged(pipe, before, "after a failure")


@exact
def test_16_bits_are_full_precision():
    pipe, stock = ptq.tiny()
    calls = recorded(pipe, stock)
    with torch.no_grad():
        plain = [call.run(pipe.unet).sample for call in calls]
    session = Session(pipe.unet, PTQConfig(method="minmax", weight_bits=16, act_bits=16, softmax_bits=16), calls, 0)
    with session.in_place(), torch.no_grad():
        session.place_weights()
        session.place_inputs()
        found = [call.run(pipe.unet).sample for call in calls]
    assert max(ptq.relative_error(a, b) for a, b in zip(found, plain, strict=True)) < 1e-3


@exact
def test_structure_and_ends():
    """The first and the last layer keep 8 bits: `conv_in` and `conv_out`, not the embedding of the timestep."""
    pipe, stock = ptq.tiny()
    session = Session(pipe.unet, PTQConfig(method="ptq4dm", weight_bits=4, act_bits=6), recorded(pipe, stock), 0)
    assert (session.structure.first, session.structure.last) == ("conv_in", "conv_out")
    table = session.config.layers
    assert table["conv_in"][:2] == table["conv_out"][:2] == [8, 8]
    assert {tuple(row[:2]) for name, row in table.items() if name not in ("conv_in", "conv_out")} == {(4, 6)}
    assert "time_embedding.linear_1" in session.structure.timewise
    convolutions = [n for n, m in pipe.unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sorted(table) == sorted(convolutions)


@exact
@pytest.mark.parametrize("split", [0, 5])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_integer_products_equal_the_simulation(split, symmetric, weight_bits):
    torch.manual_seed(0)
    layers = [
        nn.Linear(13, 7),
        nn.Conv2d(13, 6, 3, padding=1, stride=2),
        nn.Conv2d(13, 6, (1, 3), dilation=2, bias=False),
    ]
    inputs = [torch.randn(3, 5, 13) + 0.3, torch.randn(2, 13, 9, 8), torch.randn(2, 13, 6, 7).abs()]
    for layer, x in zip(layers, inputs, strict=True):
        found = {}
        for arithmetic in ("simulated", "int8"):
            form = LayerForm(weight_bits, 8, split, symmetric=symmetric, arithmetic=arithmetic)
            calibrated = CalibratedLayer(layer, form)
            calibrated.weight_place = weight_place(layer.weight, calibrated.weight_grid, split, "minmax", [1.0], 2.0)
            observer = InputObserver(calibrated.axis, split, "minmax")
            observer(x)
            calibrated.input_place = observer.place(calibrated.input_grid, [1.0], 2.0, False)
            calibrated.weights_on = calibrated.inputs_on = True
            with torch.no_grad():
                expected, found[arithmetic] = calibrated(x), calibrated.packed()(x)
        assert torch.allclose(found["simulated"], expected, atol=1e-6), "packed layers compute what calibrated ones do"
        assert torch.allclose(found["int8"], found["simulated"], atol=2e-5, rtol=1e-5)
    a, b = torch.randint(-128, 128, (5, 9), dtype=torch.int8), torch.randint(-128, 128, (4, 9), dtype=torch.int8)
    assert torch.equal(int8_product(a, b), a.int() @ b.int().T)


@exact
@pytest.mark.parametrize(("bits", "most"), [(8, 0.27), (4, 0.16)])
def test_bytes(bits, most, tmp_path):
    """Of the quantized layers, on disk and in memory, as a share of float32."""
    from safetensors.torch import load_file

    pipe = STOCKS["avatars-sd"].make()
    before = pipe.unet.state_dict()
    ptq.quantized(pipe, method="minmax", weight_bits=bits, attention=False)
    pipe.unet.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for kept in (tensors, type(pipe.unet).from_pretrained(tmp_path).state_dict()):
        share = sum(_bytes(kept, name) for name in pipe.unet.config.quantization_config.layers) / sum(
            _bytes(before, name) for name in pipe.unet.config.quantization_config.layers
        )
        assert share <= most


def _bytes(tensors, layer):
    return sum(v.numel() * v.element_size() for k, v in tensors.items() if k.rpartition(".")[0] == layer)


# --- refusals --------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "`weight_bits` is 1"),
        ({"weight_bits": 9}, "`weight_bits` is 9"),
        ({"act_bits": True}, "`act_bits` is True"),
        ({"act_bits": 5, "act_format": "float"}, "`act_bits` is 5; of format 'float' there are 4, 8"),
        ({"method": "ptq5dm"}, "`method` is 'ptq5dm'; allowed are minmax, ptq4dm"),
        ({"timesteps": "all"}, "`timesteps` is 'all'"),
        ({"rounding_iterations": 0}, "`rounding_iterations` is 0"),
        ({"search_from": 0.0}, "`search_from` is 0.0"),
        ({"format_version": 7}, "`format_version` is 7; this version of diffusers_ext reads 1"),
        ({"arithmetic": "int8", "act_bits": None}, "`arithmetic` is 'int8'"),
        ({"backend": "quanto", "method": "q_diffusion", "weight_bits": 3}, "`weight_bits` is 3"),
        ({"backend": "quanto", "split": True}, "`split` is True; backend 'quanto' allows False"),
        ({"exclude": "conv_in"}, "`exclude` is 'conv_in'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        PTQConfig(**settings)


@exact
def test_bad_calls_change_nothing():
    pipe, _ = ptq.tiny()
    before = trace(pipe)
    everything = [name for name, _ in pipe.unet.named_children()]
    for config, call, message in (
        (PTQConfig(), {}, "`prompts` and `num_samples` are None"),
        (PTQConfig(), {"num_samples": 0}, "`num_samples` is empty"),
        (PTQConfig(), {"prompts": []}, "`prompts` is empty"),
        (PTQConfig(), {"prompts": "a cat"}, "a list of prompts is needed"),
        (PTQConfig(), {"prompts": ["a cat"]}, "use `num_samples`"),
        (PTQConfig(), {"num_samples": 1, "num_inference_steps": 0}, "`num_inference_steps` is 0"),
        (PTQConfig(), {"num_samples": 1, "component": "vae"}, "`component` is 'vae'"),
        (PTQConfig(exclude=everything), {"num_samples": 1, "num_inference_steps": 1}, "no linear or convolution layer"),
        ("w8a8", {"num_samples": 1}, "a PTQConfig is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(pipe, config, **call)
        require_unchanged(pipe, before, f"refused: {message}")


@exact
def test_quantized_twice_and_back(tmp_path):
    pipe, stock = ptq.tiny()
    plain = stock.draw(pipe)
    ptq.quantized(pipe, method="minmax")
    with pytest.raises(ValueError, match="is quantized already"):
        ptq.quantized(pipe, method="minmax")
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipe.unet.to(torch.float16)
    drawn = stock.draw(pipe)
    weights = {n: m.weight for n, m in pipe.unet.named_modules() if isinstance(m, QuantizedLayer)}
    pipe.save_pretrained(tmp_path)
    STOCKS["tiny-ddpm"].make().unet.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="needs calibration"):
        type(pipe.unet).from_pretrained(tmp_path / "plain", quantization_config=PTQConfig())
    pipe.unet.dequantize()
    assert not any(isinstance(m, QuantizedLayer) for m in pipe.unet.modules())
    assert all(torch.equal(pipe.unet.get_submodule(n).weight, w) for n, w in weights.items())
    assert "quantization_config" not in pipe.unet.config
    back = stock.draw(pipe)
    assert 0 < ptq.relative_error(back, plain) < 0.7 and not torch.equal(back, drawn)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`format_version` 99"):
        type(pipe.unet).from_pretrained(tmp_path / "unet")


@exact
def test_quanto_backend(tmp_path):
    pytest.importorskip("optimum.quanto")
    pipe, stock = ptq.tiny("tiny-sd3")
    plain = stock.draw(pipe)
    ptq.quantized(pipe, method="minmax", backend="quanto", scale_iterations=0)
    drawn = stock.draw(pipe)
    assert 0 < ptq.relative_error(drawn, plain) < 1
    assert type(pipe.transformer.get_submodule("proj_out")).__name__ == "QLinear"
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **dict.fromkeys(stock.absent))
    assert torch.allclose(stock.draw(loaded), drawn, atol=1e-4)


# --- reference -------------------------------------------------------------------------------------------------------


@reference
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_reference_grids(bits):
    """The release searches with the power 2.4, and so does this; the paper's squared error is our default.

    The zero point of a symmetric grid is 2^(b-1) - 1/2 before it is rounded. The release leaves to float errors where that
    goes, row by row; here it goes up. So the places of the weights are those of the release's formula.
    """
    grid, weight = UniformGrid(bits), ptq.formula(4, 24)
    clips = [weight.abs().amax(1) / 100 * percent for percent in range(1, 101)]
    scales = [(c + c) / (2**bits - 1) for c in clips]
    places = [torch.stack([s, -torch.round(-c / s)]) for c, s in zip(clips, scales, strict=True)]
    found = grid.quantize(weight, search(weight, grid, places, 2.4)[..., None])
    assert torch.allclose(found.flatten(), torch.tensor(GOLDEN[f"weight_{bits}"]), atol=1e-6)
    observer, inputs = InputObserver(-1, 0, "search"), ptq.formula(8, 24, 1.0, positive=True)
    observer(inputs)
    found = grid.quantize(inputs, observer.place(grid, shrinks(0.01), 2.4, True)[:, 0])
    assert torch.allclose(found.flatten(), torch.tensor(GOLDEN[f"input_{bits}"]), atol=1e-6)


@reference
def test_search_is_the_best_by_a_slow_search():
    weight, grid = ptq.formula(3, 40), UniformGrid(3, True)
    found = weight_place(weight, grid, 0, "search", shrinks(0.01), 2.0)
    for row in range(3):
        c = float(weight[row].abs().max())
        errors = {}
        for percent in range(1, 101):
            values = ptq.slow_uniform(weight[row], -c * percent / 100, c * percent / 100, 3, True)
            errors[percent] = sum((a - b) ** 2 for a, b in zip(values, weight[row].tolist(), strict=True))
        best = min(errors, key=errors.get)
        assert math.isclose(float(found[0, 0, row]), 2 * c * best / 100 / 7, rel_tol=1e-5)


# --- loads and card --------------------------------------------------------------------------------------------------


@pytest.mark.proof("loads")
def test_a_loaded_model_is_bit_equal(tmp_path):
    """Packed codes, places and biases, and what they draw; nothing is kept in float beside them."""
    pipe, stock = ptq.tiny()
    ptq.quantized(pipe, method="ptq4dm", weight_bits=4, attention=True)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    ours, theirs = pipe.unet.state_dict(), loaded.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(stock.draw(loaded), stock.draw(pipe))
    middle = loaded.unet.get_submodule("mid_block.resnets.0.conv1")
    assert isinstance(middle, QuantizedLayer) and middle.codes.dtype == torch.uint8
    assert loaded.unet.config.quantization_config.method == "ptq4dm"
    assert quantization is dx.quantization


@pytest.mark.proof("card")
def test_card():
    ptq.run_card("ptq4dm", "2211.15736", search_from=0.95, exclude=["down_blocks", "up_blocks"])
