"""What a cache of masked language models is worth: tokens a second by length, and bits a token of what is decoded.

Time: texts of 128 to 1,024 tokens, a quarter of them prompt, decoded in blocks of 32 with four tokens a step, on the zoo's
`verses-mdlm` (whose positions are rotary: beyond its 512 it can be timed, not judged) and on random weights of LLaDA's depth
(32 layers) at a tiny width. Quality: the zoo model goes on with the beginnings of chapters that it was not trained on, at
temperature 1, the same random numbers with and without the cache; the model itself, uncached, says how likely it finds
what was decoded. Of greedy texts it is counted how many tokens are the same.

The authors' own code (horseee/dKV-Cache) is timed beside it where the environment variable `DKV_CACHE` names a clone of it;
it needs no GPU. That of FreeCache (ZhanqiuHu/flash-dlm-experimental) is written for one GPU package and one checkpoint, and
is not run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer

import diffusers_ext as dx
from benchmarks._bench import Benchmark
from benchmarks._record import Recorder
from benchmarks.data import load_kjv
from diffusers_ext.enabling import HookConfig
from diffusers_ext.metrics import bootstrap_interval
from diffusers_ext.metrics.text import masked_nll_bound, tokens_per_second
from diffusers_ext.schedulers._unmasking import UnmaskingScheduler, UnmaskingStep, the_highest

ZOO, DEEP = "verses-mdlm", "llada-depth"
LENGTHS = (128, 256, 512, 1024)
BLOCK, TOKENS_A_STEP = 32, 4
REPEATS = {128: 5, 256: 5, 512: 3, 1024: 3}
TEXTS, PROMPT, LENGTH, MASKS = 64, 16, 96, 16
SEEDS = {"texts": 0, "masks": 0, "weights": 0}
LLADA: dict[str, Any] = {
    "model_type": "llada", "d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 32, "mlp_hidden_size": 192,
    "mlp_ratio": 4, "vocab_size": 512, "embedding_size": 512, "max_sequence_length": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "mask_token_id": 511, "weight_tying": False,
}  # fmt: skip
SETTINGS = {
    "lengths": list(LENGTHS), "block": BLOCK, "tokens_a_step": TOKENS_A_STEP, "texts": TEXTS, "prompt": PROMPT,
    "length": LENGTH, "masks": MASKS, "llada": LLADA, "numbers": SEEDS,
}  # fmt: skip


@functools.cache
def grounds() -> dict[str, tuple[nn.Module, int]]:
    """Models and their mask tokens."""
    from diffusers_ext.models.public_checkpoints import checkpoint_format

    zoo = AutoModelForMaskedLM.from_pretrained(dx.zoo_path(ZOO), dtype=torch.float32).eval()
    torch.manual_seed(SEEDS["weights"])
    deep = dx.MaskedLanguageModel(**checkpoint_format(LLADA)[0]).eval()
    return {ZOO: (zoo, tokenizer().mask_token_id), DEEP: (deep, LLADA["mask_token_id"])}


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(dx.zoo_path(ZOO))


@dataclass(frozen=True)
class Variant:
    """Settings of a cache but for the mask, and the order of decoding in a block: by "confidence", or from the "left"."""

    make: Callable[..., HookConfig]
    order: str = "confidence"


class LeftToRight(UnmaskingScheduler):
    """The masks that come first: an order that is known beforehand."""

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        return the_highest(-now.masked.cumsum(1).double(), now.masked, now.quota)


def decode(
    model: nn.Module,
    mask: int,
    prompts: torch.Tensor,
    length: int,
    config: HookConfig | None = None,
    order: str = "confidence",
    **options: Any,
) -> torch.Tensor:
    """`length` tokens after the prompts `(n, prompt)`, in blocks, without an early end, with a cache on or none."""
    scheduler = UnmaskingScheduler() if order == "confidence" else LeftToRight()
    pipe = dx.MaskedDiffusionPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def announce(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        masked = kwargs["input_ids"] == mask
        dx.announce_positions(pipe, masked & (masked.cumsum(1) <= TOKENS_A_STEP))

    with contextlib.ExitStack() as stack:
        if config is not None:
            stack.enter_context(dx.enabled(pipe, config))
        if order == "left":
            stack.callback(model.register_forward_pre_hook(announce, with_kwargs=True).remove)
        return pipe(
            input_ids=list(prompts), gen_length=length, block_length=BLOCK,
            num_inference_steps=BLOCK // TOKENS_A_STEP, mask_token_id=mask, output_type="seq", stop_at_eos=False, **options,
        ).sequences  # fmt: skip


def add_parts(benchmark: Benchmark, variants: Mapping[str, Variant], goal_variant: str) -> None:
    """Time and quality of `variants`, by name.

    The claims of time are about `goal_variant`; the tables have all.
    """
    speed_claims = [f"speed_{ground}_{length}" for ground in (ZOO, DEEP) for length in LENGTHS]

    @benchmark.part(*speed_claims, minutes=45)
    def speed(recorder: Recorder) -> None:
        torch.set_num_threads(1)
        rows = []
        for ground, (model, mask) in grounds().items():
            for length in LENGTHS:
                prompt = torch.randint(4, 500, (1, length // 4), generator=torch.Generator().manual_seed(length))
                made = length - length // 4

                plain = functools.partial(decode, model, mask, prompt, made, temperature=0.0)
                runs: dict[str, Callable[[], Any]] = {"none": plain}
                for name, variant in variants.items():
                    config = variant.make(mask_token_id=mask)
                    runs[name] = functools.partial(plain, config=config, order=variant.order)
                if ground == DEEP and os.environ.get("DKV_CACHE"):
                    runs |= authors_runs(model, mask, prompt, made)
                rates = tokens_per_second(runs, made, "none", repeats=REPEATS[length], warmup=1)
                ratio = rates.speedups[goal_variant]
                recorder.claim(
                    f"speed_{ground}_{length}",
                    f"tokens a second over no cache, {goal_variant}, {ground}, {length} tokens",
                    ratio.median, "x", ratio.interval, goal=(">=", 3.0) if length == 1024 else None,
                )  # fmt: skip
                for name in runs:
                    speedup = rates.speedups.get(name, rates.noise)
                    rows.append([ground, length, name, rates.rates[name], speedup.median, *speedup.interval])
        recorder.table(
            "tokens a second", ["model", "tokens", "cache", "tokens/s", "over none", "low", "high"], rows
        )  # fmt: skip

    quality_claims = [f"{c}_{name}" for name in variants for c in ("nll_change", "agreement", "token_forwards")]

    @benchmark.part(*quality_claims, minutes=8)
    def quality(recorder: Recorder) -> None:
        model, mask = grounds()[ZOO]
        prompts = beginnings()
        orders = list(dict.fromkeys(variant.order for variant in variants.values()))
        found = {order: _measured(model, mask, prompts, None, order) for order in orders}
        rows = [[f"none ({order})", found[order][0].mean(), None, None, None, 1.0, 1.0] for order in orders]
        for name, variant in tqdm(variants.items(), desc="Quality", unit="cache"):
            found[name] = _measured(model, mask, prompts, variant.make(mask_token_id=mask), variant.order)
        for name, variant in variants.items():
            bits, greedy, forwards = found[variant.order]
            ours, texts, count = found[name]
            scale = 100 / bits.mean()
            change = float((ours - bits).mean() * scale)
            low, high = (float(scale * end) for end in bootstrap_interval(ours - bits, np.mean))
            recorder.claim(
                f"nll_change_{name}", f"change of bits a token of what is decoded, {name}", change, "%", (low, high),
                goal=("<=", 1.0),
            )  # fmt: skip
            same = (texts == greedy).double().mean(1).numpy()
            recorder.claim(
                f"agreement_{name}", f"share of greedy tokens as without a cache, {name}", float(same.mean()), "",
                bootstrap_interval(same, np.mean),
            )  # fmt: skip
            recorder.claim(
                f"token_forwards_{name}", f"tokens through each layer over no cache, {name}", count / forwards, "x"
            )
            rows.append([name, ours.mean(), change, low, high, same.mean(), count / forwards])
        recorder.table(
            "quality",
            ["cache", "bits a token", "change (%)", "low", "high", "greedy agreement", "token forwards"],
            rows,
        )


@functools.cache
def beginnings() -> torch.Tensor:
    """Beginnings of chapters that the model was not trained on, one a text, `(TEXTS, PROMPT)`."""
    ids = [row[:PROMPT] for row in tokenizer()(load_kjv("reference")).input_ids if len(row) >= PROMPT]
    return torch.tensor([ids[i % len(ids)] for i in range(TEXTS)])


def _measured(
    model: nn.Module, mask: int, prompts: torch.Tensor, config: HookConfig | None, order: str
) -> tuple[np.ndarray, torch.Tensor, int]:
    """Bits a token of each text at temperature 1; greedy texts; tokens that went through a layer for these."""
    counts: list[int] = []
    generators = [torch.Generator().manual_seed(SEEDS["texts"] + i) for i in range(len(prompts))]
    texts = decode(model, mask, prompts, LENGTH, config, order, temperature=1.0, generator=generators)
    handle = model.get_submodule("head").register_forward_hook(lambda m, a, out: counts.append(out.shape[:2].numel()))
    greedy = decode(model, mask, prompts, LENGTH, config, order, temperature=0.0)
    handle.remove()
    whole = torch.cat([prompts, texts], 1)
    scored = torch.zeros_like(whole, dtype=torch.bool)
    scored[:, PROMPT:] = True
    with torch.no_grad():
        likelihood = masked_nll_bound(model, whole, mask, scored=scored, samples=MASKS, seed=SEEDS["masks"])
    return likelihood.nats.double().numpy() / LENGTH / math.log(2), greedy, sum(counts)


# --- the authors' code -----------------------------------------------------------------------------------------------


def authors_runs(model: nn.Module, mask: int, prompt: torch.Tensor, made: int) -> dict[str, Callable[[], Any]]:
    """Runs of dKV-Cache's own LLaDA, cached and not, with the same weights, from the clone that `DKV_CACHE` names."""
    import transformers.cache_utils

    from diffusers_ext.models.public_checkpoints import checkpoint_format

    folder = os.environ["DKV_CACHE"]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Its classes derive from one that takes other arguments today, and transformers calls `tie_weights` with some.
    transformers.cache_utils.Cache = type("Cache", (), {"__init__": lambda self, *a, **k: None})  # type: ignore[misc]
    import generation_utils.llada_dkv_cache_decode as theirs
    import models.modeling_llada_dkv_cache_decode as network

    network.LLaDAModelLM.tie_weights = lambda self, *args, **kwargs: None
    known = {
        "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False,
        "include_bias": False, "include_qkv_bias": False, "use_cache": False,
    }  # fmt: skip
    config = network.LLaDAConfig(**{k: v for k, v in LLADA.items() if k != "model_type"}, **known)
    copy = network.LLaDAModelLM(config, init_params=True).eval()
    weights, rename = model.network.state_dict(), checkpoint_format(LLADA)[1]  # type: ignore[union-attr]
    copy.load_state_dict({name: weights[rename(name)] for name in copy.state_dict()})

    def run(**options: Any) -> None:
        theirs.generate(
            copy,
            None,
            prompt,
            steps=made // TOKENS_A_STEP,
            gen_length=made,
            block_length=BLOCK,
            mask_id=mask,
            **options,
        )

    return {
        "authors, none": run,
        "authors, decode": functools.partial(run, enable_cache=True, cache_reloading_step=4),
    }
