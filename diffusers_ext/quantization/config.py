"""The settings of calibrated quantization, which are also what a saved model says of itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from .backends import MODULES, backend, check_settings
from .grids import FLOAT_MANTISSAS, UNIFORM_BITS
from .layers import LayerForm
from .methods import METHODS, defaults_of
from .timing import Clock

QUANT_METHOD = "diffusers_ext_ptq"
FORMAT_VERSION = 1
_CHOICES: dict[str, tuple[str, ...]] = {
    "weight_format": ("int", "float"),
    "act_format": ("int", "float"),
    "backend": ("native", *MODULES),
    "arithmetic": ("simulated", "int8"),
    "timesteps": ("uniform", "normal", "noisiest", "cleanest"),
    "weight_range": ("minmax", "search"),
    "act_range": ("minmax", "running", "search"),
    "rounding": ("nearest", "adaround"),
    "temporal": ("none", "reconstruct", "cache", "auto"),
}
STAGES = ("time_embedding", "sensitive_layers")


class PTQQuantMethod(StrEnum):
    """What diffusers reads as `quant_method`: it wants a string that is a member of an Enum."""

    PTQ = QUANT_METHOD


@dataclass(kw_only=True)
class PTQConfig(QuantizationConfigMixin):
    """Settings of calibrated post-training quantization; hand it to `dx.quantization.calibrate`.

    What is None takes the default of `method`, and is filled in at once.

    Args:
        method: "minmax" (plain ranges), "ptq4dm", "q_diffusion", "fp_quant_diffusion", "tfmq_dm", "quest".
        weight_bits: of integers 2 to 8 or 16, of floats 4 or 8.
        act_bits: of the inputs of layers; None leaves activations in float.
        weight_format, act_format: "int" or "float"; of weights by bitsandbytes also "nf", its 4-bit NormalFloat.
        symmetric: whether the grids of weights, and of activations with negative values, are symmetric.
        end_bits: bits of weights and inputs of the first and the last layer that the sample goes through; None takes 8 for
            "ptq4dm" and "tfmq_dm", and else those of all layers.
        attention: quantize queries, keys, values, and what the softmax gives (with `act_bits` alone).
        softmax_bits: of what the softmax gives; None leaves it in float.
        split: give the two parts of concatenated inputs (skip connections of U-Nets) grids of their own.
        timesteps: which inputs of the denoiser are recorded: "uniform" takes all samples of evenly spread steps, "normal" a
            normally distributed step of each sample, "noisiest" and "cleanest" the first or the last step alone.
        timestep_mean, timestep_std: of "normal", as shares of the run, counted from the image.
        calibration_steps: how many steps of a run "uniform" takes.
        weight_range: "minmax", or "search" for the best of shrunk ranges.
        act_range: as well, or "running" for a running mean of the ranges of each recorded call; "dynamic" for those of each row
            of each input while the model is used, by torchao and bitsandbytes alone.
        search_from: smallest factor by which a search shrinks a range, in steps of 0.01.
        search_power: p of the error |x_q - x|^p that a search makes least.
        rounding: "nearest", or "adaround" for weights rounded so that the output of their block changes least.
        rounding_iterations, rounding_rate, rounding_weight: of "adaround": iterations a block, learning rate, lambda.
        scale_iterations, scale_rate: of learning the scales of activations, 0 for not.
        temporal: what is done with the layers that see the timestep alone. "none" treats them as all others;
            "reconstruct" learns their rounding together and gives their inputs a grid for each timestep; "cache" replaces
            them by tables of what they give at the timesteps of the calibration, the only ones that the model then runs at;
            "auto" does both, and takes for each timestep what is nearer to full precision.
        temporal_bits: of the tables.
        step_scales: give all activations a grid for each recorded step of the run. A step that was not recorded takes that of
            the recorded one before it.
        channel_scales: give each channel of a layer's input a grid of its own; None takes it for "quest" at up to 4 bits.
        stages: of finetuning, in their order: "time_embedding", "sensitive_layers", or none.
        time_epochs, layer_epochs: of these stages: how often each recorded input is seen.
        finetune_rate: learning rate of the weights while finetuning.
        finetune_scale_rate: of the logarithms of the scales; that of the first stage is a tenth of it.
        exclude: names of modules to leave in float.
        backend: "native", or a package that does all of it: "quanto" (optimum-quanto), "torchao", "bitsandbytes". Of the
            settings, only formats, bits and `exclude` are then open. The last two quantize linear layers, and leave
            convolutions in float. docs/quantization.md says what works with which, and on what hardware.
        arithmetic: of the native backend: "simulated" computes in float with quantized values; "int8" with products of 8-bit
            integers where weights and inputs have at most 8 bits; see `int8` for where that is fast.
        layers: name -> [weight bits, activation bits, split, times, channels] of what is quantized, the last two only where
            the input has a grid for each of `group_times` (1) or `step_times` (2), or for each channel (1); `calibrate`
            fills it in.
        attentions: names of the attention modules with quantized inputs; `calibrate` fills it in.
        tables, skipped: names of the layers that tables stand for, and of those that so became idle; filled in as well.
        step_times, group_times: timesteps that grids or tables are made for: of all steps, of the recorded ones; filled in.
        calibration: what the calibration took: "minutes", "peak_bytes" of memory above what was held before; and with
            `stages` how many "trained_parameters" and "changed_weights" there were; filled in.
        format_version: of what is stored.
        quant_method: what diffusers knows it by.

    Raises:
        ValueError: a value is out of range, or a combination does not exist.
    """

    quant_method: Any = PTQQuantMethod.PTQ  # type: ignore[assignment]  # of ours, not of diffusers' Enum
    method: str = "q_diffusion"
    weight_bits: int = 8
    act_bits: int | None = 8
    weight_format: str | None = None
    act_format: str | None = None
    symmetric: bool | None = None
    end_bits: int | None = None
    attention: bool | None = None
    softmax_bits: int | None = 8
    split: bool | None = None
    timesteps: str | None = None
    timestep_mean: float = 0.4
    timestep_std: float = 0.4
    calibration_steps: int = 20
    weight_range: str | None = None
    act_range: str | None = None
    search_from: float | None = None
    search_power: float | None = None
    rounding: str | None = None
    rounding_iterations: int = 1000
    rounding_rate: float = 1e-2
    rounding_weight: float = 0.01
    scale_iterations: int | None = None
    scale_rate: float = 4e-3
    temporal: str | None = None
    temporal_bits: int = 8
    step_scales: bool | None = None
    channel_scales: bool | None = None
    stages: list[str] | None = None
    time_epochs: int = 20
    layer_epochs: int = 20
    finetune_rate: float = 1e-4
    finetune_scale_rate: float = 1e-3
    exclude: list[str] = field(default_factory=list)
    backend: str = "native"
    arithmetic: str = "simulated"
    layers: dict[str, list[int | None]] = field(default_factory=dict)
    attentions: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    group_times: list[float] = field(default_factory=list)
    calibration: dict[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self.quant_method = PTQQuantMethod.PTQ
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"`format_version` is {self.format_version!r}; this version of diffusers_ext reads {FORMAT_VERSION}."
            )
        if self.method not in METHODS:
            raise ValueError(f"`method` is {self.method!r}; allowed are {', '.join(METHODS)}.")
        other = backend(self.backend) if self.backend in tuple(MODULES) else None
        settings, extra = ({}, {}) if other is None else (other.SETTINGS, other.EXTRA)
        for name, value in {**defaults_of(self.method, self.act_bits), **settings}.items():
            if getattr(self, name) is None:
                setattr(self, name, list(value) if isinstance(value, list) else value)
        for name, choices in _CHOICES.items():
            allowed = (*choices, *extra.get(name, ()))
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed are {', '.join(allowed)}.")
        self._check_numbers()
        self._check_bits("weight_bits", self.weight_bits, self.weight_format)
        if self.act_bits is not None:
            self._check_bits("act_bits", self.act_bits, self.act_format)
            if self.softmax_bits is not None:
                self._check_bits("softmax_bits", self.softmax_bits, self.act_format)
        if self.end_bits is not None:
            self._check_bits("end_bits", self.end_bits, self.weight_format)
            self._check_bits("end_bits", self.end_bits, self.act_format)
        self._check_bits("temporal_bits", self.temporal_bits, "int")
        if not isinstance(self.stages, list) or self.stages not in ([], [STAGES[0]], [STAGES[1]], list(STAGES)):
            raise ValueError(f"`stages` is {self.stages!r}; allowed are lists of {', '.join(STAGES)}, in this order.")
        if self.channel_scales and self.act_range == "search":
            raise ValueError("`channel_scales` is True and `act_range` 'search'; allowed are 'minmax' and 'running'.")
        if not isinstance(self.exclude, list) or not all(isinstance(name, str) for name in self.exclude):
            raise ValueError(f"`exclude` is {self.exclude!r}; a list of names of modules is needed.")
        if other is not None:
            check_settings(self)
        elif self.arithmetic == "int8":
            bits = (self.weight_bits, self.act_bits)
            if "float" in (self.weight_format, self.act_format) or any(bit is None or bit > 8 for bit in bits):
                raise ValueError(
                    f"`arithmetic` is 'int8' with weights of {self.weight_format} {bits[0]} and activations of "
                    f"{self.act_format} {bits[1]}; both must be integers of at most 8 bits."
                )
            if self.channel_scales:
                raise ValueError("`arithmetic` is 'int8' and `channel_scales` True; integer products need one scale.")

    def _check_bits(self, name: str, bits: Any, form: str | None) -> None:
        allowed = {"float": tuple(FLOAT_MANTISSAS), "nf": (4,)}.get(form or "", UNIFORM_BITS)
        if isinstance(bits, bool) or bits not in allowed:
            raise ValueError(f"`{name}` is {bits!r}; of format {form!r} there are {', '.join(map(str, allowed))}.")

    def _check_numbers(self) -> None:
        for name, least in (
            ("calibration_steps", 1), ("rounding_iterations", 1), ("scale_iterations", 0), ("time_epochs", 1),
            ("layer_epochs", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")
        ranges = {
            "timestep_mean": (0, 1), "timestep_std": (0, 10), "search_from": (0.01, 1), "search_power": (0.1, 10),
            "rounding_rate": (0, 10), "rounding_weight": (0, 1e6), "scale_rate": (0, 10),
            "finetune_rate": (0, 10), "finetune_scale_rate": (0, 10),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"`{name}` is {value!r}; it must be a number from {low} to {high}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers calls it on what was saved.

        Raises:
            ValueError: another version wrote it, or it has unknown settings.
        """
        version = config_dict.get("format_version", FORMAT_VERSION)
        known = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(set(config_dict) - known)
        if version != FORMAT_VERSION or unknown:
            raise ValueError(
                f"The model was saved in `format_version` {version!r} with settings {unknown} that are unknown here; this "
                f"version of diffusers_ext reads {FORMAT_VERSION}."
            )
        config = cls(**config_dict)
        unused = {name: value for name, value in kwargs.items() if not hasattr(config, name)}
        for name in kwargs.keys() - unused.keys():
            setattr(config, name, kwargs[name])
        return (config, unused) if return_unused_kwargs else config

    def to_diff_dict(self) -> dict[str, Any]:
        """All settings; diffusers prints them."""
        return self.to_dict()

    def excludes(self, name: str) -> bool:
        """Whether `exclude` names that module, or one that it is in."""
        return any(name == part or name.startswith(f"{part}.") for part in self.exclude)

    def form_of(self, name: str) -> LayerForm:
        """How layer `name` is quantized, of those in `layers`."""
        weight_bits, act_bits, split, times, channels = [*self.layers[name], 0, 0][:5]
        assert weight_bits is not None and split is not None and self.weight_format and self.act_format
        count = (0, len(self.group_times), len(self.step_times))[times or 0]
        return LayerForm(
            weight_bits, act_bits, split, self.weight_format, self.act_format, bool(self.symmetric), self.arithmetic, count,
            bool(channels),
        )  # fmt: skip

    def clocks(self) -> tuple[Clock | None, Clock | None]:
        """What tells the time to what depends on it: of `group_times`, of `step_times`."""
        strict = any(name not in self.layers for name in self.tables)
        group = Clock(self.group_times) if self.group_times else None
        return group, Clock(self.step_times, strict) if self.step_times else None

    def times_of(self, name: str) -> int:
        """Which clock layer `name` looks at: 0 for none, 1 or 2 for the first or the second of `clocks`."""
        return ([*self.layers[name], 0, 0][3]) or 0
