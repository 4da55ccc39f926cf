"""bf16: the upper 16 bits of IEEE 754 binary32.

Packed: line j of a panel is columns 2j and 2j + 1; an odd last column is followed by zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats.base import PANEL_ROWS, SLAB_BYTES, Quantizer, WeightFormat, pack_words, unpack_words


def to_bf16(values: F32) -> npt.NDArray[np.uint16]:
    """The nearest bf16 of each number, ties to even, as its bits. Same shape. Peak memory: the result and a few MB."""
    out = np.empty(values.shape, np.uint16)
    if values.ndim < 2:
        out[...] = _round_to_bf16(values)
        return out
    step = max(1, SLAB_BYTES // 4 // max(1, values.size // max(1, values.shape[0])))
    for first in range(0, values.shape[0], step):
        out[first : first + step] = _round_to_bf16(values[first : first + step])
    return out


def _round_to_bf16(values: F32) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # Rounding could carry a NaN over into infinity; a set mantissa bit keeps it a NaN.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: Array) -> F32:
    """The numbers of bf16 bits (uint16). Same shape; exact."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


class _BF16(WeightFormat):
    def panel_shape(self, columns: int, first: int = 0) -> tuple[int, ...]:
        return (-(-columns // 2), PANEL_ROWS, 2)

    def pack_panels(self, rows: Bytes, present: int, out: Bytes, columns: int, first: int) -> None:
        pack_words(rows, out)

    def unpack_panels(self, panels: Bytes, columns: int, first: int) -> Bytes:
        return unpack_words(panels, self.row_bytes(columns))

    def encode(self, values: F32, quantizer: Quantizer) -> Bytes:
        return to_bf16(values).view(np.uint8)

    def decode(self, stored: Bytes, columns: int, first: int = 0) -> F32:
        return from_bf16(stored.view("<u2"))


BF16 = _BF16(
    name="bf16",
    kernel_code=1,
    block_bytes=2,
    dtype=np.dtype("<u2"),
    activation_type="bf16",
)
