r"""Turn an autoregressive language model into a block diffusion model by a short training (SDAR).

    accelerate launch -m diffusers_ext.training.train_sdar --pretrained_model_name_or_path MODEL --block_length 4 \
        --train_data_dir texts/ --output_dir my-model

The model is a causal language model of transformers with the layers of Llama, Qwen2 or Qwen3. Its weights are kept, its causal
mask becomes block-causal: a token sees its own block and those before it. Each text is passed twice in one call, with masks and
clean, where a block with masks sees itself and the clean blocks before it, so that one call trains all blocks. Tokens are
predicted in their own places. The result is a `MaskedDiffusionPipeline` folder; `BlockCausalCacheConfig` is its exact cache.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..models.masked_language_model import MaskedLanguageModel
from ..pipelines._masked_diffusion import MaskedDiffusionPipeline
from ..schedulers._unmasking import UnmaskingScheduler
from ._card import training_card
from ._data import SampleNoise
from ._loop import Task, add_run_arguments, check_common_arguments, setup_logging, train
from ._text import TextWindows, add_text_arguments, load_documents

ARCHITECTURES = ("llama", "qwen2", "qwen3")
MASK_TOKEN = "<|mask|>"


def convert_to_block_diffusion(model: Any, block_length: int, mask_token_id: int) -> MaskedLanguageModel:
    """A causal language model with a block-causal mask in place of the causal one; its weights are copied, tied ones twice.

    Args:
        model: of transformers, of one of `ARCHITECTURES`. With `block_length=1` the tokens seen stay the same; what is
            predicted at a place becomes the token under it, which has to be learnt.
        block_length: tokens of a block.
        mask_token_id: a token of the model's vocabulary.

    Raises:
        ValueError: another architecture, no token of this number, or a block below 1.
    """
    kind, size = model.config.model_type, model.get_input_embeddings().weight.shape[0]
    if kind not in ARCHITECTURES:
        raise ValueError(f"`model` is of type {kind!r}; allowed are {', '.join(map(repr, ARCHITECTURES))}.")
    if not 0 <= mask_token_id < size:
        raise ValueError(f"`mask_token_id` is {mask_token_id}; the model has {size} tokens.")
    aside = {"architectures", "auto_map", "model_type", "dtype", "transformers_version", "use_cache", "_name_or_path"}
    backbone = {name: value for name, value in model.config.to_diff_dict().items() if name not in aside}
    weights = model.state_dict()
    made = MaskedLanguageModel(kind, backbone, mask_token_id, block_length=block_length)
    made.network.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return made.eval()


def block_diffusion_mask(length: int, block_length: int, device: torch.device | str | None = None) -> torch.Tensor:
    """What each of `[noisy; clean]` sees: bool `(1, 1, 2 length, 2 length)` (BD3-LM, arXiv 2503.09573, section 3).

    A noisy token sees its noisy block, and the clean blocks before it; a clean one the clean blocks up to its own.
    """
    block = torch.arange(length, device=device) // block_length
    query, key = block[:, None], block[None, :]
    noisy = torch.cat([query == key, query > key], 1)
    clean = torch.cat([torch.zeros_like(query == key), query >= key], 1)
    return torch.cat([noisy, clean])[None, None]


def block_diffusion_loss(
    model: Any,
    input_ids: torch.Tensor,
    mask_token_id: int,
    block_length: int,
    t: torch.Tensor,
    u: torch.Tensor,
) -> torch.Tensor:
    r"""Bound on the negative log-likelihood, in nats a token.

    The sum over blocks of :math:`-\log p(x^b | x^{<b})`, each bounded by masking the tokens of the block with probability t and
    weighing the cross-entropy of the masked ones by 1 / t. With one token a block it is no bound, but the likelihood.

    Args:
        model: called as `model(input_ids=, attention_mask=, position_ids=).logits`, with a mask `(1, 1, n, n)`.
        input_ids: `(batch, length)`.
        mask_token_id: the mask.
        block_length: tokens of a block; the last one may be shorter.
        t: `(batch, blocks)` in (0, 1].
        u: `(batch, length)` uniform on [0, 1): a token is masked where u is less than the t of its block.
    """
    length = input_ids.shape[1]
    rate = t.repeat_interleave(block_length, 1)[:, :length]
    masked = u < rate
    places = torch.arange(length, device=input_ids.device)
    logits = model(
        input_ids=torch.cat([torch.where(masked, mask_token_id, input_ids), input_ids], 1),
        attention_mask=block_diffusion_mask(length, block_length, input_ids.device),
        position_ids=torch.cat([places, places])[None],
    ).logits[:, :length]
    chosen = logits[masked].float().index_fill(1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    losses = F.cross_entropy(chosen, input_ids[masked], reduction="none")
    return (losses / rate[masked]).sum() / input_ids.numel()


def _make_room(model: Any, tokens: int) -> None:
    """New rows of the embeddings, where the model has fewer than `tokens`: the mean of the others, the same in every run."""
    size = model.get_input_embeddings().weight.shape[0]
    if tokens <= size:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[size:] = layer.weight[:size].mean(0)


class BlockDiffusionTask(Task):
    on_device = ("input_ids",)

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, name = args, args.pretrained_model_name_or_path
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=args.revision)
        source = AutoModelForCausalLM.from_pretrained(name, revision=args.revision, dtype=torch.float32)
        if self.tokenizer.mask_token_id is None:
            self.tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
            _make_room(source, len(self.tokenizer))
        self.mask = self.tokenizer.mask_token_id
        self.model = convert_to_block_diffusion(source, args.block_length, self.mask)
        self.trained = {"model": self.model}
        scheduler = UnmaskingScheduler(block_length=args.block_length, num_inference_steps=args.block_length)
        self.pipeline = MaskedDiffusionPipeline(self.model, scheduler, self.tokenizer, attention="block_causal")
        self.pipeline.set_progress_bar_config(disable=True)

    def dataset(self, args: argparse.Namespace) -> TextWindows:
        return TextWindows(load_documents(args), self.tokenizer, args.max_seq_length)

    def prepare(self, dataset: Any, accelerator: Any) -> None:
        self.model.to(accelerator.device)

    def loss(self, batch: dict[str, Any], noise: SampleNoise) -> torch.Tensor:
        ids, block, least = batch["input_ids"], self.args.block_length, self.args.min_mask_ratio
        t = least + (1 - least) * noise.uniform(-(-ids.shape[1] // block))
        return block_diffusion_loss(self.model, ids, self.mask, block, t, noise.uniform(ids.shape[1]))

    def validate(self, folder: Path, step: int) -> dict[str, Any]:
        if self.args.num_validation_texts == 0:
            return {}
        generators = [torch.Generator().manual_seed(seed) for seed in range(self.args.num_validation_texts)]
        texts = self.pipeline(
            gen_length=self.args.max_seq_length, block_length=self.args.block_length, generator=generators,
            num_texts_per_prompt=len(generators),
        ).texts  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step-{step:06d}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        return {}

    def save(self, folder: Path) -> None:
        self.model.eval()
        self.pipeline.save_pretrained(folder)

    def card(self, args: argparse.Namespace, summary: dict[str, Any]) -> str:
        repo = args.hub_model_id or "path/to/this/folder"
        code = (
            f"import diffusers_ext as dx\n\npipe = dx.Pipeline.from_pretrained({repo!r})\n"
            "dx.enable(pipe, dx.BlockCausalCacheConfig())\n"
            f'text = pipe("Once", gen_length=64, block_length={args.block_length}, threshold=0.85).texts[0]'
        )
        tags = ["masked-diffusion", "block-diffusion"]
        return training_card(args, "train_sdar", "MaskedDiffusionPipeline", summary, tags, loading=code)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--block_length", type=int, default=4, help="Tokens of a block.")
    parser.add_argument("--min_mask_ratio", type=float, default=1e-3, help="Smallest t: bounds the weight 1 / t.")
    parser.add_argument("--num_validation_texts", type=int, default=2)
    args = add_run_arguments(add_text_arguments(parser)).parse_args(argv)
    for name, least in (("block_length", 1), ("max_seq_length", 1), ("num_validation_texts", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least {least}.")
    if not 0.0 < args.min_mask_ratio < 1.0:
        raise ValueError(f"`--min_mask_ratio` is {args.min_mask_ratio}; it must lie in (0, 1).")
    check_common_arguments(args)
    return args


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    train(args, BlockDiffusionTask(args))


if __name__ == "__main__":
    main()
