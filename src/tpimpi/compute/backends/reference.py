"""Every operation as NumPy says it most plainly: the oracle of the other backends, and a backend that needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from tpimpi.compute.arrays import F32, I32, Array
from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.backends.generic import experts
from tpimpi.compute.backends.routing import FIXED_LANES, route
from tpimpi.compute.experts import ExpertUse
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.bf16 import from_bf16, to_bf16
from tpimpi.compute.formats.packed import Matrix, runs_of_rows, values
from tpimpi.compute.kv import KVPages, Rows, gathered, store, widened
from tpimpi.compute.router import RouterSpec

_RUN_NUMBERS = 1 << 22  # of a weight, as f32 at a time
_GELU_SLOPE, _GELU_CUBE = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the factor of the cube
_SIGMOID_SLOPE = 1.702  # of clamped_swiglu
_ACTIVATION_BLOCK = 32  # numbers of a row of activations that share a scale


class NumpyBackend:
    """See `Backend` for shapes and meaning."""

    name = "numpy"

    def __init__(self, threads: int) -> None:
        # The BLAS beneath NumPy would else take every core, in every rank.
        self._limits = threadpool_limits(threads, user_api="blas")

    def linear(self, x: F32, weight: Matrix, bias: F32 | None = None) -> F32:
        x = rounded_activations(x, weight.format)
        y = np.empty((x.shape[0], weight.rows), np.float32)
        for first, run in runs_of_rows(weight, _RUN_NUMBERS):
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the result
                np.matmul(x, values(run).T, out=y[:, first : first + run.rows])
        return y if bias is None else y + bias

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
        inverse: F32 = np.reciprocal(np.sqrt(mean_square + np.float32(eps)))
        return x * inverse * weight

    def fixed_rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return fixed_rms_norm(x, weight, eps)

    def rope(self, x: F32, cos: F32, sin: F32) -> F32:
        half = cos.shape[-1]
        first, second, rest = np.split(x, [half, 2 * half], axis=-1)
        cos, sin = cos[:, None], sin[:, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    def store(self, kv: KVPages, rows: Rows, first_head: int, k: F32, v: F32) -> None:
        store(kv, rows, first_head, k, v)

    def attention(
        self, q: F32, kv: KVPages, rows: Rows, q_to_kv: tuple[int, ...], spec: AttentionSpec, sinks: F32 | None = None
    ) -> F32:
        return attention(q, kv, rows, q_to_kv, spec, sinks)

    def swiglu(self, gate: F32, up: F32) -> F32:
        with np.errstate(over="ignore"):  # exp(-gate) may be infinite: gate / inf is the right limit, 0
            return gate / (1 + np.exp(-gate)) * up

    def geglu(self, gate: F32, up: F32) -> F32:
        return geglu(gate, up)

    def clamped_swiglu(self, gate: F32, up: F32, limit: float) -> F32:
        return clamped_swiglu(gate, up, limit)

    def route(self, x: F32, router: Array, bias: F32 | None, spec: RouterSpec) -> tuple[I32, F32]:
        return route(x, router, bias, spec)

    def experts(self, x: F32, uses: Sequence[ExpertUse], activation: str, limit: float, out: F32) -> None:
        experts(self, x, uses, activation, limit, out)


def attention(
    q: F32, kv: KVPages, rows: Rows, q_to_kv: tuple[int, ...], spec: AttentionSpec, sinks: F32 | None = None
) -> F32:
    """As Backend.attention."""
    y = np.empty_like(q)
    for span in rows.spans():
        k, v, first = seen_by(kv, rows, span, spec.window)
        seen = mask(rows.position[span], first, k.shape[1], spec.window)
        heads = list(q_to_kv)
        y[span] = _attention(q[span], widened(k)[heads], widened(v)[heads], seen, spec, sinks)
    return y


def seen_by(kv: KVPages, rows: Rows, span: slice, window: int) -> tuple[Array, Array, int]:
    """Keys and values of the pages that rows of one sequence see, [kv_heads, positions, row], and their first position."""
    position, table = rows.position[span], rows.tables[rows.sequence[span.start]]
    first_page = max(0, int(position.min()) - window + 1) // kv.page_size if window else 0
    stop = int(position.max()) + 1
    k, v = (gathered(pages, table, first_page, stop) for pages in (kv.k, kv.v))
    return k, v, first_page * kv.page_size


def mask(position: I32, first: int, keys: int, window: int) -> npt.NDArray[np.bool_]:
    """Which keys, at positions from `first`, a row sees: [n, keys]."""
    key = first + np.arange(keys)[None]
    seen: npt.NDArray[np.bool_] = key <= position[:, None]
    return seen & (key > position[:, None] - window) if window else seen


def _attention(q: F32, k: F32, v: F32, seen: npt.NDArray[np.bool_], spec: AttentionSpec, sinks: F32 | None) -> F32:
    """Of rows q [n, heads, head_dim] and one sequence's keys and values, of each query head: [heads, keys, head_dim]."""
    scores = np.einsum("nhd,hkd->hnk", q, k) * np.float32(spec.scale)
    if spec.softcap:
        scores = np.float32(spec.softcap) * np.tanh(scores / np.float32(spec.softcap))
    scores = np.where(seen, scores, -np.inf)
    greatest = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        greatest = np.maximum(greatest, sinks[:, None, None])
    weights = np.exp(scores - greatest)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks[:, None, None] - greatest)
    weights /= total
    return np.einsum("hnk,hkd->nhd", weights, v)


def geglu(gate: F32, up: F32) -> F32:
    """gelu(gate) * up, as Backend.geglu."""
    with np.errstate(over="ignore"):  # the cube may be infinite, and tanh then 1 or -1
        inner = np.float32(_GELU_SLOPE) * (gate + np.float32(_GELU_CUBE) * gate * gate * gate)
    return np.float32(0.5) * gate * (1 + np.tanh(inner)) * up


def clamped_swiglu(gate: F32, up: F32, limit: float) -> F32:
    """As Backend.clamped_swiglu."""
    g = np.minimum(gate, np.float32(limit))
    u = np.clip(up, np.float32(-limit), np.float32(limit))
    with np.errstate(over="ignore"):  # as in swiglu
        return g / (1 + np.exp(np.float32(-_SIGMOID_SLOPE) * g)) * (u + 1)


def fixed_rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x [n, size] over the root of its mean square, times weight [size]: the same bits wherever it is computed.

    In f64, in which the square of an f32 is exact: element i is added to lane i mod 16 in the order of i, then lane j + 8 to
    lane j, j + 4 to j, j + 2 to j, 1 to 0. x / sqrt(mean + eps) * weight is rounded to f32 at its end. Nothing else is
    rounded, and each operation is one that IEEE 754 defines to the bit.
    """
    n, size = x.shape
    wide = x.astype(np.float64)
    squares = np.zeros((n, -(-size // FIXED_LANES) * FIXED_LANES))
    squares[:, :size] = wide * wide
    lanes = np.add.accumulate(squares.reshape(n, -1, FIXED_LANES), axis=1)[:, -1]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    inverse = 1 / np.sqrt(lanes / size + eps)
    return (wide * inverse * weight.astype(np.float64)).astype(np.float32)


def rounded_activations(x: F32, fmt: str) -> F32:
    """x [n, columns] as it is multiplied with weights of a format: as it is (f32), rounded to bf16 (bf16), or quantized.

    Quantized: in blocks of 32 along a row, to scale * q with scale = max |x| / 127 and q = x * (127 / max |x|) as the
    nearest integer, ties to even; zeros where max |x| < 1e-30. A block that holds an infinity or a NaN becomes NaN.
    """
    rounding = FORMATS[fmt].activation_type
    if rounding == "bf16":
        return from_bf16(to_bf16(x))
    if rounding == "f32":
        return x
    n, columns = x.shape
    blocks = np.pad(x, ((0, 0), (0, -columns % _ACTIVATION_BLOCK))).reshape(n, -1, _ACTIVATION_BLOCK)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        q = np.rint(blocks * (np.float32(127) / largest))
        rounded = q * (largest / np.float32(127))
    rounded = np.where(largest < 1e-30, np.float32(0), rounded)
    rounded = np.where(np.isfinite(largest), rounded, np.float32(np.nan))
    return rounded.reshape(n, -1)[:, :columns]
