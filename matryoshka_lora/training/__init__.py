"""The batch plan, the loss, the loop, checkpoints and resume."""

from matryoshka_lora.data.loss import batch_loss
from matryoshka_lora.training.loop import fit

__all__ = ["batch_loss", "fit"]
