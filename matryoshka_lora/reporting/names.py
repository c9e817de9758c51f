"""What reports know of methods and rules: labels, order and line styles, also of unknown names."""

from collections.abc import Sequence
from typing import Any

from matryoshka_lora.runs import record

RULES = [rule for rule in record.RULES if rule != "base"]

METHOD_LABELS = {
    "lora": "LoRA",
    "dylora": "DyLoRA",
    "nested_dropout": "nested dropout",
    "matryoshka": "MatryoshkaLoRA",
}
_METHOD_STYLE = {
    "lora": ("#0072B2", "o"),
    "dylora": ("#E69F00", "s"),
    "nested_dropout": ("#009E73", "^"),
    "matryoshka": ("#CC3311", "D"),
}


def place(name: Any, order: Sequence[Any]) -> int:
    return order.index(name) if name in order else len(order)


def method_label(method: str) -> str:
    return METHOD_LABELS.get(method, method)


def method_order(method: str) -> int:
    return place(method, tuple(METHOD_LABELS))


def is_baseline(method: str) -> bool:
    return method == "lora"


def method_style(method: str) -> tuple[str, str] | None:
    return _METHOD_STYLE.get(method)


def rule_order(rule: str) -> tuple[int, str]:
    return (place(rule, RULES), rule)
