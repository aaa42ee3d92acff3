"""What reaches into other libraries; each sub-package needs its library installed.

transformers: recording of visual attention, log-probabilities and loss without logits. trl: the VGPO trainer.
"""
