"""The arrays that travel between modules: NumPy, contiguous unless a docstring says otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
