"""Weight formats, a module each: sizes, rows, packing, quantizing.

To add one: a module with its `WeightFormat` and its name below; its kernel (enum Format in src/kernels/kernels.h, and a
decoder in linear.h). Formats are named by GGML's names.
"""

from __future__ import annotations

from tpimpi.compute.formats.base import WeightFormat
from tpimpi.modules import ModuleTable

# In the order in which texts list them.
WEIGHT_FORMATS = (
    *("f32", "bf16", "f16", "q8_0", "q4_0", "q4_1", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"),
    *("q5_0", "q5_1", "iq4_nl", "iq4_xs", "mxfp4"),
)
# Each is a module of its name, with the format under that name in capitals.
FORMATS = ModuleTable[WeightFormat](__name__, {name: f"{name}.{name.upper()}" for name in WEIGHT_FORMATS})


def is_quantized(fmt: str) -> bool:
    """Whether the format of this name has blocks of codes."""
    return FORMATS[fmt].is_quantized


def nearest_format(stored: str) -> str:
    """The format for a tensor of this type of a GGUF or safetensors file: the same, or what loses least of its values."""
    if stored in FORMATS:
        return stored
    return next((name for name, format in FORMATS.items() if stored in format.stands_in_for), "q8_0")
