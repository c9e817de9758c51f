"""The training methods: each is a choice of the diagonal between the LoRA factors.

To add one, write a file here with a function marked `@register`, and add
`configs/method/<name>.yaml`. Nothing outside this folder knows a method by its name: hash, tables,
colours and `--help` follow from what is registered.
"""

import importlib
import pkgutil

from matryoshka_lora.methods.base import (
    METHODS,
    AdapterShape,
    Method,
    MethodInfo,
    add_method,
    get,
    label,
    register,
    setting,
)
from matryoshka_lora.methods.hooks import Hooks

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
_ordered = sorted(METHODS.values(), key=lambda info: info.order)
METHODS.clear()
METHODS.update({info.name: info for info in _ordered})
TRAINED = [name for name, info in METHODS.items() if info.trained]
"""The names of those that a run can train."""

__all__ = [
    "METHODS",
    "TRAINED",
    "AdapterShape",
    "Hooks",
    "Method",
    "MethodInfo",
    "add_method",
    "get",
    "label",
    "register",
    "setting",
]
