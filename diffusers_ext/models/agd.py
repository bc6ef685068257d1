r"""Adapter guidance distillation (Jensen and Sadat 2025, arXiv 2503.07274): guidance in one call of the denoiser a step.

Beside each attention layer of a frozen denoiser a small adapter looks at what the layer is given, at the guidance scale w, the
time and the prompt, and adds what guidance would change: :math:`h' = Attn(h) + A(h; w, t, c)`. Trained on guided runs of the
model itself (`training.train_agd`), the conditional prediction becomes the guided one, and the call without a prompt goes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, ModelMixin, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import ModelHook
from torch import nn

from .. import _compat
from ..enabling import status

KINDS = ("cross_attention", "additive")
_HOOK = "diffusers_ext.agd"
_DIT_EMBEDDER = "transformer_blocks.0.norm1.emb"  # each block has its own; the adapters look at that of the first


class ScalarEncoder(nn.Module):
    """An embedding of guidance scales: cosines of random frequencies and phases, a network of two layers, a norm.

    The authors' additive adapter takes 1000 w. Frequencies are drawn from a normal distribution, so that scales which differ by
    a thousandth then look unrelated, and nothing is learned of those between the trained ones; here it is w, as in their other.
    """

    frequencies: torch.Tensor
    phases: torch.Tensor

    def __init__(self, width: int, mlp_ratio: float, inner_norm: bool = False) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))
        hidden = int(width * mlp_ratio)
        norm = nn.LayerNorm(hidden) if inner_norm else nn.Identity()
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), norm, nn.Linear(hidden, width), nn.LayerNorm(width)
        )
        for layer in (self.net[0], self.net[3]):
            _xavier(layer, math.sqrt(2))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """`(batch,)` scales to `(batch, width)`."""
        angle = self.frequencies.float() * w.float()[:, None] + self.phases.float()
        return self.net(torch.cos(2 * math.pi * angle).to(self.net[0].weight.dtype))


class CrossAttentionAdapter(nn.Module):
    """Attends, with one head, from the image tokens to one token of w, one of each embedding, and those of the prompt."""

    def __init__(
        self, width: int, hidden_dim: int, mlp_ratio: float, embeddings: list[int], prompt_width: int | None
    ) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, hidden_dim, bias=False)
        self.to_k = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.to_v = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.to_out = nn.Linear(hidden_dim, width)
        self.scale_encoder = ScalarEncoder(hidden_dim, mlp_ratio)
        self.embedders = nn.ModuleList(nn.Linear(size, hidden_dim) for size in embeddings)
        self.prompt_embedder = None if prompt_width is None else nn.Linear(prompt_width, hidden_dim)
        nn.init.xavier_uniform_(self.to_q.weight)
        _zero(self.to_out)

    def forward(
        self, h: torch.Tensor, w: torch.Tensor, embeddings: list[torch.Tensor], prompt: torch.Tensor | None
    ) -> torch.Tensor:
        """What to add to the layer's output, of the shape of h, `(batch, tokens, width)`."""
        tokens = [self.scale_encoder(w)[:, None].expand(len(h), -1, -1)]
        tokens += [embed(vector)[:, None] for embed, vector in zip(self.embedders, embeddings, strict=True)]
        if self.prompt_embedder is not None and prompt is not None:
            tokens.append(self.prompt_embedder(prompt))
        context = torch.cat(tokens, dim=1)
        context = context + _positions(context.shape[1], context.shape[2]).to(context)
        q, k, v = (part[:, None] for part in (self.to_q(h), self.to_k(context), self.to_v(context)))
        return self.to_out(F.scaled_dot_product_attention(q, k, v)[:, 0])


class AdditiveAdapter(nn.Module):
    """Adds one vector to all image tokens: a network of the sum of the embeddings of w and of the rest."""

    def __init__(
        self, width: int, hidden_dim: int, mlp_ratio: float, embeddings: list[int], prompt_width: int | None
    ) -> None:
        super().__init__()
        self.scale_encoder = ScalarEncoder(hidden_dim, mlp_ratio, inner_norm=True)
        self.embedders = nn.ModuleList(nn.Linear(size, hidden_dim) for size in embeddings)
        self.prompt_embedder = None if prompt_width is None else nn.Linear(prompt_width, hidden_dim)
        self.net = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), nn.LayerNorm(hidden_dim))
        self.to_out = nn.Linear(hidden_dim, width)
        _xavier(self.net[0], math.sqrt(2))
        _zero(self.to_out)

    def forward(
        self, h: torch.Tensor, w: torch.Tensor, embeddings: list[torch.Tensor], prompt: torch.Tensor | None
    ) -> torch.Tensor:
        """What to add to the layer's output, `(batch, 1, width)`."""
        c = self.scale_encoder(w)
        for embed, vector in zip(self.embedders, embeddings, strict=True):
            c = c + embed(vector)
        if self.prompt_embedder is not None and prompt is not None:
            c = c + self.prompt_embedder(prompt.mean(dim=1))
        return self.to_out(self.net(c))[:, None]


class AGDAdapter(ModelMixin, ConfigMixin):
    """Adapters for all attention layers of one denoiser, or of its fine-tunes. New ones change nothing.

        adapter = AGDAdapter.from_pretrained("my-adapter").attach(pipe, guidance_scale=7.5)
        pipe(prompt, guidance_scale=1.0)     # one call a step: guidance is in the denoiser
        adapter.set_guidance_scale(4.0)
        adapter.detach()                     # the denoiser is bit-equal to before

    Call the pipeline with `guidance_scale=1.0` while it is attached: with more, it guides what is guided already. A negative
    prompt has no effect. Make a new adapter with `AGDAdapter(**AGDAdapter.config_for(pipe.unet))`.

    Args:
        layers: name of an attention layer in the denoiser -> width of its tokens, and of those of its prompt (0: none).
        embeddings: name of a module of the denoiser whose output, `(batch, width)`, tells the time or the class -> width.
        use_prompt: whether adapters see the prompt as their layer does.
        kind: `cross_attention` (the paper's for Stable Diffusion) or `additive` (its for DiT).
        hidden_dim: width of the adapters; even.
        mlp_ratio: width of the network that embeds w, over `hidden_dim`.
        min_guidance_scale, max_guidance_scale: the trained range of w.

    Raises:
        ValueError: an argument is out of range.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        layers: dict[str, tuple[int, int]],
        embeddings: dict[str, int],
        use_prompt: bool = True,
        kind: str = "cross_attention",
        hidden_dim: int = 320,
        mlp_ratio: float = 4.0,
        min_guidance_scale: float = 1.0,
        max_guidance_scale: float = 12.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"`kind` is {kind!r}; allowed are {', '.join(KINDS)}.")
        if isinstance(hidden_dim, bool) or not isinstance(hidden_dim, int) or hidden_dim < 2 or hidden_dim % 2:
            raise ValueError(f"`hidden_dim` is {hidden_dim!r}; it must be an even integer of at least 2.")
        if not isinstance(mlp_ratio, (int, float)) or not 1 <= hidden_dim * mlp_ratio < float("inf"):
            raise ValueError(f"`mlp_ratio` is {mlp_ratio!r}; it must be a number of at least 1 / `hidden_dim`.")
        low, high = min_guidance_scale, max_guidance_scale
        if not all(isinstance(end, (int, float)) for end in (low, high)) or not 0 <= low <= high < float("inf"):
            raise ValueError(
                f"`min_guidance_scale` and `max_guidance_scale` are {low!r} and {high!r}; two numbers from 0 on, in order, are "
                "needed."
            )
        if not layers:
            raise ValueError(f"`layers` is {layers!r}; at least one attention layer is needed.")
        make = CrossAttentionAdapter if kind == "cross_attention" else AdditiveAdapter
        self._layers, self._embeddings = sorted(layers), sorted(embeddings)  # a saved config has its keys in this order
        sizes = [embeddings[name] for name in self._embeddings]
        self.adapters = nn.ModuleList(
            make(width, hidden_dim, mlp_ratio, sizes, prompt_width if use_prompt and prompt_width else None)
            for width, prompt_width in (layers[name] for name in self._layers)
        )
        self._denoiser: list[nn.Module] = []  # in a list: it is no part of this model
        self._seen: dict[str, torch.Tensor] = {}  # outputs of the modules `embeddings` in this call of the denoiser
        self._scale = torch.tensor([float(low)])

    @classmethod
    def config_for(cls, denoiser: nn.Module, use_timestep: bool = True, **options: Any) -> dict[str, Any]:
        """Arguments of an adapter for a denoiser.

        Args:
            denoiser: a `UNet2DConditionModel`, a `DiTTransformer2DModel` or an `SD3Transformer2DModel`.
            use_timestep: whether adapters see the embedding of the time.
            options: more arguments of the class. `kind` is as in the paper unless given: additive for DiT.

        Raises:
            ValueError: there is no such adapter.
        """
        denoiser = _compat.unwrap(denoiser)
        if isinstance(denoiser, UNet2DConditionModel):
            ending, time, classes, kind = ".attn2", "time_embedding", "", "cross_attention"
        elif isinstance(denoiser, DiTTransformer2DModel):
            ending, kind = ".attn1", "additive"
            time, classes = f"{_DIT_EMBEDDER}.timestep_embedder", f"{_DIT_EMBEDDER}.class_embedder"
        elif isinstance(denoiser, SD3Transformer2DModel):
            ending, time, classes, kind = ".attn", "time_text_embed.timestep_embedder", "", "cross_attention"
        else:
            raise ValueError(
                f"`denoiser` is a {type(denoiser).__name__}; allowed are UNet2DConditionModel, DiTTransformer2DModel and "
                "SD3Transformer2DModel."
            )
        layers = {
            name: (module.query_dim, _prompt_width(module))
            for name, module in denoiser.named_modules()
            if name.endswith(ending) and "transformer_blocks." in name
        }
        if not layers:
            raise ValueError(f"`denoiser` is a {type(denoiser).__name__} without attention layers that see a prompt.")
        embeddings = {time: denoiser.get_submodule(time).linear_2.out_features} if use_timestep else {}
        if classes:
            embeddings[classes] = denoiser.get_submodule(classes).embedding_table.embedding_dim
        return {"layers": layers, "embeddings": embeddings, "kind": kind, **options}

    # --- on and off --------------------------------------------------------------------------------------------------

    def attach(self, pipe: Any, guidance_scale: float | None = None) -> AGDAdapter:
        """Put the adapters on the denoiser of a pipeline, or on a denoiser itself. Pipelines that share it share them.

        Args:
            pipe: whose `unet` or `transformer` has these layers.
            guidance_scale: w; 7.5 or the end of the trained range that is nearest to it, unless given.

        Returns:
            This adapter.

        Raises:
            ValueError: the layers are not there, one has adapters on, these are on something, or w is out of range.
        """
        low, high = self.config.min_guidance_scale, self.config.max_guidance_scale
        scale = self._checked(min(max(7.5, low), high) if guidance_scale is None else guidance_scale)
        if self._denoiser:
            raise ValueError(
                f"`pipe` is a {type(pipe).__name__}, and this adapter is on a {type(self._denoiser[0]).__name__} "
                "already: call `detach` first."
            )
        denoiser = self._check_denoiser(pipe)
        for name in self._embeddings:
            _compat.attach_hook(denoiser.get_submodule(name), _EmbeddingHook(self, name), _HOOK)
        for number, name in enumerate(self._layers):
            _compat.attach_hook(denoiser.get_submodule(name), _LayerHook(self, number), _HOOK)
        self._denoiser, self._scale = [denoiser], scale
        return self

    def detach(self) -> None:
        """Take the adapters off: the denoiser is bit-equal to before.

        Raises:
            ValueError: they are not on.
        """
        if not self._denoiser:
            raise ValueError("`detach` was called on an adapter that is not attached; call `attach` first.")
        denoiser = self._denoiser.pop()
        for name in (*self._embeddings, *self._layers):
            _compat.detach_hook(denoiser.get_submodule(name), _HOOK)
        self._seen = {}

    def set_guidance_scale(self, guidance_scale: float | torch.Tensor) -> None:
        """Take another w from the next call on: a number, or one for each row of the batch, `(batch,)`.

        Raises:
            ValueError: it is not in the trained range.
        """
        self._scale = self._checked(guidance_scale)

    def _checked(self, guidance_scale: Any) -> torch.Tensor:
        low, high = self.config.min_guidance_scale, self.config.max_guidance_scale
        number = isinstance(guidance_scale, (int, float)) and not isinstance(guidance_scale, bool)
        if number or (torch.is_tensor(guidance_scale) and guidance_scale.ndim == 1):
            scale = torch.as_tensor(guidance_scale, dtype=torch.float32).reshape(-1)
            if ((scale >= low) & (scale <= high)).all():
                return scale
        raise ValueError(
            f"`guidance_scale` is {guidance_scale!r}; this adapter was trained for {low:g} to {high:g}: give a number, or a "
            "tensor `(batch,)` of them."
        )

    def _check_denoiser(self, pipe: Any) -> nn.Module:
        """The denoiser of `pipe`, where these adapters fit it. Changes nothing."""
        found = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "unet", None)
        found = getattr(pipe, "transformer", None) if found is None else found
        if not isinstance(found, nn.Module):
            raise ValueError(f"`pipe` is a {type(pipe).__name__}, which has no `unet` and no `transformer`.")
        denoiser = _compat.unwrap(found)
        modules = dict(denoiser.named_modules())
        for name, widths in self.config.layers.items():
            layer = modules.get(name)
            if layer is None or (getattr(layer, "query_dim", None), _prompt_width(layer)) != tuple(widths):
                raise ValueError(
                    f"`pipe` has a {type(denoiser).__name__} without a layer {name!r} of widths {tuple(widths)}: this adapter "
                    "is for another model."
                )
            if _compat.has_hook(layer, _HOOK):
                raise ValueError(
                    f"`pipe` has a {type(denoiser).__name__} with another adapter on: call its `detach` first."
                )
        missing = [name for name in self._embeddings if name not in modules]
        if missing:
            raise ValueError(
                f"`pipe` has a {type(denoiser).__name__} without {missing}: this adapter is for another model."
            )
        for entry in status(denoiser):
            if getattr(entry.config, "parallel", False):
                raise ValueError(
                    f"`pipe` has {entry.key} on with `parallel=True`, which decodes several steps in one call, and these "
                    "adapters take one time a call: enable it with `parallel=False`."
                )
        return denoiser

    # --- in a call of the denoiser -----------------------------------------------------------------------------------

    def see(self, name: str, embedding: torch.Tensor) -> None:
        """What a module of `embeddings` gave in this call."""
        self._seen[name] = embedding

    def added(self, number: int, h: torch.Tensor, prompt: Any) -> torch.Tensor:
        """What adapter `number` adds to what its layer makes of h.

        Args:
            number: counted from 0 in the sorted names of `layers`.
            h: what the layer is given, `(batch, tokens, width)`.
            prompt: the states of the prompt that the layer is given, or a tuple with them first (IP-Adapter).
        """
        adapter = self.adapters[number]
        if adapter.to_out.weight.device != h.device:  # the pipeline was moved
            self.to(h.device)
        if self._scale.device != h.device:
            self._scale = self._scale.to(h.device)
        dtype = adapter.to_out.weight.dtype
        prompt = prompt[0] if isinstance(prompt, (tuple, list)) else prompt
        embeddings = [self._seen[name].to(h.device, dtype) for name in self._embeddings]
        prompt = None if prompt is None else prompt.to(dtype)
        return adapter(h.to(dtype), self._scale, embeddings, prompt).to(h.dtype)


class _EmbeddingHook(ModelHook):
    def __init__(self, adapter: AGDAdapter, name: str) -> None:
        super().__init__()
        self.adapter, self.name = adapter, name

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.adapter.see(self.name, output)
        return output


class _LayerHook(ModelHook):
    def __init__(self, adapter: AGDAdapter, number: int) -> None:
        super().__init__()
        self.adapter, self.number = adapter, number

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self.fn_ref.original_forward(*args, **kwargs)
        h = args[0] if args else kwargs["hidden_states"]
        prompt = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        added = self.adapter.added(self.number, h, prompt)
        if isinstance(output, tuple):  # joint attention: the stream of the image comes first
            return (output[0] + added, *output[1:])
        return output + added


def _prompt_width(layer: nn.Module) -> int:
    """Width of the prompt's states that an attention layer is given, 0 where it is given none."""
    if getattr(layer, "added_kv_proj_dim", None) is not None:
        return layer.added_kv_proj_dim  # type: ignore[return-value]
    return layer.cross_attention_dim if getattr(layer, "is_cross_attention", False) else 0  # type: ignore[return-value]


def _xavier(layer: nn.Linear, gain: float) -> None:
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    nn.init.zeros_(layer.bias)


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


@functools.lru_cache(maxsize=16)
def _positions(length: int, width: int) -> torch.Tensor:
    """Sines, then cosines, of positions at geometric frequencies, `(length, width)`."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
