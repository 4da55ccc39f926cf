"""What the tiles of one rank add to the sum of a block: where tiles, the mathematics of `layers` and the KV cache meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32, Array
from tpimpi.compute.backends import Backend
from tpimpi.compute.kv import KVPages, Rows
from tpimpi.models.blocks import Block
from tpimpi.models.kv.cache import KVCache
from tpimpi.models.layer_spec import LayerSpec, Rope
from tpimpi.models.layers.attention import QKNormWeights, attention_partial
from tpimpi.models.layers.mlp import mlp_partial
from tpimpi.models.layers.norms import pre_norm
from tpimpi.models.layers.projections import Projections, TileHeads
from tpimpi.models.layers.rope import Angles
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.tile import Tile


@dataclass(frozen=True)
class StepState:
    """What the rows of a step have beside their hidden vectors: `rows` of each kind of layer, angles of each rope."""

    cache: KVCache
    kinds: Sequence[int]  # of each layer
    rows: Sequence[Rows]
    rotary: Mapping[Rope, Angles]

    def kv(self, layer: int) -> tuple[KVPages, Rows]:
        """A layer's pages, and the rows with the tables of its kind."""
        return self.cache.layer_pages(layer), self.rows[self.kinds[layer]]


@dataclass(frozen=True)
class Partials:
    """One rank's part of the blocks' mathematics; `layers` are the config's, `resident` the small arrays of its slice."""

    header: Header
    layers: Sequence[LayerSpec]
    resident: Mapping[str, Array]
    backend: Backend

    def normed(self, x: F32, block: Block) -> F32:
        """What a block reads of the residual `x`, [n, hidden] both."""
        spec, config = self.layers[block.layer], self.header.config
        if not spec.pre_norms:
            return x
        weight = self.resident["mlp_norm" if block.kind == "mlp" else "attn_norm"][block.layer]
        if block.kind == "mlp" and spec.router is not None:  # from which experts are chosen, the same on every rank
            return self.backend.fixed_rms_norm(x, weight, config.norm_eps)
        return pre_norm(self.backend, spec.norm, x, weight, config.norm_eps)

    def empty(self, x: F32, block: Block) -> F32:
        """The partial of a block before its first tile: [n, hidden], or [n, 2] of sums of squares."""
        return np.zeros((x.shape[0], 2), np.float32) if block.kind == "qkv" else np.zeros(x.shape, np.float32)

    def of_tile(self, h: F32, tile: Tile, step: StepState, projections: Projections | None) -> F32:
        """What one tile adds to its block: [n, hidden] from `h` [n, hidden], or [n, 2] sums of squares."""
        record = tile.record
        spec = self.layers[record.block.layer]
        if projections is not None and record.block.kind == "qkv":
            return self.squares(h, tile, projections)
        if projections is not None and record.block.kind == "attn":
            kv = step.kv(record.block.layer)
            return projections.attention(tile, record.heads, *kv, spec.attention, record.q_to_kv)
        if record.block.kind == "attn":
            return self._attention(h, tile, step)
        return mlp_partial(self.backend, h, tile, spec.activation, spec.activation_limit)

    def squares(self, h: F32, tile: Tile, projections: Projections) -> F32:
        """Of a tile's queries and keys, which `projections` keeps, the sums of squares, [n, 2]."""
        record, config = tile.record, self.header.config
        first = -(-self.header.share.heads.start // (config.heads // config.kv_heads))
        counted = (max(record.kv_heads.start, min(first, record.kv_heads.stop)), record.kv_heads.stop)
        return projections.add(h, tile, TileHeads(record.heads, record.kv_heads, counted))

    def _attention(self, h: F32, tile: Tile, step: StepState) -> F32:
        record, layer, config = tile.record, tile.record.block.layer, self.header.config
        spec = self.layers[layer]
        return attention_partial(
            self.backend,
            h,
            tile,
            *step.kv(layer),
            spec.attention,
            record.kv_heads.start - self.header.share.kv_heads.start,
            record.q_to_kv,
            None if spec.rope is None else step.rotary[spec.rope],
            self._qk_norm(layer) if config.qk_norm else None,
            self.resident["sinks"][layer, slice(*record.heads)] if config.attention_sinks else None,
        )

    def finish(self, projections: Projections, squares: F32, layer: int, step: StepState) -> None:
        """Norm and store what a `qkv` block made, with its sums of squares over all ranks, [n, 2]."""
        rope = self.layers[layer].rope
        turned = None if rope is None else step.rotary[rope]
        first_kv = self.header.share.kv_heads.start
        projections.finish(squares, self._qk_norm(layer), *step.kv(layer), first_kv, turned)

    def _qk_norm(self, layer: int) -> QKNormWeights:
        return QKNormWeights(
            self.resident["q_norm"][layer], self.resident["k_norm"][layer], self.header.config.norm_eps
        )

    def add_bias(self, partial: F32, block: Block) -> None:
        """Add the bias of the block's output projection, if this rank has it."""
        # Only rank 0's file has the biases of the output projections, so each is added once.
        if block.kind == "qkv":
            return
        bias = self.resident.get("o_bias" if block.kind == "attn" else "down_bias")
        if bias is not None:
            partial += bias[block.layer]

    def to_residual(self, total: F32, block: Block) -> F32:
        """What is added to the residual, from a block's sum over all ranks, [n, hidden]: the same bits on every rank."""
        spec = self.layers[block.layer]
        if spec.post_norms:
            weight = self.resident[f"{block.kind}_post_norm"][block.layer]
            total = self.backend.fixed_rms_norm(total, weight, self.header.config.norm_eps)
        return total if spec.residual_scale == 1 else total * np.float32(spec.residual_scale)
