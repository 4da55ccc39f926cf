"""GGML's q8_0: a weight is d * q, with a code q of int8 for each and an f16 scale d for each 32.

A block is d (2 bytes), then 32 codes, -128..127 (GGML and `quantize` use -127..127). In packed form codes are unsigned,
q + 128, and line j of a block is columns 4j to 4j + 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats import search
from tpimpi.compute.formats.blocks_of_32 import PairedFormat, join

_CODES = (-127, 127)
_SIGNS = np.uint32(0x80808080)  # int8 q <-> unsigned q + 128, four at once
CANDIDATES = (127.0, 126.0, 125.0, 124.0, 123.0, 122.0, 121.0, 120.0)  # see search.py


class _Q80(PairedFormat):
    def dequantize(self, numbers: F32, codes: Bytes, out: F32) -> None:
        np.multiply(codes.view(np.int8), numbers, out=out)

    def to_lines(self, words: Array) -> Array:
        return words ^ _SIGNS

    def from_lines(self, words: Array) -> Array:
        return words ^ _SIGNS

    def quantize_blocks(self, x: F32) -> Bytes:
        d, q = search.search_scale(x, np.abs(x).max(axis=0), 127, CANDIDATES, _CODES)
        return join([d], q.astype(np.int8).view(np.uint8))

    def code_range(self) -> tuple[int, int]:
        return _CODES

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T
        return join([np.full(flat.shape[1], scale, np.float32)], flat.view(np.uint8)).reshape(
            *codes.shape[:-1], self.block_bytes
        )


Q8_0 = _Q80(
    name="q8_0",
    kernel_code=2,
    block_bytes=34,
    f16_offsets=(0,),
    largest=65504.0 * 127,  # at the largest scale that is finite in f16
    activation_type="int8",
)
