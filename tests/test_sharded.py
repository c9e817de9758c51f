"""A base that is sharded while it is made or read equals a whole one; two processes hold halves."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_processes import all_print_equal
from torch.distributed.tensor import DTensor

from matryoshka_lora.config import Config, ModelConfig
from matryoshka_lora.core.adapter import adapter_parameters, at_rank
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.loading import build_model
from matryoshka_lora.models import EMBEDDED, load_model
from matryoshka_lora.ops.sharded import mesh_of
from matryoshka_lora.processes import shard_base

CPU = torch.device("cpu")
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@contextmanager
def alone(device):
    """The mesh of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(store=store, rank=0, world_size=1)
    try:
        yield mesh_of(device)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def mesh():
    with alone(CPU) as mesh:
        yield mesh


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=GPU)])
def test_a_sharded_model_is_the_whole_one(device, random):
    device = torch.device(device)
    with alone(device) as mesh:
        check_equal(device, mesh, random)


def check_equal(device, mesh, random):
    config = Config(model=ModelConfig(random_weights=random))
    whole, sharded = build_model(config, device), build_model(config, device, mesh)
    shard_base(sharded, mesh)
    adapters = adapter_parameters(sharded)
    for name, parameter in whole.named_parameters():
        found = sharded.get_parameter(name)
        assert isinstance(found, DTensor) == (name not in adapters), name
        found = found.full_tensor() if isinstance(found, DTensor) else found
        assert torch.equal(found, parameter), name
        assert found.requires_grad == parameter.requires_grad, name
    assert sharded.lm_head.weight is sharded.model.embed_tokens.weight
    tokens = torch.arange(12, device=device)[None]
    with torch.no_grad():
        torch.testing.assert_close(sharded(tokens).logits, whole(tokens).logits)
        with at_rank(sharded, 4, "prefix"):
            assert sharded(tokens).logits.device == device
    assert all(tensor.device == device for tensor in (*sharded.buffers(), *adapters.values()))


def no_number(weights):
    weights["model.layers.2.mlp.up_proj.weight"][-1, -1] = float("nan")


def another_shape(weights):
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name] = torch.cat([weights[name], weights[name][:1]])


def missing(weights):
    del weights["model.layers.2.mlp.up_proj.weight"]


DAMAGES = {
    no_number: "up_proj.weight holds numbers that are not finite",
    another_shape: "1 of another shape .model.layers.2.mlp.up_proj.weight",
    missing: "1 missing .model.layers.2.mlp.up_proj.weight",
}


def damaged(folder, damage):
    shutil.copytree(EMBEDDED, folder)
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items())
def test_damaged_weights_are_named(mesh, tmp_path, damage, message):
    with pytest.raises(UserError, match=message):
        load_model(damaged(tmp_path / "model", damage), CPU, mesh)


BUILT = """
import sys, torch, weakref
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from accelerate import Accelerator
from test_sharded import DAMAGES, damaged
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from matryoshka_lora.config import ModelConfig
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.models import DTYPES, load_model
from matryoshka_lora.ops.sharded import mesh_of

accelerator = Accelerator(cpu=True)
cpu, folder = torch.device("cpu"), Path(sys.argv[2])
mesh = mesh_of(cpu)

class Held(TorchDispatchMode):
    "The most bytes that tensors made in a block had at a time."
    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if type(leaf) is torch.Tensor and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if (key := storage.data_ptr()) not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, key, storage.nbytes())
        return result

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size

shared = dict(num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=77)
shapes = {
    # A row and a head that two processes cannot share evenly.
    "llama": dict(hidden_size=96, intermediate_size=81, tie_word_embeddings=False, pad_token_id=0),
    "qwen2": dict(hidden_size=96, intermediate_size=81),  # with biases
    "mixtral": dict(hidden_size=96, intermediate_size=80, num_local_experts=3),  # converted names
}
for kind, own in shapes.items():
    path = folder / kind
    if accelerator.is_main_process:
        AutoConfig.for_model(kind, **shared, **own).save_pretrained(path)
        (path / "tokenizer_config.json").write_text("{}")
    accelerator.wait_for_everyone()
    config = ModelConfig(path=str(path), random_weights=True, dtype="bfloat16")
    whole = load_model(config, cpu)
    if accelerator.is_main_process:
        whole.save_pretrained(path)
    accelerator.wait_for_everyone()
    for config.random_weights in (True, False):
        with Held() as held:
            rows = load_model(config, cpu, mesh)
        own = sum(p.to_local().nbytes for p in rows.parameters())
        largest = max(p.nbytes for p in whole.parameters())
        if config.random_weights:  # files are read by threads
            assert held.most <= own + 3 * largest, (kind, held.most, own, largest)
        for name, expected in whole.named_parameters():
            found = rows.get_parameter(name)
            assert isinstance(found, DTensor) and torch.equal(found.full_tensor(), expected), name
            assert len(found.to_local()) <= (len(expected) + 1) // 2, name
        for expected, found in zip(whole.buffers(), rows.buffers(), strict=True):
            assert torch.equal(expected, found)

# What one process finds is said by both, none waits for the other.
for damage, message in DAMAGES.items():
    path = folder / damage.__name__
    if accelerator.is_main_process:
        damaged(path, damage)
    accelerator.wait_for_everyone()
    try:
        load_model(ModelConfig(path=str(path)), cpu, mesh)
    except UserError as error:
        assert message.split(".")[0] in str(error), error
    else:
        raise AssertionError(damage)
print("equal")
"""


@pytest.mark.slow
def test_two_processes_hold_half_of_the_weights_each(tmp_path):
    all_print_equal(tmp_path, BUILT)
