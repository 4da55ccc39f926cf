"""A tile of a slice, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tpimpi.compute.arrays import Array
from tpimpi.compute.formats.packed import Matrix
from tpimpi.system.buffers import Bytes
from tpimpi.weights.slices.layout import Record


@dataclass(frozen=True)
class Tile:
    """A tile in memory: its record, and its parts by name, which are views of one buffer."""

    record: Record
    parts: Mapping[str, Array]  # biases, norms (f32) and files (uint8), in their shapes
    matrices: Mapping[str, Matrix]

    @classmethod
    def of(cls, record: Record, buffer: Bytes) -> Tile:
        """The tile whose parts lie in `buffer` as the record says, and are not copied."""
        parts: dict[str, Array] = {}
        matrices: dict[str, Matrix] = {}
        for start, stop, part in record.spans():
            data = buffer[start:stop]
            if part.is_matrix:
                matrices[part.name] = part.matrix(data)
            else:
                parts[part.name] = data.view(part.dtype).reshape(part.shape)
        return cls(record, parts, matrices)
