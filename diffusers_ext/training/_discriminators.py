r"""Many small discriminators on the features of a frozen U-Net encoder, of which a few are drawn in each step.

    pool = HeadPool(timesteps, channels, ..., accelerator=accelerator, learning_rate=1e-4)   # a callback of the task
    drawn, places = pool.draw(step), pool.places(sample_ids)   # a head a noise level and level of the encoder; a noise level a sample
    fakes = unet_features(teacher, noisy, drawn.timesteps[places], condition)
    logits = drawn.judge(fakes, places, trained=False)         # with gradients for the samples, not for the heads
    pool.learn(head_hinge_loss(drawn.judge(real_features, places), drawn.judge(fake_features, places)))

A group of heads is tied to one noise level and one level of the encoder; the samples of a batch are shared out among the noise
levels. In a group, heads differ: every second one sees the mean of a map and judges the whole, the others judge each place; and two of
four see features under the prompt, two under the empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.func import functional_call

from ._data import generator_for
from ._score_distillation import FakeScore
from ._teacher import Teacher

_HIDDEN, _GROUPS = 64, 4
# Seeds of their own: which heads are drawn and renewed does not depend on the noise of samples.
_INITIAL, _DRAW, _REFRESH = 0x48454144, 0x44524157, 0x52454E45


class _Reached(Exception):
    """The encoder is done."""


def encoder_blocks(unet: Any) -> list[nn.Module]:
    """Blocks whose outputs are the levels of features, from the largest map to the smallest."""
    return [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else [])]


def unet_features(teacher: Teacher, x: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]) -> list[torch.Tensor]:
    """What the blocks of the teacher's encoder make of noisy samples; its decoder does not run.

    Args:
        x: `(batch, channels, height, width)`; gradients reach it where they are on.
        t: timesteps.
        condition: keyword arguments of the U-Net.

    Returns:
        A tensor `(batch, channels, height, width)` a level.
    """
    found: list[torch.Tensor] = []
    blocks = encoder_blocks(teacher.denoiser)

    def see(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        if len(found) == len(blocks):
            raise _Reached

    handles = [block.register_forward_hook(see) for block in blocks]
    try:
        teacher.call(teacher.denoiser, x, t, condition)
    except _Reached:
        return found
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError("The U-Net ended before its encoder did.")


def _by_sample(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.float().flatten(1).mean(dim=1) for each in logits])


def head_hinge_loss(real: Sequence[torch.Tensor], fake: Sequence[torch.Tensor]) -> torch.Tensor:
    r"""What heads learn: mean of :math:`\max(0, 1 - D(real)) + \max(0, 1 + D(fake))`, each sample of each head alike.

    Args:
        real, fake: logits of each head, `(samples, ...)`; a head has a logit, or one a place, of each sample that it judges.
    """
    return (
        _by_sample([(1 - each).relu() for each in real]).mean()
        + _by_sample([(1 + each).relu() for each in fake]).mean()
    )


def generator_hinge_loss(fake: Sequence[torch.Tensor]) -> torch.Tensor:
    r"""What the generator learns: mean of :math:`-D(fake)`, each sample of each head alike; `fake` as in `head_hinge_loss`."""
    return -_by_sample(fake).mean()


class Head(nn.Module):
    """Logits `(batch, 1, height, width)` of feature maps, of each place by itself; `(batch, 1, 1, 1)` if it sees means only.

    Args:
        channels: of the features.
        pooled: see above.
    """

    def __init__(self, channels: int, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.into, self.norm = nn.Conv2d(channels, _HIDDEN, 1), nn.GroupNorm(_GROUPS, _HIDDEN)
        self.out = nn.Conv2d(_HIDDEN, 1, 1)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """New weights, of convolutions uniform up to the root of one over the number of inputs."""
        for layer in (self.into, self.out):
            bound = layer.in_channels**-0.5
            drawn = torch.rand(layer.weight.shape, generator=generator) * 2 * bound - bound
            layer.weight.copy_(drawn)
            assert layer.bias is not None
            layer.bias.zero_()
        self.norm.reset_parameters()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.pooled:
            features = features.mean((2, 3), keepdim=True)
        return self.out(nn.functional.silu(self.norm(self.into(features))))


@dataclass(frozen=True)
class DrawnHeads:
    """Heads of one step.

    Attributes:
        timesteps: the noise levels, `(levels of noise,)`.
        conditional: whether the heads of a noise level see features under the prompt, `(levels of noise,)`.
        heads: by noise level, one a level of the encoder.
    """

    timesteps: torch.Tensor
    conditional: torch.Tensor
    heads: Sequence[Sequence[nn.Module]]

    def judge(self, features: Sequence[torch.Tensor], places: torch.Tensor, trained: bool = True) -> list[torch.Tensor]:
        """Logits of each head for the samples of its noise level; heads without a sample are left out.

        Args:
            features: of `unet_features`.
            places: number of the noise level of each sample, `(batch,)`.
            trained: False keeps the heads' own weights out of the graph.
        """
        told = []
        for place, heads in enumerate(self.heads):
            rows = (places == place).nonzero().flatten()
            if len(rows) == 0:
                continue
            for head, each in zip(heads, features, strict=True):
                weights = {name: value if trained else value.detach() for name, value in head.named_parameters()}
                told.append(functional_call(head, weights, (each[rows],)))
        return told


class HeadPool(FakeScore):
    """All heads, with an AdamW of their own that steps after the student's; a share of them is made new after each step.

    Args:
        timesteps: noise levels.
        channels: of the features of each level of the encoder.
        heads_per_group: heads of each noise level and level of the encoder.
        refresh_rate: probability of each head to be made new after a step, its optimizer state with it.
        seed: of weights and draws.
        accelerator, learning_rate, max_grad_norm, accumulate: see `FakeScore`.
    """

    def __init__(
        self,
        timesteps: Sequence[int],
        channels: Sequence[int],
        heads_per_group: int,
        refresh_rate: float,
        seed: int,
        accelerator: Accelerator,
        learning_rate: float,
        max_grad_norm: float = 1.0,
        accumulate: int = 1,
    ) -> None:
        self.timesteps, self.levels, self.count = list(timesteps), len(channels), heads_per_group
        self.refresh_rate, self.seed, self.step = refresh_rate, seed, 0
        self.heads = nn.ModuleList(
            Head(size, pooled=number % 2 == 1) for _ in timesteps for size in channels for number in range(self.count)
        )
        for number, head in enumerate(self.heads):
            head.reset(generator_for(_INITIAL ^ seed, number))
        self.heads.to(accelerator.device)
        named = dict(self.heads.named_parameters())
        super().__init__(named, accelerator, learning_rate, max_grad_norm, accumulate)

    def places(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """Numbers of the noise levels of samples, `(batch,)`: each has its turn."""
        return (sample_ids % len(self.timesteps)).to(self.accelerator.device)

    def draw(self, step: int) -> DrawnHeads:
        """Heads of an optimizer step, the same in all processes."""
        generator = generator_for(_DRAW ^ self.seed, step)

        def one_of(choices: Sequence[Any]) -> Any:
            return choices[int(torch.randint(len(choices), (), generator=generator))]

        self.step = step
        by_condition: dict[bool, list[int]] = {}
        for number in range(self.count):
            by_condition.setdefault(number // 2 % 2 == 0, []).append(number)
        groups, conditional = iter(range(len(self.timesteps) * self.levels)), []
        self.drawn: list[list[nn.Module]] = []
        for _ in self.timesteps:
            conditional.append(one_of(list(by_condition)))
            choices = by_condition[conditional[-1]]
            self.drawn.append([self.heads[next(groups) * self.count + one_of(choices)] for _ in range(self.levels)])
        device = self.accelerator.device
        return DrawnHeads(
            torch.tensor(self.timesteps, device=device), torch.tensor(conditional, device=device), self.drawn
        )

    def learn(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those of the heads that were drawn last, zeros where a head had no sample."""
        parameters = [parameter for heads in self.drawn for head in heads for parameter in head.parameters()]
        # Zeros and not nothing: all processes have to reduce the same gradients.
        found = torch.autograd.grad(loss / self.accumulate, parameters, materialize_grads=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def around_step(self, step: Callable[[], None]) -> None:
        super().around_step(step)
        self.refresh(self.step)

    def refresh(self, step: int) -> None:
        """Make some heads new, by chance that depends on the seed and the step alone."""
        generator = generator_for(_REFRESH ^ self.seed, step)
        chosen = torch.rand(len(self.heads), generator=generator) < self.refresh_rate
        for number in chosen.nonzero().flatten().tolist():
            self.heads[number].reset(generator)
            for parameter in self.heads[number].parameters():
                self.optimizer.state.pop(parameter, None)
