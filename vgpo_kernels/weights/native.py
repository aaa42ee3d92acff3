"""The weights on CPUs: csrc/weights.h."""

from vgpo_kernels.weights.reference import weights

__all__ = ["weights"]
