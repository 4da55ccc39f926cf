"""The operations that a layer is made of, behind one small surface.

A backend is a module or object with the functions of `Backend`. All arrays are NumPy; f32 comes in and goes out; weight
matrices are packed, in a format of their own (see tpimpi.compute.formats). `reference` states each operation plainly,
and tests compare the others against it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

from tpimpi.compute.arrays import F32, I32, Array
from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.experts import ExpertUse
from tpimpi.compute.formats.base import Quantizer
from tpimpi.compute.formats.packed import Matrix
from tpimpi.compute.formats.quantize import quantize
from tpimpi.compute.kv import KVPages, Rows
from tpimpi.compute.router import RouterSpec
from tpimpi.errors import InputError

BACKEND_NAMES = ("auto", "native", "torch", "numpy")  # what --backend takes
# Instruction sets that the native kernels are made for, which --kernels takes beside auto.
KERNEL_LEVELS = ("avx512-bf16", "avx512", "avx-vnni", "avx2", "neon-dot", "neon", "portable")


class Backend(Protocol):
    """n is the number of positions computed at once."""

    name: str

    def linear(self, x: F32, weight: Matrix, bias: F32 | None = None) -> F32:
        """x [n, columns] times the transpose of weight [rows, columns], plus bias [rows]: [n, rows].

        A backend may round x as `reference` does: to bf16 beside bf16 weights, to int8 in blocks of 32 beside quantized
        ones.
        """

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """x [..., size] over the root of its mean square, times weight [size] (Zhang and Sennrich 2019)."""

    def fixed_rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """As rms_norm, x [n, size], with the same bits on every processor, in every backend: see `reference`.

        For what is added to the residual, of which every rank must have the same bits.
        """

    def rope(self, x: F32, cos: F32, sin: F32) -> F32:
        """Rotate the first 2 * half elements of each head of x [n, heads, head_dim] by angles cos, sin [n, half].

        Element i pairs with i + half.
        """

    def store(self, kv: KVPages, rows: Rows, first_head: int, k: F32, v: F32) -> None:
        """Put keys and values [n, heads, head_dim] of rows into the pages of KV heads from `first_head`.

        Row i goes to position[i] % page of the page tables[sequence[i], position[i] // page], where `page` is the positions
        of a page; every row has a page. Numbers are rounded to the pages' format, as kv.py says.
        """

    def attention(
        self, q: F32, kv: KVPages, rows: Rows, q_to_kv: tuple[int, ...], spec: AttentionSpec, sinks: F32 | None = None
    ) -> F32:
        """Causal attention of rows q [n, heads, head_dim] over what their sequences have in the pages up to their positions.

        Query head i reads KV head q_to_kv[i]. Returns [n, heads, head_dim]; a row's numbers depend neither on the rows of
        other sequences nor on where the pages are.
        sinks [heads]: a score of each query head that is one more in its softmax, and has no value (gpt-oss).
        """

    def swiglu(self, gate: F32, up: F32) -> F32:
        """silu(gate) * up, elementwise [n, columns] (Shazeer 2020)."""

    def geglu(self, gate: F32, up: F32) -> F32:
        """gelu(gate) * up, elementwise [n, columns], gelu by its tanh formula (Hendrycks and Gimpel 2016)."""

    def clamped_swiglu(self, gate: F32, up: F32, limit: float) -> F32:
        """g sigmoid(1.702 g) * (u + 1), elementwise [n, columns] (gpt-oss; GptOssExperts in transformers).

        g is gate, limit at the most; u is up between -limit and limit.
        """

    def route(self, x: F32, router: Array, bias: F32 | None, spec: RouterSpec) -> tuple[I32, F32]:
        """The experts of each position of x [n, hidden], as `spec` says, and what each counts: int32, f32 [n, chosen].

        They are in the order of their scores (with the bias of the choice), the greatest first. router [experts, hidden] is
        f32, or bf16 as its bits, uint16; bias [experts] where the spec has one. The same bits on every processor, in every
        backend: see `routing`.
        ValueError ("router logits are not finite") where x, the router or the bias holds what is not.
        """

    def experts(self, x: F32, uses: Sequence[ExpertUse], activation: str, limit: float, out: F32) -> None:
        """Add weights[i] times the expert's result for x[rows[i]] to out[rows[i]], out [n, hidden], one use after another.

        x [n, hidden] is normed; `activation` is silu, gelu_tanh or clamped_silu, which has a `limit`. See ExpertUse, and
        `generic` for the plain form.
        """


def load_backend(name: str, threads: int, kernels: str = "auto") -> Backend:
    """The backend `name`, computing with `threads` threads; "auto" is native where it is installed, or torch. Any
    other name gives NumPy.

    `kernels` is the level of the native backend, one of KERNEL_LEVELS, or "auto": the best that this processor has.

    Raises InputError where native, or a level of its kernels, is asked for and not there, where a level is given for another
    backend, or native has more threads than this host starts; ImportError without torch.
    """
    if name == "auto":
        name = "native" if has_native() else "torch"
    if name == "native":
        if not has_native():
            raise InputError(f"--backend is native, but {NOT_INSTALLED}; or give --backend torch")
        from tpimpi.compute.backends.native import NativeBackend

        return NativeBackend(threads, "" if kernels == "auto" else kernels)
    if kernels != "auto":
        raise InputError(f"--kernels is {kernels}, a level of the native kernels, and {name} computes; leave it out")
    if name == "torch":
        from tpimpi.compute.backends.torch_backend import TorchBackend

        return TorchBackend(threads)
    from tpimpi.compute.backends.reference import NumpyBackend

    return NumpyBackend(threads)


def load_quantizer(threads: int) -> Quantizer:
    """The native kernel where it is installed, else its NumPy twin: they give the same bytes."""
    if not has_native():
        return quantize
    from tpimpi.compute.backends.native import NativeBackend

    return NativeBackend(threads).quantize


NOT_INSTALLED = (
    "the native kernels are not installed (there was no C++ compiler when tpimpi was): install g++ and tpimpi again"
)


def has_native() -> bool:
    """Whether the extension with the kernels was built when tpimpi was installed."""
    return importlib.util.find_spec("tpimpi._native") is not None
