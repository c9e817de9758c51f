"""The adapter layer, how it is put into a model, and how a model is read at a sub-rank.

There is one layer and one forward. Training methods and inference rules alike only set its diagonal
`p` (see `diagonals.py`); the rule "svd" in addition swaps the factors for their principal
directions.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from matryoshka_lora.core.diagonals import check_rank, prefix_diagonal
from matryoshka_lora.core.files import write_atomically

logger = logging.getLogger(__name__)

INITS = ("lora", "paper")
RULES = ("prefix", "trained", "svd")


@dataclass(frozen=True)
class AdapterSpec:
    """What a trained adapter is, as far as reading it at a sub-rank needs to know."""

    rank: int
    """R, the rank of the factors."""
    scaling: str
    """Which `s_r` the prefix diagonals carry."""
    p_full: tuple[float, ...]
    """The method's full diagonal, length R."""
    trains_prefixes: bool
    """Whether training itself used `prefix(r)` (DyLoRA, nested dropout): `trained` is `prefix`."""

    def diagonal(self, rank: int, rule: str) -> tuple[str, Tensor]:
        """The (factor set, p of shape (R,)) that `rule` reads at `rank`; rank 0 is the base model.

        prefix:  p = s_r on the first r entries: the paper's inference, P dropped.
        trained: the function that training used: p_full cut to r entries, or prefix(r).
        svd:     the r largest singular directions of the full update, p = 1.
        """
        if rank == 0:
            return "trained", torch.zeros(self.rank)
        check_rank(rank, self.rank)
        if rule == "svd":
            return "svd", prefix_diagonal(rank, self.rank, "none")
        if rule == "prefix" or (rule == "trained" and self.trains_prefixes):
            return "trained", prefix_diagonal(rank, self.rank, self.scaling)
        if rule == "trained":
            return "trained", torch.tensor(self.p_full) * prefix_diagonal(rank, self.rank, "none")
        raise ValueError(f"inference rule {rule!r} is unknown; allowed: {', '.join(RULES)}")

    def same_as(self, rank: int, rule: str) -> str | None:
        """The rule whose function at `rank` is the same and is evaluated in its place, if any."""
        if rule == "svd" and rank == self.rank:
            rule = "trained"
            return self.same_as(rank, rule) or rule
        if rule == "trained" and torch.equal(
            self.diagonal(rank, "trained")[1], self.diagonal(rank, "prefix")[1]
        ):
            return "prefix"
        return None


class AdapterLinear(nn.Linear):
    """`y = x W0^T + b + ((x A^T) * p) B^T` for a frozen base layer.

    x: (..., in), y: (..., out), weight W0: (out, in), lora_A: (R, in), lora_B: (out, R). The
    diagonal p broadcasts against (batch, tokens, R): (R,) for all, (batch, 1, R) a rank per
    sequence, (1, tokens, R) a rank per token of a packed row. The factors may be held in a higher
    precision than the activations; they are cast explicitly, so no autocast is needed.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    p: Tensor

    def __init__(self, base: nn.Linear, p: Tensor, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.requires_grad_(False)
        device, rank = base.weight.device, p.numel()
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        # Not in the state dict: it belongs to the method, not to what was learnt. And no buffer at
        # all, because compiled layers take a buffer's shape, here the number of tokens, for fixed.
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.lora_A.to(x.dtype)) * self.p.to(x)
        # The large product is added to the small one, in place: it is bound by arithmetic, so that
        # reading y costs nothing there. The other way round, y is read and written once more.
        y = F.linear(h.flatten(0, -2), self.lora_B.to(x.dtype), self.bias)
        y.addmm_(x.flatten(0, -2), self.weight.t())
        return y.unflatten(0, x.shape[:-1])


def init_bound(init: str, in_features: int, rank: int) -> float:
    """Half the width of the uniform distribution that A starts from (B starts at zero).

    lora:  1/sqrt(in), `kaiming_uniform_(a=sqrt(5))` on an (R, in) tensor, as loralib and PEFT do
           (https://github.com/microsoft/LoRA/blob/main/loralib/layers.py).
    paper: 1/sqrt(R), the same call on the (in, R) tensor of the paper's released code, for which R
           is the fan-in (https://github.com/IST-DASLab/MatryoshkaLoRA).
    """
    if init not in INITS:
        raise ValueError(f"initialiser {init!r} is unknown; allowed: {', '.join(INITS)}")
    return 1.0 / math.sqrt(in_features if init == "lora" else rank)


def add_adapters(
    model: nn.Module,
    spec: AdapterSpec,
    targets: Sequence[str],
    *,
    init: str = "lora",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[str]:
    """Freeze `model` and replace every linear layer whose last name segment is in `targets`.

    A is drawn on the CPU from a generator of its own, layer by layer in the order of the names, so
    the start does not depend on the device or on the global random state. Returns the names of the
    adapted layers. Raises ValueError if a target matches nothing or what it names is not linear.
    """
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]
    found = {name.rpartition(".")[2] for name in names}
    linear = sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    )
    if missing := [target for target in targets if target not in found]:
        raise ValueError(
            f"adapter.targets {missing} match no module; linear layers of this model: "
            f"{', '.join(linear)}"
        )
    for name in names:
        module = model.get_submodule(name)
        # Subclasses, such as quantised layers, keep weights that F.linear cannot use.
        if type(module) is not nn.Linear:
            raise ValueError(
                f"adapter.targets names {name}, a {type(module).__name__}, not a plain linear "
                f"layer; linear layers of this model: {', '.join(linear)}"
            )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    p_full = torch.tensor(spec.p_full, dtype=torch.float32)
    shared: dict[torch.device, Tensor] = {}
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        device = base.weight.device
        p = shared.setdefault(device, p_full.to(device))
        layer = AdapterLinear(base, p, dtype)
        if device.type != "meta":
            bound = init_bound(init, layer.in_features, spec.rank)
            start = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                layer.lora_A.copy_(start)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.adapter_spec = spec  # type: ignore[assignment]
    logger.debug("%d layers adapted at rank %d", len(names), spec.rank)
    return names


def adapter_spec(model: nn.Module) -> AdapterSpec:
    """The spec that `add_adapters` left on the model."""
    spec = getattr(model, "adapter_spec", None)
    assert isinstance(spec, AdapterSpec), "add_adapters was not called on this model"
    return spec


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """Name -> adapter layer, in the order of the model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLinear)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`<layer>.lora_A` and `<layer>.lora_B` -> parameter: all that is trained and saved."""
    return {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in adapter_layers(model).items()
        for factor in ("lora_A", "lora_B")
    }


def set_diagonal(model: nn.Module, p: Tensor) -> None:
    """Give every adapter layer the diagonal `p`; see `AdapterLinear` for the shapes it may have."""
    moved: dict[torch.device, Tensor] = {}
    for layer in adapter_layers(model).values():
        device = layer.lora_A.device
        if device not in moved:
            moved[device] = p.to(device, torch.float32, non_blocking=True)
        layer.p = moved[device]


@contextmanager
def diagonal(model: nn.Module, p: Tensor) -> Iterator[None]:
    """`set_diagonal` for the length of a block."""
    before = {name: layer.p for name, layer in adapter_layers(model).items()}
    try:
        set_diagonal(model, p)
        yield
    finally:
        for name, layer in adapter_layers(model).items():
            layer.p = before[name]


@torch.no_grad()
def principal_factors(A: Tensor, B: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (A', B') of the update `B diag(p) A`, sorted by singular value, with p = 1.

    A: (R, in), B: (out, R), p: (R,). QR of both factors, then SVD of the R x R core, in float64:
    the leading r rows of A' and columns of B' are the best rank-r approximation of the update
    (Eckart-Young).
    """
    q_out, r_out = torch.linalg.qr(B.double() * p.double())
    q_in, r_in = torch.linalg.qr(A.double().T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T)
    root = s.sqrt()
    # R may exceed a layer's width; the missing directions are zero.
    A_new, B_new = A.new_zeros(A.shape), B.new_zeros(B.shape)
    A_new[: len(s)] = ((q_in @ vh.T[:, : len(s)]) * root).T.to(A.dtype)
    B_new[:, : len(s)] = ((q_out @ u[:, : len(s)]) * root).to(B.dtype)
    return A_new, B_new


@contextmanager
def use_factors(model: nn.Module, factor_set: str) -> Iterator[None]:
    """Read the model with its `trained` or its `svd` factors for the length of a block."""
    assert factor_set in ("trained", "svd"), factor_set
    if factor_set == "trained":
        yield
        return
    p_full = torch.tensor(adapter_spec(model).p_full)
    layers = adapter_layers(model)
    before = {name: (layer.lora_A.data, layer.lora_B.data) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            A, B = layer.lora_A.data, layer.lora_B.data
            layer.lora_A.data, layer.lora_B.data = principal_factors(A, B, p_full.to(A.device))
        yield
    finally:
        for name, layer in layers.items():
            layer.lora_A.data, layer.lora_B.data = before[name]


@contextmanager
def at_rank(model: nn.Module, rank: int, rule: str = "prefix") -> Iterator[None]:
    """Read the model at a sub-rank: `with at_rank(model, 4): model.generate(...)`.

    rank 0 is the base model. Factors and diagonal are restored bit-exactly on leaving.
    """
    factor_set, p = adapter_spec(model).diagonal(rank, rule)
    with use_factors(model, factor_set), diagonal(model, p):
        yield


def save_adapter(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write the factors in float32 as safetensors, atomically, with `metadata` in the header."""
    # float32 holds bf16 factors exactly, so nothing is lost for either dtype.
    state = {
        name: parameter.detach().float().cpu().contiguous()
        for name, parameter in adapter_parameters(model).items()
    }
    write_atomically(path, save(state, metadata))


def load_adapter(path: Path, model: nn.Module) -> dict[str, str]:
    """Load factors into an adapted model, strictly; returns the file's metadata.

    Raises ValueError if the file is not safetensors or its names or shapes are not the model's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an adapter: {error}") from error
    parameters = adapter_parameters(model)
    if state.keys() != parameters.keys():
        lacking, extra = sorted(parameters.keys() - state), sorted(state.keys() - parameters.keys())
        raise ValueError(
            f"{path} does not fit the model: {len(lacking)} tensors missing {lacking[:3]}, "
            f"{len(extra)} unknown {extra[:3]}"
        )
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, "
                f"the model needs {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    return metadata
