"""The model on one rank: where the window, the layers and the star meet."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping

import numpy as np

from tpimpi.backends import Backend
from tpimpi.cache import KVCache, kv_dtype
from tpimpi.formats import F32, Array
from tpimpi.layers import (
    Angles,
    QKNorm,
    angles,
    attention_partial,
    head_logits,
    mlp_partial,
    rope_frequencies,
)
from tpimpi.plan import HEAD, Block
from tpimpi.slicefile import Tile
from tpimpi.sliceheader import Header
from tpimpi.star import Star
from tpimpi.window import Window


def block_order(header: Header) -> list[Block]:
    """The cycle of blocks that a rank goes through for each token; only rank 0 has the head."""
    layers = [Block(kind, layer) for layer in range(header.config.layers) for kind in ("attn", "mlp")]
    return [*layers, HEAD] if header.rank == 0 else layers


class Model:
    """One rank's part of a model; all ranks call `begin` and then `forward` together."""

    def __init__(
        self,
        header: Header,
        resident: Mapping[str, Array],
        window: Window,
        star: Star,
        backend: Backend,
        kv: str = "auto",
    ) -> None:
        """`resident` are the small arrays that are kept in memory (see slicefile); `kv` is one of KV_FORMATS."""
        self.config, self.share = header.config, header.share
        self.resident, self.window, self.star, self.backend = resident, window, star, backend
        self.cache: KVCache | None = None
        self._kv_dtype = kv_dtype(kv, itertools.chain(*header.formats.layers))
        self.compute_seconds = 0.0
        self._blocks = [block for block in block_order(header) if block != HEAD]
        self._frequencies = rope_frequencies(self.config)

    def begin(self, context: int) -> None:
        """Start a new sequence of at most `context` positions."""
        if self.cache is None or self.cache.context != context:
            self.cache = None  # give the old one back before the new one is made
            shape = (self.config.layers, self.share.kv_heads.size, context, self.config.head_dim)
            self.cache = KVCache(*shape, self._kv_dtype)

    def forward(self, x: F32, start: int) -> F32:
        """Run hidden vectors `x` [n, hidden], the same on every rank, through all layers, at positions from `start`.

        Returns the hidden vectors after the last layer, [n, hidden], the same bits on every rank.
        """
        x = x.copy()
        rotary = angles(self._frequencies, start, x.shape[0])
        with self._computing():
            for block in self._blocks:
                weight = self.resident[f"{block.kind}_norm"][block.layer]
                h = self.backend.rms_norm(x, weight, self.config.norm_eps)
                partial = np.zeros_like(x)
                for tile in self.window.tiles(block):
                    if block.kind == "attn":
                        partial += self._attention(h, tile, rotary)
                    else:
                        partial += mlp_partial(self.backend, h, tile)
                self._add_bias(partial, block)
                self.star.allreduce(partial)
                x += partial
        return x

    def logits(self, x: F32) -> F32:
        """Rank 0: final norm and output head of hidden vectors `x` [n, hidden]; returns [n, vocab]."""
        with self._computing():
            h = self.backend.rms_norm(x, self.resident["norm"], self.config.norm_eps)
            tiles = self.window.tiles(HEAD)
            return np.concatenate([head_logits(self.backend, h, tile) for tile in tiles], axis=1)

    def _attention(self, h: F32, tile: Tile, rotary: Angles) -> F32:
        assert self.cache is not None, "forward before begin"
        record, layer, config = tile.record, tile.record.block.layer, self.config
        norm = None
        if config.qk_norm:
            norm = QKNorm(self.resident["q_norm"][layer], self.resident["k_norm"][layer], config.norm_eps)
        return attention_partial(
            self.backend,
            h,
            tile,
            self.cache,
            layer,
            record.kv_heads.start - self.share.kv_heads.start,
            record.q_to_kv,
            rotary,
            config.attention_windows[layer],
            norm,
        )

    def _add_bias(self, partial: F32, block: Block) -> None:
        # Only rank 0's file has the biases of the output projections, so each is added once.
        bias = self.resident.get("o_bias" if block.kind == "attn" else "down_bias")
        if bias is not None:
            partial += bias[block.layer]

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Count the time spent inside, less what went to the disk and the star."""
        began, elsewhere = time.monotonic(), self.window.wait_seconds + self.star.seconds
        yield
        waited = self.window.wait_seconds + self.star.seconds - elsewhere
        self.compute_seconds += time.monotonic() - began - waited
