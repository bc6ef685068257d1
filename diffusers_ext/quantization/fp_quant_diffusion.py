r"""Floating-point quantization (Chen et al. 2024, arXiv 2408.06995): the format is chosen tensor by tensor.

For each output channel of a weight and each input, every split of the bits into exponent and mantissa is tried with clip
values :math:`c = i / 100 \cdot \max|x|`, and the pair of the least squared error is kept (`grids.FloatGrid`). At 4 bits the
rounding of the weights is learnt on the grid's uneven steps (`rounding`); at 8 bits it need not be.

No code of the authors was found. The grid is that of Kuzmin et al. 2022 (arXiv 2208.09225).
"""

from __future__ import annotations

from typing import Any, ClassVar

from .methods import PTQMethod


class FPQuantDiffusion(PTQMethod):
    """Settings of floating-point quantization."""

    defaults: ClassVar[dict[str, Any]] = {
        "weight_format": "float",
        "act_format": "float",
        "weight_range": "search",
        "act_range": "search",
        "search_from": 0.05,
        "search_power": 2.0,
        "rounding": "adaround",
    }
