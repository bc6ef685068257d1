r"""GIDD, diffusion that masks tokens and changes some into others (von Rütte et al. 2025, arXiv 2503.04482).

At time t a clean token x is, as :math:`q_t(z | x) = \alpha_t 1[z = x] + \beta_t \pi_t(z)` says, still itself, the mask, or any
other of N tokens. With :math:`c_t = B\, (t (1 - t))^{\gamma / 2}`, :math:`B = 2^\gamma p_u / (1 - p_u)` and
:math:`C_t = 1 + c_t`,

.. math::
    \alpha_t = (1 - t) / C_t, \qquad \beta_t \pi_t(m) = t / C_t, \qquad \beta_t \pi_t(v) = c_t / (N C_t),

so that the share of uniform noise is :math:`p_u` at t = 1/2, and none at both ends. With :math:`p_u = 0` it is masked
diffusion. A visible token may then be wrong, and the sampler goes on changing it:

.. math::
    q(z_s | z_t) \propto q_{t|s}(z_t | z_s)\, q_s(z_s | \hat x),

where :math:`\hat x` is what the network says of the clean token *from the other positions*: with anything else at visible
positions the steps are not those of the process.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from ._token_noise import HybridNoise, tokens_but_mask
from ._unmasking import (
    UnmaskingScheduler,
    UnmaskingStep,
    check_number,
    draw_uniform,
    safe_categorical,
    tempered,
    without_mask,
)


def reverse_step(
    noise: HybridNoise, clean: torch.Tensor, z: torch.Tensor, t: float, s: float, mask_token_id: int
) -> torch.Tensor:
    r"""Probabilities of the tokens at time s < t, given those at t.

    Args:
        noise: the process.
        clean: `(n, vocabulary)` float64, :math:`\hat x`; 0 for the mask, which may also be the token after the last.
        z: `(n,)`, tokens at time t.
        t, s: times.
        mask_token_id: the mask.

    Returns:
        `(n, vocabulary + 1)`, of which the last is the mask; the mask's own column is 0.
    """
    size = clean.shape[-1]
    count = size - (mask_token_id < size)
    (kept_t, masked_t, uniform_t), (kept_s, masked_s, uniform_s) = (
        [float(share) for share in noise.shares(torch.tensor(time, dtype=torch.float64))] for time in (t, s)
    )
    kept = kept_t / kept_s  # of what is clean at s
    at_s = torch.nn.functional.pad(kept_s * clean + uniform_s / count, (0, 1), value=masked_s)
    if mask_token_id < size:
        at_s[:, mask_token_id] = 0
    place = torch.where(z == mask_token_id, size, z)[:, None]
    to_mask, to_token = clean.new_tensor([masked_t - kept * masked_s, (uniform_t - kept * uniform_s) / count]).clamp(
        min=0
    )
    arrives = torch.where(place == size, to_mask, to_token)  # what comes to z between s and t, from any token
    weight = (arrives * at_s).scatter_add(1, place, kept * at_s.gather(1, place))
    return weight / weight.sum(-1, keepdim=True)


class GIDDScheduler(UnmaskingScheduler):
    """Draws text by the reverse process of hybrid noise: masks become tokens, and tokens may change again.

    With a network that was trained on this noise (`gidd_loss`) and many steps its samples follow the data; `temperature=1`
    and no `top_p` or `top_k` are needed for that. All positions of a block change together, so that a text in one block is
    what the process is about. A network that is conditioned on the time gets it from `MaskedDiffusionPipeline`.

    `LLaDA2Pipeline` needs `temperature=1, editing_threshold=None, eos_early_stop=False`. It ends a block as soon as no mask
    is left, so that there only `p_uniform=0` has all its steps.

    Args:
        block_length: tokens of a block, where a pipeline is not told.
        num_inference_steps: steps of a block, where nobody says.
        p_uniform, gamma: of the noise that the network was trained on, see `HybridNoise`. With `p_uniform=0` visible tokens
            stay, and the sampler is that of masked diffusion.
        min_p: outcomes of a step that are less likely become impossible, but for the likeliest; 0 leaves all.
        eps: the grid is uniform from 1 - eps to eps; masks that are left at its end are drawn from the last output.
    """

    @register_to_config
    def __init__(
        self,
        *,
        block_length: int = 32,
        num_inference_steps: int = 32,
        p_uniform: float = 0.1,
        gamma: float = 1.0,
        min_p: float = 0.0,
        eps: float = 1e-4,
    ) -> None:
        self.prepare(block_length, num_inference_steps)
        self.noise = HybridNoise(p_uniform, gamma)
        check_number("min_p", min_p, 0, 1)
        check_number("eps", eps, 0, 0.4)
        self.revises = p_uniform > 0
        self.times = self._grid(num_inference_steps)

    def _grid(self, steps: int) -> list[float]:
        eps = self.config.eps
        return torch.linspace(1 - eps, eps, steps + 1, dtype=torch.float64).tolist()

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device, block_length)
        self.times = self._grid(num_inference_steps)

    def model_time(self, step: int) -> float:
        """The time of a step, counted from 0, for networks that are conditioned on it."""
        return self.times[min(step, len(self.times) - 2)]

    def add_noise(  # type: ignore[override]
        self,
        original_samples: torch.Tensor,
        timesteps: torch.Tensor,
        *,
        mask_token_id: int,
        vocab_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Noisy tokens `(batch, length)` of clean ones.

        Args:
            original_samples: `(batch, length)`.
            timesteps: `(batch,)`, times in [0, 1].
            mask_token_id: the mask.
            vocab_size: number of tokens; the mask may be one of them.
            generator: one, or one a row.

        Raises:
            ValueError: times are out of range, or of another shape.
        """
        if timesteps.shape != original_samples.shape[:1] or not bool(((timesteps >= 0) & (timesteps <= 1)).all()):
            raise ValueError(f"`timesteps` is {timesteps}; a time from 0 to 1 is needed for each row.")
        u, v = (draw_uniform(tuple(original_samples.shape), generator, original_samples.device) for _ in range(2))
        others = tokens_but_mask((v * (vocab_size - (mask_token_id < vocab_size))).long(), mask_token_id)
        return self.noise.add(original_samples, timesteps.to(u), u, others, mask_token_id)

    def commit(self, now: UnmaskingStep) -> torch.Tensor:
        return torch.zeros_like(now.masked)  # all that happens is in `revise`

    def revise(self, now: UnmaskingStep, after: torch.Tensor) -> torch.Tensor:
        if now.step >= now.num_steps:
            return after
        where = ~now.given if self.revises else now.masked & ~now.given
        clean = _clean(now, where)
        t, s = self.times[now.step], self.times[now.step + 1]
        probability = reverse_step(self.noise, clean, now.sample[where], t, s, now.mask_token_id)
        if now.is_last:
            probability[:, :-1] += probability[:, -1:] * clean
            probability[:, -1] = 0
        if self.config.min_p > 0:
            rare = (probability < self.config.min_p) & (probability < probability.amax(-1, keepdim=True))
            probability = probability.masked_fill(rare, 0)
        drawn = safe_categorical(probability.log(), uniform=now.random()[where])
        after = after.clone()
        after[where] = torch.where(drawn == clean.shape[-1], now.mask_token_id, drawn)
        return after


def _clean(now: UnmaskingStep, where: torch.Tensor) -> torch.Tensor:
    """What the network says of the clean tokens, `(n, vocabulary)` float64."""
    logits = without_mask(now.logits[where], now.mask_token_id)
    if now.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.softmax(tempered(logits, now.temperature, now.top_k, now.top_p), -1)
