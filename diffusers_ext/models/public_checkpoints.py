"""Load public checkpoints of masked diffusion language models in their own formats, without their own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from .masked_language_model import MaskedLanguageModel


def load_masked_language_model(
    checkpoint: str | Path, dtype: torch.dtype | None = None, **download: Any
) -> MaskedLanguageModel:
    """Load a checkpoint of LLaDA, Dream, SDAR, MDLM or GIDD in its own format.

    Args:
        checkpoint: a folder, or a repository on the Hub.
        dtype: of the weights; None keeps that of the files.
        download: arguments of `huggingface_hub.snapshot_download`, for example `revision`.

    Raises:
        ValueError: the checkpoint is of another model, its settings are not known here, or weights are missing or of
            another shape.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(checkpoint), allow_patterns=["*.json", "*.safetensors"], **download))
    settings, rename = checkpoint_format(_read_config(folder))
    tied = bool(settings["backbone"].pop("tie_word_embeddings", False))
    with init_empty_weights(include_buffers=False):
        model = MaskedLanguageModel(**settings)
    expected = {name: value.shape for name, value in model.network.state_dict().items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"`checkpoint` is {str(checkpoint)!r}, which has no .safetensors files.")
    for file in files:  # one at a time: a shard is gigabytes
        weights = {rename(name): value for name, value in load_file(file).items()}
        weights = {name: value for name, value in weights.items() if name is not None}
        for name, value in weights.items():
            if name not in expected or value.shape != expected[name]:
                known = tuple(expected[name]) if name in expected else "no such weight"
                raise ValueError(f"`checkpoint` has {name} of shape {tuple(value.shape)}; the model has {known}.")
        model.network.load_state_dict(
            {n: v if dtype is None else v.to(dtype) for n, v in weights.items()}, strict=False, assign=True
        )
    if tied and model.get_output_embeddings().weight.is_meta:
        weight = model.get_input_embeddings().weight.detach().clone()
        model.get_output_embeddings().weight = torch.nn.Parameter(weight)
    missing = sorted(name for name, value in model.network.state_dict().items() if value.is_meta)
    if missing:
        raise ValueError(f"`checkpoint` lacks {', '.join(missing[:3])} ({len(missing)} weights).")
    return model.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, with the mask token of the tokenizer where it has none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = folder / "tokenizer_config.json"
    if "mask_token_id" not in config and tokenizer.is_file():
        told = json.loads(tokenizer.read_text(encoding="utf-8"))
        mask = told.get("mask_token")
        mask = mask.get("content") if isinstance(mask, dict) else mask
        for number, token in told.get("added_tokens_decoder", {}).items():
            if mask is not None and token.get("content") == mask:
                config["mask_token_id"] = int(number)
    return config


def checkpoint_format(config: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], str | None]]:
    """What a public checkpoint's `config.json` says.

    Returns:
        Arguments of `MaskedLanguageModel`, and a function from names of the checkpoint's weights to those of the network
        (None for what is computed here).

    Raises:
        ValueError: another model, or settings that are not known here.
    """
    try:
        return _format(config)
    except (KeyError, StopIteration) as error:
        raise ValueError(f"The checkpoint's config lacks a setting that its network needs: {error!r}.") from error


def _format(config: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], str | None]]:
    kind = str(config.get("model_type", "")).lower()
    if kind == "llada":
        return _llada(config), _llada_name
    if kind == "dream":
        return {**_of_transformers("qwen2", config), "shift_logits": True}, lambda name: name
    if kind in ("sdar", "sdar_moe"):
        if kind == "sdar_moe":
            raise ValueError("The checkpoint is a mixture of experts ('sdar_moe'), which is not known here.")
        return {**_of_transformers("qwen3", config), "block_length": config.get("block_size", 4)}, lambda name: name
    if kind in ("mdlm", "dit"):
        return _dit(config), _dit_name
    raise ValueError(
        f"The checkpoint has `model_type` {config.get('model_type')!r}; known are LLaDA, Dream, SDAR, MDLM, GIDD."
    )


def _of_transformers(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """Settings that a transformers config of that architecture knows under the same names."""
    aside = {"architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache"}
    backbone = {name: value for name, value in config.items() if name not in aside}
    mask = config.get("mask_token_id", 151669 if architecture == "qwen3" else None)
    return {"architecture": architecture, "backbone": backbone, "mask_token_id": mask}


def _llada(config: dict[str, Any]) -> dict[str, Any]:
    known = {
        "block_type": "llama", "layer_norm_type": "rms", "rope": True, "alibi": False, "include_bias": False,
        "activation_type": "silu", "input_emb_norm": False, "scale_logits": False, "attention_layer_norm": False,
        "include_qkv_bias": False, "block_group_size": 1,
    }  # fmt: skip
    if "d_model" not in config:
        raise ValueError("The checkpoint has no `d_model`: it is another LLaDA than the dense one, and not known here.")
    for name, value in known.items():
        if config.get(name, value) != value:
            raise ValueError(f"The LLaDA checkpoint has {name} = {config[name]!r}; known is {value!r}.")
    backbone = {
        "hidden_size": config["d_model"],
        "intermediate_size": config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config.get("n_kv_heads") or config["n_heads"],
        "vocab_size": config.get("embedding_size") or config["vocab_size"],
        "max_position_embeddings": config["max_sequence_length"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "tie_word_embeddings": config["weight_tying"],
        "pad_token_id": config.get("pad_token_id"),
        "eos_token_id": config.get("eos_token_id"),
        "bos_token_id": None,
    }
    return {"architecture": "llama", "backbone": backbone, "mask_token_id": config["mask_token_id"]}


_LLADA_BLOCK = {
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip
_LLADA_ROOT = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}


def _llada_name(name: str) -> str:
    parts = name.removeprefix("model.").removeprefix("transformer.").split(".")
    if len(parts) == 4 and parts[0] == "blocks" and parts[2] in _LLADA_BLOCK:
        return f"model.layers.{parts[1]}.{_LLADA_BLOCK[parts[2]]}.{parts[3]}"
    return f"{_LLADA_ROOT[parts[0]]}.{parts[1]}" if len(parts) == 2 and parts[0] in _LLADA_ROOT else name


def _dit(config: dict[str, Any]) -> dict[str, Any]:
    """MDLM on the Hub (`model_length`, `hidden_dim`, ...) or GIDD (`max_seq_len`, `hidden_size`, ...)."""
    first = lambda *names: next(config[name] for name in names if name in config)  # noqa: E731
    vocabulary = config["vocab_size"]
    backbone = {
        "vocab_size": vocabulary,
        "hidden_size": first("hidden_dim", "hidden_size"),
        "cond_dim": first("cond_dim", "timestep_cond_dim"),
        "num_layers": first("n_blocks", "num_hidden_layers"),
        "num_heads": first("n_heads", "num_attention_heads"),
    }
    is_mdlm = "model_length" in config  # its mask is the last token; GIDD is conditioned on time
    mask = config.get("mask_token_id", vocabulary - 1 if is_mdlm else None)
    if mask is None:
        raise ValueError("The checkpoint does not say which token is the mask (`mask_token_id`, or its tokenizer).")
    return {
        "architecture": "dit", "backbone": backbone, "mask_token_id": mask,
        "time_conditioning": config.get("time_conditioning", not is_mdlm),
    }  # fmt: skip


def _dit_name(name: str) -> str | None:
    name = name.removeprefix("backbone.").removeprefix("dit.")
    if name.startswith("rotary_emb."):
        return None
    return name.replace("vocab_embed.embedding", "vocab_embed.weight")
