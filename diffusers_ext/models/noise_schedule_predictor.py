r"""The network that looks at a noisy sample and says how long the next step may be (FastDiff, arXiv 2204.09934, section 3.3).

It comes from BDDM (Lam et al. 2022, arXiv 2203.13508), whose network is for waveforms. This one is of convolutions and takes
samples of any size. With :math:`a_t` the factor of the data in :math:`x_t`, and :math:`\delta_t^2 = 1 - a_t^2`, it predicts

.. math:: \hat\beta_t = \min(\delta_t^2, \beta_{t+1})\, \mathrm{sigmoid}(\phi(x_t, \delta_t^2, \beta_{t+1}))

so that a schedule never takes away more noise than there is, and its betas fall towards clean data.
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.nn import functional as F

_LARGEST = 12.0  # of the logit: in float32 the sigmoid never is 1, where the loss is infinite
_LEVELS = 3  # numbers that describe the noise levels


class NoiseSchedulePredictor(ModelMixin, ConfigMixin):
    """Predicts beta of a noisy sample. Starts at half of the largest that there can be.

    Args:
        in_channels: of the samples.
        spatial_dims: number of axes after batch and channels: 1 for sound, 2 for pictures, 3 for video.
        hidden_channels: of the convolutions.
        num_layers: of convolutions; each but the first halves the sides. It sees over about `2**num_layers` positions.

    Raises:
        ValueError: a value is not an integer of at least 1, or `spatial_dims` is above 3.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self, *, in_channels: int = 3, spatial_dims: int = 2, hidden_channels: int = 32, num_layers: int = 3
    ) -> None:
        super().__init__()
        for name in ("in_channels", "spatial_dims", "hidden_channels", "num_layers"):
            value = self.config[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least 1.")
        if spatial_dims > 3:
            raise ValueError(f"`spatial_dims` is {spatial_dims!r}; allowed are 1, 2 and 3.")
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1]
        width = hidden_channels
        self.convolutions = nn.ModuleList(
            convolution(width if layer else in_channels, width, 3, stride=2 if layer else 1, padding=1)
            for layer in range(num_layers)
        )
        self.level_embedder = nn.Linear(_LEVELS, width)
        self.mix = nn.Linear(2 * width, width)
        self.proj_out = nn.Linear(width, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, sample: torch.Tensor, beta_next: torch.Tensor, delta_squared: torch.Tensor) -> torch.Tensor:
        r""":math:`\hat\beta` of each sample, `(batch,)`, in float32 at least.

        Args:
            sample: :math:`x_t = a_t x_0 + \delta_t \epsilon`, `(batch, in_channels, ...)` with `spatial_dims` axes more.
            beta_next: beta of the next noisier step, `(batch,)` in (0, 1).
            delta_squared: :math:`\delta_t^2`, `(batch,)` in (0, 1).

        Raises:
            ValueError: `sample` has another number of axes or channels.
        """
        if sample.ndim != self.config.spatial_dims + 2 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}; (batch, {self.config.in_channels}) and "
                f"{self.config.spatial_dims} axes more are needed."
            )
        x = sample.to(self.proj_out.weight.dtype)
        for layer in self.convolutions:
            x = F.silu(layer(x))
        dtype = torch.promote_types(delta_squared.dtype, torch.float32)
        beta_next, delta_squared = beta_next.to(dtype), delta_squared.to(dtype)
        levels = torch.stack([delta_squared, 1 - delta_squared, beta_next], dim=1).clamp_min(1e-12).log() / 4
        x = torch.cat([x.flatten(2).mean(2), F.silu(self.level_embedder(levels.to(x.dtype)))], dim=1)
        logit = self.proj_out(F.silu(self.mix(x)))[:, 0].to(dtype)
        return torch.minimum(delta_squared, beta_next) * torch.sigmoid(_LARGEST * torch.tanh(logit / _LARGEST))
