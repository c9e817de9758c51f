"""A LoRA that other code has trained; it is read, never trained. See `importing.py`."""

from matryoshka_lora.core.diagonals import lora_diagonal
from matryoshka_lora.methods.base import AdapterShape, Method, NoSettings, register, single


@register(
    label="imported LoRA",
    colour="#56B4E9",
    marker="h",
    order=8,
    trains_sub_ranks=False,
    trained=False,
)
def imported(shape: AdapterShape, settings: NoSettings) -> Method:
    """p = s_R; nothing is known of the order of the components, so no prefix of them is read."""
    return single(lora_diagonal(shape.rank, shape.scaling), ordered=False)
