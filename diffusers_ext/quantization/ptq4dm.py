r"""PTQ4DM (Shang et al. 2022, arXiv 2211.15736): ranges calibrated on what the sampler visits, mostly near the image.

Each sample of the calibration set is the denoiser's input at one step of a full-precision run, drawn from a normal
distribution whose mean lies nearer to the image than to the noise (NDTC, section 4.2). Weights have one symmetric scale for
each output channel, inputs one for each tensor, with the clip value :math:`c = i/100 \cdot \max|x|`, i = 1..100, of the least
squared error; a tensor without negative values uses [0, c]. The first and the last layer keep 8 bits.

The authors' release pairs the input of step r of the reverse loop with the label r of the other end of the chain. Here an
input keeps the timestep that it was made for.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .methods import PTQMethod


class PTQ4DM(PTQMethod):
    """Settings of PTQ4DM. Attention inputs are left in float, as in the paper."""

    defaults: ClassVar[dict[str, Any]] = {
        "symmetric": True,
        "end_bits": 8,
        "attention": False,
        "timesteps": "normal",
        "weight_range": "search",
        "act_range": "search",
        "search_from": 0.01,
        "search_power": 2.0,
    }
