"""Gradients of the adapter: their sum over the processes, their norms by rank, clipping.

Parameters are known by their names, `<layer>.<role>`. A role says which axis of the parameter is
the rank (`RANK_AXIS`); component i of an adapter is the i-th entry of all its parameters along it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from matryoshka_lora.core.layer import RANK_AXIS
from matryoshka_lora.methods.hooks import Hooks

Parameters = Mapping[str, nn.Parameter]

# Gradients of one shape are stacked up to this size, to take their norms by one kernel.
STACKED_BYTES = 2**28
# The largest message between processes: summing copies no more than this at a time.
MESSAGE_BYTES = 2**28


def gradients_of(parameters: Parameters) -> list[Tensor]:
    """The gradient of each parameter; one that has none gets zeros.

    A process may have no sample in the last batch of an epoch, and a parameter may take no part in
    a forward.
    """
    grads = []
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    return grads


def sum_over_processes(parameters: Parameters, loss: Tensor, accelerator: Accelerator) -> None:
    """Add up gradients and loss over the processes, in place and in float32."""
    grads = gradients_of(parameters)
    if accelerator.num_processes == 1:
        return
    for parts in _messages([*grads, loss], MESSAGE_BYTES // torch.float32.itemsize):
        total = accelerator.reduce(torch.cat([part.float() for part in parts]), "sum")
        sizes = [part.numel() for part in parts]
        for part, summed in zip(parts, total.split(sizes), strict=True):
            part.copy_(summed)


def are_same_on_all_processes(parameters: Parameters, accelerator: Accelerator) -> bool:
    """Whether all processes hold the parameters of the first one, bit for bit."""
    values = [parameter.detach() for parameter in parameters.values()]
    equal = torch.ones((), device=values[0].device)
    for parts in _messages(values, MESSAGE_BYTES // torch.float32.itemsize):
        mine = torch.cat(parts)
        equal *= torch.equal(mine, broadcast(mine.clone()))
    return int(accelerator.reduce(equal, "sum")) == accelerator.num_processes


def add_penalty(hooks: Hooks) -> None:
    """Add the gradient of the method's penalty, if it has one.

    Nothing of the penalty's autograd graph may live on: its nodes for the parameters belong to the
    stream of this call, and a forward that is captured as a CUDA graph, on a stream of its own,
    would meet them.
    """
    penalty = hooks.penalty()
    if penalty is not None:
        penalty.backward()


def _messages(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Flat views of all elements of the tensors, in lists of at most `limit` elements."""
    message: list[Tensor] = []
    free = limit
    for tensor in tensors:
        rest = tensor.view(-1)
        while len(rest):
            part, rest = rest[:free], rest[free:]
            message.append(part)
            free -= len(part)
            if not free:
                yield message
                message, free = [], limit
    if message:
        yield message


def rank_square_norms(parameters: Parameters) -> Tensor:
    """Squared gradient norm of each rank component over all parameters, (R,), float32 or higher.

    The gradients of one shape share a kernel: one for each of the hundreds of parameters would take
    longer to launch than to run.
    """
    stacks: dict[tuple[torch.Size, int], list[list[Tensor]]] = {}
    for name, parameter in parameters.items():
        grad, axis = parameter.grad, RANK_AXIS[name.rpartition(".")[2]]
        assert grad is not None, name
        alike = stacks.setdefault((grad.shape, axis), [[]])
        if len(alike[-1]) >= max(STACKED_BYTES // (grad.numel() * grad.itemsize), 1):
            alike.append([])
        alike[-1].append(grad)
    norms = [
        torch.linalg.vector_norm(
            torch.stack(stack),
            dim=[0, *(dim + 1 for dim in range(len(shape)) if dim != axis)],
            dtype=torch.promote_types(stack[0].dtype, torch.float32),
        )
        for (shape, axis), alike in stacks.items()
        for stack in alike
    ]
    return torch.stack(norms).square().sum(0)


def clip(parameters: Parameters, norm: Tensor, largest: float) -> None:
    """Scale all gradients so that their norm, `norm` now, is at most `largest`."""
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients_of(parameters), scale)


def block_norms(square_norms: Tensor, ranks: Sequence[int]) -> Tensor:
    """Gradient norm of each block of components from one sub-rank to the next, (len(ranks),)."""
    blocks = zip([0, *ranks], ranks, strict=False)
    return torch.stack([square_norms[start:end].sum() for start, end in blocks]).sqrt()
