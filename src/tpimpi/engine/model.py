"""The model on one rank: where the window, the layers and the star meet.

Compute never talks, reading never computes: `Model._through_layers` is where they meet, a block in four steps: norm, partial
(of this rank's tiles), star (the sum over all ranks), residual.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from tpimpi.compute.arrays import F32, Array
from tpimpi.compute.backends import Backend
from tpimpi.engine.overlap import HalfChunk, Need, Steps, go_through_blocks, half_chunks
from tpimpi.engine.trace import COMPUTE, STAR, Recorder
from tpimpi.engine.window import Window
from tpimpi.models.blocks import HEAD, Block
from tpimpi.models.kv.cache import KVCache, kv_dtype
from tpimpi.models.layers.attention import QKNorm, attention_partial
from tpimpi.models.layers.head import head_logits
from tpimpi.models.layers.mlp import mlp_partial
from tpimpi.models.layers.rope import Angles, angles, rope_frequencies
from tpimpi.star import Star
from tpimpi.weights.slices.file import Tile
from tpimpi.weights.slices.header import Header

_NOT_RECORDED = contextlib.nullcontext()


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
        *,
        make_room: Callable[[int], None] = lambda context: None,
        recorder: Recorder | None = None,
    ) -> None:
        """`resident` are the small arrays that are kept in memory (see slices/file); `kv` is one of KV_FORMATS;
        `make_room` is called with the number of positions before a cache for them is made."""
        self.config, self.share = header.config, header.share
        self.resident, self.window, self.star, self.backend = resident, window, star, backend
        self.cache: KVCache | None = None
        self._kv_dtype = kv_dtype(kv, itertools.chain(*header.formats.layers))
        self.compute_seconds = 0.0
        self._make_room, self._recorder = make_room, recorder
        self._blocks = [block for block in block_order(header) if block != HEAD]
        self._frequencies = rope_frequencies(self.config)

    def begin(self, context: int) -> None:
        """Start a new sequence of at most `context` positions."""
        if self.cache is None or self.cache.context != context:
            self.cache = None  # give the old one back before the new one is made
            self._make_room(context)
            shape = (self.config.layers, self.share.kv_heads.size, context, self.config.head_dim)
            self.cache = KVCache(*shape, self._kv_dtype)

    def forward(self, x: F32, start: int, *, head: bool = True) -> F32:
        """Run hidden vectors `x` [n, hidden], the same on every rank, through all layers, at positions from `start`.

        Returns the hidden vectors after the last layer, [n, hidden], the same bits on every rank. Unless `head`, their
        logits will not be asked for.
        """
        if not head:
            self.window.skip(HEAD)
        x = x.copy()
        runs = half_chunks(x.shape[0], self.star.rank.size)
        with self._computing():
            halves = [HalfChunk(self._through_layers(x[run], start + run.start, len(runs) > 1)) for run in runs]
            go_through_blocks(self._blocks, self.window, halves)
        return x

    def _through_layers(self, x: F32, start: int, overlapped: bool) -> Steps:
        """Take `x` [n, hidden], at positions from `start`, through all layers, in place.

        See overlap.py for the `yield`s: each lets the other half of the chunk go on where it is `overlapped`.
        """
        rotary = angles(self._frequencies, start, x.shape[0])
        for place, block in enumerate(self._blocks):
            h = self.backend.rms_norm(x, self.resident[f"{block.kind}_norm"][block.layer], self.config.norm_eps)
            partial, number = np.zeros_like(x), 0
            while (tile := (yield Need.TILE)) is not None:
                with self._recorded(COMPUTE, place, number):
                    partial += self._tile_partial(h, tile, rotary)
                number += 1
            self._add_bias(partial, block)
            total = self.star.start(partial, background=overlapped)
            yield Need.SUM
            with self._recorded(STAR, place):
                total.wait()
            x += partial

    def _tile_partial(self, h: F32, tile: Tile, rotary: Angles) -> F32:
        """What one tile adds to its block: [n, hidden] from `h` [n, hidden]."""
        if tile.record.block.kind == "attn":
            return self._attention(h, tile, rotary)
        return mlp_partial(self.backend, h, tile)

    def logits(self, x: F32) -> F32:
        """Rank 0: final norm and output head of hidden vectors `x` [n, hidden]; returns [n, vocab]."""
        with self._computing():
            h = self.backend.rms_norm(x, self.resident["norm"], self.config.norm_eps)
            found = []
            for number, tile in enumerate(self.window.tiles(HEAD)):
                with self._recorded(COMPUTE, len(self._blocks), number):
                    found.append(head_logits(self.backend, h, tile))
            return np.concatenate(found, axis=1)

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

    def _recorded(self, kind: int, place: int, tile: int = -1) -> contextlib.AbstractContextManager[None]:
        """For the trace: what is inside is done for the block at `place` in the order."""
        return _NOT_RECORDED if self._recorder is None else self._recorder.span(kind, place, tile)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Count the time spent inside, less what went to the disk and the star."""
        began, elsewhere = time.monotonic(), self.window.wait_seconds + self.star.seconds
        yield
        waited = self.window.wait_seconds + self.star.seconds - elsewhere
        self.compute_seconds += time.monotonic() - began - waited
