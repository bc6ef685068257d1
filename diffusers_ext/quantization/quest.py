r"""QuEST (Wang et al. 2024, arXiv 2402.03666): a quantized network, finetuned where few bits hurt most.

It starts as Q-Diffusion does, with one grid of each activation for every recorded step, and at up to 4 bits for every channel
of a layer's input. Then two stages train weights under their grids (`finetuning`), in the whole network:

1. the projections of the time embedding, step by step, by the squared errors of their outputs and of the network's output;
2. the layers that few activation bits damage, attention and feed-forward ones, by the network's output, with the scales
   of all activations.

Weights keep their grid and the direction in which each was rounded; the scales of activations are learnt by their
logarithms. A stage that does not lower the error of the output over the calibration set is undone.

The release adds the error of the output once for each trained layer in stage 2, which scales it; here it counts once. It
learns the scales themselves. It takes 300 and 20 epochs at a rate of 1e-5; the defaults here are fewer and faster ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .methods import PTQMethod


class QuEST(PTQMethod):
    """Settings of QuEST."""

    defaults: ClassVar[dict[str, Any]] = {
        "split": True,
        "weight_range": "search",
        "act_range": "running",
        "search_power": 2.4,
        "rounding": "adaround",
        "step_scales": True,
        "stages": ["time_embedding", "sensitive_layers"],
    }
    low_bit_defaults: ClassVar[dict[str, Any]] = {"channel_scales": True}
