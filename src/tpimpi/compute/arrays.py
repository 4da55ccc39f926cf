"""The arrays that travel between modules: NumPy, contiguous unless a docstring says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


def median(values: Sequence[float]) -> float:
    """The middle of some numbers, or the mean of the two in the middle. np.median would bring numpy.ma, which is 1 MB."""
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2
