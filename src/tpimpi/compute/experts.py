"""What the experts of a mixture are given to compute, beside the vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Array
from tpimpi.compute.formats.packed import Matrix

# Experts that were chosen: [positions, layers, experts a token].
RoutingTrace = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class ExpertUse:
    """One expert (or tile of one), and the positions that use it.

    An expert's result for a position is down (activation(gate x + gate_bias, up x + up_bias)) + down_bias. Here it is of
    this rank's columns alone, of which there may be none: then `matrices` is empty, and so are gate_bias and up_bias.
    """

    matrices: Mapping[str, Matrix]  # gate, up [columns, hidden], down [hidden, columns]; or none
    parts: Mapping[str, Array]  # of gate_bias, up_bias [columns], down_bias [hidden], f32, those that there are
    rows: Array  # int32 [uses], each once: the positions that use it
    weights: F32  # [uses], of the results
