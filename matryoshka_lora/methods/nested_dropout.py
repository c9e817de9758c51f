"""Nested dropout (arXiv 1402.0915): a rank for every sample."""

from dataclasses import dataclass

from matryoshka_lora.methods.base import AdapterShape, Method, nothing_to_draw, register, setting
from matryoshka_lora.methods.prefixes import prefix_choices


@dataclass(frozen=True)
class Settings:
    weights: list[float] | None = setting(
        None, "odds of each trained sub-rank; null: all alike", idle=nothing_to_draw
    )


@register(label="nested dropout", colour="#009E73", marker="^", order=2, settings=Settings)
def nested_dropout(shape: AdapterShape, settings: Settings) -> Method:
    """p = prefix(r), r drawn from S for each sample."""
    return prefix_choices(shape, settings.weights, draw="sample")
