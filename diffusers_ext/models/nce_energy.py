r"""The trained energy of EDLM (Xu et al. 2024, arXiv 2410.21357): how much worse a text is than the denoiser thinks.

A bidirectional transformer sees the noisy and the clean token at every place. It begins as the denoiser and is trained to tell
texts of the data from those that the denoiser draws for the same noisy text (noise-contrastive estimation, Gutmann and
Hyvärinen 2010). Its optimum is :math:`E = \log p_\theta(x_0 | x_t) - \log p(x_0 | x_t)`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..schedulers._unmasking import safe_categorical, without_mask


class NCEEnergy(ModelMixin, ConfigMixin):
    """One number a text, lower for texts like those of the data: an energy for `EnergyReweightedScheduler`.

        energy = NCEEnergy.from_denoiser(model)     # then train it: `train_edlm`
        energy = NCEEnergy.from_pretrained(folder)

    Args:
        backbone: config of the transformer, as transformers writes it, with its `model_type`.

    Raises:
        ValueError: `backbone` names no transformer.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, backbone: dict[str, Any]) -> None:
        super().__init__()
        if "model_type" not in backbone:
            raise ValueError(
                f"`backbone` has {sorted(backbone)}; it needs a `model_type` and the sizes of a transformer."
            )
        self.network = AutoModel.from_config(AutoConfig.for_model(**backbone))
        if getattr(self.network, "pooler", None) is not None:
            self.network.pooler = None  # BERT's, over the first token; here the mean is taken
        size = self.network.get_input_embeddings().embedding_dim
        self.mix = nn.Linear(2 * size, size)
        hidden = self.network.config.hidden_size
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1, bias=False))
        with torch.no_grad():  # at visible places the denoiser's own embedding; no energy yet
            self.mix.weight.copy_(torch.eye(size).repeat(1, 2) / 2)
            self.mix.bias.zero_()
            self.head[2].weight.zero_()

    @classmethod
    def from_denoiser(cls, model: PreTrainedModel) -> NCEEnergy:
        """An untrained one, 0 everywhere, whose transformer is that of a masked language model of transformers.

        Raises:
            ValueError: the model's transformer is not one that `AutoModel` makes.
        """
        made = cls(backbone=model.config.to_dict())
        weights = {k: v for k, v in model.base_model.state_dict().items() if not k.startswith("pooler.")}
        try:
            made.network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"`model` is {type(model).__name__}, whose transformer `AutoModel` does not make."
            ) from error
        return made.eval()

    def forward(
        self,
        candidates: torch.Tensor,
        noisy: torch.Tensor,
        log_probability: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        mask_token_id: int | None = None,
    ) -> torch.Tensor:
        """Energies `(n,)`.

        Args:
            candidates, noisy: texts `(n, length)` without and with masks.
            log_probability: not used; the residual is learnt.
            attention_mask: `(n, length)`, 0 for padding; None for none.
            mask_token_id: not used.
        """
        mask = torch.ones_like(candidates) if attention_mask is None else attention_mask.to(candidates.dtype)
        embed = self.network.get_input_embeddings()
        mixed = self.mix(torch.cat([embed(noisy), embed(candidates)], -1))
        hidden = self.network(inputs_embeds=mixed, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1)).squeeze(-1)


def nce_energy_loss(
    energy: Any,
    denoiser: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    mask_token_id: int,
    t: torch.Tensor,
    u: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    r""":math:`-\log\sigma(-E(x_0, x_t)) - \log\sigma(E(\hat x_0, x_t))`, a mean over the texts.

    Low energy is the data's: :math:`x_0` is a text, and :math:`\hat x_0` what the denoiser draws for the same noisy text.

    Args:
        energy: called as in `EnergyReweightedScheduler.guide`.
        denoiser: the frozen masked language model.
        input_ids, attention_mask: `(batch, length)` integers.
        mask_token_id: the mask.
        t: `(batch,)` in (0, 1], how much is masked.
        u: `(batch, length)` uniform on [0, 1): a token is masked where u < t.
        draws: `(batch, length)` uniform on [0, 1), by which the denoiser's tokens are drawn.
    """
    masked = (u < t[:, None]) & attention_mask.bool()
    noisy = torch.where(masked, mask_token_id, input_ids)
    with torch.no_grad():
        logits = without_mask(denoiser(input_ids=noisy, attention_mask=attention_mask).logits[masked], mask_token_id)
        drawn = safe_categorical(logits, uniform=draws[masked])
    negative = noisy.masked_scatter(masked, drawn)
    both = energy(
        torch.cat([input_ids, negative]), noisy.repeat(2, 1), None, attention_mask.repeat(2, 1), mask_token_id
    )
    real, made = both.chunk(2)
    return (F.softplus(real) + F.softplus(-made)).mean()
