r"""Train the cache router of HarmoniCa for the frozen transformer of a pipeline. It needs no pictures.

    accelerate launch -m diffusers_ext.training.train_harmonica --pretrained_model_name_or_path PIPELINE \
        --num_inference_steps 20 --guidance_scale 1.5 --beta 7e-8 --train_batch_size 32 --max_train_steps 2000 \
        --output_dir my-router

An optimizer step is one run of the pipeline from noise to sample. At each step of the run but the first, the router learns to
give what the transformer gives that computes everything, and pays `--beta` for each sublayer that it lets run; then the run
goes on with what the router gave, as it will in use (step-wise denoising training). The error at a step is weighted by what it
costs in the finished picture (image error proxy). The result is a `CacheRouter` for `HarmonicaConfig(router=...)`, of this
model and number of steps.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers.hooks import ModelHook
from torch import nn

from ..enabling import enabled
from ..hooks._blocks import BlockPlan
from ..hooks._plan import CacheRun, Call, PlanBuilder, uninstall
from ..hooks.harmonica import HarmonicaConfig, Kept, new_router, sublayer_names, unsupported
from ..models.cache_router import CacheRouter
from ..schedulers._model_statistics import weight_marks
from ._card import training_card
from ._data import SampleNoise
from ._loop import setup_logging, train
from ._trajectories import (
    TrajectoryTask,
    Walk,
    add_trajectory_arguments,
    check_trajectory_arguments,
    count_steps,
    travel,
    with_gradients,
)

_KEY = "harmonica.training"
PLAIN, STORE, MIX = "plain", "store", "mix"


class SoftCache:
    """What sublayers do next, while a router is trained.

    Attributes:
        mode: PLAIN runs all and leaves the cache alone, STORE runs all and stores it, MIX mixes outputs and cache.
        weights: r of each sublayer, for MIX.
        threshold: what MIX gives is stored where r is over it.
    """

    def __init__(self, threshold: float) -> None:
        self.mode, self.threshold = STORE, threshold
        self.weights, self.stored = torch.ones(0), [True]

    def use(self, mode: str, weights: torch.Tensor | None = None) -> None:
        self.mode = mode
        if weights is not None:
            self.weights, self.stored = weights, (weights.detach() > self.threshold).tolist()


class _Plan:
    def __init__(self, cache: SoftCache) -> None:
        self.cache = cache

    def mode(self, call: Call) -> str:
        return self.cache.mode


class _MixHook(ModelHook):
    def __init__(self, run: CacheRun, cache: SoftCache, number: int, slot: int) -> None:
        super().__init__()
        self.run, self.cache, self.number, self.slot = run, cache, number, slot

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        state = self.run.state
        if state.mode == PLAIN:
            return output
        kept = Kept.of(state.slots[self.slot])
        place, parts = kept.place(state.step), [output] if torch.is_tensor(output) else list(output)
        mixes = state.mode == MIX and place in kept.outputs
        if mixes:
            r = self.cache.weights[self.number]
            parts = [
                part if part is None else r * part + (1 - r) * last
                for part, last in zip(parts, kept.outputs[place], strict=True)
            ]
        if not mixes or self.cache.stored[self.number]:
            kept.outputs[place] = [part if part is None else part.detach() for part in parts]
        return parts[0] if torch.is_tensor(output) else type(output)(parts)


@contextmanager
def soft_cache(transformer: nn.Module, threshold: float) -> Iterator[tuple[SoftCache, Callable[[], None]]]:
    r"""Inside, sublayers give :math:`o_i = r_i f_i(x) + (1 - r_i) c_i`, with what they gave before as :math:`c_i`.

    Yields:
        What they are told by, and a function that empties the cache for a new run.
    """
    cache = SoftCache(threshold)
    builder = PlanBuilder(transformer, _KEY, _Plan(cache))
    for number, name in enumerate(sublayer_names(transformer)):
        builder.hook(name, _MixHook(builder.run, cache, number, builder.slot()))
    run = BlockPlan(builder).install()

    def begin() -> None:
        run.begin(None)

    try:
        yield cache, begin
    finally:
        uninstall(transformer, _KEY)


def router_loss(
    wanted: torch.Tensor, given: torch.Tensor, shares: torch.Tensor, weight: torch.Tensor | float, beta: float
) -> torch.Tensor:
    r""":math:`\lambda_t \|\epsilon - \epsilon_r\|^2 + \beta \sum_i r_{t,i}` (arXiv 2410.01723), a mean over the elements.

    Args:
        wanted: what the denoiser gives that computes everything, with guidance.
        given: what it gives with the router.
        shares: r at this step, `(sublayers,)`.
        weight: :math:`\lambda_t`.
        beta: price of a sublayer.
    """
    return weight * (wanted.detach() - given).float().square().mean() + beta * shares.sum()


def run_loss(
    pipe: Any, call: dict[str, Any], router: CacheRouter, beta: float, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of all steps of one run of the student, and its gradient by `router.logits`.

    A step has its own row of the router, which no other step of the run reads. So one optimizer step after the run is the same
    as one after each of its steps.
    """
    total, gradient = torch.zeros((), device=router.logits.device), torch.zeros_like(router.logits)
    with soft_cache(pipe.transformer, threshold) as (cache, begin):

        def walk() -> Walk:
            nonlocal total, gradient
            cache.use(STORE)
            yield True
            for step in range(1, len(router.logits)):
                cache.use(PLAIN)
                wanted = yield False
                shares = router(step)
                cache.use(MIX, shares)
                given = yield True
                loss = router_loss(wanted, given, shares, router.lambdas[step], beta)
                gradient = gradient + torch.autograd.grad(loss, router.logits)[0]
                total = total + loss.detach()

        begin()
        travel(pipe, call, walk(), visits=2)
    return total, gradient


@torch.no_grad()
def image_errors(
    pipe: Any, make_call: Callable[[], dict[str, Any]], router: CacheRouter, threshold: float
) -> torch.Tensor:
    r""":math:`\lambda_t`: mean squared change of the finished sample where the router is used at step t only, `(steps,)`.

    The paper's definition (arXiv 2410.01723). The authors' code switches one step after the other to the router
    and takes the change that each brings. The first step is 0.

    Args:
        make_call: keyword arguments of a call, with the same noise each time.
    """
    steps = len(router.logits)
    with soft_cache(pipe.transformer, threshold) as (cache, begin):

        def finished(routed: int) -> torch.Tensor:
            def walk() -> Walk:
                for step in range(steps):
                    cache.use(MIX, router(step)) if step == routed else cache.use(STORE)
                    yield True

            begin()
            return travel(pipe, make_call(), walk())

        full = finished(0)  # the first step finds nothing in the cache
        changes = [(finished(step) - full).float().square().mean() for step in range(1, steps)]
    return torch.stack([torch.zeros_like(changes[0]), *changes])


class HarmonicaTask(TrajectoryTask):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        if (reason := unsupported(self.transformer)) is not None:
            name = type(self.transformer).__name__
            raise ValueError(f"`--pretrained_model_name_or_path`: HarmoniCa does not work on {name}: {reason}.")
        steps = count_steps(self.pipeline, self.call(self.shown([0]), [torch.Generator()]))
        marks = weight_marks(self.transformer)
        set_seed(args.seed)  # the router's first numbers belong to the run
        self.router = new_router(self.transformer, steps, num_marks=len(marks))
        self.router.marks.copy_(marks)
        self.trained = {"router": self.router}

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        args, number = self.args, self.number(batch)
        self.router.clamp()  # what the optimizer did last
        steps = len(self.router.logits)
        if number == 0 or number * steps // args.lambda_every > (number - 1) * steps // args.lambda_every:
            ids = torch.arange(args.train_batch_size) + number * args.train_batch_size * self.world

            def make_call() -> dict[str, Any]:  # the same in every process
                return self.call(self.shown(ids.tolist()), SampleNoise(args.seed, ids).generators)

            self.router.lambdas.copy_(image_errors(self.pipeline, make_call, self.router, args.threshold))
        call = self.batch_call(batch, noise)
        total, gradient = run_loss(self.pipeline, call, self.router, args.beta, args.threshold)
        return with_gradients(total, [self.router.logits], [gradient])

    @contextmanager
    def enabled(self) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            saved = stack.enter_context(tempfile.TemporaryDirectory())
            self.save(Path(saved))
            yield stack.enter_context(enabled(self.pipeline, HarmonicaConfig(saved, self.args.threshold)))

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        computed = self.router.table(self.args.threshold).float().mean().item()
        return {**super().validate(folder, step), "computed": computed}

    def save(self, folder: Path) -> None:
        self.router.clamp()
        self.router.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(args, "train_harmonica", "CacheRouter", summary, ["cache"], library="diffusers_ext")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_trajectory_arguments(parser).set_defaults(learning_rate=1e-2, adam_weight_decay=0.0)
    parser.add_argument(
        "--beta", type=float, default=7e-8, help="Price of a sublayer that runs; more of it caches more."
    )
    parser.add_argument(
        "--lambda_every", type=int, default=500, help="Denoising steps from one error proxy to the next."
    )
    parser.add_argument("--threshold", type=float, default=0.1, help="Share over which a sublayer runs.")
    args = parser.parse_args(argv)
    if not 0 <= args.beta < float("inf"):
        raise ValueError(f"`--beta` is {args.beta}; it must be a number of at least 0.")
    if args.lambda_every < 1:
        raise ValueError(f"`--lambda_every` is {args.lambda_every}; it must be at least 1.")
    if not 0 <= args.threshold < 1:
        raise ValueError(f"`--threshold` is {args.threshold}; it must lie in [0, 1).")
    check_trajectory_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, HarmonicaTask(args))


if __name__ == "__main__":
    main()
