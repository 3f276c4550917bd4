"""Training: SLA fine-tuning and rCM distillation. What is minimised is in `losses`."""
