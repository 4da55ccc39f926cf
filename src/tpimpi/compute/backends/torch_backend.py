"""The operations through torch: the fallback where no kernels were built, and the way to a GPU.

What torch has not (softcaps, sinks, a clamped activation, norms and routing of fixed bits) is `reference`'s and `routing`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)

from tpimpi.compute.arrays import F32, I32, Array
from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.backends.generic import experts
from tpimpi.compute.backends.reference import attention, clamped_swiglu, fixed_rms_norm, mask, seen_by
from tpimpi.compute.backends.routing import route
from tpimpi.compute.experts import ExpertUse
from tpimpi.compute.formats.base import PANEL_ROWS
from tpimpi.compute.formats.packed import Matrix, runs_of_rows, values
from tpimpi.compute.kv import KVPages, Rows, store, widened
from tpimpi.compute.router import RouterSpec

_RUN_NUMBERS = 1 << 19  # of a weight, widened to f32 at a time: stays in the cache


class TorchBackend:
    """See `Backend` for shapes and meaning. Weights are widened to f32, a run of rows at a time; sums are in f32."""

    name = "torch"

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    def linear(self, x: F32, weight: Matrix, bias: F32 | None = None) -> F32:
        positions, y = _tensor(x), torch.empty(x.shape[0], weight.rows)
        for first, run in runs_of_rows(
            weight, weight.rows * weight.columns if weight.format == "f32" else _RUN_NUMBERS
        ):
            y[:, first : first + run.rows] = _product(positions, run)
        return (y if bias is None else y + _tensor(bias)).numpy()

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return F.rms_norm(_tensor(x), weight.shape, _tensor(weight), eps).numpy()

    def fixed_rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return fixed_rms_norm(x, weight, eps)

    def rope(self, x: F32, cos: F32, sin: F32) -> F32:
        half = cos.shape[-1]
        first, second, rest = torch.tensor_split(_tensor(x), [half, 2 * half], dim=-1)
        c, s = _tensor(cos)[:, None], _tensor(sin)[:, None]
        return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1).numpy()

    def store(self, kv: KVPages, rows: Rows, first_head: int, k: F32, v: F32) -> None:
        store(kv, rows, first_head, k, v)

    def attention(
        self, q: F32, kv: KVPages, rows: Rows, q_to_kv: tuple[int, ...], spec: AttentionSpec, sinks: F32 | None = None
    ) -> F32:
        if spec.softcap or sinks is not None:
            return attention(q, kv, rows, q_to_kv, spec, sinks)
        y = np.empty_like(q)
        for span in rows.spans():
            k, v, first = seen_by(kv, rows, span, spec.window)
            seen = mask(rows.position[span], first, k.shape[1], spec.window)
            y[span] = _attention(q[span], k, v, None if seen.all() else torch.from_numpy(seen), q_to_kv, spec.scale)
        return y

    def swiglu(self, gate: F32, up: F32) -> F32:
        return (F.silu(_tensor(gate)) * _tensor(up)).numpy()

    def geglu(self, gate: F32, up: F32) -> F32:
        return (F.gelu(_tensor(gate), approximate="tanh") * _tensor(up)).numpy()

    def clamped_swiglu(self, gate: F32, up: F32, limit: float) -> F32:
        return clamped_swiglu(gate, up, limit)

    def route(self, x: F32, router: Array, bias: F32 | None, spec: RouterSpec) -> tuple[I32, F32]:
        return route(x, router, bias, spec)

    def experts(self, x: F32, uses: Sequence[ExpertUse], activation: str, limit: float, out: F32) -> None:
        experts(self, x, uses, activation, limit, out)


def _attention(q: F32, k: Array, v: Array, seen: torch.Tensor | None, q_to_kv: tuple[int, ...], scale: float) -> F32:
    """Of one sequence's rows q [n, heads, head_dim], over stored keys and values [kv_heads, keys, row]; seen [n, keys]."""
    heads = q.shape[1]
    queries = _tensor(q).transpose(0, 1)  # [heads, n, head_dim]
    if q_to_kv == tuple(range(q_to_kv[0], q_to_kv[0] + heads)):  # a KV head for each query head
        own = slice(q_to_kv[0], q_to_kv[0] + heads)
        y = F.scaled_dot_product_attention(queries, _wide(k[own]), _wide(v[own]), seen, scale=scale)
    else:  # a KV head at a time with the query heads that read it, so that no f32 key is copied
        y = torch.empty_like(queries)
        for kv_head in sorted(set(q_to_kv)):
            group = [head for head, own_kv in enumerate(q_to_kv) if own_kv == kv_head]
            k_group, v_group = (_wide(kv[kv_head]).expand(len(group), -1, -1) for kv in (k, v))
            y[group] = F.scaled_dot_product_attention(queries[group], k_group, v_group, seen, scale=scale)
    return y.transpose(0, 1).contiguous().numpy()


def _wide(rows: Array) -> torch.Tensor:
    """Stored keys or values as f32."""
    return torch.from_numpy(widened(rows)) if rows.dtype == np.uint8 else torch.from_numpy(rows).float()


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array)


def _product(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    """x [n, columns] times the transpose of weight [rows, columns]: [n, rows]. f32 and bf16 are used as they are packed."""
    if weight.format == "f32":
        panels = torch.from_numpy(weight.data.view(np.float32).reshape(-1, weight.columns, PANEL_ROWS))
        return _joined(torch.matmul(x, panels), weight.rows)
    if weight.format == "bf16":
        words = torch.from_numpy(weight.data.view(np.int32).reshape(-1, -(-weight.columns // 2), PANEL_ROWS))
        even, odd = (words << 16).view(torch.float32), (words & -0x10000).view(torch.float32)
        padded = F.pad(x, (0, weight.columns % 2))
        return _joined(torch.matmul(padded[:, 0::2], even) + torch.matmul(padded[:, 1::2], odd), weight.rows)
    return F.linear(x, torch.from_numpy(values(weight)))


def _joined(panels: torch.Tensor, rows: int) -> torch.Tensor:
    """Products [panels, n, 16] as [n, rows]."""
    return panels.transpose(0, 1).reshape(panels.shape[1], -1)[:, :rows]
