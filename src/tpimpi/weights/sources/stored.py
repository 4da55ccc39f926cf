"""Where a tensor lies in a file of weights, and how its rows are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from tpimpi.compute.arrays import Bytes
from tpimpi.errors import ModelError
from tpimpi.models.tensors import Piece
from tpimpi.weights.sources.weight_file import WeightFile, shown

FLOAT_FORMATS = MappingProxyType({"f32": 4, "bf16": 2, "f16": 2})  # bytes a number


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's canonical name, its shape ([out, in] or [out]) and its stored format: f32, bf16, q4_1, …"""

    name: str
    shape: tuple[int, ...]
    format: str


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies. `permuted_heads` > 0: the first `permuted_rows` rows of each of that many heads are interleaved.

    Its rows are every `step`th of the file's from `offset` on. `offset_value` is added to the numbers of a vector.
    """

    info: TensorInfo
    file: WeightFile
    offset: int
    row_bytes: int
    permuted_heads: int = 0
    permuted_rows: int = 0
    offset_value: float = 0.0
    step: int = 1

    def split(self, pieces: Sequence[Piece]) -> dict[str, Stored]:
        """The matrices, or biases, that this holds, by their canonical names. ModelError where it has not as many rows."""
        first = pieces[0]
        transposed = first.transposed and self.info.format in FLOAT_FORMATS
        shape, height = self.info.shape, first.height
        rows = sum(piece.rows for piece in pieces)
        dimensions = 1 if first.name.endswith(".bias") else 2
        if height and len(shape) == dimensions + 1 and shape[0] * height == rows:
            if transposed and shape[2] == height:
                return {piece.name: self._transposed(piece) for piece in pieces}
            if not transposed and shape[1] == height:
                whole = self.flat()
                return {piece.name: whole.cut(piece) for piece in pieces}
        if height or len(shape) != dimensions or shape[0] != rows:
            needed = f"{rows // height} x {height} {'columns' if transposed else 'rows'}" if height else f"{rows} rows"
            raise ModelError(
                f"{self.file.path}: tensor {shown(self.info.name)} has shape {list(shape)}, and the config needs "
                f"{needed}; config and weights are not of the same model"
            )
        return {piece.name: self.cut(piece) for piece in pieces}

    def flat(self) -> Stored:
        """A stack of matrices [experts, rows, …] as one [experts * rows, …]: the same numbers in the same order."""
        stack, height, *rest = self.info.shape
        info = TensorInfo(self.info.name, (stack * height, *rest), self.info.format)
        return replace(self, info=info, row_bytes=self.row_bytes // height)

    def cut(self, piece: Piece) -> Stored:
        """Some of the rows of this, as a tensor of its own."""
        return replace(
            self,
            info=TensorInfo(piece.name, (piece.rows, *self.info.shape[1:]), self.info.format),
            offset=self.offset + piece.first * self.row_bytes,
            step=piece.step,
        )

    def _transposed(self, piece: Piece) -> Transposed:
        """A matrix that is one of a stack [experts, columns, rows]."""
        _, columns, height = self.info.shape
        number = FLOAT_FORMATS[self.info.format]
        expert, first = divmod(piece.first, height)
        return Transposed(
            info=TensorInfo(piece.name, (piece.rows, columns), self.info.format),
            file=self.file,
            offset=self.offset + (expert * columns * height + first) * number,
            row_bytes=columns * number,
            step=piece.step,
            column_bytes=height * number,
        )

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows [start, stop): uint8 [rows, bytes a row]. Where `step` is 2, as much again is read for a while."""
        count = max(0, (stop - start - 1) * self.step + 1)
        data = self.file.read(self.offset + start * self.step * self.row_bytes, count * self.row_bytes)
        return np.ascontiguousarray(data.reshape(count, self.row_bytes)[:: self.step])


@dataclass(frozen=True)
class Transposed(Stored):
    """A matrix of numbers whose columns are rows in the file, `column_bytes` from one to the next."""

    column_bytes: int = 0

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows [start, stop): uint8 [rows, bytes a row]. Of each column the numbers of these rows are read by themselves."""
        columns = self.info.shape[1]
        number = self.row_bytes // columns
        out = np.empty((stop - start, columns, number), np.uint8)
        span = ((stop - start - 1) * self.step + 1) * number
        for column in range(columns) if stop > start else ():
            place = self.offset + column * self.column_bytes + start * self.step * number
            out[:, column] = self.file.read(place, span).reshape(-1, number)[:: self.step]
        return out.reshape(stop - start, self.row_bytes)
