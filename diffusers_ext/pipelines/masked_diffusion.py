"""Text by masked diffusion language models; pipelines that extend it import the core, `_masked_diffusion`."""

from ._masked_diffusion import MaskedDiffusionOutput, MaskedDiffusionPipeline

__all__ = ["MaskedDiffusionOutput", "MaskedDiffusionPipeline"]
