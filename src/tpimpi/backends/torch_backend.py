"""The operations through torch: the readable reference, the fallback without a compiler, and the way to a GPU."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)

from tpimpi.formats import DTYPES, F32, Array


class TorchBackend:
    """See `Backend` for shapes and meaning. Sums are in f32; bf16 weights are widened a tile at a time."""

    name = "torch"

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    def linear(self, x: F32, weight: Array, bias: F32 | None = None) -> F32:
        return F.linear(_tensor(x), _weight(weight), None if bias is None else _tensor(bias)).numpy()

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return F.rms_norm(_tensor(x), weight.shape, _tensor(weight), eps).numpy()

    def rope(self, x: F32, cos: F32, sin: F32) -> F32:
        first, second = _tensor(x).chunk(2, dim=-1)
        c, s = _tensor(cos)[:, None], _tensor(sin)[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1).numpy()

    def attention(self, q: F32, k: F32, v: F32, q_to_kv: tuple[int, ...], start: int, window: int) -> F32:
        n, heads, _ = q.shape
        mask = None
        if n > 1 or window:
            position = start + torch.arange(n)[:, None]
            key = torch.arange(start + n)[None]
            mask = key <= position
            if window:
                mask &= key > position - window
        queries, keys, values = _tensor(q).transpose(0, 1), _tensor(k), _tensor(v)  # [heads, positions, head_dim]
        if q_to_kv == tuple(range(q_to_kv[0], q_to_kv[0] + heads)):  # a KV head for each query head
            own = slice(q_to_kv[0], q_to_kv[0] + heads)
            y = F.scaled_dot_product_attention(queries, keys[own], values[own], mask)
        else:  # a KV head at a time with the query heads that read it, so that no key is copied
            y = torch.empty_like(queries)
            for kv_head in sorted(set(q_to_kv)):
                group = [head for head, own_kv in enumerate(q_to_kv) if own_kv == kv_head]
                shared = (keys[kv_head].expand(len(group), -1, -1), values[kv_head].expand(len(group), -1, -1))
                y[group] = F.scaled_dot_product_attention(queries[group], *shared, mask)
        return y.transpose(0, 1).contiguous().numpy()

    def swiglu(self, gate: F32, up: F32) -> F32:
        return (F.silu(_tensor(gate)) * _tensor(up)).numpy()


def _tensor(array: F32) -> torch.Tensor:
    return torch.from_numpy(array)


def _weight(array: Array) -> torch.Tensor:
    if array.dtype == DTYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(array)
