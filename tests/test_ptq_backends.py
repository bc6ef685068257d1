"""Other packages behind `PTQConfig`. Those that are not installed are left out; what is refused needs none of them."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers import auto
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_ext.quantization import PTQConfig, PTQQuantizer, calibrate
from diffusers_ext.quantization.backends import MODULES, backend
from diffusers_ext.quantization.config import QUANT_METHOD
from diffusers_ext.quantization.recording import Call
from diffusers_ext.quantization.summary import summary
from tests import ptq

TORCHAO = [{"act_bits": None}, {}, {"weight_format": "float", "act_bits": None}]
BITSANDBYTES = [
    {},
    {"weight_format": "nf", "weight_bits": 4, "act_bits": None},
    {"weight_format": "float", "weight_bits": 4, "act_bits": None},
]
PACKAGES = {"quanto": "optimum.quanto", "torchao": "torchao.quantization", "bitsandbytes": "bitsandbytes"}


def installed(name: str) -> None:
    pytest.importorskip(PACKAGES[name])
    if name == "torchao":  # diffusers looks for it once, when it is imported
        quantizer = importlib.import_module("diffusers.quantizers.torchao.torchao_quantizer")
        assert hasattr(quantizer, "quantize_")


def quantized(name: str, stock_name: str = "tiny-sd3", **settings):
    """A pipeline, its stock, what it drew before and what it draws now."""
    installed(name)
    pipe, stock = ptq.tiny(stock_name)
    plain = stock.draw(pipe)
    ptq.quantized(pipe, method="minmax", backend=name, scale_iterations=0, **settings)
    return pipe, stock, plain, stock.draw(pipe)


def loaded(stock, folder):
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **dict.fromkeys(stock.absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "awq"}, "`backend` is 'awq'; allowed are native, quanto, torchao, bitsandbytes"),
        ({"backend": "torchao", "weight_bits": 4}, "`weight_bits` is 4 .* backend 'torchao' has 'int' 8, 'float' 8"),
        ({"backend": "torchao", "weight_format": "float"}, "`act_bits` is 8 .* with weights of 'float' 8 bits, None"),
        ({"backend": "torchao", "act_range": "minmax"}, "`act_range` is 'minmax'; backend 'torchao' allows 'dynamic'"),
        ({"backend": "torchao", "arithmetic": "int8"}, "`arithmetic` is 'int8'; allowed is 'simulated'"),
        ({"backend": "torchao", "attention": True}, "`attention` is True; backend 'torchao' allows False"),
        ({"backend": "torchao", "weight_format": "nf"}, "`weight_format` is 'nf'; allowed are int, float"),
        ({"backend": "bitsandbytes", "act_bits": None}, "`act_bits` is None; backend 'bitsandbytes' has"),
        ({"backend": "bitsandbytes", "weight_format": "nf"}, "`weight_bits` is 8; of format 'nf' there are 4"),
        ({"backend": "bitsandbytes", "weight_format": "nf", "weight_bits": 4}, "`act_bits` is 8 of `act_format` 'int'"),
        ({"backend": "bitsandbytes", "symmetric": False}, "`symmetric` is False; backend 'bitsandbytes' allows True"),
        ({"backend": "quanto", "weight_bits": 6}, "`weight_bits` is 6 .* backend 'quanto' has 'int' 8, 'int' 4"),
        ({"weight_format": "nf", "weight_bits": 4}, "`weight_format` is 'nf'; allowed are int, float"),
        ({"act_range": "dynamic"}, "`act_range` is 'dynamic'; allowed are minmax, running, search"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PTQConfig(**{"method": "minmax", **settings})


@pytest.mark.parametrize("name", MODULES)
def test_a_package_that_is_not_installed_is_named_before_any_work(name, monkeypatch):
    pipe, _ = ptq.tiny()
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    config = PTQConfig(method="minmax", backend=name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"`backend` is '{name}', and .* is not installed: pip install "):
        calibrate(pipe, config, num_samples=1, num_inference_steps=1)
    assert type(pipe.unet.conv_in) is nn.Conv2d


@pytest.mark.parametrize("settings", TORCHAO, ids=["W8A16", "W8A8", "F8A16"])
def test_torchao_loads_without_this_package(settings, tmp_path, monkeypatch):
    pipe, stock, plain, drawn = quantized("torchao", **settings)
    assert 0 < ptq.relative_error(drawn, plain) < 1
    assert pipe.transformer.config.quantization_config.quant_method == "torchao"
    assert type(pipe.transformer.proj_out.weight).__name__ in ("Int8Tensor", "Float8Tensor")
    pipe.save_pretrained(tmp_path)
    assert summary(pipe) == summary(tmp_path) and "by torchao" in summary(pipe)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, QUANT_METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, QUANT_METHOD)
    assert torch.equal(stock.draw(loaded(stock, tmp_path)), drawn)
    with pytest.raises(ValueError, match="is quantized already"):
        ptq.quantized(pipe, method="minmax")


@pytest.mark.parametrize("settings", BITSANDBYTES, ids=["W8A8", "NF4", "FP4"])
def test_bitsandbytes_saves_and_loads(settings, tmp_path):
    pipe, stock, plain, drawn = quantized("bitsandbytes", **settings)
    assert drawn.isfinite().all() and not torch.equal(drawn, plain)
    assert type(pipe.transformer.proj_out).__name__ in ("Linear8bitLt", "Linear4bit")
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")  # parts of a weight lie in any of the files
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    again = loaded(stock, tmp_path)
    again.transformer = copy.deepcopy(again.transformer)
    assert isinstance(again.transformer.hf_quantizer, PTQQuantizer)
    assert torch.equal(stock.draw(again), drawn)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(stock.draw(loaded(stock, tmp_path / "again")), drawn)


def test_bitsandbytes_says_which_scales_are_missing(tmp_path):
    pipe, *_ = quantized("bitsandbytes")
    pipe.transformer.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "proj_out.SCB"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="the codes of 'proj_out' and not their scales"):
        type(pipe.transformer).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["torchao", "bitsandbytes"])
def test_convolutions_stay_in_float(name):
    pipe, _, plain, drawn = quantized(name, "tiny-ddpm")
    assert not torch.equal(plain, drawn)
    assert type(pipe.unet.conv_in) is nn.Conv2d and type(pipe.unet.conv_in.weight) is nn.Parameter
    other, _ = ptq.tiny()
    rest = [child for child, _ in other.unet.named_children() if child != "conv_in"]
    with pytest.raises(ValueError, match=f"no linear layer to quantize, .* `backend` is '{name}'"):
        ptq.quantized(other, method="minmax", backend=name, scale_iterations=0, exclude=rest)


@pytest.mark.parametrize("name", MODULES)
def test_a_failure_leaves_the_model_as_it_was(name, monkeypatch):
    installed(name)
    pipe, stock = ptq.tiny("tiny-sd3")
    model, plain = pipe.transformer, stock.draw(pipe)
    before = {key: (type(module), dict(module._parameters)) for key, module in model.named_modules()}
    run, count = Call.run, 0

    def broken(self, model):
        nonlocal count
        count += 1
        if count > 1:  # the first looks for layers
            raise RuntimeError("broken")
        return run(self, model)

    monkeypatch.setattr(Call, "run", broken)
    with pytest.raises(RuntimeError, match="broken"):
        ptq.quantized(pipe, method="minmax", backend=name, scale_iterations=0)
    after = {key: (type(module), dict(module._parameters)) for key, module in model.named_modules()}
    assert after.keys() == before.keys()
    for key, (kind, parameters) in before.items():
        assert after[key][0] is kind
        assert all(after[key][1][part] is parameter for part, parameter in parameters.items()), key
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "quantization_config" not in model.config and torch.equal(stock.draw(pipe), plain)


def test_every_backend_has_what_the_core_asks_for():
    for name in MODULES:
        module = backend(name)
        assert {"SETTINGS", "FORMATS", "EXTRA", "CALIBRATES", "package", "calibrate"} <= set(vars(module))
