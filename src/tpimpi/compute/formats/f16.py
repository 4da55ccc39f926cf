"""f16: IEEE 754 binary16.

Packed: line j of a panel is column 2j of its 16 rows, then column 2j + 1; an odd last column is followed by zeros.
"""

from __future__ import annotations

import numpy as np

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats.base import PANEL_ROWS, Quantizer, WeightFormat


class _F16(WeightFormat):
    def panel_shape(self, columns: int, first: int = 0) -> tuple[int, ...]:
        return (-(-columns // 2), 2, PANEL_ROWS)

    def pack_panels(self, rows: Bytes, present: int, out: Bytes, columns: int, first: int) -> None:
        by_column = out.view("<u2").reshape(rows.shape[0], -1, PANEL_ROWS)
        by_column[:, :columns] = rows.view("<u2").transpose(0, 2, 1)

    def unpack_panels(self, panels: Bytes, columns: int, first: int) -> Bytes:
        by_column = panels.view("<u2").reshape(panels.shape[0], -1, PANEL_ROWS)[:, :columns]
        rows = np.ascontiguousarray(by_column.transpose(0, 2, 1))
        return rows.view(np.uint8).reshape(-1, self.row_bytes(columns))

    def encode(self, values: F32, quantizer: Quantizer) -> Bytes:
        greatest = max(values.max(initial=0), -values.min(initial=0))
        if greatest > self.largest and np.isfinite(greatest):
            raise ValueError(f"holds {greatest:g}, and {self.name} nothing over {self.largest:g}")
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)

    def decode(self, stored: Bytes, columns: int, first: int = 0) -> F32:
        return stored.view("<f2").astype(np.float32)


F16 = _F16(
    name="f16",
    kernel_code=15,
    block_bytes=2,
    dtype=np.dtype("<f2"),
    largest=65504.0,
    activation_type="f32",
)
