"""What the training loop costs: steps a second over those of a bare loop that does the same work.

    python -m benchmarks.trainer_overhead

Both train the U-Net of `avatars-sd` on latents and captions' states that are drawn once: forward, backward, clipping, AdamW,
EMA. The training loop also draws its noise by sample number, orders and collates rows, shows a bar and keeps the books. Runs
alternate. Its goal is a share of at least 0.95. The result goes to `outputs/bench/trainer_overhead.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from benchmarks._bench import OUTPUT
from benchmarks._record import machine, versions
from benchmarks._zoo import ZooModel
from diffusers_ext.metrics import bootstrap_interval
from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training._loop import Task, add_run_arguments, train

GOAL = 0.95


class Rows(Dataset):
    """Clean latents, and the states of one caption."""

    def __init__(self, pipe: Any, count: int) -> None:
        side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
        self.latents = torch.randn((count, channels, side, side), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.states = pipe.encode_prompt("a person", "cpu", 1, False)[0][0]

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        return {"clean": self.latents[item[0]], "states": self.states, "index": item[0], "sample_id": item[1]}


def loss_of(
    unet: Any, scheduler: Any, clean: torch.Tensor, states: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    prediction = unet(scheduler.add_noise(clean, noise, t), t, states, return_dict=False)[0]
    return (prediction - noise).square().mean()


class LatentTask(Task):
    on_device = ("clean", "states")

    def __init__(self, pipe: Any, rows: Rows) -> None:
        self.unet, self.scheduler, self.rows = copy.deepcopy(pipe.unet), pipe.scheduler, rows
        self.trained = {"unet": self.unet}

    def dataset(self, args: argparse.Namespace) -> Rows:
        return self.rows

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        epsilon, t = noise.normal(*batch["clean"].shape[1:]), noise.integers(1000)
        return loss_of(self.unet, self.scheduler, batch["clean"], batch["states"], epsilon, t)

    def save(self, folder: Path) -> None:
        pass


def seconds_of_ours(pipe: Any, rows: Rows, steps: int, batch: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        args = add_run_arguments(argparse.ArgumentParser()).parse_args([
            f"--output_dir={folder}", f"--max_train_steps={steps}", f"--train_batch_size={batch}", "--use_ema",
            f"--checkpointing_steps={steps + 1}",
        ])  # fmt: skip
        args.train_data_dir, args.dataset_name = "drawn", None
        return float(train(args, LatentTask(pipe, rows))["seconds"])


def seconds_of_bare(pipe: Any, rows: Rows, steps: int, batch: int) -> float:
    unet = copy.deepcopy(pipe.unet).train()
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, power=3 / 4)
    clean, states = rows.latents[:batch], rows.states.expand(batch, -1, -1)
    began = time.perf_counter()
    for _ in range(steps):
        noise, t = torch.randn_like(clean), torch.randint(1000, (batch,))
        loss_of(unet, pipe.scheduler, clean, states, noise, t).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.trainer_overhead")
    parser.add_argument("--steps", type=int, default=40, help="Of a run.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pipe = ZooModel("avatars-sd").pipe
    pipe.unet.requires_grad_(True)
    rows, given = Rows(pipe, 256), (args.steps, args.batch)
    seconds_of_bare(pipe, rows, 3, args.batch), seconds_of_ours(pipe, rows, 3, args.batch)
    pairs = [
        (seconds_of_bare(pipe, rows, *given), seconds_of_ours(pipe, rows, *given))
        for _ in tqdm(range(args.rounds), desc="rounds")
    ]
    shares = [bare / ours for bare, ours in pairs]
    result = {
        "share": statistics.median(shares), "interval": list(bootstrap_interval(shares)), "goal": GOAL,
        "steps_a_second": args.steps / statistics.median(ours for _, ours in pairs), "seconds": pairs, **vars(args),
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "trainer_overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    verdict = "holds" if result["share"] >= GOAL else "does not hold"
    low, high = result["interval"]
    print(
        f"steps a second over those of a bare loop: {result['share']:.3f} [{low:.3f}, {high:.3f}], goal >= {GOAL}: {verdict}"
    )


if __name__ == "__main__":
    main()
