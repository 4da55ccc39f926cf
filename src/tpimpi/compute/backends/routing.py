"""The router of a mixture of experts, to the same bits wherever it is computed: the twin of src/kernels/route.cpp.

All is in f64, by additions, multiplications and divisions that IEEE 754 defines to the bit, in a fixed order. The product of
two f32 is exact in f64, so that it makes no difference whether a sum is fused with it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, I32, Array
from tpimpi.compute.formats.bf16 import from_bf16
from tpimpi.compute.router import RouterSpec

_F64 = npt.NDArray[np.float64]

FIXED_LANES = 16  # of sums
_LANE_SUMS = 1 << 18  # that are computed at once, over positions and experts
_MIN_SUM = 1e-300  # is added to the sum of the scores: where all are zero, weights are zero and no NaN

# exp: x = n ln 2 + r; ln 2 in two parts, of which the first times n is exact.
_MIN_EXPONENT = -708.0  # under it e^x is taken for zero
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_ROUND = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to an integer, ties to even
_INVERSE_FACTORIALS = tuple(1 / math.factorial(k) for k in range(13, -1, -1))


def route(x: F32, router: Array, bias: F32 | None, spec: RouterSpec) -> tuple[I32, F32]:
    """As Backend.route."""
    logits = router_logits(x, router)
    if spec.bias == "logits":
        assert bias is not None
        logits = logits + bias.astype(np.float64)
    order = logits  # which is that of the scores
    if not np.isfinite(logits).all():
        raise ValueError(NOT_FINITE)
    scores = _scores(logits, spec)
    if spec.bias == "choice":
        assert bias is not None
        order = scores + bias.astype(np.float64)
        if not np.isfinite(order).all():
            raise ValueError(NOT_FINITE)
    experts = np.argsort(-order, axis=1, kind="stable")[:, : spec.top_k]
    weights = np.take_along_axis(scores, experts, axis=1)
    if spec.normalized:
        weights = weights / (_in_order(weights) + _MIN_SUM)
    return experts.astype(np.int32), (weights * spec.scale).astype(np.float32)


NOT_FINITE = "router logits are not finite"


def router_logits(x: F32, router: Array) -> _F64:
    """x [n, hidden] times the router's rows [experts, hidden]: [n, experts].

    The product of element i is added to lane i mod 16 in the order of i, then lane j + 8 to lane j, j + 4 to j, j + 2 to j,
    1 to 0.
    """
    rows = router if router.dtype == np.float32 else from_bf16(router)
    experts, hidden = rows.shape
    pad = ((0, 0), (0, -hidden % FIXED_LANES))
    wide, wide_rows = (np.pad(of.astype(np.float64), pad).reshape(len(of), -1, FIXED_LANES) for of in (x, rows))
    logits = np.empty((len(x), experts))
    run = max(1, _LANE_SUMS // (experts * FIXED_LANES))
    with np.errstate(invalid="ignore"):  # what is not finite shows in the result
        for first in range(0, len(x), run):
            some = wide[first : first + run, None]
            lanes = np.zeros((some.shape[0], experts, FIXED_LANES))
            for block in range(wide.shape[1]):
                lanes += some[:, :, block] * wide_rows[:, block]
            while lanes.shape[2] > 1:
                half = lanes.shape[2] // 2
                lanes = lanes[:, :, :half] + lanes[:, :, half:]
            logits[first : first + run] = lanes[:, :, 0]
    return logits


def _scores(logits: _F64, spec: RouterSpec) -> _F64:
    """Scores [n, experts]. Where they are normalized over the chosen in the end, softmax leaves its sum out, unless a bias
    is added to them."""
    if spec.scoring == "softmax":
        powers = fixed_exp(logits - logits.max(axis=1, keepdims=True))
        return powers if spec.normalized and spec.bias != "choice" else powers / _in_order(powers)
    power = fixed_exp(-np.abs(logits))
    return np.where(logits < 0, power, 1.0) / (1 + power)


def _in_order(numbers: _F64) -> _F64:
    """The sums of rows [n, count], from the first to the last: [n, 1]."""
    return np.add.accumulate(numbers, axis=1)[:, -1:]


def fixed_exp(x: _F64) -> _F64:
    """e^x of x <= 0, of which the same bits are computed everywhere: to within 2 last places; 0 under -708."""
    x = np.maximum(x, 2 * _MIN_EXPONENT)
    n = (x * _LOG2_E + _ROUND) - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    power: Any = _INVERSE_FACTORIALS[0]
    for coefficient in _INVERSE_FACTORIALS[1:]:
        power = power * r + coefficient
    return np.where(x < _MIN_EXPONENT, 0.0, np.ldexp(power, np.maximum(n, -1022).astype(np.int32)))
