"""What follows from what the settings affect: run hash, variants, wanted points."""

import hashlib
import json
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from matryoshka_lora.config.schema import (
    Affects,
    Config,
    Effect,
    adapter_spec_of,
    build_method,
    settings_of,
)
from matryoshka_lora.core.rules import rules_at


def affecting(config: Config, effect: Effect) -> dict[str, Any]:
    """The settings that have this effect, by their key, with their resolved values."""
    resolved = {"adapter.train_ranks": config.train_ranks, "eval.ranks": config.eval_ranks}
    found: dict[str, Any] = {}
    for key, declaration in settings_of(config):
        value = attrgetter(key)(config)
        declared: Affects = declaration.metadata["affects"]
        if declaration.metadata["later"] and value == declaration.default:
            declared = "nothing"
        if (declared(config) if callable(declared) else declared) == effect:
            found[key] = resolved.get(key, value)
    return found


def run_hash(config: Config, model_identity: Mapping[str, Any], data_fingerprint: str) -> str:
    """8 hex digits over exactly what changes the adapter, the method's diagonals included."""
    content = {
        "settings": affecting(config, "adapter"),
        "method": build_method(config).fingerprint(),
        "model": model_identity,
        "data": data_fingerprint,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


COLUMNS = (
    "method.name",
    "adapter.rank",
    "adapter.scaling",
    "trainer.lr",
    "trainer.epochs",
    "seed",
)
"""Settings that tables show for themselves."""


def variant(
    config: Config, model_identity: Mapping[str, Any], data_fingerprint: str | None
) -> dict[str, str]:
    """What tells two runs apart whose settings in COLUMNS are equal, as JSON by name.

    Runs of different variants are never pooled as seeds of one row. `data` and `base` stand for the
    content behind paths and revisions; None where it is not known.
    """
    base = {k: v for k, v in model_identity.items() if k not in ("name", "provenance")}
    digest = hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()[:8]
    found = {k: v for k, v in affecting(config, "adapter").items() if k not in COLUMNS}
    found["base"] = digest
    found["data"] = None if data_fingerprint is None else data_fingerprint[:8]
    return {key: json.dumps(value) for key, value in found.items()}


VALIDATION = "validation"
"""What points and rows call the records that are held out of training."""


def wanted_points(config: Config, fingerprints: Mapping[str, str]) -> list[str]:
    """A name for every number that the config asks for; a run is finished when it has them all.

    fingerprints: of the content behind each entry of `eval.tasks`, and behind "validation". What
    has none is left out.
    """
    spec = adapter_spec_of(config)
    axes = ("eval.tasks", "eval.ranks", "eval.rules")
    asked = affecting(config, "evaluation")
    rest = " ".join(f"{k.removeprefix('eval.')}={v}" for k, v in asked.items() if k not in axes)
    tasks = {f"{name}:{shots}": f" {rest}" for name, shots in config.tasks}
    if config.dataset.validation:
        tasks[VALIDATION] = ""
    readings = [
        f"{rule}@{rank}"
        for rank in config.eval_ranks
        for rule in rules_at(spec, rank, config.eval.rules)
    ]
    return [
        f"{task}{rest} {fingerprints[task]} {reading}"
        for task, rest in tasks.items()
        if task in fingerprints
        for reading in readings
    ]
