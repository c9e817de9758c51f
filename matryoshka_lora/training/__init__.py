"""The batch plan, the loop, checkpoints and resume."""

from matryoshka_lora.training.loop import batch_loss, fit

__all__ = ["batch_loss", "fit"]
