"""What answers the sweep's requests."""

import logging
from typing import TYPE_CHECKING

from matryoshka_lora.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from matryoshka_lora.evaluation.engines.protocol import Engine

logger = logging.getLogger(__name__)


def make_engine(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    batch_size: int,
    cuda_graphs: bool,
    lockstep: bool,
) -> "Engine":
    """The engine of this name, batched or hf; only its own libraries are imported.

    batch_size: of hf. cuda_graphs: of batched. lockstep: the base is sharded over the processes.
    Raises UserError for other names and for models that the engine cannot answer for.
    """
    if name == "hf":
        from matryoshka_lora.evaluation.engines.hf import HFEngine

        return HFEngine(model, tokenizer, batch_size=batch_size, lockstep=lockstep)
    if name == "batched":
        from matryoshka_lora.evaluation.engines.batched.engine import BatchedEngine

        engine = BatchedEngine(model, tokenizer, cuda_graphs=cuda_graphs, lockstep=lockstep)
        if cuda_graphs and not engine.cuda_graphs:
            logger.info("eval.cuda_graphs has no effect: it needs a GPU and an unsharded model")
        return engine
    raise UserError(f"eval.engine {name!r} is unknown; allowed: batched, hf")
