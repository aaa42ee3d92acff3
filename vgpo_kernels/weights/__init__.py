"""Focus scores to token and trajectory weights."""

from vgpo_kernels.weights.api import VGPOWeights, vgpo_weights
from vgpo_kernels.weights.config import VGPOConfig

__all__ = ["VGPOConfig", "VGPOWeights", "vgpo_weights"]
