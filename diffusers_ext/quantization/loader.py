"""The diffusers quantizer: what `save_pretrained` and stock `from_pretrained` of a quantized model call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from .. import _compat
from .attention import attach, attached, detach
from .backends import MODULES, backend
from .config import QUANT_METHOD, PTQConfig
from .layers import QuantizedLayer
from .session import attention_inputs, put
from .temporal import FeatureTable, SkippedLayer
from .timing import attach_clocks, detach_clocks

_PLACES = ("weight_place", "input_place", "places")  # of grids, in float32 whatever the model is loaded in


class PTQQuantizer(DiffusersQuantizer):
    """Lays out a model for the tensors of a quantized one. It loads only what was calibrated before."""

    requires_calibration = False  # it says so itself, in its own words
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: PTQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "`quantization_config` is a PTQConfig, which needs calibration: load the pipeline in full precision and call "
                "`diffusers_ext.quantization.calibrate`."
            )

        self._extras: dict[str, torch.Tensor] = {}  # tensors of the backend's that are none of the model's

    @property
    def _backend(self) -> Any:
        """The module of the backend, None for our own layers. Not kept: models are copied, and modules cannot be."""
        name = self.quantization_config.backend
        return backend(name) if name in MODULES else None

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """None would make diffusers cast the tensors to the dtypes of empty ones."""
        return torch_dtype or torch.float32

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: PTQConfig = self.quantization_config
        if self._backend is None:
            _lay_out(model, config)
        else:
            self._backend.package()
            self._backend.lay_out(model, config)
        model.config.quantization_config = config

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        return [key for key in loaded_keys if not self._is_extra(key)]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Keep back what is set last; shards bring it in any order."""
        self._extras |= {key: value for key, value in state_dict.items() if self._is_extra(key)}
        return {key: value for key, value in state_dict.items() if not self._is_extra(key)}

    def _is_extra(self, key: str) -> bool:
        return self._backend is not None and self._backend.is_extra(self.quantization_config, key)

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        if self._backend is None:
            return param_name.rpartition(".")[2] in _PLACES
        return self._backend.is_part(model, param_name)

    def create_quantized_param(
        self,
        model: Any,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if self._backend is None:
            owner, _, name = param_name.rpartition(".")  # `param_value` is rounded to the model's dtype already
            setattr(model.get_submodule(owner), name, state_dict[param_name].to(target_device, torch.float32))
            return
        self._backend.set_part(model, param_name, param_value.to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # Tensors that are mapped from the file may be aligned otherwise, and results differ in the last bits: activations
        # at the middle between two values of a grid would then be rounded the other way.
        if self._backend is not None:
            extras, self._extras = self._extras, {}
            self._backend.finish(model, self.quantization_config, extras)
        else:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for tensor in tensors.values():
                        if tensor is not None and tensor.device.type == "cpu":
                            tensor.data = tensor.data.clone()
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        if self._backend is not None:
            name = self.quantization_config.backend
            raise ValueError(
                f"A model that backend {name!r} quantized cannot be dequantized; load it in full precision."
            )
        config: PTQConfig = self.quantization_config
        if any(name not in config.layers for name in config.tables):
            raise ValueError(
                "The layers that see the timestep alone were replaced by tables (`temporal='cache'`) and cannot be given back; "
                "load the model in full precision."
            )
        for name in config.layers:
            layer = model.get_submodule(name)
            if isinstance(layer, FeatureTable):
                layer = layer.layer
            assert isinstance(layer, QuantizedLayer)
            put(model, name, layer.dequantized())
        for name in attached(model):
            detach(model.get_submodule(name))
        detach_clocks(model)
        _compat.set_private_config(model, "quantization_config", None)
        vars(model).pop("quantization_method", None)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def mark_quantized(model: Any, config: PTQConfig) -> None:
    """Make a model say what `from_pretrained` makes a quantized one say."""
    quantizer: DiffusersQuantizer = PTQQuantizer(config, pre_quantized=True)
    if config.backend == "torchao":
        quantizer = backend("torchao").stock_quantizer(config)
    model.register_to_config(quantization_config=quantizer.quantization_config)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method


def register() -> None:
    """Put the quantizer into diffusers' two maps; safe to call again."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PTQQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = PTQConfig


def _lay_out(model: nn.Module, config: PTQConfig) -> None:
    """Make an empty model take the tensors of a quantized one."""
    group, step = clocks = config.clocks()
    for name in [*config.layers, *(name for name in config.tables if name not in config.layers)]:
        before, layer = _layer(model, name), None
        if name in config.layers:
            layer = QuantizedLayer(before, config.form_of(name))
            layer.clock = (None, *clocks)[config.times_of(name)]
        after: nn.Module | None = layer
        if name in config.tables:
            assert step is not None
            width = before.out_features
            after = FeatureTable(len(config.step_times), width, config.temporal_bits, layer, step, "meta")  # type: ignore[arg-type]
        assert after is not None
        put(model, name, after)
    for name in config.skipped:
        put(model, name, SkippedLayer(_layer(model, name).out_features))  # type: ignore[arg-type]
    for name in config.attentions:
        inputs = attention_inputs(config, "meta")
        inputs.clock = group
        attach(_layer(model, name), inputs)
    attach_clocks(model, [clock for clock in clocks if clock is not None])


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"The quantization settings name module {name!r}, and {type(model).__name__} has none: they were written for "
            "another model or another version of diffusers."
        ) from None
