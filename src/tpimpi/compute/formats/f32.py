"""f32: IEEE 754 binary32. Packed: line j of a panel is column j."""

from __future__ import annotations

import numpy as np

from tpimpi.compute import arrays
from tpimpi.compute.formats.base import PANEL_ROWS, Quantizer, WeightFormat, pack_words, unpack_words


class _F32(WeightFormat):
    def panel_shape(self, columns: int, first: int = 0) -> tuple[int, ...]:
        return (columns, PANEL_ROWS)

    def pack_panels(self, rows: arrays.Bytes, present: int, out: arrays.Bytes, columns: int, first: int) -> None:
        pack_words(rows, out)

    def unpack_panels(self, panels: arrays.Bytes, columns: int, first: int) -> arrays.Bytes:
        return unpack_words(panels, self.row_bytes(columns))

    def encode(self, values: arrays.F32, quantizer: Quantizer) -> arrays.Bytes:
        return values.view(np.uint8)

    def decode(self, stored: arrays.Bytes, columns: int, first: int = 0) -> arrays.F32:
        return stored.view("<f4")


F32 = _F32(name="f32", kernel_code=0, block_bytes=4, dtype=np.dtype("<f4"), activation_type="f32")
