"""A base model of whose weights each process holds a shard (FSDP2), and never held more.

mesh = mesh_of(device)
with shards_only(mesh, device):
    model = AutoModelForCausalLM.from_pretrained(..., device_map={"": device})
...  # adapters are added
shard(model, layers, whole, mesh)
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel


def mesh_of(device: torch.device) -> DeviceMesh:
    """All processes, to shard over."""
    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


@contextmanager
def shards_only(mesh: DeviceMesh, device: torch.device) -> Iterator[None]:
    """transformers makes or reads models of whose parameters each process has its own rows alone.

    No process holds more beside its shards than the parameters of one module, such as a projection
    or an embedding. The values are those without sharding, but for random ones of classes that
    initialise a part of the model again at the end (GPT-2). A parameter whose rows do not give
    every process some is whole until `shard`.
    """
    initialise = PreTrainedModel._initialize_weights

    def keep_rows(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        for key, parameter in [] if module is None else [*module._parameters.items()]:
            if parameter is not None and _gives_all_some(parameter, mesh.size()):
                assert module is not None
                setattr(module, key, _rows(parameter, mesh))

    def initialise_whole(self: PreTrainedModel, module: nn.Module, *args: bool) -> None:
        if getattr(module, "_is_hf_initialized", False):
            return
        for key, parameter in [*module._parameters.items()]:
            # What was read has this mark; the rest is drawn as without sharding, then cut.
            if isinstance(parameter, DTensor) and not hasattr(parameter, "_is_hf_initialized"):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, key, nn.Parameter(empty))
        initialise(self, module, *args)
        keep_rows(module, "", module)

    # A module becomes a part of another when its constructor, which may draw numbers, has ended.
    handle = register_module_module_registration_hook(keep_rows)
    PreTrainedModel._initialize_weights = initialise_whole  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = initialise  # type: ignore[method-assign]
        handle.remove()


def _gives_all_some(parameter: nn.Parameter, processes: int) -> bool:
    """Whether `parameter` is to be cut: it is not yet, and each process gets a row."""
    if isinstance(parameter, DTensor) or not parameter.dim():
        return False
    return len(parameter.detach().chunk(processes)) == processes


def _rows(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This process's rows, as FSDP cuts them."""
    own = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    shape, stride = parameter.shape, parameter.stride()
    cut = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return nn.Parameter(cut, requires_grad=parameter.requires_grad)


def shard(
    model: nn.Module, layers: Iterable[nn.Module], whole: Collection[nn.Parameter], mesh: DeviceMesh
) -> None:
    """Shard the parameters of a model, layer by layer, so that they are gathered to be used.

    whole: parameters that every process keeps. The others are whole, or cut by `shards_only`.
    """
    # FSDP takes a cut parameter for one of tensor parallelism: it gets the shape, then the rows.
    named = model.named_parameters(remove_duplicate=False)
    cut = {name: parameter for name, parameter in named if isinstance(parameter, DTensor)}
    shapes: dict[DTensor, nn.Parameter] = {}
    for name, rows in cut.items():
        if rows not in shapes:
            empty = torch.empty(rows.shape, dtype=rows.dtype, device="meta")
            shapes[rows] = nn.Parameter(empty, requires_grad=rows.requires_grad)
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, shapes[rows])
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=set(whole))
    fully_shard(model, mesh=mesh, ignored_params=set(whole))
    model.load_state_dict(cut, strict=False, assign=True)
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    empty_ones = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    assert not empty_ones, f"nothing was read for {', '.join(empty_ones)}"
