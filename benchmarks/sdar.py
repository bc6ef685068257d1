"""What a short conversion of an autoregressive model is worth against block diffusion from scratch; calls a token.

    diffusers-ext bench sdar            # records diffusers_ext/results/sdar.json

Settings were fixed before measuring. A small autoregressive model learns the King James Bible; then it is converted with a sixth
of its steps. From scratch, the same network learns block diffusion with the computation of both together: a step of block
diffusion passes each text twice. All three times, with other seeds. Bounds on the likelihood are of chapters that no model saw,
with the same masks for all. The paper's models are a thousand times larger and its adaptation far longer.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder, Samples
from benchmarks._texts import PROMPT, TrigramJudge, prompts, unseen
from benchmarks._trainings import training_folder
from benchmarks.data import load_kjv
from diffusers_ext.training import train_sdar
from diffusers_ext.training._data import SampleNoise
from diffusers_ext.training._loop import Task, add_run_arguments, train
from diffusers_ext.training._text import TextWindows
from diffusers_ext.training.train_sdar import block_diffusion_loss, convert_to_block_diffusion

LENGTH, BLOCK, WIDE, SEEDS = 64, 4, 16, (0, 1, 2)
NETWORK: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
AUTOREGRESSIVE, CONVERSION = 480, 80  # steps; of the second kind each costs two of the first
SCRATCH = AUTOREGRESSIVE // 2 + CONVERSION
COMMON: dict[str, Any] = {
    "train_batch_size": 32, "learning_rate": 2e-3, "lr_warmup_steps": 20, "adam_weight_decay": 0.0,
    "checkpointing_steps": 100, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest",
}  # fmt: skip
LIKELIHOOD: dict[str, Any] = {"windows": 64, "draws": 16}
DECODING: dict[str, Any] = {"texts": 32, "length": 64, "threshold": 0.85}
BENCHMARK = Benchmark(
    "sdar",
    settings={
        "network": NETWORK, "common": COMMON, "length": LENGTH, "block": BLOCK, "wide": WIDE,
        "steps": [AUTOREGRESSIVE, CONVERSION, SCRATCH], "seeds": list(SEEDS), "likelihood": LIKELIHOOD,
        "decoding": DECODING,
    },
)  # fmt: skip


class NextTokenTask(Task):
    """Ordinary training of an autoregressive model."""

    on_device = ("input_ids",)

    def __init__(self, start: Path) -> None:
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
        self.trained = {"model": self.model}

    def dataset(self, args: argparse.Namespace) -> TextWindows:
        return TextWindows(load_kjv("generator"), self.tokenizer, LENGTH)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        ids = batch["input_ids"]
        return F.cross_entropy(self.model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def folder() -> Path:
    """Where everything is kept."""
    told = [NETWORK, COMMON, LENGTH, AUTOREGRESSIVE, CONVERSION]
    return training_folder("sdar", "diffusers_ext.training.train_sdar", told)


def start(seed: int) -> Path:
    """The untrained network, with the tokenizer of the zoo's language model."""
    made = folder() / f"start-{seed}"
    if not (made / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(dx.zoo_path("verses-mdlm"))
        tokenizer.save_pretrained(made)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            end = tokenizer.eos_token_id
            model = LlamaForCausalLM(
                LlamaConfig(**NETWORK, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end)
            )
            model.save_pretrained(made)
    return made


def autoregressive(seed: int) -> Path:
    """The trained autoregressive model; made, or gone on with, where it is not finished."""
    made = folder() / f"autoregressive-{seed}"
    if not (made / "config.json").is_file():
        parser = add_run_arguments(argparse.ArgumentParser())
        parser.set_defaults(train_data_dir="kjv", dataset_name=None)
        values = {**COMMON, "max_train_steps": AUTOREGRESSIVE, "output_dir": made, "seed": seed}
        train(parser.parse_args(_flags(values)), NextTokenTask(start(seed)))
    return made


def block_diffusion(name: str, source: Path, steps: int, block: int, seed: int) -> Any:
    """A pipeline trained from `source`; made, or gone on with, where it is not finished."""
    made = folder() / f"{name}-{block}-{seed}"
    if not (made / "model_index.json").is_file():
        texts = folder() / "texts"
        texts.mkdir(parents=True, exist_ok=True)
        for i, text in enumerate(load_kjv("generator")):
            (texts / f"{i:04d}.txt").write_text(text, encoding="utf-8")
        train_sdar.main(_flags({
            **COMMON, "pretrained_model_name_or_path": source, "train_data_dir": texts, "max_seq_length": LENGTH,
            "block_length": block, "num_validation_texts": 0, "max_train_steps": steps, "output_dir": made, "seed": seed,
        }))  # fmt: skip
    pipe = dx.MaskedDiffusionPipeline.from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def windows() -> torch.Tensor:
    found = unseen(LENGTH)
    return found[torch.linspace(0, len(found) - 1, LIKELIHOOD["windows"]).long()]


@torch.no_grad()
def bound(model: Any, mask: int, block: int) -> float:
    """Nats a token; the noise levels of a block are one in each stratum."""
    generator, draws = torch.Generator().manual_seed(0), LIKELIHOOD["draws"]
    blocks, total = -(-LENGTH // block), 0.0
    for draw in range(draws):
        t = ((draw + torch.rand(len(windows()), blocks, generator=generator)) / draws).clamp(min=1e-3)
        u = torch.rand(windows().shape, generator=generator)
        total += block_diffusion_loss(model, windows(), mask, block, t, u).item() / draws
    return total


@torch.no_grad()
def likelihood(model: Any) -> float:
    """Nats a token of the autoregressive model; the first token of a window, for which it sees nothing, is left out."""
    logits = model(input_ids=windows()).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), windows()[:, 1:].flatten()).item()


@BENCHMARK.part("conversion_over_scratch", minutes=24)
def conversion(recorder: Recorder) -> None:
    """Bounds on unseen chapters."""
    rows, ours, theirs = [], [], []
    for seed in tqdm(SEEDS, desc="Seeds"):
        source = autoregressive(seed)
        causal = AutoModelForCausalLM.from_pretrained(source).eval()
        mask = AutoTokenizer.from_pretrained(source).mask_token_id
        untrained = bound(convert_to_block_diffusion(causal, BLOCK, mask), mask, BLOCK)
        ours.append(bound(block_diffusion("converted", source, CONVERSION, BLOCK, seed).model, mask, BLOCK))
        scratch = block_diffusion("scratch", start(seed), SCRATCH, BLOCK, seed).model
        theirs.append(bound(scratch, mask, BLOCK))
        rows.append([seed, likelihood(causal), untrained, ours[-1], theirs[-1]])
    recorder.paired(
        "conversion_over_scratch",
        f"bound on the negative log-likelihood of unseen chapters after conversion less that from scratch with the same "
        f"computation, blocks of {BLOCK}",
        Samples("difference", {"ours": ours, "theirs": theirs}, 0.05), "nats a token", ("<=", 0.0),
    )  # fmt: skip
    columns = ["seed", "autoregressive", "converted, not trained", "converted", "from scratch"]
    recorder.table("nats a token", columns, rows)


@BENCHMARK.part("calls_per_token", minutes=3)
def decoding(recorder: Recorder) -> None:
    """Calls by a threshold on the confidence; and what the texts are worth."""
    source, rows, calls = autoregressive(SEEDS[0]), [], {}
    judge, starts = TrigramJudge.of_the_training_data(), prompts(DECODING["texts"], PROMPT + DECODING["length"])
    for block in (BLOCK, WIDE):
        pipe = block_diffusion("converted", source, CONVERSION, block, SEEDS[0])
        dx.enable(pipe, dx.BlockCausalCacheConfig())
        for name, threshold in (("one token a call", None), ("threshold", DECODING["threshold"])):
            pipe.scheduler = dx.UnmaskingScheduler(threshold=threshold)
            found = pipe(
                input_ids=starts, gen_length=DECODING["length"], block_length=block, temperature=0.0, stop_at_eos=False,
                output_type="seq",
            )  # fmt: skip
            calls[block, name] = [count / DECODING["length"] for count in found.num_calls]
            nats = judge.nats_per_token(torch.cat([starts, found.sequences], 1), PROMPT)
            mean = sum(calls[block, name]) / DECODING["texts"]
            rows.append([block, name, mean, sum(nats) / DECODING["texts"]])
    recorder.paired(
        "calls_per_token",
        f"calls a token with a threshold of {DECODING['threshold']} on the confidence, blocks of {BLOCK}",
        Samples("value", {"ours": calls[BLOCK, "threshold"]}, 0.05, each=False), "", ("<=", 0.5),
    )  # fmt: skip
    recorder.table("decoding", ["block", "commits", "calls a token", "judge, nats a token"], rows)


if __name__ == "__main__":
    BENCHMARK.main()
