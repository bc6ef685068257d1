"""The networks of public masked diffusion language models, without their own code: LLaDA, Dream, SDAR, MDLM, GIDD.

Three of the architectures are known ones without the causal mask: LLaDA (arXiv 2502.09992) is Llama, Dream (2508.15487) is
Qwen2 with shifted logits, SDAR (2510.06303) is Qwen3 with a block-causal mask. transformers' own layers compute them, so that
attention backends, quantization, LoRA and this package's caches work on them. MDLM (2406.07524) and GIDD (2503.04482) share a
diffusion transformer, which is here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_TRANSFORMERS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ARCHITECTURES = (*_TRANSFORMERS, "dit")


class MaskedLanguageModel(ModelMixin, ConfigMixin):
    r"""A masked language model, called as `model(input_ids, attention_mask, position_ids).logits`.

        model = dx.load_masked_language_model("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16)
        pipe = dx.MaskedDiffusionPipeline(model, BlockRefinementScheduler(), tokenizer)

    Logits at a place are always those of the token under it: where a checkpoint's own code predicts the token after it
    (Dream), they are shifted here.

    Args:
        architecture: "llama", "qwen2", "qwen3" (of transformers), or "dit" (the diffusion transformer of MDLM and GIDD).
        backbone: settings of the architecture: of the transformers config of that name; of "dit" those of
            `DiffusionTransformerLM`. Input and output embeddings are two weights, whatever it says of tying them.
        mask_token_id: the mask token.
        shift_logits: whether the network predicts the token after each place.
        block_length: None, or: each token sees its own block of so many and the blocks before it (block-causal attention).
        time_conditioning: whether a "dit" is conditioned on the time, 0 to 1 (GIDD). Otherwise it gets time 0 (MDLM).

    Raises:
        ValueError: an unknown architecture, `block_length` is not positive, or `time_conditioning` of another than "dit".
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        architecture: str = "llama",
        backbone: dict[str, Any] | None = None,
        mask_token_id: int | None = None,
        shift_logits: bool = False,
        block_length: int | None = None,
        time_conditioning: bool = False,
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"`architecture` is {architecture!r}; allowed are {', '.join(map(repr, ARCHITECTURES))}.")
        if block_length is not None and (
            isinstance(block_length, bool) or not isinstance(block_length, int) or block_length < 1
        ):
            raise ValueError(f"`block_length` is {block_length!r}; it must be None or an integer of at least 1.")
        if time_conditioning and architecture != "dit":
            raise ValueError(f"`time_conditioning` is {time_conditioning!r}; only architecture 'dit' has a time.")
        self.network: nn.Module
        if architecture == "dit":
            self.network = DiffusionTransformerLM(**(backbone or {}))
            return
        config_class, model_class = _TRANSFORMERS[architecture]
        settings = {**(backbone or {}), "is_causal": False, "use_cache": False}
        settings["tie_word_embeddings"] = False  # diffusers saves no shared tensors
        self.network = model_class(config_class(**settings, attn_implementation="sdpa"))
        for module in self.network.modules():  # without a mask, attention would go by this and not by the config
            if hasattr(module, "is_causal"):
                module.is_causal = False

    @property
    def mask_token_id(self) -> int | None:
        return self.config.mask_token_id

    def get_input_embeddings(self) -> nn.Module:
        return self.network.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module:
        return self.network.get_output_embeddings()  # type: ignore[operator]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MaskedLMOutput | tuple[torch.Tensor]:
        """Logits of every token.

        Args:
            input_ids: integers `(batch, length)`.
            attention_mask: `(batch, length)`, 0 for padding; or `(batch or 1, 1, length, length)`, what each token sees,
                bool or as added to attention scores, which is taken as it is.
            position_ids: `(batch or 1, length)`; None is 0, 1, 2, ...
            timesteps: `(batch,)`, 0 (clean) to 1 (noise), for a network conditioned on time; None takes the share of masks.
            return_dict: whether to return an output object, or a tuple.

        Returns:
            Logits `(batch, length, vocabulary)`.

        Raises:
            ValueError: `attention_mask` has neither of these shapes, or a network without a time gets `timesteps`.
        """
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        mask = self._mask(attention_mask, input_ids)
        options: dict[str, Any] = {"use_cache": False}
        if self.config.architecture == "dit":
            options = {"time": self._time(timesteps, input_ids, attention_mask)}
        elif timesteps is not None:
            raise ValueError("`timesteps` is given, and this network is not conditioned on time.")
        logits = self.network(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, **options).logits
        if self.config.shift_logits:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return MaskedLMOutput(logits=logits) if return_dict else (logits,)

    def _mask(self, mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor | None:
        length, block = input_ids.shape[1], self.config.block_length
        if mask is not None and mask.ndim == 4 and mask.shape[-2:] == (length, length):
            return mask
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(mask.shape)}; allowed are {tuple(input_ids.shape)} and (batch or 1, 1, "
                f"{length}, {length})."
            )
        if block is None:
            if mask is None or self.config.architecture != "dit":
                return mask
            seen = mask.bool()[:, None, None, :].expand(-1, 1, length, -1)
        else:
            number = torch.arange(length, device=input_ids.device) // block
            seen = (number[:, None] >= number[None, :])[None, None]
            if mask is not None:
                seen = seen & mask.bool()[:, None, None, :]
        # Padding sees itself: a softmax over nothing is no number.
        return seen | torch.eye(length, dtype=torch.bool, device=input_ids.device)

    def _time(
        self, timesteps: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        if timesteps is not None:
            if not self.config.time_conditioning:
                raise ValueError("`timesteps` is given, and this network is not conditioned on time.")
            return timesteps.expand(len(input_ids))
        if not self.config.time_conditioning:
            return torch.zeros(len(input_ids), device=input_ids.device)
        real = torch.ones_like(input_ids, dtype=torch.bool)  # what any token sees
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask.bool()
        elif attention_mask is not None:
            seen = attention_mask
            if seen.dtype != torch.bool:
                seen = seen > torch.finfo(seen.dtype).min / 2
            real = seen[:, 0].any(1).expand(len(input_ids), -1)
        masked = (input_ids == self.config.mask_token_id) & real
        return masked.sum(1) / real.sum(1).clamp(min=1)


# --- the diffusion transformer of MDLM and GIDD ----------------------------------------------------------------------


class _Norm(nn.Module):
    """Layer norm with a weight and no bias, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.layer_norm(x.float(), x.shape[-1:]) * self.weight).to(x.dtype)


class _Block(nn.Module):
    def __init__(self, config: Any, size: int, cond_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Norm(size), _Norm(size)
        self.attn_qkv = nn.Linear(size, 3 * size, bias=False)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(approximate="tanh"), nn.Linear(4 * size, size))
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * size)
        self.config, self.num_heads, self.is_causal = config, num_heads, False

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, condition=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        attended = self._attend(self.norm1(hidden_states) * (1 + scale1) + shift1, position_embeddings, attention_mask)
        hidden_states = hidden_states + gate1 * self.attn_out(attended)
        return hidden_states + gate2 * self.mlp(self.norm2(hidden_states) * (1 + scale2) + shift2)

    def _attend(self, x, position_embeddings, attention_mask):
        query, key, value = self.attn_qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        cos, sin = (part[:, None].to(query.dtype) for part in position_embeddings)

        def turned(t: torch.Tensor) -> torch.Tensor:
            left, right = t.chunk(2, -1)
            return t * cos + torch.cat((-right, left), -1) * sin

        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        scaling = query.shape[-1] ** -0.5
        return attend(self, turned(query), turned(key), value, attention_mask, scaling=scaling)[0].flatten(2)


class _TimeEmbedding(nn.Module):
    """Sinusoids of a time, through two layers."""

    def __init__(self, cond_dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        half = self.mlp[0].in_features // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
        angles = time[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class _FinalLayer(nn.Module):
    def __init__(self, size: int, vocab_size: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final = _Norm(size)
        self.linear = nn.Linear(size, vocab_size)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * size)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiffusionTransformerLM(nn.Module):
    """The network of MDLM and GIDD.

    Args:
        vocab_size, hidden_size, cond_dim, num_layers, num_heads: sizes.
    """

    _supports_attention_backend = True

    def __init__(
        self,
        vocab_size: int = 50258,
        hidden_size: int = 768,
        cond_dim: int = 128,
        num_layers: int = 12,
        num_heads: int = 12,
    ) -> None:
        super().__init__()
        self.config = PretrainedConfig(attn_implementation="sdpa")
        self.vocab_embed = nn.Embedding(vocab_size, hidden_size)
        self.sigma_map = _TimeEmbedding(cond_dim)
        self.blocks = nn.ModuleList(_Block(self.config, hidden_size, cond_dim, num_heads) for _ in range(num_layers))
        self.output_layer = _FinalLayer(hidden_size, vocab_size, cond_dim)
        self.head_size = hidden_size // num_heads

    def get_input_embeddings(self) -> nn.Module:
        return self.vocab_embed

    def get_output_embeddings(self) -> nn.Module:
        return self.output_layer.linear

    def forward(self, input_ids, attention_mask, position_ids, time) -> MaskedLMOutput:
        """As `MaskedLanguageModel`; `time` is `(batch,)`."""
        x = self.vocab_embed(input_ids)
        condition = F.silu(self.sigma_map(time))
        even = torch.arange(0, self.head_size, 2, device=input_ids.device).float()
        angles = position_ids[..., None].float() / 10000 ** (even / self.head_size)
        angles = torch.cat([angles, angles], -1)  # (1 or B, L, head size)
        rotary = (angles.cos(), angles.sin())
        for block in self.blocks:
            x = block(x, attention_mask=attention_mask, position_embeddings=rotary, condition=condition)
        return MaskedLMOutput(logits=self.output_layer(x, condition))
