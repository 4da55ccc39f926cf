"""The operations that a layer is made of, behind one small surface.

A backend is a module or object with the functions of `Backend`. All arrays are NumPy; f32 comes in and goes out, and the
dtype of a weight tells its format (see tpimpi.formats). `numpy_twin` is the plain statement of each operation, which
tests compare the others against.
"""

from __future__ import annotations

from typing import Protocol

from tpimpi.formats import F32, Array

NAMES = ("torch", "numpy")


class Backend(Protocol):
    """n is the number of positions computed at once."""

    name: str

    def linear(self, x: F32, weight: Array, bias: F32 | None = None) -> F32:
        """x [n, in] times the transpose of weight [out, in] (f32 or bf16), plus bias [out]: [n, out]."""

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """x [..., size] over the root of its mean square, times weight [size] (Zhang and Sennrich 2019)."""

    def rope(self, x: F32, cos: F32, sin: F32) -> F32:
        """Rotate x [n, heads, head_dim] by angles cos, sin [n, head_dim / 2]; element i pairs with i + head_dim / 2."""

    def attention(self, q: F32, k: F32, v: F32, q_to_kv: tuple[int, ...], start: int, window: int) -> F32:
        """Causal attention of q [n, heads, head_dim] at positions from `start` over k, v [kv_heads, start + n, head_dim].

        Query head i reads KV head q_to_kv[i]. A position sees `window` positions, itself included; 0: all before it.
        Returns [n, heads, head_dim].
        """

    def swiglu(self, gate: F32, up: F32) -> F32:
        """silu(gate) * up, elementwise [n, columns] (Shazeer 2020)."""


def load_backend(name: str, threads: int) -> Backend:
    """The backend `name` (one of NAMES), computing with `threads` threads."""
    if name == "torch":
        from tpimpi.backends.torch_backend import TorchBackend

        return TorchBackend(threads)
    from tpimpi.backends.numpy_twin import NumpyTwin

    return NumpyTwin(threads)
