"""The operations through the C++ kernels of the extension `tpimpi._native` (sources in src/kernels). Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tpimpi._native import Session, levels
from tpimpi.compute.arrays import F32, I32, Array, Bytes
from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.backends.routing import NOT_FINITE
from tpimpi.compute.experts import ExpertUse
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.packed import Matrix, row_bytes
from tpimpi.compute.formats.quantize import quantize
from tpimpi.compute.kv import KVPages, Rows
from tpimpi.compute.router import ROUTER_BIASES, RouterSpec
from tpimpi.errors import InputError

# Formats that the kernels make of numbers; the others are made with NumPy.
QUANTIZED_HERE = ("q8_0", "q4_0", "q4_1", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs")


_ACTIVATIONS = ("silu", "gelu_tanh", "clamped_silu")  # in the order of Activation::Kind in session.h


class NativeBackend:
    """See `Backend` for shapes and meaning, and kernels.h for the kernels.

    `level` is the instruction set that computes, the best that this processor has unless another is named: avx512-bf16,
    avx512, avx-vnni, avx2, neon-dot, neon, or portable. Not to be used by two threads at once.
    """

    name = "native"

    def __init__(self, threads: int, level: str = "") -> None:
        if level and level not in levels():
            raise InputError(f"--kernels is {level}, this processor has {', '.join(levels())}; give one of those")
        try:
            self._session = Session(level, threads)
        except RuntimeError as error:
            raise InputError(f"--threads is {threads}, more than this host starts ({error}); give fewer") from error
        self.level: str = self._session.level

    def linear(self, x: F32, weight: Matrix, bias: F32 | None = None) -> F32:
        y = np.empty((len(x), weight.rows), np.float32)
        code = FORMATS[weight.format].kernel_code
        self._session.linear(code, weight.rows, weight.columns, weight.data, x, bias, y, weight.first)
        return y

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        y = np.empty(x.shape, np.float32)
        self._session.rms_norm(x, weight, eps, y)
        return y

    def fixed_rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        y = np.empty(x.shape, np.float32)
        self._session.fixed_rms_norm(x, weight, eps, y)
        return y

    def rope(self, x: F32, cos: F32, sin: F32) -> F32:
        y = np.empty(x.shape, np.float32)
        self._session.rope(x, cos, sin, y)
        return y

    def store(self, kv: KVPages, rows: Rows, first_head: int, k: F32, v: F32) -> None:
        self._session.store(k, v, kv.k, kv.v, rows.sequence, rows.position, rows.tables, first_head)

    def attention(
        self, q: F32, kv: KVPages, rows: Rows, q_to_kv: tuple[int, ...], spec: AttentionSpec, sinks: F32 | None = None
    ) -> F32:
        y = np.empty(q.shape, np.float32)
        of = (rows.sequence, rows.position, rows.tables)
        self._session.attention(q, kv.k, kv.v, *of, q_to_kv, spec.window, spec.scale, spec.softcap, sinks, y)
        return y

    def swiglu(self, gate: F32, up: F32) -> F32:
        y = np.empty(gate.shape, np.float32)
        self._session.swiglu(gate, up, y)
        return y

    def geglu(self, gate: F32, up: F32) -> F32:
        y = np.empty(gate.shape, np.float32)
        self._session.geglu(gate, up, y)
        return y

    def clamped_swiglu(self, gate: F32, up: F32, limit: float) -> F32:
        y = np.empty(gate.shape, np.float32)
        self._session.clamped_swiglu(gate, up, limit, y)
        return y

    def route(self, x: F32, router: Array, bias: F32 | None, spec: RouterSpec) -> tuple[I32, F32]:
        chosen, weights = np.empty((len(x), spec.top_k), np.int32), np.empty((len(x), spec.top_k), np.float32)
        bias_of, sigmoid = ROUTER_BIASES.index(spec.bias), spec.scoring == "sigmoid"
        if not self._session.route(x, router, bias, bias_of, sigmoid, spec.normalized, spec.scale, chosen, weights):
            raise ValueError(NOT_FINITE)
        return chosen, weights

    def experts(self, x: F32, uses: Sequence[ExpertUse], activation: str, limit: float, out: F32) -> None:
        every = []
        for use in uses:
            m, parts = use.matrices, use.parts.get
            of = (_by_code(m["gate"]), _by_code(m["up"]), _by_code(m["down"])) if m else (None, None, None)
            every.append((*of, parts("gate_bias"), parts("up_bias"), parts("down_bias"), use.rows, use.weights))
        self._session.experts(x, every, _ACTIVATIONS.index(activation), limit, out)

    def read(self, data: Bytes) -> int:
        """Read all of `data` with all threads, and do nothing else: for measuring. Returns the sum of its 8-byte words."""
        total: int = self._session.read(data)
        return total

    def multiply_peak(self, fmt: str, seconds: float) -> float:
        """Operations a second (a product and its sum are two) of one thread that multiplies in registers as for `fmt`."""
        rate: float = self._session.multiply_peak(FORMATS[fmt].kernel_code, seconds)
        return rate

    def quantize(self, values: F32, fmt: str) -> Bytes:
        """As tpimpi.compute.formats.quantize.quantize, to the same bytes. ValueError for numbers that are not finite."""
        if fmt not in QUANTIZED_HERE:
            return quantize(values, fmt)
        rows, columns = values.shape
        out = np.empty((rows, row_bytes(fmt, columns)), np.uint8)
        if not self._session.quantize(FORMATS[fmt].kernel_code, np.ascontiguousarray(values), out):
            raise ValueError("holds numbers that are not finite")
        return out


def _by_code(weight: Matrix) -> tuple[int, int, int, int, Bytes]:
    """A matrix as the kernels take it."""
    return FORMATS[weight.format].kernel_code, weight.rows, weight.columns, weight.first, weight.data
