"""Weight formats: how numbers are stored in slices. The dtype of an array tells its format (uint16 is bf16).

`f32` is IEEE 754 binary32, little endian; `bf16` its upper 16 bits, as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

WEIGHT_FORMATS = ("f32", "bf16")
DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "bf16": np.dtype("<u2"),
    "bytes": np.dtype("u1"),  # not numbers: a tokenizer's file
}


def encode(values: F32, fmt: str) -> Array:
    """Numbers as they are stored: f32 unchanged, or rounded to the nearest bf16, ties to even. Same shape."""
    if fmt == "f32":
        return values
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # Rounding could carry a NaN over into infinity; a set mantissa bit keeps it a NaN.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def decode(stored: Array) -> F32:
    """Exact f32 values of an array stored as f32 or bf16. Same shape; f32 is not copied."""
    if stored.dtype == DTYPES["f32"]:
        return stored
    assert stored.dtype == DTYPES["bf16"], stored.dtype
    return (stored.astype(np.uint32) << 16).view(np.float32)
