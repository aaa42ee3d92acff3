"""Focus scores to token and trajectory weights; public: `vgpo_weights`, its result and its `VGPOConfig`.

`api` checks (`checks`) and calls the operator (`ops`), which runs `reference`, `native` or `triton/`.
"""

from vgpo_kernels.weights.api import VGPOWeights, vgpo_weights
from vgpo_kernels.weights.config import VGPOConfig

__all__ = ["VGPOConfig", "VGPOWeights", "vgpo_weights"]
