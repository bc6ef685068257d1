"""The loop that every training script shares: arguments, accelerate, exact resume, EMA, validation, trackers, card, push.

A script brings a `Task`: which modules it trains and what the loss of a batch is. Everything else is here. Argument
names are those of the diffusers example scripts.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ._data import GlobalBatches, SampleNoise, collate, load_dataset

logger = logging.getLogger(__name__)


class Callback:
    """What changes gradients or updates of a training, whatever is trained; a `Task` brings it.

    Its state is kept in checkpoints, so that a resumed run goes on with the same bits.
    """

    def on_gradients(self) -> None:
        """Gradients of a whole optimizer step are complete: averaged over the processes, unscaled, not clipped yet."""

    def around_step(self, step: Callable[[], None]) -> None:
        """Once an optimizer step; `step` is the optimizer's own, or that of the callback before this one."""
        step()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


class Task:
    """What a training script brings to the loop.

    Attributes:
        trained: the modules to train, by the name of the folder that each is saved in. Each has `save_pretrained` and
            a `from_pretrained` that restores it.
        on_device: entries of a batch that the loss wants on the device.
        callbacks: see `Callback`; may be set in `prepare`.
    """

    trained: dict[str, nn.Module]
    on_device: tuple[str, ...] = ("pixel_values",)
    callbacks: Sequence[Callback] = ()

    def dataset(self, args: argparse.Namespace) -> Dataset:
        """What to train on: rows are dictionaries, asked for by `(index, global sample number)`."""
        return load_dataset(args)

    def prepare(self, dataset: Any, accelerator: Accelerator) -> None:
        """Move frozen parts to the device, cache what does not change. Called once, before training."""

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        """Mean loss of `batch`; all randomness from `noise`. Called with gradients on."""
        raise NotImplementedError

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        """Write validation pictures of the current weights to `folder`; returns scalars and pictures for the trackers."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the finished result to `folder` with the weights that the modules hold now."""
        raise NotImplementedError

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str | None:
        """Text of the model card for the result, or None."""
        return None


def add_common_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of every script that trains on pictures, named and meant as in the diffusers examples."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train_data_dir", help="Folder of pictures with metadata.jsonl or .txt captions, or an .npz file."
    )
    data.add_argument("--dataset_name", help="Data set of the Hub or a local one, for the `datasets` package.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--cache_dir")
    data.add_argument("--image_column", default="image")
    data.add_argument("--caption_column", default="text")
    data.add_argument("--label_column", default="label")
    data.add_argument("--split_file", help="JSON file for an .npz: row numbers, or start and stop, by split name.")
    data.add_argument("--split", default="train", help="Name of the split in --split_file to train on.")
    data.add_argument("--resolution", type=int, default=512)
    data.add_argument("--center_crop", action="store_true")
    data.add_argument("--random_flip", action="store_true")
    return add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of every script, whatever it trains on."""
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default="outputs/run")
    run.add_argument("--dataloader_num_workers", type=int, default=0)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--train_batch_size", type=int, default=16, help="Pictures a process takes at once.")
    run.add_argument("--max_train_steps", type=int, default=1000, help="Optimizer steps in all.")
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--gradient_checkpointing", action="store_true")
    run.add_argument("--learning_rate", type=float, default=1e-4)
    run.add_argument("--lr_scheduler", default="constant")
    run.add_argument("--lr_warmup_steps", type=int, default=0)
    run.add_argument(
        "--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, on a GPU: a quarter of its state."
    )
    run.add_argument("--adam_beta1", type=float, default=0.9)
    run.add_argument("--adam_beta2", type=float, default=0.999)
    run.add_argument("--adam_weight_decay", type=float, default=1e-2)
    run.add_argument("--adam_epsilon", type=float, default=1e-8)
    run.add_argument("--max_grad_norm", type=float, default=1.0)
    run.add_argument("--use_ema", action="store_true")
    run.add_argument("--ema_decay", type=float, default=0.9999)
    run.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    run.add_argument("--allow_tf32", action="store_true")
    run.add_argument("--checkpointing_steps", type=int, default=500)
    run.add_argument("--checkpoints_total_limit", type=int)
    run.add_argument("--resume_from_checkpoint", help="`latest`, or the name of a checkpoint folder.")
    run.add_argument("--validation_steps", type=int, default=0, help="0: only at the end.")
    run.add_argument("--report_to", help="Tracker of accelerate, for example tensorboard.")
    run.add_argument("--logging_dir", default="logs")
    hub = parser.add_argument_group("sharing")
    hub.add_argument("--push_to_hub", action="store_true")
    hub.add_argument("--hub_model_id")
    hub.add_argument("--hub_token")
    return parser


def check_common_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is loaded."""
    sources = [name for name in ("prompts", "train_data_dir", "dataset_name") if hasattr(args, name)]
    # By value: trainings on prompts alone give them as `train_data_dir` as well.
    if len({getattr(args, name) for name in sources} - {None}) != 1:
        allowed = ", ".join(f"`--{name}`" for name in sources[:-1])
        raise ValueError(f"Give exactly one of {allowed} and `--{sources[-1]}`.")
    for name in (
        "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps", "resolution",
    ):  # fmt: skip
        value = getattr(args, name, None)  # a text has no resolution, and a teacher has its own
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` is {value}; it must be at least 1.")
    if not 0.0 <= args.ema_decay < 1.0:
        raise ValueError(f"`--ema_decay` is {args.ema_decay}; it must lie in [0, 1).")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        raise ValueError(f"`--checkpoints_total_limit` is {args.checkpoints_total_limit}; it must be at least 1.")
    if args.push_to_hub and args.hub_model_id is None:
        raise ValueError("`--push_to_hub` needs `--hub_model_id`, for example user/my-model.")


class _Loss(nn.Module):
    """Trained modules and loss as one module, so that data parallelism sees one forward."""

    def __init__(self, task: Task):
        super().__init__()
        self.modules_ = nn.ModuleDict(task.trained)
        self._task = [task]  # in a list: the task's frozen modules are no submodules of this one

    def forward(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        return self._task[0].loss(batch, noise)


def _optimizer(args: argparse.Namespace, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }  # fmt: skip
    return (_adamw_8bit() if args.use_8bit_adam else torch.optim.AdamW)(parameters, **options)


def _adamw_8bit() -> Any:
    """AdamW of bitsandbytes.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "`--use_8bit_adam` needs the `bitsandbytes` package: pip install 'diffusers_ext[quant]'"
        ) from error
    return AdamW8bit


def train(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Train `task` and write the result to `args.output_dir`. Returns `{"steps", "seconds", "processes"}`."""
    check_common_arguments(args)
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(output_dir), logging_dir=str(output_dir / args.logging_dir)
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.use_8bit_adam:
        if accelerator.device.type != "cuda":
            raise ValueError(
                f"`--use_8bit_adam` needs a GPU, and this run is on {accelerator.device.type!r}; leave it out."
            )
        _adamw_8bit()
    set_seed(args.seed)
    dataset = task.dataset(args)
    task.prepare(dataset, accelerator)

    loss_module = _Loss(task)
    parameters = [p for p in loss_module.parameters() if p.requires_grad]
    for module in task.trained.values():
        module.train()
        if args.gradient_checkpointing:
            module.enable_gradient_checkpointing()
    optimizer = _optimizer(args, parameters)
    # The prepared scheduler steps once a process and optimizer step: lengths are scaled to keep steps what they say.
    scheduler = get_scheduler(
        args.lr_scheduler, optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )  # fmt: skip
    ema = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=3 / 4) if args.use_ema else None
    checkpoints = _Checkpoints(args, output_dir, accelerator, task, ema)
    loss_module, optimizer, scheduler = accelerator.prepare(loss_module, optimizer, scheduler)
    if ema is not None:
        ema.to(accelerator.device)
    for callback in task.callbacks:
        accelerator.register_for_checkpointing(callback)
    optimizer_step = optimizer.step
    for callback in task.callbacks:
        optimizer_step = functools.partial(callback.around_step, optimizer_step)
    first_step = checkpoints.resume() if args.resume_from_checkpoint else 0

    if accelerator.is_main_process and args.report_to:
        accelerator.init_trackers(
            Path(args.output_dir).name, config={k: v for k, v in vars(args).items() if _is_plain(v)}
        )
    accumulate = args.gradient_accumulation_steps
    sampler = GlobalBatches(
        len(dataset), args.train_batch_size, args.seed, first_step * accumulate, args.max_train_steps * accumulate,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.dataloader_num_workers)

    progress = tqdm(
        total=args.max_train_steps, initial=first_step, desc="Steps", mininterval=1.0,
        disable=not accelerator.is_local_main_process,
    )  # fmt: skip
    step, running = first_step, torch.zeros((), device=accelerator.device)
    for batch in loader:
        batch |= {name: batch[name].to(accelerator.device) for name in task.on_device}
        with accelerator.accumulate(loss_module):
            loss = loss_module(batch, SampleNoise(args.seed, batch["sample_id"], accelerator.device))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                _clip(accelerator, task.callbacks, parameters, args.max_grad_norm)
                optimizer_step()
            scheduler.step()
            optimizer.zero_grad()
        running += loss.detach() / accumulate
        if not accelerator.sync_gradients:
            continue
        step += 1
        if ema is not None:
            ema.step(parameters)
        progress.update()
        if step % 10 == 0 or step == args.max_train_steps:
            mean_loss = accelerator.reduce(running, "mean").item() / (
                step - first_step if step - first_step < 10 else 10
            )
            progress.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{scheduler.get_last_lr()[0]:.1e}")
            accelerator.log({"loss": mean_loss, "lr": scheduler.get_last_lr()[0]}, step=step)
            if not math.isfinite(mean_loss):
                raise FloatingPointError(f"The loss is {mean_loss} at step {step}; the last checkpoint is still good.")
            running.zero_()
        if step % args.checkpointing_steps == 0:
            checkpoints.save(step)
        if args.validation_steps and step % args.validation_steps == 0 and step < args.max_train_steps:
            _validate(accelerator, task, ema, parameters, output_dir, step)
    seconds = progress.format_dict["elapsed"]
    progress.close()

    accelerator.wait_for_everyone()
    summary = {"steps": step, "seconds": seconds, "processes": accelerator.num_processes}
    if accelerator.is_main_process:
        if ema is not None:
            ema.copy_to(parameters)
        _validate(accelerator, task, None, parameters, output_dir, step)
        task.save(output_dir)
        card = task.card(args, summary)
        if card is not None:
            (output_dir / "README.md").write_text(card)
        if args.push_to_hub:
            from ..hub import upload_folder

            upload_folder(output_dir, args.hub_model_id, token=args.hub_token)
    accelerator.end_training()
    return summary


def _clip(
    accelerator: Accelerator, callbacks: Sequence[Callback], parameters: list[nn.Parameter], limit: float
) -> None:
    """Clip the gradients, after the callbacks have seen them."""
    if not callbacks:
        accelerator.clip_grad_norm_(parameters, limit)
        return
    accelerator.unscale_gradients()
    if accelerator.scaler is not None and not all(p.grad.isfinite().all() for p in parameters if p.grad is not None):
        return  # the scaler is going to leave this step out; callbacks that average must not see it
    for callback in callbacks:
        callback.on_gradients()
    torch.nn.utils.clip_grad_norm_(parameters, limit)  # accelerate's would unscale once more, which fp16 refuses


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _validate(accelerator, task: Task, ema, parameters, output_dir: Path, step: int) -> None:
    """Validation with the EMA weights where there are any; training weights and modes are put back."""
    if not accelerator.is_main_process:
        return
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    try:
        for module in task.trained.values():
            module.eval()
        with torch.no_grad():
            logs = task.validate(output_dir / "samples", step)
    finally:
        for module in task.trained.values():
            module.train()
        if ema is not None:
            ema.restore(parameters)
    for tracker in accelerator.trackers:
        scalars = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        tracker.log(scalars, step=step)
        if tracker.name == "tensorboard":
            for name, value in logs.items():
                if hasattr(value, "ndim"):
                    tracker.writer.add_image(name, value, step, dataformats="HWC")


class _Checkpoints:
    """`checkpoint-<step>` folders: modules in the diffusers layout, EMA beside them, optimizer state by accelerate.

    Written under another name and renamed when complete, so that a kill never leaves half a checkpoint.
    """

    def __init__(self, args, output_dir: Path, accelerator: Accelerator, task: Task, ema: EMAModel | None):
        self.args, self.output_dir, self.accelerator, self.task, self.ema = args, output_dir, accelerator, task, ema
        accelerator.register_save_state_pre_hook(self._save_modules)
        accelerator.register_load_state_pre_hook(self._load_modules)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for module in self.task.trained.values() for p in module.parameters() if p.requires_grad]

    def _save_modules(self, models, weights, folder: str) -> None:
        if self.accelerator.is_main_process:
            for name, module in self.task.trained.items():
                module.save_pretrained(os.path.join(folder, name))
            if self.ema is not None:
                self.ema.store(self._parameters())
                self.ema.copy_to(self._parameters())
                for name, module in self.task.trained.items():
                    module.save_pretrained(os.path.join(folder, f"{name}_ema"))
                self.ema.restore(self._parameters())
        weights.clear()  # accelerate then writes no second copy

    def _load_modules(self, models, folder: str) -> None:
        models.clear()
        if self.ema is not None:
            for name, module in self.task.trained.items():
                _load_weights(module, Path(folder) / f"{name}_ema")
            self.ema.shadow_params = [p.detach().clone() for p in self._parameters()]
            self.ema.optimization_step = json.loads((Path(folder) / "trainer_state.json").read_text())["ema_step"]
        for name, module in self.task.trained.items():
            _load_weights(module, Path(folder) / name)

    def existing(self) -> list[Path]:
        folders = [f for f in self.output_dir.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
        return sorted(folders, key=lambda f: int(f.name.removeprefix("checkpoint-")))

    def save(self, step: int) -> None:
        limit = self.args.checkpoints_total_limit
        partial, final = self.output_dir / f".partial-checkpoint-{step}", self.output_dir / f"checkpoint-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            state = {"step": step, "ema_step": self.ema.optimization_step if self.ema is not None else 0}
            (partial / "trainer_state.json").write_text(json.dumps(state))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            if limit is not None:  # the new one is safe: only now the oldest go
                for old in self.existing()[:-limit]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        wanted = self.args.resume_from_checkpoint
        existing = self.existing()
        if wanted == "latest":
            if not existing:
                logger.warning(
                    "`--resume_from_checkpoint latest`: %s holds no checkpoint, starting from step 0.", self.output_dir
                )
                return 0
            folder = existing[-1]
        else:
            folder = self.output_dir / Path(wanted).name
            if folder not in existing:
                names = [f.name for f in existing]
                raise ValueError(f"`--resume_from_checkpoint` is {wanted!r}; allowed are 'latest' and {names}.")
        self.accelerator.load_state(str(folder))
        return json.loads((folder / "trainer_state.json").read_text())["step"]


def _load_weights(module: nn.Module, folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    state = module.state_dict(keep_vars=True)
    tied = {value.data_ptr() for name, value in state.items() if name in weights}
    weights |= {name: value for name, value in state.items() if name not in weights and value.data_ptr() in tied}
    module.load_state_dict(weights)  # of tied weights the file has one name; the others would count as missing


def picture_grid(pictures: list, columns: int, scale: int = 1):
    """PIL pictures of one size as one picture, row by row; `scale` repeats pixels (small pictures stay readable)."""
    from PIL import Image

    width, height = (side * scale for side in pictures[0].size)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(
            picture.resize((width, height), Image.Resampling.NEAREST), (i % columns * width, i // columns * height)
        )
    return sheet


def setup_logging() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
