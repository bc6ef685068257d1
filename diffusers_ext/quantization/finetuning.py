r"""Finetuning of a quantized network against full precision, in the whole network: few layers, and the scales of activations.

A trained weight w stays under its grid, and keeps the direction in which it was rounded (u is 1 for up):

.. math:: w_q = s\,\big(\mathrm{clamp}(\lfloor w/s \rfloor + u + z, 0, 2^b - 1) - z\big).

The gradient goes straight through the floor, so w_q changes where w crosses a boundary. s, z and u are fixed, as is every other
weight. Scales of activations are learnt by their logarithms, those of a timestep from calls at this timestep.

Stages, each kept only where it lowers the squared error of the network's output over the calibration set:

- "time_embedding": the layers by which the timestep enters the network, timestep after timestep, by
  :math:`\sum_i \big(\|y_i - \hat y_i\|^2 + \|\epsilon - \hat\epsilon\|^2\big)` over their outputs y and the network's
  output :math:`\epsilon` (means over elements);
- "sensitive_layers": feed-forward layers, and where the network takes no text also the queries, and the keys and values of
  self-attention, in epochs over all timesteps, by the network's output alone; with all other scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import nn
from tqdm.auto import tqdm

from .attention import AttentionInputs
from .layers import CalibratedLayer
from .recording import Call
from .timing import falling

if TYPE_CHECKING:
    from .session import Session

_ROWS = {"time_embedding": 2, "sensitive_layers": 4}  # samples in one step of the optimizer
_SLOWER = 0.1  # scales of the first stage learn at this share of the rate


def sensitive_layers(model: nn.Module, call: Call, attentions: Sequence[str], timewise: Sequence[str]) -> list[str]:
    """Names of the layers that few bits of activations damage most.

    Args:
        model: the denoiser.
        call: one of its calls.
        attentions: names of its attention modules.
        timewise: names of layers that do not see the noisy sample.
    """
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, FeedForward))
    layers = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    found = [name for name in layers if name.startswith(inside) or name.endswith(".proj_mlp")]
    if found and torch.is_tensor(call.kwargs.get("encoder_hidden_states")):
        return found
    parts = [f"{name}.{part}" for name in attentions for part in ("to_q", "to_k", "to_v")]
    return [*found, *(name for name in parts if name in layers and name not in timewise)]


@dataclass(frozen=True)
class _Batch:
    """A few samples at one timestep: the call, the network's output in full precision, and those of the watched layers."""

    call: Call
    output: torch.Tensor
    parts: list[torch.Tensor]


def finetune(session: Session) -> None:
    """All stages of the settings. `config.calibration` gets how many numbers were trained and how many weights changed."""
    config = session.config
    config.calibration |= {"trained_parameters": 0, "changed_weights": 0}
    time_layers = [name for name in session.time_layers if name in session.layers]
    for stage in config.stages or []:
        first = stage == "time_embedding"
        if first:
            names, scaled, attended = session.time_projections, session.time_projections, []
        else:
            names = session.sensitive
            scaled = [name for name in session.layers if name not in time_layers]
            attended = [*session.attentions.values()]
        layers = [session.layers[name] for name in names if name in session.layers]
        holders = [session.layers[name] for name in scaled if name in session.layers]
        if layers or (holders and not first):
            _Stage(session, stage, layers, [*holders, *attended]).run()


class _Stage:
    """One stage of finetuning.

    Args:
        session: the model, quantized.
        name: of the stage.
        layers: whose weights and biases are trained.
        holders: of the places whose scales are trained.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        layers: Sequence[CalibratedLayer],
        holders: Sequence[CalibratedLayer | AttentionInputs],
    ) -> None:
        self.session, self.layers, self.first = session, layers, name == "time_embedding"
        named: list[tuple[Any, str]] = [
            (holder, "places" if isinstance(holder, AttentionInputs) else "input_place") for holder in holders
        ]
        self.holders = [(holder, place) for holder, place in named if getattr(holder, place) is not None]
        self.watched = layers if self.first else []
        self.rows = _ROWS[name]
        self.rate = session.config.finetune_rate
        self.scale_rate = session.config.finetune_scale_rate * (_SLOWER if self.first else 1)

    def run(self) -> None:
        """Train, and keep what is better."""
        config = self.session.config
        times = falling(call.timestep for call in self.session.calls)
        batches = {time: self._batches(time) for time in times}
        saved = [(layer, name, getattr(layer, name)) for layer in self.layers for name in ("rounded", "up", "own_bias")]
        saved += [(holder, name, getattr(holder, name)) for holder, name in self.holders]
        before, error = [layer.weight for layer in self.layers], self._error(batches)
        weights = self._freed()
        optimizer = torch.optim.Adam(weights, lr=self.rate) if weights else None
        epochs = config.time_epochs if self.first else config.layer_epochs
        total = epochs * sum(len(some) for some in batches.values())
        what = "Finetuning, time embedding" if self.first else "Finetuning, sensitive layers"
        with tqdm(total=total, desc=what, unit="it", delay=2.0, leave=False) as bar:
            visits = [(time, epochs) for time in times] if self.first else [(time, 1) for time in times] * epochs
            for time, rounds in visits:
                self._visit(time, batches[time] * rounds, optimizer, weights, bar)
        self._settled()
        if self._error(batches) >= error:
            for holder, name, value in saved:
                setattr(holder, name, value)
            return
        changed = [(layer.weight != old).sum() for layer, old in zip(self.layers, before, strict=True)]
        scales = sum(getattr(holder, name)[0].numel() for holder, name in self.holders)
        config.calibration["changed_weights"] += int(sum(changed))
        config.calibration["trained_parameters"] += sum(weight.numel() for weight in weights) + scales

    @torch.no_grad()
    def _batches(self, time: float) -> list[_Batch]:
        """The calibration set at one timestep."""
        calls = [call for call in self.session.calls if call.timestep == time]
        parts = [call.take(rows) for call in calls for rows in torch.arange(call.rows).split(self.rows)]
        with self.session.full_precision():
            return [_Batch(part, *self._outputs(part)) for part in parts]

    def _outputs(self, call: Call) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the network gives now, and the watched layers."""
        found: dict[nn.Module, torch.Tensor] = {}

        def see(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            found[module] = output

        handles = [layer.register_forward_hook(see) for layer in self.watched]
        try:
            output = call.run(self.session.model)[0]
        finally:
            for handle in handles:
                handle.remove()
        return output, [found[layer] for layer in self.watched]

    @torch.no_grad()
    def _error(self, batches: dict[float, list[_Batch]]) -> float:
        """Mean squared error of the network's output over the calibration set."""
        errors = [
            F.mse_loss(batch.call.run(self.session.model)[0].float(), batch.output.float())
            for some in batches.values()
            for batch in some
        ]
        return float(torch.stack(errors).mean())

    def _freed(self) -> list[torch.Tensor]:
        """Weights and biases to train."""
        weights = []
        for layer in self.layers:
            layer.up = layer.goes_up()
            layer.free = layer.float_weight.clone().requires_grad_(True)
            weights.append(layer.free)
            if layer.bias is not None:
                layer.own_bias = layer.bias.detach().clone().requires_grad_(True)
                weights.append(layer.own_bias)
        return weights

    @torch.no_grad()
    def _settled(self) -> None:
        """Weights and biases as they are from now on."""
        for layer in self.layers:
            assert layer.free is not None and layer.up is not None
            place = layer.spread_weight_place()
            layer.rounded = layer.weight_grid.between(layer.free.detach(), layer.up.float(), place)
            layer.free = None
            if layer.own_bias is not None:
                layer.own_bias = layer.own_bias.detach()

    def _visit(
        self,
        time: float,
        batches: Sequence[_Batch],
        optimizer: torch.optim.Optimizer | None,
        weights: Sequence[torch.Tensor],
        bar: Any,
    ) -> None:
        """One step of the optimizers for each batch, all of them at one timestep. Scales start anew at each visit."""
        clock = self.session.group_clock
        entry = None if clock is None else clock.times.index(time)
        tables = [getattr(holder, name) for holder, name in self.holders]
        bases = [table if entry is None else table[..., entry] for table in tables]
        logs = [torch.zeros_like(base[0]).requires_grad_(True) for base in bases]
        scales = torch.optim.Adam(logs, lr=self.scale_rate) if logs else None

        def place() -> None:
            for (holder, name), base, log in zip(self.holders, bases, logs, strict=True):
                setattr(holder, name, torch.cat([base[:1] * log.exp(), base[1:]]))

        for holder, _ in self.holders:
            holder.clock = None  # for as long as the table is this one entry
        for batch in batches:
            with torch.enable_grad():
                place()
                loss = self._loss(batch)
                found = torch.autograd.grad(loss, [*weights, *logs], allow_unused=True)
            for parameter, gradient in zip([*weights, *logs], found, strict=True):
                parameter.grad = gradient
            for each in (optimizer, scales):
                if each is not None:
                    each.step()
            bar.update()
        with torch.no_grad():
            place()
        for (holder, name), table in zip(self.holders, tables, strict=True):
            new = getattr(holder, name).detach()
            if entry is not None:
                old = list(table.unbind(-1))
                new = torch.stack([*old[:entry], new, *old[entry + 1 :]], -1)
                holder.clock = clock
            setattr(holder, name, new)

    def _loss(self, batch: _Batch) -> torch.Tensor:
        output, parts = self._outputs(batch.call)
        loss = F.mse_loss(output.float(), batch.output.float())
        if not self.first:
            return loss
        errors = [F.mse_loss(a.float(), b.float()) for a, b in zip(parts, batch.parts, strict=True)]
        return len(parts) * loss + torch.stack(errors).sum()
