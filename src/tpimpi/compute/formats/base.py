"""What a weight format is: how the numbers of a row are stored, and laid out for the kernels.

A matrix [rows, columns] has two forms, both little-endian:

Row form, as in GGUF and safetensors files: uint8 [rows, row_bytes], one row after another. Where `columns` is no
multiple of a format's block, the last block is filled up with zeros before it is quantized.

Packed form: panels of 16 rows, one after another; rows that are not there are zero bytes. A panel is made of lines of
64 bytes: 16 words of 4 bytes, one of each row, in order. What the lines hold stands with each format.

A matrix may be a cut of columns from a larger one. Blocks of 32 begin where the cut does; blocks of 256 lie where they
lie in the larger matrix, and `first` is the place of the cut's first column in its block, a multiple of 32. Row form
then has whole blocks, all that the cut touches; packed form has the cut's own columns only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Bytes

PANEL_ROWS = 16
LINE_BYTES = 64
SLAB_BYTES = 1 << 20  # converted at a time: stays in the cache, and bounds what is needed beside the result

UINT8: np.dtype[Any] = np.dtype("u1")

Quantizer = Callable[[F32, str], Bytes]  # numbers [rows, columns] and a format's name -> its row form


@dataclass(frozen=True, kw_only=True)
class WeightFormat(ABC):
    """One format: its sizes, and how rows of it are made, read, and packed for the kernels. One module each."""

    name: str
    kernel_code: int  # in enum Format of src/kernels/kernels.h
    block_weights: int = 1  # weights of a row that are stored together
    block_bytes: int  # what they take in row form
    cut_weights: int = 1  # columns at multiples of which a row may be cut
    dtype: np.dtype[Any] = UINT8  # of a dataset that holds it
    largest: float = np.inf  # magnitude above which `encode` refuses
    activation_type: Literal["f32", "bf16", "int8"]  # what kernels round activations to, beside these weights
    head_format: str = ""  # of the head and the embedding table beside such layers; "": the same
    # Types of GGUF and safetensors files that become this format where none holds their values exactly.
    stands_in_for: tuple[str, ...] = ()

    @property
    def can_quantize(self) -> bool:
        """Whether rows of it can be made from numbers."""
        return type(self).quantize_blocks is not WeightFormat.quantize_blocks or not self.is_quantized

    @property
    def is_quantized(self) -> bool:
        """Whether weights are codes with a scale a block."""
        return self.block_weights > 1

    @property
    def weight_bytes(self) -> float:
        """Size of one weight, in bytes."""
        return self.block_bytes / self.block_weights

    def first_column(self, start: int) -> int:
        """Where in a block a cut that begins at column `start` of a matrix begins; 0 where it has blocks of its own."""
        return start % self.block_weights if start % self.cut_weights == 0 else 0

    def blocks(self, columns: int, first: int = 0) -> int:
        """Blocks that a row touches."""
        return -(-(first + columns) // self.block_weights)

    def row_bytes(self, columns: int, first: int = 0) -> int:
        """Bytes of a row in row form."""
        return self.blocks(columns, first) * self.block_bytes

    def panel_bytes(self, columns: int, first: int = 0) -> int:
        """Bytes of a panel of 16 rows in packed form, a multiple of 64."""
        return math.prod(self.panel_shape(columns, first)) * self.dtype.itemsize

    @abstractmethod
    def panel_shape(self, columns: int, first: int = 0) -> tuple[int, ...]:
        """Shape of a panel in a dataset of `dtype`."""

    @abstractmethod
    def pack_panels(self, rows: Bytes, present: int, out: Bytes, columns: int, first: int) -> None:
        """Pack `rows` [panels, 16, row_bytes], of which `present` are rows of the matrix, the last ones zeros.

        `rows` is contiguous. `out` is [panels, panel_bytes], zeroed.
        """

    @abstractmethod
    def unpack_panels(self, panels: Bytes, columns: int, first: int) -> Bytes:
        """Panels [panels, panel_bytes] in row form: [panels * 16, row_bytes]; what lies beside the cut is zeros."""

    @abstractmethod
    def encode(self, values: F32, quantizer: Quantizer) -> Bytes:
        """Numbers [rows, columns] in row form, rounded or quantized. ValueError for numbers that the format cannot hold."""

    @abstractmethod
    def decode(self, stored: Bytes, columns: int, first: int = 0) -> F32:
        """Row form as numbers, f32 [rows, columns], contiguous; exact. f32 is not copied."""

    def quantize_blocks(self, x: F32) -> Bytes:
        """Blocks, one a column: x [block_weights, blocks], finite, to uint8 [blocks, block_bytes].

        The algorithm is stated by search.py for blocks of 32, by search_scales.py for those of 256 and iq4_nl.
        """
        raise TypeError(f"{self.name} cannot be made from numbers")

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        """Blocks that all have this scale, of weights `scale * code`: [..., block_weights] to uint8 [..., block_bytes]."""
        raise TypeError(f"{self.name} is no quantized format")

    def code_range(self) -> tuple[int, int]:
        """The least and the greatest code that `blocks_of_codes` takes."""
        raise TypeError(f"{self.name} is no quantized format")

    def holds_infinities(self, stored: Bytes) -> bool:
        """Whether a scale or minimum of rows [rows, row_bytes] is infinite or NaN."""
        return False


def pack_words(rows: Bytes, out: Bytes) -> None:
    """Panels of a format without blocks: line j of a panel is the j-th 4-byte word of each row, the last filled with zeros.

    `rows` [panels, 16, row_bytes], `out` [panels, panel_bytes].
    """
    panels = rows.shape[0]
    if missing := -rows.shape[2] % 4:
        rows = np.concatenate([rows, np.zeros((panels, PANEL_ROWS, missing), np.uint8)], axis=2)
    out.view("<u4").reshape(panels, -1, PANEL_ROWS)[:] = rows.view("<u4").transpose(0, 2, 1)


def unpack_words(panels: Bytes, row_bytes: int) -> Bytes:
    """Undoes `pack_words`: [panels * 16, row_bytes]."""
    count = panels.shape[0]
    words = np.ascontiguousarray(panels.view("<u4").reshape(count, -1, PANEL_ROWS).transpose(0, 2, 1))
    return words.view(np.uint8).reshape(count * PANEL_ROWS, -1)[:, :row_bytes]
