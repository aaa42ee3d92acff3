"""TRL's GRPO trainer with visual weights and without logits: `VGPOTrainer` is public, the modules are not.

from vgpo_kernels.integrations.trl import VGPOTrainer  # needs TRL 1.16: pip install 'vgpo-kernels[trl]'
"""

from vgpo_kernels.integrations.trl.trainer import VGPOTrainer

__all__ = ["VGPOTrainer"]
