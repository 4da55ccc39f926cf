"""Weight formats, a module each: sizes, rows, packing, quantizing.

To add one: a module with its `WeightFormat` and its line below; its kernel (enum Format in src/kernels/kernels.h, and a
decoder in linear.h). Formats are named by GGML's names.
"""

from __future__ import annotations

from tpimpi.compute.formats.base import WeightFormat
from tpimpi.compute.formats.bf16 import BF16
from tpimpi.compute.formats.f32 import F32
from tpimpi.compute.formats.q4_0 import Q4_0
from tpimpi.compute.formats.q4_1 import Q4_1
from tpimpi.compute.formats.q8_0 import Q8_0

# By name, in the order in which texts list them.
FORMATS: dict[str, WeightFormat] = {format.name: format for format in (F32, BF16, Q8_0, Q4_0, Q4_1)}
WEIGHT_FORMATS = tuple(FORMATS)


def is_quantized(fmt: str) -> bool:
    """Whether the format of this name has blocks of codes."""
    return FORMATS[fmt].is_quantized


def nearest_format(stored: str) -> str:
    """The format for a tensor of this type of a GGUF or safetensors file: the same, or what loses least of its values."""
    if stored in FORMATS:
        return stored
    return next((name for name, format in FORMATS.items() if stored in format.stands_in_for), Q8_0.name)
