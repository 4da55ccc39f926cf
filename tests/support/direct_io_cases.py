"""What tests of direct io share."""

from __future__ import annotations

import numpy as np

from tpimpi.system.buffers import PAGE_BYTES
from tpimpi.system.direct_io import (
    READ_BYTES,
)

ODD = 1234  # bytes after the last whole page


CONTENT = np.random.default_rng(3).integers(0, 256, 3 * READ_BYTES + 5 * PAGE_BYTES + ODD, np.uint8)


SIZE = CONTENT.size
