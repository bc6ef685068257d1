r"""The reverse process of DiffusionBERT (He et al. 2022, arXiv 2211.15029), whose tokens have noise schedules of their own.

From time t to s a mask becomes token v with probability :math:`p_v h_v`, where p is what the network says and

.. math::
    h_v = \frac{\bar\alpha_s^v - \bar\alpha_t^v}{1 - \bar\alpha_t^v},

and stays a mask with what is left. The mean frequency of the text, of which :math:`\bar\alpha` depends, is that of the
network's likeliest tokens.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from ._carried import CarriesStatistics
from ._spindle import MAX_LAMBDA, WordFrequencies, unmask_chance
from ._unmasking import UnmaskingScheduler, UnmaskingStep, check_number, safe_categorical, tempered, without_mask


class SpindleScheduler(CarriesStatistics, UnmaskingScheduler):
    """Ancestral unmasking under the spindle schedule: frequent tokens come first, rare ones late.

        scheduler = SpindleScheduler.from_config(pipe.scheduler.config, statistics=WordFrequencies.from_counts(counts))

    `train_diffusion_bert` saves it with the model that it trains. The frequencies travel with the scheduler. With `lam=0` it is
    `AbsorbingDiffusionScheduler(eps=0)`. `temperature=1` and no `top_p` or `top_k` are needed for the exact law;
    `LLaDA2Pipeline` needs `temperature=1, editing_threshold=None, eos_early_stop=False` and one block for the whole text.

    Args:
        block_length: tokens of a block, where a pipeline is not told.
        num_inference_steps: steps of a block, where nobody says.
        lam: how far schedules differ, 0 to 1 / pi; that of the training. Without the bound a token could become hidden again.

    Raises:
        ValueError: a value is out of range.
    """

    statistics_class = WordFrequencies

    @register_to_config
    def __init__(self, *, block_length: int = 32, num_inference_steps: int = 128, lam: float = 0.3) -> None:
        self.prepare(block_length, num_inference_steps)
        check_number("lam", lam, 0, MAX_LAMBDA)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        self.require_statistics()
        super().set_timesteps(num_inference_steps, device, block_length)
        self.statistics.to(device)

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        if now.is_last:
            return now.masked
        frequencies, size = self.statistics.frequency.double(), now.logits.shape[-1]
        if len(frequencies) != size:
            raise ValueError(f"`statistics` has {len(frequencies)} tokens, and the network {size}.")
        logits = without_mask(now.logits[now.masked], now.mask_token_id)
        guess = now.sample.clone()
        guess[now.masked] = logits.argmax(-1)
        mean = self.statistics.mean(guess, ~now.given).expand_as(guess)[now.masked]
        t, s = (1 - (now.step + i) / now.num_steps for i in (0, 1))
        h = unmask_chance(s, t, frequencies - mean[:, None], self.config.lam)  # (masks, vocabulary)
        if now.temperature == 0:
            p = torch.nn.functional.one_hot(logits.argmax(-1), size).double()
        else:
            p = torch.softmax(tempered(logits, now.temperature, now.top_k, now.top_p), -1)
        chance = torch.zeros(now.sample.shape, dtype=torch.float64, device=p.device)
        chance[now.masked] = (p * h).sum(-1)
        committed = now.masked & (now.random() < chance)
        tokens = now.sample.clone()
        if now.for_tokens is None:
            tokens[now.masked] = p.argmax(-1)
        else:
            tokens[now.masked] = safe_categorical((p * h).log(), uniform=now.for_tokens[now.masked])
        now.use_tokens(tokens)
        return committed
