r"""TFMQ-DM (Huang et al. 2024, arXiv 2407.19547): the layers that see the timestep alone are quantized by themselves.

They and their outputs, the temporal features :math:`e_{t,i}`, are found from one run (`temporal`). Then

- their rounding is learnt together, against the features at all timesteps of the sampler, summed over the features, and is
  left alone when the blocks that contain some of them are learnt (TIB-based maintenance: TIAR);
- each of their inputs has a grid for each timestep (finite set calibration);
- or the features are not computed at all: their full-precision values are quantized, with a scale for each timestep and
  feature, and kept as tables (cache-based maintenance);
- or, by default, whichever errs less, for each timestep and feature (disturbance-aware selection).

All else is as in Q-Diffusion without its split and learnt scales. Where a class or a pooled text is added to the embedding,
the features end before the sum.

The release has no tables and no selection. It leaves the first and the last layer in float; here they have 8 bits. It has all
activations' grids change with the timestep (`PTQConfig(step_scales=True)`), the paper those of the temporal layers alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .methods import PTQMethod


class TFMQDM(PTQMethod):
    """Settings of TFMQ-DM."""

    defaults: ClassVar[dict[str, Any]] = {
        "end_bits": 8,
        "weight_range": "search",
        "act_range": "running",
        "search_power": 2.4,
        "rounding": "adaround",
        "temporal": "auto",
    }
