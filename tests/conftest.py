"""Small models and a tokenizer that need no download."""

import os
import signal
from pathlib import Path

# The suite must pass where there is no network: nothing may even try. Before the imports below,
# because the hub's client reads this once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small work on several threads is slower than on one, far so on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

torch.set_num_threads(1)

# A suite started in the background ignores SIGINT, and so would the commands whose end it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def small_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random two-layer Llama with grouped query heads."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(shape).to(dtype).eval()
    # transformers' start leaves all logits near 0, whatever the layers below do.
    model.lm_head.weight.data.mul_(20)
    return model


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return small_llama()
