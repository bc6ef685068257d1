"""Tiny language models without a causal mask, in the formats of public checkpoints, and the sampling loop of LLaDA."""

from __future__ import annotations

import torch
from torch import nn

from diffusers_ext.models.masked_language_model import MaskedLanguageModel
from diffusers_ext.models.public_checkpoints import checkpoint_format

# What the public checkpoints' `config.json` say, but for the sizes.
LLADA = {
    "model_type": "llada", "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True,
    "alibi": False, "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "scale_logits": False,
    "weight_tying": False, "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3, "mlp_ratio": 4,
    "mlp_hidden_size": 48, "vocab_size": 50, "embedding_size": 50, "max_sequence_length": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "mask_token_id": 49, "eos_token_id": 48, "pad_token_id": 48,
}  # fmt: skip
DREAM = {
    "model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": False,
    "use_sliding_window": False, "attention_dropout": 0.0, "use_cache": True, "mask_token_id": 49, "pad_token_id": 48,
}  # fmt: skip
SDAR = {
    "model_type": "sdar", "architectures": ["SDARForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 64, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": False, "use_cache": True, "mask_token_id": 49, "block_size": 4,
}  # fmt: skip
MDLM = {
    "model_type": "mdlm", "vocab_size": 50, "model_length": 64, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 3,
    "n_heads": 4, "dropout": 0.1, "time_conditioning": False,
}  # fmt: skip
GIDD = {
    "model_type": "dit", "vocab_size": 50, "max_seq_len": 64, "hidden_size": 32, "timestep_cond_dim": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "attention_dropout": 0.0, "p_uniform": 0.2, "mask_token_id": 49,
}  # fmt: skip
CHECKPOINTS = {"llada": LLADA, "dream": DREAM, "sdar": SDAR, "mdlm": MDLM, "gidd": GIDD}
MASK = 49


def hashed(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Weights by formula, that look random: recorded numbers hold on every version and machine."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 12.9898 + 78.233 * i) * 43758.5453
            value = 2 * torch.frac(wave).reshape(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(value * scale * (3 / parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(1 + 0.2 * value)
    return module.eval()


def tiny(name: str) -> MaskedLanguageModel:
    """The architecture of a public checkpoint, `CHECKPOINTS`."""
    model = MaskedLanguageModel(**checkpoint_format(CHECKPOINTS[name])[0])
    return hashed(model, 0.5 if model.config.architecture == "dit" else 1.0)  # else its attention sees one token only


def prompts(batch: int = 2, length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 48, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(model, prompt, gen_length=16, block_length=8, steps=None, order=None, before=None, mask=MASK):
    """LLaDA's sampling at temperature 0, one block after another.

    Args:
        steps: in a block; None settles one token a step.
        order: `(batch, length)` per block, called with its number: tokens of the highest values are settled first.
            None goes by confidence.
        before: called with the positions that are going to be settled, before each call; with `order` only.

    Returns:
        Tokens, and of each call the tokens it was made with and its logits.
    """
    batch, start = prompt.shape
    x = torch.full((batch, start + gen_length), mask)
    x[:, :start] = prompt
    calls = []
    for block in range(gen_length // block_length):
        inside = torch.zeros_like(x, dtype=torch.bool)
        inside[:, start + block * block_length : start + (block + 1) * block_length] = True
        ranks = None if order is None else order(block)
        for _ in range(steps or block_length):
            masked = x == mask
            settled = block_length // (steps or block_length)
            if ranks is not None:
                now = torch.zeros_like(masked).scatter(
                    1, ranks.masked_fill(~(inside & masked), -1.0).topk(settled, 1).indices, True
                )
                if before is not None:
                    before(now)
            logits = model(input_ids=x, attention_mask=torch.ones_like(x)).logits
            calls.append((x.clone(), logits.clone()))
            confidence, token = logits.double().softmax(-1).max(-1)
            if ranks is None:
                confidence = confidence.masked_fill(~(inside & masked), -1.0)
                now = torch.zeros_like(masked).scatter(1, confidence.topk(settled, 1).indices, True)
            x = torch.where(now, token, x)
    return x, calls


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(input_ids=tokens, **options).logits


def unmasked(tokens, *places, value=7):
    tokens = tokens.clone()
    tokens[:, list(places)] = value
    return tokens


def masked_tokens(batch=2, prompt=4, length=12):
    tokens = torch.full((batch, length), MASK)
    tokens[:, :prompt] = prompts(batch, prompt)
    return tokens


def computed(model) -> list[int]:
    """How many tokens of each row every later call computes, in the last layer; appended to as calls come."""
    counts: list[int] = []
    layers = model.network.model.layers if hasattr(model.network, "model") else model.network.blocks
    layers[-1].register_forward_hook(lambda module, args, output: counts.append(output.shape[1]))
    return counts


def slow_logits(model, tokens, fresh, stored):
    """A LLaDA forward written out, in which the tokens outside `fresh` keep the keys and values in `stored`.

    Returns the logits of all tokens (those outside `fresh` have no meaning) and the keys and values of each layer.
    """
    network = model.network.model
    x, kept = network.embed_tokens(tokens), []
    heads, size = network.config.num_attention_heads, network.layers[0].self_attn.head_dim
    even = torch.arange(0, size, 2, dtype=x.dtype) / size
    angles = (
        torch.arange(tokens.shape[1], dtype=x.dtype)[:, None] / network.config.rope_parameters["rope_theta"] ** even
    )
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(t):  # (B, L, heads, size): the halves are real and imaginary parts
        z = torch.complex(*t.chunk(2, -1)) * turn[:, None]
        return torch.cat([z.real, z.imag], -1)

    for i, layer in enumerate(network.layers):
        y = layer.input_layernorm(x)
        q, k, v = (getattr(layer.self_attn, n)(y).unflatten(-1, (heads, size)) for n in ("q_proj", "k_proj", "v_proj"))
        q, k = rotate(q), rotate(k)
        if stored is not None:
            k, v = (torch.where(fresh[..., None, None], new, old) for new, old in zip((k, v), stored[i], strict=True))
        kept.append((k, v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(size**0.5).softmax(-1)
        x = x + layer.self_attn.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        y = layer.post_attention_layernorm(x)
        x = x + layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    return model.network.lm_head(network.norm(x)), kept
