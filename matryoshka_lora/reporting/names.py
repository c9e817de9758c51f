"""What reports ask the registries of methods and rules, also about names that are not in them.

Records of another version may hold methods and rules that this one does not know: they come last
and are shown by their name.
"""

from collections.abc import Sequence
from typing import Any

from matryoshka_lora.core.rules import RULES
from matryoshka_lora.methods import METHODS


def place(name: Any, order: Sequence[Any]) -> int:
    """The index of a name in an order; what is not in it comes last."""
    return order.index(name) if name in order else len(order)


def method_place(method: str) -> int:
    return place(method, list(METHODS))


def rule_place(rule: str) -> int:
    return place(rule, list(RULES))


def is_baseline(method: str) -> bool:
    return method in METHODS and METHODS[method].baseline


def was_trained_here(method: str) -> bool:
    """Whether its runs were trained by this project, so that their records say how."""
    return method not in METHODS or METHODS[method].trained


def method_style(method: str) -> tuple[str, str] | None:
    """Colour and marker of a known method."""
    return (METHODS[method].colour, METHODS[method].marker) if method in METHODS else None
