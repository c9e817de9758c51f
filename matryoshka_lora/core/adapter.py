"""Adapters in a model: how they are put in, and how the model is read at a sub-rank."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.layer import RANK_AXIS, AdapterLinear, sizes_of
from matryoshka_lora.core.rules import (
    FACTOR_SETS,
    AdapterView,
    Components,
    Diagonal,
    FactorSet,
    read,
)
from matryoshka_lora.core.spec import AdapterSpec

logger = logging.getLogger(__name__)

INITS = ("lora", "paper")

Factors = dict[str, Tensor]
"""Role (a key of RANK_AXIS) -> tensor, of one layer."""


@dataclass
class _State:
    """What `add_adapters` leaves on a model."""

    spec: AdapterSpec
    in_place: FactorSet = "trained"
    """The factor set that the layers hold now."""
    trained: dict[str, Factors] = field(default_factory=dict)
    """Layer -> its factors as trained, while another set is in place."""
    importance: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> (R,), what the method says of its components; empty: their singular values tell."""


def init_bound(init: str, in_features: int, rank: int) -> float:
    """Half the width of the uniform distribution that A starts from (B starts at zero).

    lora:  1/sqrt(in), `kaiming_uniform_(a=sqrt(5))` on an (R, in) tensor, as loralib and PEFT do
           (https://github.com/microsoft/LoRA/blob/main/loralib/layers.py).
    paper: 1/sqrt(R), the same call on the (in, R) tensor of the paper's released code, for which R
           is the fan-in (https://github.com/IST-DASLab/MatryoshkaLoRA).
    """
    if init not in INITS:
        raise UserError(f"initialiser {init!r} is unknown; allowed: {', '.join(INITS)}")
    return 1.0 / math.sqrt(in_features if init == "lora" else rank)


def add_adapters(
    model: nn.Module,
    spec: AdapterSpec,
    targets: Sequence[str],
    *,
    init: str = "lora",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    without: Sequence[str] = (),
) -> list[str]:
    """Freeze `model` and replace every layer whose last name segment is in `targets`.

    without: names of modules whose layers get none, such as a tower that text does not go through.
    dtype: of the factors. A is drawn on the CPU from a generator of its own, layer by layer in the
    order of the names, so the start does not depend on the device or on the global random state.
    Returns the names of the adapted layers. Raises UserError if a target matches nothing, or names
    something that is no linear map, or is adapted already.
    """
    names = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in targets
        and not any(name.startswith(f"{outside}.") for outside in without)
    ]
    found = {name.rpartition(".")[2] for name in names}
    linear = sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    )
    if missing := [target for target in targets if target not in found]:
        raise UserError(
            f"adapter.targets {missing} match no module; linear layers of this model: "
            f"{', '.join(linear)}"
        )
    for name in names:
        module = model.get_submodule(name)
        try:
            if isinstance(module, AdapterLinear):
                raise UserError("it has an adapter already")
            sizes_of(module)
        except UserError as error:
            raise UserError(
                f"adapter.targets names {name}, a {type(module).__name__}, not a plain linear "
                f"layer ({error}); linear layers of this model: {', '.join(linear)}"
            ) from None
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    p_full = torch.tensor(spec.p_full, dtype=torch.float32)
    shared: dict[torch.device, Tensor] = {}
    for name in names:
        base = model.get_submodule(name)
        device = next(base.parameters()).device
        p = shared.setdefault(device, p_full.to(device))
        layer = AdapterLinear(
            base, p, dtype, gated=spec.gated, float32_diagonal=spec.float32_diagonal
        )
        if device.type != "meta":
            bound = init_bound(init, layer.in_features, spec.rank)
            start = torch.empty(layer.lora_A.shape, dtype=torch.float32)
            start.uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                layer.lora_A.copy_(start)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.adapter_state = _State(spec)  # type: ignore[assignment]
    logger.debug("%d layers adapted at rank %d", len(names), spec.rank)
    return names


def _state(model: nn.Module) -> _State:
    state = getattr(model, "adapter_state", None)
    if not isinstance(state, _State):
        raise UserError("the model has no adapters: call add_adapters on it first")
    return state


def adapter_spec(model: nn.Module) -> AdapterSpec:
    """The spec of the model's adapters. Raises UserError for a model without."""
    return _state(model).spec


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """Name -> adapter layer, in the order of the model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLinear)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`<layer>.<role>` -> parameter, in the order of the model: all that is trained and saved.

    The roles are the keys of RANK_AXIS: `lora_A` (R, in), `lora_B` (out, R), and with a gated spec
    `lora_gate` (R,).
    """
    return {
        f"{name}.{role}": parameter
        for name, layer in adapter_layers(model).items()
        for role, parameter in layer_parameters(layer).items()
    }


def layer_parameters(layer: AdapterLinear) -> dict[str, nn.Parameter]:
    """Role -> parameter of one layer."""
    found = {role: getattr(layer, role) for role in RANK_AXIS}
    return {role: parameter for role, parameter in found.items() if parameter is not None}


def set_importance(model: nn.Module, importance: Mapping[str, Tensor]) -> None:
    """Keep what a method says of the components, layer -> (R,), for rules and for the file.

    It is kept in float32 on the CPU, as a file holds it. Empty: the singular values tell.
    """
    _state(model).importance = {
        name: values.detach().float().cpu() for name, values in importance.items()
    }


def adapter_importance(model: nn.Module) -> dict[str, Tensor]:
    """What `set_importance` has set."""
    return dict(_state(model).importance)


def adapter_view(model: nn.Module) -> AdapterView:
    """What rules see of the model's adapters, whichever factor set is in place."""
    state = _state(model)

    def trained() -> dict[str, Factors]:
        if state.in_place != "trained":
            return state.trained
        return {name: _data(layer) for name, layer in adapter_layers(model).items()}

    return view_of(state.spec, trained, state.importance)


def view_of(
    spec: AdapterSpec,
    trained: Callable[[], Mapping[str, Factors]],
    importance: Mapping[str, Tensor],
) -> AdapterView:
    """An adapter as rules see it. trained: layer -> the factors that training left, by role.

    Components are as important as the method says, and where it says nothing, as their singular
    values are large.
    """

    def look(factor_set: FactorSet) -> dict[str, Components]:
        found = {}
        for name, factors in trained().items():
            A, B, p = factors["lora_A"], factors["lora_B"], _effective_p_full(factors, spec)
            if factor_set == "svd":
                # R may exceed a layer's width; the missing directions are zero.
                values = singular_values(A, B, p).cpu()
                values = torch.cat([values, values.new_zeros(spec.rank - len(values))])
                live = values > 0
            else:
                nothing = torch.zeros(spec.rank)
                values, live = importance.get(name, nothing).double(), (p != 0).cpu()
            found[name] = Components(A.shape[1] + B.shape[0], values, live)
        return found

    return AdapterView(spec, look, "trained" if importance else "svd")


def set_diagonal(model: nn.Module, p: Diagonal) -> None:
    """Give the adapter layers the diagonal `p`: one for all, or by name each layer its own.

    See `AdapterLinear` for the shapes that a diagonal may have. It may carry gradients.
    """
    moved: dict[tuple[torch.device, int], Tensor] = {}
    for name, layer in adapter_layers(model).items():
        own = p if isinstance(p, Tensor) else p[name]
        key = (layer.lora_A.device, id(own))
        if key not in moved:
            moved[key] = own.to(key[0], torch.float32, non_blocking=True)
        layer.p = moved[key]


@contextmanager
def diagonal(model: nn.Module, p: Diagonal) -> Iterator[None]:
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


@torch.no_grad()
def singular_values(A: Tensor, B: Tensor, p: Tensor) -> Tensor:
    """Those of the update `B diag(p) A`, falling, (min(R, in, out),), float64.

    A: (R, in), B: (out, R), p: (R,). The squares of what `principal_factors` splits over both.
    """
    _, r_out = torch.linalg.qr(B.double() * p.double(), mode="r")
    _, r_in = torch.linalg.qr(A.double().T, mode="r")
    return torch.linalg.svdvals(r_out @ r_in.T)


def factors_of(trained: Mapping[str, Tensor], spec: AdapterSpec, factor_set: FactorSet) -> Factors:
    """The factors of one layer in a factor set, from those that training left, by role."""
    if factor_set == "trained":
        return dict(trained)
    p_full = _effective_p_full(trained, spec)
    A, B = principal_factors(trained["lora_A"], trained["lora_B"], p_full)
    made = {"lora_A": A, "lora_B": B}
    return made | {"lora_gate": torch.ones_like(p_full)} if "lora_gate" in trained else made


def _effective_p_full(trained: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
    """The diagonal of the full update of one layer, gate included, (R,)."""
    p_full = torch.tensor(spec.p_full, dtype=torch.float32, device=trained["lora_A"].device)
    return p_full * trained["lora_gate"] if "lora_gate" in trained else p_full


@contextmanager
def use_factors(model: nn.Module, factor_set: FactorSet) -> Iterator[None]:
    """Read the model with its `trained` or its `svd` factors for the length of a block.

    Blocks may stand inside each other: the inner one reads what it names, always of the factors
    that training left, and the outer one has its own again afterwards.
    """
    assert factor_set in FACTOR_SETS, factor_set
    state, layers = _state(model), adapter_layers(model)
    outer = state.in_place
    if factor_set == outer:
        yield
        return
    before = {name: _data(layer) for name, layer in layers.items()}
    if outer == "trained":
        state.trained = before
    try:
        for name, layer in layers.items():
            _set_data(layer, factors_of(state.trained[name], state.spec, factor_set))
        state.in_place = factor_set
        yield
    finally:
        for name, layer in layers.items():
            _set_data(layer, before[name])
        state.in_place = outer
        if outer == "trained":
            state.trained = {}


def _data(layer: AdapterLinear) -> Factors:
    return {role: parameter.data for role, parameter in layer_parameters(layer).items()}


def _set_data(layer: AdapterLinear, factors: Mapping[str, Tensor]) -> None:
    for role, parameter in layer_parameters(layer).items():
        parameter.data = factors[role]


@contextmanager
def at_rank(model: nn.Module, rank: int, rule: str = "trained") -> Iterator[None]:
    """Read the model at a sub-rank: `with at_rank(model, 4): model.generate(...)`.

    rank 0 is the base model; see `rules` for the rules. Blocks may stand inside each other: the
    innermost holds. Factors and diagonal are restored bit-exactly on leaving. Raises UserError for
    an unknown rule, one that the adapter cannot be read by, or a rank outside 0..R.
    """
    reading = read(adapter_view(model), rank, rule)
    with use_factors(model, reading.factors), diagonal(model, reading.p):
        yield
