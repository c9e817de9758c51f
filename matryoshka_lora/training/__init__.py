"""The batch plan, the loss, the loop, checkpoints and resume."""

from matryoshka_lora.training.loop import fit
from matryoshka_lora.training.loss import batch_loss

__all__ = ["batch_loss", "fit"]
