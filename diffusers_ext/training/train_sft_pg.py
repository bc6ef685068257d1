r"""Fine-tune the UNet of a `DDPMPipeline` for a few stochastic steps by policy gradient (SFT-PG).

    accelerate launch -m diffusers_ext.training.train_sft_pg --pretrained_model_name_or_path PIPELINE \
        --train_data_dir pictures/ --resolution 32 --num_inference_steps 10 --output_dir my-model

The short run is a policy whose actions are its steps. A critic learns to tell drawn pictures from real ones, and what it says of
the finished picture is the cost of the run; a second network learns to expect that cost at each step. In each round
`--n_critic` batches are drawn, with an update of the two networks each, and then `--n_generator` optimizer steps are taken on
steps of these runs, each on one of each place in the batches. The result is a `DDIMPipeline` folder, to be called with
`eta=1` and the same number of steps.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn
from torch.nn import functional

from ._card import training_card
from ._data import SampleNoise, collate, generator_for
from ._diffusion import write_samples
from ._loop import Callback, setup_logging, train
from ._policy import log_density, transition
from .train_mmd_ddm import add_short_run_arguments, check_short_run_arguments
from .train_unconditional import UnconditionalTask

_DRAWN, _ORDER = (
    0x447261776E,
    0x4F72646572,
)  # seeds of their own for the rounds' batches and for the order of their steps


def policy_loss(advantage: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
    r"""Mean of :math:`(f(x_0) - v(x_k, k)) \log p(x_{k+1} | x_k)` (arXiv 2301.13362, algorithm 1), to be made small.

    Its gradient is that of the mean of f over the drawn pictures, up to a factor of elements times steps.

    Args:
        advantage: :math:`f(x_0) - v(x_k, k)`, `(n,)`: how much worse than expected the run ended.
        log_prob: of the steps, `(n, ...)`; the mean over its elements is taken.
    """
    return (advantage.detach() * log_prob.flatten(1).mean(1)).mean()


class Critic(nn.Module):
    """f, how bad pictures are, `(n,)`: four convolutions, the mean over what is left of the picture."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        widths = (channels, 2 * width, 4 * width, 8 * width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, max(1, min(4, side // 8))))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers(pictures).flatten(1).mean(1)


class Value(nn.Module):
    """v, what f will say of the finished picture, `(n,)`, by the sample before step k: linear layers, scaled by step."""

    def __init__(self, elements: int, steps: int, width: int) -> None:
        super().__init__()
        widths = (elements, width, width, max(1, width // 4))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.scales = nn.ModuleList(nn.Embedding(steps, b) for b in widths[1:])
        for scale in self.scales:
            nn.init.uniform_(scale.weight)  # type: ignore[arg-type]
        self.last = nn.Linear(widths[-1], 1)

    def forward(self, samples: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        x = samples.flatten(1)
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = functional.relu(scale(steps) * layer(x))
        return self.last(x)[:, 0]


class _Rounds(Callback):
    """What a resumed run needs besides the UNet: critic and value with their optimizers, and the runs of this round.

    Attributes:
        states: samples before each step and at the end, `(places of this process, batches, steps + 1, ...)`.
    """

    accelerator: Accelerator

    def __init__(self, critic: Critic, value: Value, rates: tuple[float, float]) -> None:
        self.critic, self.value = critic, value
        self.optimizers = [
            torch.optim.Adam(critic.parameters(), rates[0]), torch.optim.Adam(value.parameters(), rates[1])
        ]  # fmt: skip
        self.states = torch.zeros(0)

    def _parts(self) -> dict[str, Any]:
        return {"critic": self.critic, "value": self.value, "f": self.optimizers[0], "v": self.optimizers[1]}

    def state_dict(self) -> dict[str, Any]:
        states = self.accelerator.gather(self.states)  # called in every process
        return {"states": states, **{name: part.state_dict() for name, part in self._parts().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        number, of = self.accelerator.process_index, self.accelerator.num_processes
        self.states = state["states"].chunk(of)[number].to(self.accelerator.device)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


class SFTTask(UnconditionalTask):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        if self.scheduler.config.prediction_type != "epsilon":
            kind = self.scheduler.config.prediction_type
            raise ValueError(
                f"`--pretrained_model_name_or_path` predicts {kind!r}; a network that predicts epsilon is needed."
            )
        config = {**self.scheduler.config, "timestep_spacing": "trailing", "set_alpha_to_one": True}
        self.scheduler = DDIMScheduler.from_config({**config, "clip_sample": False, "thresholding": False})
        self.short = DDIMPipeline(self.pipeline.unet, self.scheduler)
        self.short.set_progress_bar_config(disable=True)
        set_seed(args.seed)  # the first weights of critic and value belong to the run
        unet, steps = self.pipeline.unet.config, args.num_inference_steps
        self.shape = (unet.in_channels, args.resolution, args.resolution)
        critic = Critic(unet.in_channels, args.resolution, args.critic_channels)
        value = Value(math.prod(self.shape), steps, args.value_width)
        self.rounds = _Rounds(critic, value, (args.critic_learning_rate, args.value_learning_rate))
        self.callbacks = (self.rounds,)

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        super().prepare(dataset, accelerator)
        self.pictures, self.accelerator = dataset, accelerator
        self.rounds.accelerator = accelerator
        self.rounds.critic.to(accelerator.device)
        self.rounds.value.to(accelerator.device)
        self.scheduler.set_timesteps(self.args.num_inference_steps, accelerator.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, steps = self.args, self.args.num_inference_steps
        self.pipeline.unet.eval()
        whole = len(batch["sample_id"]) * self.accelerator.num_processes
        places = batch["sample_id"] % whole
        number = int(batch["sample_id"][0]) // whole
        turn, at = divmod(number, args.n_generator)
        if at == 0:
            drawn = [self.draw(turn * args.n_critic + each, places, whole) for each in range(args.n_critic)]
            self.rounds.states = torch.stack(drawn).movedim(2, 0).contiguous()
        # Each place takes the steps of its own runs in an order of its own, none twice in a round.
        taken = torch.tensor([
            torch.randperm(args.n_critic * steps, generator=generator_for(_ORDER ^ args.seed, turn * whole + place))[at]
            for place in places.tolist()
        ])  # fmt: skip
        states = self.rounds.states
        taken, order = taken.to(states.device), torch.arange(len(places), device=states.device)
        runs, step = taken // steps, taken % steps
        now, after, end = states[order, runs, step], states[order, runs, step + 1], states[order, runs, -1]
        with torch.no_grad():
            advantage = self.rounds.critic(end) - self.rounds.value(now, step)
        return policy_loss(advantage, log_density(*self.law(now, step), after))

    def law(self, sample: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of what follows samples before these steps."""
        timesteps = self.scheduler.timesteps[step]
        epsilon = self.pipeline.unet(sample, timesteps, return_dict=False)[0]
        return transition(self.scheduler, epsilon, timesteps, sample, self.args.last_std)

    def draw(self, number: int, places: torch.Tensor, whole: int) -> torch.Tensor:
        """Runs `(steps + 1, places, ...)` of one batch, after which critic and value have learned from them."""
        noise = SampleNoise(_DRAWN ^ self.args.seed, number * whole + places, self.accelerator.device)
        rows = zip(noise.integers(len(self.pictures)).tolist(), (number * whole + places).tolist(), strict=True)
        real = collate([self.pictures[row] for row in rows])["pixel_values"].to(self.accelerator.device)
        states = [noise.normal(*self.shape)]
        with torch.no_grad():
            for step in range(self.args.num_inference_steps):
                mean, std = self.law(states[-1], torch.full((len(places),), step, device=real.device))
                states.append(mean + std * noise.normal(*self.shape))
        runs, share = torch.stack(states), noise.uniform(1, 1, 1)
        critic, value = self.rounds.critic, self.rounds.value
        drawn = runs[-1]
        self._learn(0, critic, self.critic_loss(real, drawn, share))
        with torch.no_grad():
            cost = critic(drawn)
        losses = [
            (value(before, torch.full((len(places),), step, device=real.device)) - cost).square().mean()
            for step, before in enumerate(runs[:-1])
        ]
        self._learn(1, value, torch.stack(losses).sum())
        return runs

    def critic_loss(self, real: torch.Tensor, drawn: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Mean of f over real pictures less that over drawn ones, and what a slope other than 1 between them costs."""
        critic = self.rounds.critic
        apart = critic(real).mean() - critic(drawn).mean()
        if self.args.gradient_penalty == 0:
            return apart
        between = (share * real + (1 - share) * drawn).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return apart + self.args.gradient_penalty * (slope.flatten(1).norm(dim=1) - 1).square().mean()

    def _learn(self, which: int, net: nn.Module, loss: torch.Tensor) -> None:
        """One step of a network of our own, by the mean over the processes."""
        optimizer = self.rounds.optimizers[which]
        for parameter, gradient in zip(
            net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
        ):
            parameter.grad = self.accelerator.reduce(gradient, "mean")
        optimizer.step()
        optimizer.zero_grad()

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        count, steps = self.args.num_validation_images, self.args.num_inference_steps
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        pictures = self.short(count, generators, eta=1.0, num_inference_steps=steps).images
        return write_samples(pictures, min(8, count), folder, step)

    def save(self, folder: Path) -> None:
        self.pipeline.unet.eval()
        self.short.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(args, "train_sft_pg", "DDIMPipeline", summary, ["unconditional-image-generation"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n_critic", type=int, default=5, help="Batches that are drawn in a round.")
    parser.add_argument("--n_generator", type=int, default=10, help="Optimizer steps in a round.")
    parser.add_argument("--last_std", type=float, default=0.05, help="Of the last step; the authors': 0.001.")
    parser.add_argument("--gradient_penalty", type=float, default=10.0, help="Of the critic; 0 as the authors have it.")
    parser.add_argument("--critic_learning_rate", type=float, default=1e-4)
    parser.add_argument("--value_learning_rate", type=float, default=1e-4)
    parser.add_argument("--critic_channels", type=int, default=64)
    parser.add_argument("--value_width", type=int, default=1024)
    add_short_run_arguments(parser).set_defaults(
        num_inference_steps=10, learning_rate=1e-6, adam_weight_decay=0.0, max_grad_norm=0.1, train_batch_size=128
    )
    args = parser.parse_args(argv)
    check_short_run_arguments(args)
    for name in ("n_critic", "n_generator", "critic_channels", "value_width"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least 1.")
    if args.n_generator > args.n_critic * args.num_inference_steps:
        raise ValueError(
            f"`--n_generator` is {args.n_generator}; with {args.n_critic} runs of {args.num_inference_steps} steps a round it "
            f"can be at most {args.n_critic * args.num_inference_steps}."
        )
    for name, least in (("last_std", "above"), ("critic_learning_rate", "above"), ("value_learning_rate", "above"), ("gradient_penalty", "from")):  # fmt: skip
        value = getattr(args, name)
        if not 0 <= value < math.inf or (value == 0 and least == "above"):
            raise ValueError(f"`--{name}` is {value}; it must be a number {least} 0.")
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"`--gradient_accumulation_steps` is {args.gradient_accumulation_steps}; rounds are of whole batches: take a larger "
            "`--train_batch_size`."
        )
    if args.resolution < 8:
        raise ValueError(f"`--resolution` is {args.resolution}; the critic needs at least 8.")
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, SFTTask(args))


if __name__ == "__main__":
    main()
