"""What all formats of blocks have in common: how their rows are made and read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats.base import SLAB_BYTES, Quantizer, WeightFormat

UNIT_WEIGHTS = 32  # weights that meet a scale of activations; rows are cut at multiples of it
_F16_EXPONENT = 0x7C00  # all ones: an infinity or a NaN


@dataclass(frozen=True, kw_only=True)
class BlockFormat(WeightFormat):
    """A format of blocks, whose scales (and minima) are f16 unless it says otherwise."""

    cut_weights: int = UNIT_WEIGHTS
    f16_offsets: tuple[int, ...]  # of f16 numbers: bytes from a block's begin

    @abstractmethod
    def decode_blocks(self, blocks: Bytes, out: F32) -> None:
        """Blocks [rows, blocks, block_bytes], contiguous, as numbers into `out` [rows, blocks, block_weights]."""

    def encode(self, values: F32, quantizer: Quantizer) -> Bytes:
        if missing := -values.shape[1] % self.block_weights:
            values = np.pad(values, ((0, 0), (0, missing)))
        greatest = max(values.max(initial=0), -values.min(initial=0))
        if greatest > self.largest and np.isfinite(greatest):
            raise ValueError(f"holds {greatest:g}, and {self.name} nothing over {self.largest:g}")
        return quantizer(values, self.name)

    def decode(self, stored: Bytes, columns: int, first: int = 0) -> F32:
        out = np.empty((stored.shape[0], self.blocks(columns, first) * self.block_weights), np.float32)
        step = max(1, SLAB_BYTES // 4 // max(1, out.shape[1]))
        # A hostile file's scales may overflow; they are refused elsewhere.
        with np.errstate(over="ignore", invalid="ignore"):
            for row in range(0, stored.shape[0], step):
                slab, into = np.ascontiguousarray(stored[row : row + step]), out[row : row + step]
                self.decode_blocks(
                    slab.reshape(len(slab), -1, self.block_bytes), into.reshape(len(slab), -1, self.block_weights)
                )
        return np.ascontiguousarray(out[:, first : first + columns])

    def holds_infinities(self, stored: Bytes) -> bool:
        blocks = stored.reshape(stored.shape[0], -1, self.block_bytes)
        return any(
            bool(((f16_bits(blocks, place) & _F16_EXPONENT) == _F16_EXPONENT).any()) for place in self.f16_offsets
        )


def f16_bits(blocks: Bytes, place: int) -> Array:
    """The two bytes at `place` of blocks [..., block_bytes], as uint16 [...]: a view."""
    return blocks[..., place : place + 2].view("<u2")[..., 0]


def f16_numbers(blocks: Bytes, place: int) -> F32:
    """The f16 at `place` of blocks [..., block_bytes], as f32 [...]."""
    return f16_bits(blocks, place).view("<f2").astype(np.float32)
