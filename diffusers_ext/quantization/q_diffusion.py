r"""Q-Diffusion (Li et al. 2023, arXiv 2302.04304): evenly spread steps, split skip connections, learnt rounding.

- Calibration (section 3.2): inputs of evenly spread steps of full-precision runs, guided and unguided.
- Split (section 3.3): where a layer's input is concatenated from the deep path and a skip connection, whose values differ
  in size, each part has grids of its own, of inputs and of weights.
- Reconstruction: AdaRound, block by block, in the order in which the network runs (`rounding`), then the scales of the
  activations on the same blocks, by :math:`|e|^{2.4}`.

Grids are affine. Queries, keys, values and what the softmax gives are quantized too. The release makes no exception for
first and last layers, nor does this (`PTQConfig(end_bits=8)` does).

Of the release: it spans one-sided tensors by `max - min`, with a zero point that supposes 0 to be inside; here 0 always is.
It takes 20,000 iterations a block at a rate of 1e-3; the defaults here are fewer and faster ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .methods import PTQMethod


class QDiffusion(PTQMethod):
    """Settings of Q-Diffusion."""

    defaults: ClassVar[dict[str, Any]] = {
        "split": True,
        "weight_range": "search",
        "act_range": "running",
        "search_power": 2.4,
        "rounding": "adaround",
        "scale_iterations": 250,
    }
