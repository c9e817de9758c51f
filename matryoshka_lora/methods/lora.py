"""LoRA (arXiv 2106.09685); with adapter.scaling=sqrt rsLoRA (arXiv 2312.03732)."""

from matryoshka_lora.core.diagonals import lora_diagonal
from matryoshka_lora.methods.base import AdapterShape, Method, NoSettings, register, single


@register(
    label="LoRA", colour="#0072B2", marker="o", order=0, baseline=True, trains_sub_ranks=False
)
def lora(shape: AdapterShape, settings: NoSettings) -> Method:
    """p = s_R in every step."""
    return single(lora_diagonal(shape.rank, shape.scaling))
