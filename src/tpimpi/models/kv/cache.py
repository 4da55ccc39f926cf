"""The KV cache: this rank's pages of keys and values, and in which format.

Layers are of two kinds, for which pages are taken apart: those that see all positions, and those that see a window. A page
holds PAGE positions of all layers of its kind, of all KV heads of the rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import I32, Array, Bytes
from tpimpi.compute.kv import KVPages, Rows, fits_q8_0, row_layout
from tpimpi.errors import InputError
from tpimpi.models.config import ModelConfig
from tpimpi.system.buffers import RELEASE_BYTES, Pages

KV_FORMATS = (
    "auto",
    "f16",
    "f32",
    "q8_0",
)  # what --kv takes; auto is as precise as the weights deserve, see `resolve_kv_format`
PAGE = 64  # positions of a page: the keys that attention takes at once (kKeys in src/kernels/attention.h)
FULL, WINDOWED = KINDS = (0, 1)  # kinds of layers


def layer_kinds(config: ModelConfig) -> tuple[int, ...]:
    """The kind of each layer."""
    return tuple(WINDOWED if window else FULL for window in config.attention_windows)


@dataclass(frozen=True)
class KVShape:
    """What a rank's pages are made of; `fmt` is one of CACHED_FORMATS.

    `ring` is how many pages a sequence that has the ranks for itself takes in windowed layers at most: each takes the place
    of the one so many before, which no row sees any more. None: it takes as many as in the others.
    """

    kinds: tuple[int, ...]  # of each layer
    kv_heads: int  # of this rank
    head_dim: int
    fmt: str
    ring: int | None = None

    def used_bytes(self, kind: int) -> int:
        """Keys and values of a page."""
        dtype, row = row_layout(self.fmt, self.head_dim)
        return self.kinds.count(kind) * 2 * self.kv_heads * PAGE * row * dtype.itemsize

    def page_bytes(self, kind: int) -> int:
        """Memory of a page: whole pages of memory, so that it can be given back."""
        return -(-self.used_bytes(kind) // RELEASE_BYTES) * RELEASE_BYTES

    @property
    def unit_bytes(self) -> int:
        """Memory of a page of one layer, of either kind, rounded up."""
        layers = [self.kinds.count(kind) for kind in KINDS]
        return max(-(-self.page_bytes(kind) // count) for kind, count in enumerate(layers) if count)

    def nbytes(self, context: int) -> int:
        """Memory of the pages of a sequence of so many positions, which has the ranks for itself."""
        return self.nbytes_of(self.pages_of_sequence(context))

    def pages_of_sequence(self, context: int) -> tuple[int, int]:
        """Pages of each kind of a sequence of so many positions, which has the ranks for itself."""
        pages = pages_of(context)
        return pages, pages if self.ring is None else min(pages, self.ring)

    def nbytes_of(self, pages: Sequence[int]) -> int:
        """Memory of so many pages of each kind."""
        return sum(self.page_bytes(kind) * count for kind, count in enumerate(pages))


def pages_of(positions: int) -> int:
    """Pages that so many positions take."""
    return -(-positions // PAGE)


@dataclass(frozen=True)
class StepRows:
    """The rows of a step: row i is position[i] of sequence[i], int32 [n]; and for each kind the page tables (see Rows)."""

    sequence: I32
    position: I32
    tables: tuple[I32, ...]

    def __getitem__(self, run: slice) -> StepRows:
        """Some of them."""
        return StepRows(self.sequence[run], self.position[run], self.tables)

    def for_kind(self, kind: int) -> Rows:
        """The rows in layers of a kind."""
        return Rows(self.sequence, self.position, self.tables[kind])

    @classmethod
    def of_sequence(cls, start: int, n: int, tables: Sequence[I32]) -> StepRows:
        """n positions from `start` of one sequence, whose pages of each kind are those of `tables`."""
        position = np.arange(start, start + n, dtype=np.int32)
        return cls(np.zeros(n, np.int32), position, tuple(table[None] for table in tables))


class KVCache:
    """Pages of keys and values, of each kind `pages[kind]`. Memory is touched as it fills."""

    def __init__(self, shape: KVShape, pages: Sequence[int]) -> None:
        self.shape, self.pages = shape, tuple(pages)
        # np.zeros would take large pages, and with them the memory of positions that are not there yet.
        self._memory = [Pages(count * shape.page_bytes(kind), large=False) for kind, count in enumerate(pages)]
        self._filled = [np.zeros(count, np.bool_) for count in pages]  # pages that were written
        self._layers = list(self._views())

    def _views(self) -> Iterable[KVPages]:
        """Each layer's pages."""
        shape, place = self.shape, [0 for _ in KINDS]
        dtype, row = row_layout(shape.fmt, shape.head_dim)
        of_kind: list[Array] = []
        for kind, count in enumerate(self.pages):
            parts = (shape.kinds.count(kind), 2, shape.kv_heads, PAGE, row)
            used = self._bytes(kind)[:, : shape.used_bytes(kind)]
            of_kind.append(used.view(dtype).reshape(count, *parts))
        for kind in shape.kinds:
            of_layer = of_kind[kind][:, place[kind]]
            place[kind] += 1
            yield KVPages(of_layer[:, 0], of_layer[:, 1], shape.head_dim)

    def _bytes(self, kind: int) -> Bytes:
        return self._memory[kind].array.reshape(self.pages[kind], self.shape.page_bytes(kind))

    def page(self, kind: int, page: int) -> Bytes:
        """The keys and values of a page, uint8, without what its size is rounded up by; a view."""
        return self._bytes(kind)[page, : self.shape.used_bytes(kind)]

    def layer_pages(self, layer: int) -> KVPages:
        """The pages of a layer."""
        return self._layers[layer]

    def note_written(self, rows: StepRows) -> None:
        """These rows are written in all layers, and take memory from now on."""
        for filled, table in zip(self._filled, rows.tables, strict=True):
            filled[table[rows.sequence, rows.position // PAGE]] = True

    def note_read(self, tables: Iterable[Sequence[int]]) -> None:
        """These pages of each kind (-1: none) were written from elsewhere, and take memory."""
        for filled, table in zip(self._filled, tables, strict=True):
            filled[[page for page in table if page >= 0]] = True

    def release(self, kind: int, pages: Iterable[int]) -> None:
        """Give the memory of these pages back; they are zeros when they are used again."""
        size = self.shape.page_bytes(kind)
        for page in pages:
            self._memory[kind].release(page * size, (page + 1) * size)
            self._filled[kind][page] = False

    def take_over(self, other: KVCache, pages: Sequence[Iterable[tuple[int, int]]]) -> None:
        """Have pages of each kind of a cache of the same shape, (its number there, its number here); their memory is given
        back one by one."""
        for kind, pairs in enumerate(pages):
            for theirs, ours in pairs:
                self._bytes(kind)[ours] = other._bytes(kind)[theirs]
                self._filled[kind][ours] = True
                other.release(kind, [theirs])

    def filled_of(self, kind: int, pages: Iterable[int]) -> list[int]:
        """Those of these pages of a kind that were written, and take memory."""
        return [page for page in pages if self._filled[kind][page]]

    @property
    def filled_bytes(self) -> int:
        """Memory that the pages written so far take."""
        return sum(self.shape.page_bytes(kind) * int(filled.sum()) for kind, filled in enumerate(self._filled))


def resolve_kv_format(kv: str, weight_formats: Iterable[str], head_dim: int) -> str:
    """The format of the cache for one of KV_FORMATS: auto is f32 where all of the layers' weights are f32, else f16.

    Raises InputError where heads of `head_dim` numbers have no blocks of q8_0.
    """
    if kv == "q8_0" and not fits_q8_0(head_dim):
        raise InputError(
            f"--kv is q8_0, which stores numbers by 32, and this model's heads have {head_dim}; give --kv f16"
        )
    if kv == "auto":
        return "f32" if set(weight_formats) == {"f32"} else "f16"
    return kv
