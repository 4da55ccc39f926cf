"""Weight formats, a module each: sizes, rows, packing, quantizing.

To add one: a module with its `WeightFormat` and its line below; its kernel (enum Format in src/kernels/kernels.h, and a
decoder in linear.h). Formats are named by GGML's names.
"""

from __future__ import annotations

from tpimpi.compute.formats.base import WeightFormat
from tpimpi.compute.formats.bf16 import BF16
from tpimpi.compute.formats.f16 import F16
from tpimpi.compute.formats.f32 import F32
from tpimpi.compute.formats.iq4_nl import IQ4_NL
from tpimpi.compute.formats.iq4_xs import IQ4_XS
from tpimpi.compute.formats.mxfp4 import MXFP4
from tpimpi.compute.formats.q2_k import Q2_K
from tpimpi.compute.formats.q3_k import Q3_K
from tpimpi.compute.formats.q4_0 import Q4_0
from tpimpi.compute.formats.q4_1 import Q4_1
from tpimpi.compute.formats.q4_k import Q4_K
from tpimpi.compute.formats.q5_0 import Q5_0
from tpimpi.compute.formats.q5_1 import Q5_1
from tpimpi.compute.formats.q5_k import Q5_K
from tpimpi.compute.formats.q6_k import Q6_K
from tpimpi.compute.formats.q8_0 import Q8_0

# By name, in the order in which texts list them.
FORMATS: dict[str, WeightFormat] = {
    format.name: format
    for format in (
        *(F32, BF16, F16, Q8_0, Q4_0, Q4_1, Q6_K, Q5_K, Q4_K, Q3_K, Q2_K),
        *(Q5_0, Q5_1, IQ4_NL, IQ4_XS, MXFP4),
    )
}
WEIGHT_FORMATS = tuple(FORMATS)


def is_quantized(fmt: str) -> bool:
    """Whether the format of this name has blocks of codes."""
    return FORMATS[fmt].is_quantized


def nearest_format(stored: str) -> str:
    """The format for a tensor of this type of a GGUF or safetensors file: the same, or what loses least of its values."""
    if stored in FORMATS:
        return stored
    return next((name for name, format in FORMATS.items() if stored in format.stands_in_for), Q8_0.name)
