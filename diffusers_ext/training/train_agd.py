r"""Train adapters that put classifier-free guidance into one call of a frozen denoiser (AGD). It needs no pictures.

    accelerate launch -m diffusers_ext.training.train_agd --pretrained_model_name_or_path PIPELINE --prompts prompts.txt \
        --num_runs 512 --num_inference_steps 999 --kept_steps 100 --train_batch_size 64 --max_train_steps 5000 \
        --output_dir my-adapter

First the pipeline makes guided runs, each with a guidance scale of its own, and keeps the states of the denoiser and its guided
predictions on disk; that can be broken off and goes on. Then the adapters learn to give them in one call with the condition
alone. States are those of guided runs, because those are met in use; noised pictures are not. The result is an `AGDAdapter` for
`AGDAdapter.from_pretrained(folder).attach(pipe)`. Pipelines: Stable Diffusion and relatives, DiT, Stable Diffusion 3.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from torch import nn

from ..models.agd import KINDS, AGDAdapter
from ._card import training_card
from ._data import SampleNoise
from ._diffusion import write_samples
from ._guided import GuidedRuns, denoiser_inputs, denoiser_of, record_guided_runs
from ._loop import Task, setup_logging, train
from ._trajectories import add_trajectory_arguments, check_trajectory_arguments, pipeline_classes, read_prompts


def agd_loss(denoiser: nn.Module, adapter: AGDAdapter, batch: Mapping[str, Any]) -> torch.Tensor:
    r"""Mean of :math:`|\epsilon_A(x_t, t, c, w) - (\epsilon_u + w (\epsilon_c - \epsilon_u))|^2` (arXiv 2503.07274, section 4).

    Args:
        denoiser: with the adapter attached.
        adapter: gets the scales of the batch.
        batch: rows of `GuidedRuns` with `guided`.
    """
    adapter.set_guidance_scale(batch["scale"])
    dtype = next(denoiser.parameters()).dtype
    inputs = _in_dtype(denoiser_inputs(batch), dtype)
    found = denoiser(batch["x"].to(dtype), timestep=batch["t"], **inputs, return_dict=False)[0]
    return (found.float() - batch["guided"].float()).square().mean()


def _in_dtype(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, dict):
        return {name: _in_dtype(value, dtype) for name, value in values.items()}
    return values.to(dtype) if values.is_floating_point() else values


class AGDTask(Task):
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        pipeline = DiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, dtype=torch.float32
        )
        self.by_class = "class_labels" in inspect.signature(pipeline.__call__).parameters
        if self.by_class != (args.prompts is None):
            needed = "of classes, which it knows" if self.by_class else "of texts"
            raise ValueError(f"`--prompts` is {args.prompts!r}, and {type(pipeline).__name__} makes pictures {needed}.")
        self.conditions: list[Any] = pipeline_classes(pipeline) if self.by_class else read_prompts(args.prompts)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.pipeline, self.denoiser = pipeline, denoiser_of(pipeline)
        options: dict[str, Any] = {} if args.kind is None else {"kind": args.kind}
        config = AGDAdapter.config_for(
            self.denoiser, use_timestep=not args.no_timestep, use_prompt=not args.no_prompt, hidden_dim=args.hidden_dim,
            mlp_ratio=args.mlp_ratio, min_guidance_scale=args.min_guidance_scale,
            max_guidance_scale=args.max_guidance_scale, **options,
        )  # fmt: skip
        set_seed(args.seed)  # the adapter's first weights belong to the run
        self.adapter = AGDAdapter(**config)
        self.trained = {"adapter": self.adapter}

    def dataset(self, args: argparse.Namespace) -> GuidedRuns:
        state = PartialState()
        self.pipeline.to(state.device)
        record_guided_runs(
            self.pipeline, args.runs, self.conditions, num_runs=args.num_runs, num_inference_steps=args.num_inference_steps,
            guidance_scales=(args.min_guidance_scale, args.max_guidance_scale), kept_steps=args.kept_steps,
            batch_size=args.run_batch_size, seed=args.seed, call=args.pipeline_arguments,
            process=(state.process_index, state.num_processes),
        )  # fmt: skip
        state.wait_for_everyone()
        runs = GuidedRuns(args.runs)
        self.on_device = tuple(runs.columns)
        return runs

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        self.adapter.to(accelerator.device)
        self.adapter.attach(self.denoiser, self.args.guidance_scale)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        return agd_loss(self.denoiser, self.adapter, batch)

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        count, args = self.args.num_validation_images, self.args
        self.adapter.set_guidance_scale(args.guidance_scale)
        call = {
            **args.pipeline_arguments,
            "guidance_scale": 1.0,
            "num_inference_steps": args.validation_inference_steps,
        }
        call["class_labels" if self.by_class else "prompt"] = [
            self.conditions[number % len(self.conditions)] for number in range(count)
        ]
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return write_samples(self.pipeline(**call, generator=generators).images, min(8, count), folder, step)

    def save(self, folder: Path) -> None:
        self.adapter.eval().save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        return training_card(
            args, "train_agd", "AGDAdapter", summary, ["guidance-distillation"], library="diffusers_ext"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )  # fmt: skip
    add_trajectory_arguments(parser).set_defaults(
        num_inference_steps=999, max_train_steps=5000, train_batch_size=64, learning_rate=1e-4, adam_weight_decay=0.0,
        lr_scheduler="cosine", lr_warmup_steps=None,
    )  # fmt: skip
    parser.add_argument("--num_inference_steps", type=int, help="Of the recorded runs.")
    parser.add_argument("--runs", help="Folder of the recorded runs; OUTPUT_DIR-runs unless given.")
    parser.add_argument("--num_runs", type=int, default=512)
    parser.add_argument("--run_batch_size", type=int, default=8, help="Runs that are made at once.")
    parser.add_argument("--kept_steps", type=int, help="Steps kept of each run, spread over it; all unless given.")
    parser.add_argument("--min_guidance_scale", type=float, default=1.0)
    parser.add_argument("--max_guidance_scale", type=float, default=12.0)
    parser.add_argument("--kind", choices=KINDS, help="Of the adapters; the paper's for the pipeline unless given.")
    parser.add_argument("--hidden_dim", type=int, default=320, help="Width of the adapters.")
    parser.add_argument("--mlp_ratio", type=float, default=4.0, help="Of the network that embeds the scale.")
    parser.add_argument("--no_timestep", action="store_true", help="Adapters do not see the time.")
    parser.add_argument("--no_prompt", action="store_true", help="Adapters do not see the prompt.")
    parser.add_argument(
        "--guidance_scale", type=float, help="Of validation pictures, which take one call a step; 7.5 unless given."
    )
    parser.add_argument("--validation_inference_steps", type=int, default=20)
    args = parser.parse_args(argv)
    check_trajectory_arguments(args)
    low, high = args.min_guidance_scale, args.max_guidance_scale
    if not 0 <= low <= high < float("inf"):
        raise ValueError(
            f"`--min_guidance_scale` and `--max_guidance_scale` are {low} and {high}; 0 or more, in order."
        )
    if args.guidance_scale is None:
        args.guidance_scale = min(max(7.5, low), high)
    if not low <= args.guidance_scale <= high:
        raise ValueError(
            f"`--guidance_scale` is {args.guidance_scale}; it must lie in the trained range, {low} to {high}."
        )
    if args.run_batch_size < 1 or args.num_runs < 1 or args.num_runs % args.run_batch_size:
        raise ValueError(
            f"`--num_runs` is {args.num_runs}; a positive multiple of `--run_batch_size`, {args.run_batch_size}, is needed."
        )
    if args.validation_inference_steps < 1:
        raise ValueError(f"`--validation_inference_steps` is {args.validation_inference_steps}; it must be at least 1.")
    if args.lr_warmup_steps is None:
        args.lr_warmup_steps = args.max_train_steps // 10
    if args.runs is None:
        args.runs = str(Path(args.output_dir)) + "-runs"
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, AGDTask(args))


if __name__ == "__main__":
    main()
