"""MatryoshkaLoRA (arXiv 2605.07850): fine-tune an LLM once, use the adapter at any rank.

What this module offers is loaded on first use, so `import matryoshka_lora` is cheap, and the
adapters need nothing but torch:

    from matryoshka_lora import AdapterSpec, add_adapters, at_rank, load_adapter, save_adapter
    from matryoshka_lora import add_method    # adapters for a training method
    from matryoshka_lora import load_run    # a finished run as a model; needs transformers
    from matryoshka_lora import MethodCallback    # training by the Trainer of transformers
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "AdapterLinear": "core.layer",
    "AdapterSpec": "core.spec",
    "MethodCallback": "trainer_callback",
    "UserError": "core.errors",
    "adapter_layers": "core.adapter",
    "adapter_parameters": "core.adapter",
    "add_adapters": "core.adapter",
    "add_method": "methods",
    "at_rank": "core.adapter",
    "diagonal": "core.adapter",
    "export_adapter": "export",
    "load_adapter": "core.storage",
    "load_run": "loading",
    "lora_diagonal": "core.diagonals",
    "matryoshka_diagonal": "core.diagonals",
    "prefix_diagonal": "core.diagonals",
    "save_adapter": "core.storage",
    "set_diagonal": "core.adapter",
}
"""Name -> the module that has it."""

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
