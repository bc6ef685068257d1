"""One calibration: the model with its layers put in place of the float ones, and the stages that methods are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from .attention import INPUTS, AttentionInputs, attach, attached, detach
from .config import PTQConfig
from .layers import CalibratedLayer
from .observers import InputObserver, shrinks, weight_place
from .recording import Call
from .rounding import full_precision, learn_rounding, learn_scales, samples_of
from .structure import Structure, trace, unit_of


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


class Session:
    """A model while it is calibrated.

    Args:
        model: the denoiser, in full precision.
        config: settings; its `layers` and `attentions` are filled in.
        calls: the calibration set.
        seed: of the choice of samples while learning.

    Raises:
        ValueError: there is no layer to quantize.
    """

    def __init__(self, model: nn.Module, config: PTQConfig, calls: Sequence[Call], seed: int) -> None:
        self.model, self.config, self.calls = model, config, list(calls)
        self.generator = torch.Generator().manual_seed(seed)
        self.structure = trace(model, self.calls[0])
        config.layers = _layer_table(config, self.structure)
        if not config.layers:
            raise ValueError(
                f"{type(model).__name__} has no linear or convolution layer to quantize, besides those that `exclude` names."
            )
        attention = config.attention and config.act_bits is not None
        config.attentions = [name for name in self.structure.attentions if attention and not _excluded(config, name)]
        self.float_layers = {name: model.get_submodule(name) for name in config.layers}
        self.layers = {name: CalibratedLayer(layer, config.form_of(name)) for name, layer in self.float_layers.items()}
        self.attentions: dict[str, AttentionInputs] = {}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model is made of calibrated layers; however it ends, it is as before afterwards."""
        try:
            for name in self.config.attentions:
                inputs = attention_inputs(self.config, next(self.model.parameters()).device)
                inputs.on = False
                attach(self.model.get_submodule(name), inputs)
                self.attentions[name] = inputs
            for name, layer in self.layers.items():
                put(self.model, name, layer)
            yield
        finally:
            for name, float_layer in self.float_layers.items():
                put(self.model, name, float_layer)
            for name in attached(self.model):
                detach(self.model.get_submodule(name))

    # --- stages --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def place_weights(self) -> None:
        """Places of the grids of all weights, which are quantized from then on."""
        config = self.config
        assert config.weight_range is not None and config.search_from is not None and config.search_power is not None
        factors = shrinks(config.search_from)
        for layer in tqdm(self.layers.values(), desc="Ranges of weights", unit="layer", delay=2.0, leave=False):
            layer.weight_place = weight_place(
                layer.float_weight,
                layer.weight_grid,
                layer.form.split,
                config.weight_range,
                factors,
                config.search_power,
            )
            layer.weights_on = True

    def units(self) -> dict[str, list[str]]:
        """Unit -> names of its layers, in the order of use."""
        found: dict[str, list[str]] = {}
        for name in self.layers:
            found.setdefault(unit_of(name, self.structure.units), []).append(name)
        return {unit: found[unit] for unit in self.structure.units if unit in found}

    def round_weights(self) -> None:
        """Learn the rounding of the weights, unit by unit, where the settings say so."""
        if self.config.rounding != "adaround":
            return
        for layer in self.layers.values():
            layer.weights_on = False
        iterations = self.config.rounding_iterations
        units = self.units()
        with tqdm(total=iterations * len(units), desc="Rounding", unit="it", delay=2.0, leave=False) as bar:
            for unit, names in units.items():
                layers = [self.layers[name] for name in names]
                module = self.model.get_submodule(unit)
                learn_rounding(
                    module,
                    layers,
                    samples_of(self.model, module, self.calls, [*self.layers.values()], [*self.attentions.values()]),
                    iterations=iterations,
                    rate=self.config.rounding_rate,
                    weight=self.config.rounding_weight,
                    generator=self.generator,
                    tick=bar.update,
                )

    @torch.no_grad()
    def place_inputs(self) -> None:
        """Places of the grids of all activations, from what they hold over the calibration set; quantized from then on."""
        config = self.config
        if config.act_bits is None:
            return
        assert config.act_range is not None and config.search_from is not None and config.search_power is not None
        for layer in self.layers.values():
            layer.observer = InputObserver(layer.axis, layer.form.split, config.act_range)
        for inputs in self.attentions.values():
            inputs.observe(config.act_range)
        for call in tqdm(self.calls, desc="Ranges of activations", unit="call", delay=2.0, leave=False):
            call.run(self.model)
        factors, power, symmetric = shrinks(config.search_from), config.search_power, bool(config.symmetric)
        for layer in tqdm(self.layers.values(), desc="Places of activations", unit="layer", delay=2.0, leave=False):
            assert layer.observer is not None and layer.input_grid is not None
            layer.input_place = layer.observer.place(layer.input_grid, factors, power, symmetric)
            layer.observer, layer.inputs_on = None, True
        for inputs in self.attentions.values():
            assert inputs.observers is not None
            for i, (grid, observer) in enumerate(zip(inputs.grids, inputs.observers, strict=True)):
                if grid is not None:
                    inputs.places[:, i] = observer.place(grid, factors, power, symmetric)[:, 0]
            inputs.observers, inputs.on = None, True

    def learn_scales(self) -> None:
        """Learn the scales of the activations, unit by unit, where the settings say so."""
        config = self.config
        if not config.scale_iterations or config.act_bits is None:
            return
        assert config.search_power is not None
        units = self.units()
        with tqdm(total=config.scale_iterations * len(units), desc="Scales", unit="it", delay=2.0, leave=False) as bar:
            for unit, names in units.items():
                module = self.model.get_submodule(unit)
                learn_scales(
                    module,
                    [self.layers[name] for name in names],
                    [*attached(module).values()],
                    samples_of(self.model, module, self.calls, [*self.layers.values()], [*self.attentions.values()]),
                    iterations=config.scale_iterations,
                    rate=config.scale_rate,
                    power=config.search_power,
                    generator=self.generator,
                    tick=bar.update,
                )

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, nothing is quantized."""
        with full_precision([*self.layers.values()], [*self.attentions.values()]):
            yield


def attention_inputs(config: PTQConfig, device: torch.device | str | None) -> AttentionInputs:
    """What quantizes the inputs of one attention module, its places not known yet."""
    assert config.act_bits is not None and config.act_format is not None and len(INPUTS) == 4
    return AttentionInputs(config.act_bits, config.softmax_bits, config.act_format, device)


def _layer_table(config: PTQConfig, structure: Structure) -> dict[str, list[int | None]]:
    """`PTQConfig.layers`."""
    table: dict[str, list[int | None]] = {}
    for name in structure.layers:
        if _excluded(config, name):
            continue
        at_end = config.end_bits is not None and name in (structure.first, structure.last)
        bits = config.end_bits if at_end else config.weight_bits
        acts = config.end_bits if at_end and config.act_bits is not None else config.act_bits
        table[name] = [bits, acts, structure.splits.get(name, 0) if config.split else 0]
    return table


def _excluded(config: PTQConfig, name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in config.exclude)
