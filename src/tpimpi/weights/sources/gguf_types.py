"""The types of tensors in a GGUF file: GGML's enum ggml_type, and the blocks of each (ggml_type_traits).

The gguf package has them too, but to import it takes 6 MB of memory, which a run that only looks into a file would keep.
It is asked for types that are newer than this table.
"""

from __future__ import annotations

from typing import NamedTuple


class GgufType(NamedTuple):
    """A type of tensors: GGML's name, and the numbers and bytes of its blocks."""

    name: str
    block: int
    block_bytes: int

    def nbytes(self, numbers: int) -> int:
        """Bytes of so many numbers, whole blocks."""
        return numbers // self.block * self.block_bytes


# By the number that stands in the file.
_TYPES = {
    0: GgufType("f32", 1, 4),
    1: GgufType("f16", 1, 2),
    2: GgufType("q4_0", 32, 18),
    3: GgufType("q4_1", 32, 20),
    6: GgufType("q5_0", 32, 22),
    7: GgufType("q5_1", 32, 24),
    8: GgufType("q8_0", 32, 34),
    9: GgufType("q8_1", 32, 40),
    10: GgufType("q2_k", 256, 84),
    11: GgufType("q3_k", 256, 110),
    12: GgufType("q4_k", 256, 144),
    13: GgufType("q5_k", 256, 176),
    14: GgufType("q6_k", 256, 210),
    15: GgufType("q8_k", 256, 292),
    16: GgufType("iq2_xxs", 256, 66),
    17: GgufType("iq2_xs", 256, 74),
    18: GgufType("iq3_xxs", 256, 98),
    19: GgufType("iq1_s", 256, 50),
    20: GgufType("iq4_nl", 32, 18),
    21: GgufType("iq3_s", 256, 110),
    22: GgufType("iq2_s", 256, 82),
    23: GgufType("iq4_xs", 256, 136),
    24: GgufType("i8", 1, 1),
    25: GgufType("i16", 1, 2),
    26: GgufType("i32", 1, 4),
    27: GgufType("i64", 1, 8),
    28: GgufType("f64", 1, 8),
    29: GgufType("iq1_m", 256, 56),
    30: GgufType("bf16", 1, 2),
    34: GgufType("tq1_0", 256, 54),
    35: GgufType("tq2_0", 256, 66),
    39: GgufType("mxfp4", 32, 17),
    40: GgufType("nvfp4", 64, 36),
    41: GgufType("q1_0", 128, 18),
}
_BY_NAME = {type.name: type for type in _TYPES.values()}


def type_of_number(number: int) -> GgufType | None:
    """The type of that number in a file; None where the gguf package does not know it either."""
    if number in _TYPES:
        return _TYPES[number]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return None
    return GgufType(kind.name.lower(), *GGML_QUANT_SIZES[kind])


def type_of_name(name: str) -> GgufType:
    """The type of GGML's name, in small letters. Raises KeyError where the gguf package does not know it either."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GgufType(name, *GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]])
