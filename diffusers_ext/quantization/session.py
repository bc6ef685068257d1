"""One calibration: the model with its layers put in place of the float ones, and the stages that methods are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn
from tqdm.auto import tqdm

from .attention import INPUTS, AttentionInputs, attach, attached, detach
from .config import PTQConfig
from .finetuning import finetune, sensitive_layers
from .layers import CalibratedLayer, QuantizedLayer
from .observers import InputObserver, shrinks, weight_place
from .recording import Call
from .rounding import Sample, full_precision, learn_rounding, learn_scales, samples_of
from .structure import Structure, trace, unit_of
from .temporal import FeatureTable, SkippedLayer, TemporalBlock, time_projections
from .timing import Clock, attach_clocks, detach_clocks, falling


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
        times: timesteps of all steps of the sampler; None takes those of the calls.

    Attributes:
        block: the temporal block, where the settings treat it by itself, or None.
        time_projections, time_layers, sensitive: names of the layers that stages of finetuning are about.
        clocks: that the model needs.

    Raises:
        ValueError: there is no layer to quantize, or none that depends on the timestep alone where the settings need one.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PTQConfig,
        calls: Sequence[Call],
        seed: int,
        times: Sequence[float] | None = None,
    ) -> None:
        self.model, self.config, self.calls = model, config, list(calls)
        self.generator = torch.Generator().manual_seed(seed)
        self.structure = trace(model, self.calls[0])
        config.layers = _layer_table(config, self.structure)
        if not config.layers:
            raise ValueError(
                f"{type(model).__name__} has no linear or convolution layer to quantize, besides those that `exclude` names."
            )
        recorded = falling(call.timestep for call in self.calls)
        self.group_clock = Clock(recorded) if config.step_scales and config.act_bits is not None else None
        config.group_times = list(self.group_clock.times) if self.group_clock is not None else []
        self.block = self._temporal_block(recorded if times is None else falling(times))
        self._mark_inputs()
        self.time_projections, self.time_layers, self.sensitive = list[str](), list[str](), list[str]()
        if config.stages:
            first = self.calls[0]
            found = time_projections(model, first, self.structure.timewise)
            self.time_projections, self.time_layers = found
            self.sensitive = sensitive_layers(model, first, self.structure.attentions, self.structure.timewise)
        attention = config.attention and config.act_bits is not None
        config.attentions = [name for name in self.structure.attentions if attention and not config.excludes(name)]
        self.float_layers = {name: model.get_submodule(name) for name in config.layers}
        self.layers = {name: CalibratedLayer(layer, config.form_of(name)) for name, layer in self.float_layers.items()}
        if self.block is not None and not self.cached:
            self.block.layers = self.layers
        self.attentions: dict[str, AttentionInputs] = {}

    @property
    def cached(self) -> bool:
        """Whether the temporal block is to be replaced by tables, and is in float until then."""
        return self.config.temporal == "cache"

    @property
    def clocks(self) -> list[Clock]:
        found = [self.group_clock, None if self.block is None else self.block.clock]
        return [clock for clock in found if clock is not None]

    def _temporal_block(self, times: list[float]) -> TemporalBlock | None:
        """The temporal block; `layers`, `tables` and `skipped` of the config are brought in line with it."""
        config = self.config
        config.tables, config.skipped, config.step_times = [], [], []
        if config.temporal == "none":
            return None
        block = TemporalBlock(
            self.model, self.calls, {name: self.model.get_submodule(name) for name in config.layers}, times
        )
        config.step_times = list(block.clock.times)
        config.tables = list(block.features) if config.temporal != "reconstruct" else []
        if self.cached:
            config.layers = {name: row for name, row in config.layers.items() if name not in block.names}
            config.skipped = [name for name in block.names if name not in block.features]
        return block

    def _mark_inputs(self) -> None:
        """Note which inputs have a grid for each timestep or channel."""
        for name, row in self.config.layers.items():
            if row[1] is None:
                continue
            alone = self.block is not None and name in self.block.names
            times = 2 if alone else int(self.group_clock is not None)
            channels = int(bool(self.config.channel_scales) and not alone)
            if times or channels:
                row += [times, channels]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model is made of calibrated layers; however it ends, it is as before afterwards."""
        try:
            for name in self.config.attentions:
                inputs = attention_inputs(self.config, next(self.model.parameters()).device)
                inputs.on, inputs.clock = False, self.group_clock
                attach(self.model.get_submodule(name), inputs)
                self.attentions[name] = inputs
            for name, layer in self.layers.items():
                put(self.model, name, layer)
            attach_clocks(self.model, self.clocks)
            yield
        finally:
            detach_clocks(self.model)
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
        """Unit -> names of its layers, in the order of use. Those of the temporal block are no part of any."""
        found: dict[str, list[str]] = {}
        for name in self.layers:
            if self.block is not None and name in self.block.names:
                continue
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
        block = self.block if not self.cached else None
        total = iterations * (len(units) + (block is not None))
        with tqdm(total=total, desc="Rounding", unit="it", delay=2.0, leave=False) as bar:
            if block is not None:
                rows = block.all_rows()
                learn_rounding(
                    block,
                    [self.layers[name] for name in block.names],
                    [Sample((some,), {}, [block.targets[n][some] for n in block.features]) for some in rows.split(32)],
                    iterations=iterations,
                    rate=self.config.rounding_rate,
                    weight=self.config.rounding_weight,
                    generator=self.generator,
                    tick=bar.update,
                )
            for unit, names in units.items():
                layers = [self.layers[name] for name in names]
                module = self.model.get_submodule(unit)
                learn_rounding(
                    module,
                    layers,
                    self._samples(module),
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
        factors, power, symmetric = shrinks(config.search_from), config.search_power, bool(config.symmetric)
        alone = self.block.names if self.block is not None else []
        layers = {name: layer for name, layer in self.layers.items() if name not in alone}
        groups = [self.calls]
        if self.group_clock is not None:
            groups = [[call for call in self.calls if call.timestep == time] for time in self.group_clock.times]
        places: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
        attended: dict[str, list[torch.Tensor]] = {name: [] for name in self.attentions}
        bar = tqdm(total=len(self.calls), desc="Ranges of activations", unit="call", delay=2.0, leave=False)
        for calls in groups:
            for layer in layers.values():
                layer.observer = InputObserver(
                    layer.axis, layer.form.input_split, config.act_range, layer.form.channels
                )
            for inputs in self.attentions.values():
                inputs.observe(config.act_range)
            for call in calls:
                call.run(self.model)
                bar.update()
            for name, layer in layers.items():
                assert layer.observer is not None and layer.input_grid is not None
                places[name].append(layer.observer.place(layer.input_grid, factors, power, symmetric))
            for name, inputs in self.attentions.items():
                assert inputs.observers is not None
                place = torch.zeros(inputs.places.shape[:2], device=inputs.places.device)
                for i, (grid, observer) in enumerate(zip(inputs.grids, inputs.observers, strict=True)):
                    if grid is not None:
                        place[:, i] = observer.place(grid, factors, power, symmetric)[:, 0]
                attended[name].append(place)
        bar.close()
        for name, layer in layers.items():
            layer.input_place, layer.clock = self._by_time(places[name]), self.group_clock
            layer.observer, layer.inputs_on = None, True
        for name, inputs in self.attentions.items():
            inputs.places = self._by_time(attended[name])
            inputs.observers, inputs.on = None, True
        if self.block is not None and not self.cached:
            self.block.place_inputs(config.act_range, factors, power, symmetric)

    def _by_time(self, places: list[torch.Tensor]) -> torch.Tensor:
        return places[0] if self.group_clock is None else torch.stack(places, -1)

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
                    self._samples(module),
                    iterations=config.scale_iterations,
                    rate=config.scale_rate,
                    power=config.search_power,
                    generator=self.generator,
                    tick=bar.update,
                )

    def finetune(self) -> None:
        """Train some of the weights and the scales of activations in the whole network, where the settings say so."""
        if self.config.stages:
            finetune(self)

    # --- what others use -----------------------------------------------------------------------------------------

    def packed(self) -> dict[str, nn.Module]:
        """Name -> module as it is kept, of all layers that are replaced."""
        found: dict[str, nn.Module] = {name: layer.packed() for name, layer in self.layers.items()}
        block = self.block
        if block is None or not self.config.tables:
            return found
        errors = {} if self.cached else block.errors()
        for name in block.features:
            wanted = block.targets[name].float()
            layer = cast("QuantizedLayer | None", found.get(name))
            table = FeatureTable.filled(wanted, self.config.temporal_bits, layer, block.clock)
            if layer is not None:
                table.chosen = (table.rows(block.all_rows()) - wanted).norm(dim=1) <= errors[name]
            found[name] = table
        for name in self.config.skipped:
            found[name] = SkippedLayer(cast(nn.Linear, self.model.get_submodule(name)).out_features)
        block.clock.strict = self.cached
        return found

    def _samples(self, unit: nn.Module) -> list[Sample]:
        layers, attentions = [*self.layers.values()], [*self.attentions.values()]
        return samples_of(self.model, unit, self.calls, layers, attentions, self.clocks)

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, nothing is quantized."""
        with full_precision([*self.layers.values()], [*self.attentions.values()]):
            yield


def attention_inputs(config: PTQConfig, device: torch.device | str | None) -> AttentionInputs:
    """What quantizes the inputs of one attention module, its places not known yet."""
    assert config.act_bits is not None and config.act_format is not None and len(INPUTS) == 4
    return AttentionInputs(config.act_bits, config.softmax_bits, config.act_format, device, len(config.group_times))


def _layer_table(config: PTQConfig, structure: Structure) -> dict[str, list[int | None]]:
    """`PTQConfig.layers`."""
    table: dict[str, list[int | None]] = {}
    for name in structure.layers:
        if config.excludes(name):
            continue
        at_end = config.end_bits is not None and name in (structure.first, structure.last)
        bits = config.end_bits if at_end else config.weight_bits
        acts = config.end_bits if at_end and config.act_bits is not None else config.act_bits
        table[name] = [bits, acts, structure.splits.get(name, 0) if config.split else 0]
    return table
