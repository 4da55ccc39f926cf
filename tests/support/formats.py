"""Weight formats as tests take them."""

from __future__ import annotations

import pytest

from tpimpi.compute.formats import WEIGHT_FORMATS

# One of each kind, for the short suite: numbers, blocks of 32, of 256 with a scale for 32 and for 16, exponents for scales.
USUAL = ("f32", "bf16", "f16", "q8_0", "q4_0", "q4_1", "q4_k", "q6_k", "mxfp4")
EVERY_FORMAT = [fmt if fmt in USUAL else pytest.param(fmt, marks=pytest.mark.slow) for fmt in WEIGHT_FORMATS]
EVERY_QUANTIZED = [fmt if fmt in USUAL else pytest.param(fmt, marks=pytest.mark.slow) for fmt in WEIGHT_FORMATS[3:]]
