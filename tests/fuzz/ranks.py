"""What ranks say to each other: notes of every kind, headers of steps, rows of batches, frames of slices on their way."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

import tpimpi
from tests.fuzz import seeds
from tests.fuzz.mutate import mutate_json
from tests.fuzz.target import Target, written
from tpimpi.engine import protocol
from tpimpi.engine.audit import one_row, receive_request
from tpimpi.engine.batch import PADDED_WORDS, pack_rows, unpack_rows
from tpimpi.engine.protocol import Operation, StepHeader
from tpimpi.errors import TpimpiError
from tpimpi.models.blocks import Block
from tpimpi.models.kv.cache import KINDS, StepRows
from tpimpi.star import Star
from tpimpi.star.control import Note, decode_note, to_json
from tpimpi.weights.notes import DistributeSlices, TilesFound
from tpimpi.weights.receive import _header_from, indexes_of
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.stream import checksum_in, frames

_PAGES, _CONTEXT, _HIDDEN = (8, 4), 256, 4


@cache
def note_types() -> list[type[Note]]:
    """Every kind of note that any module has."""
    for module in pkgutil.walk_packages(tpimpi.__path__, "tpimpi."):
        if not module.name.endswith(("__main__", "_native", "torch_backend")):
            importlib.import_module(module.name)

    def below(kind: type[Note]) -> Iterator[type[Note]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    return sorted((one for one in below(Note) if one.__module__.startswith("tpimpi.")), key=lambda one: one.__name__)


def _note(data: bytes) -> None:
    """As each kind of note; and as what rank 0 and other ranks make of those that are more than figures."""
    understood = 0
    for kind in note_types():
        try:
            note = decode_note(data, kind, "r1 pi")
        except TpimpiError:
            continue
        understood += 1
        again = decode_note(to_json(note), kind, "r1 pi")
        assert to_json(again) == to_json(note)
        if isinstance(note, TilesFound):
            indexes_of(note.missing, 100, "r1 pi")
        if isinstance(note, DistributeSlices):
            _header_from(note, 0, 1)
    if not understood:
        decode_note(data, Note, "r1 pi", any_version=True)


def _sample(kind: Any) -> Any:
    """A value of a type, as msgspec's inspect describes types, in JSON."""
    info = msgspec.inspect
    match kind:
        case info.StructType():
            values = {field.encode_name: _sample(field.type) for field in kind.fields}
            return values | ({kind.tag_field: kind.tag} if kind.tag_field else {})
        case info.DataclassType():
            return {field.encode_name: _sample(field.type) for field in kind.fields}
        case info.NamedTupleType():
            return [_sample(field.type) for field in kind.fields]
        case info.TupleType():
            return [_sample(one) for one in kind.item_types]
        case info.CollectionType():
            return [_sample(kind.item_type)]
        case info.DictType():
            return {str(_sample(kind.key_type)): _sample(kind.value_type)}
        case info.UnionType():
            return _sample(kind.types[0])
        case info.LiteralType():
            return kind.values[0]
        case info.EnumType():
            return next(iter(kind.cls)).value
    plain: dict[Any, Any] = {info.BoolType: True, info.FloatType: 0.5, info.StrType: "a", info.NoneType: None}
    return plain.get(type(kind), 1)


def _note_seeds() -> list[bytes]:
    found = [json.dumps(_sample(msgspec.inspect.type_info(kind))).encode() for kind in note_types()]
    slices = SliceFile(written("slices/rank-0-of-1.h5", seeds.slice_file()))
    header = slices.header
    slices.close()
    parts = ("m", "f", header.config.to_dict(), header.formats.to_dict(), [1.0], None, "c", False)
    return [*found, to_json(DistributeSlices(*parts))]


class _Told(Star):
    """A rank that is told what the input says, a message from each beginning of a header on, and nothing after it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(None)
        self.left = np.frombuffer(data[: len(data) // 8 * 8], np.int64)

    def receive_words(self) -> Any:
        if not len(self.left):
            raise TpimpiError("nothing more comes")
        ends = np.flatnonzero(self.left[1:] == protocol.MAGIC)
        end = int(ends[0]) + 1 if len(ends) else len(self.left)
        words, self.left = self.left[:end], self.left[end:]
        return words

    def broadcast(self, values: Any, *, exact: bool = False) -> None:
        values[:] = 0


class _Model:
    """Of a model what a step asks for; it looks whether it was to be asked for that."""

    routing_hash, context, has_one_sequence = 0, _CONTEXT, True
    config = SimpleNamespace(hidden=_HIDDEN, qk_norm_over_all=False, layer=lambda _: SimpleNamespace(parallel=False))
    blocks = (Block("attn", 0), Block("mlp", 0))
    cache: Any = SimpleNamespace(pages=_PAGES)

    def can_keep(self, start: int, positions: int) -> bool:
        return start <= min(positions, _CONTEXT)

    def begin(self, positions: int, start: int) -> None: ...

    def open_pages(self, positions: int, pages: list[int], units: int) -> None:
        assert min(pages) >= 0 and units >= 0

    def release_pages(self, kind: int, pages: list[int]) -> None:
        assert all(0 <= page < _PAGES[kind] for page in pages)

    def step(self, x: Any, rows: StepRows) -> None:
        assert len(x) == len(rows.sequence)

    def forward(self, x: Any, start: int) -> None:
        assert start + len(x) <= _CONTEXT


def _steps(data: bytes) -> None:
    model: Any = _Model()
    star = _Told(data)
    while len(star.left):
        header, words = protocol.receive_header(star)
        if header.operation == Operation.AUDIT:  # which a whole model would answer
            receive_request(model, star, words)
        elif header.operation not in (Operation.KEEP, Operation.TAKE, Operation.LIVE, Operation.FINISH):
            protocol._follow_one(model, star, header, words)


def _rows() -> StepRows:
    tables = tuple(np.arange(4, dtype=np.int32).reshape(2, 2) for _ in KINDS)
    return StepRows(np.array([0, 0, 1], np.int32), np.array([5, 6, 70], np.int32), tables)


def _step_seeds() -> list[bytes]:
    words = pack_rows(_rows())
    told = [
        [StepHeader(Operation.BEGIN, 64, 0).pack()],
        [StepHeader(Operation.FORWARD, 3, 2).pack()],
        [StepHeader(Operation.PAGES, 128).pack(), np.array([8, 4, 100], np.int64)],
        [StepHeader(Operation.STEP, 3).pack(), words],
        [StepHeader(Operation.PROMPT_STEP, 3).pack(), pack_rows(_rows(), PADDED_WORDS)],
        [StepHeader(Operation.RELEASE, 1).pack(), np.array([1, 2], np.int64)],
        [StepHeader(Operation.AUDIT).pack(), np.array([0, 0], np.int64), pack_rows(one_row(_rows(), 2))],
    ]
    return [b"".join(part.tobytes() for part in parts) for parts in told]


def _batch_rows(data: bytes) -> None:
    rows = unpack_rows(np.frombuffer(data[: len(data) // 8 * 8], np.int64), _PAGES, _CONTEXT)
    for table in rows.tables:
        table[rows.sequence, rows.position // 64]


def _stream(data: bytes) -> None:
    for _, kind, content in frames(np.frombuffer(data, np.uint8)):
        if kind == 1:
            checksum_in(content)


def _stream_seeds() -> list[bytes]:
    frame = np.array([3, 0, 5], "<u8").tobytes() + b"abcde\0\0\0"
    return [frame + np.array([3, 1, 8, 77, 0, 2, 0], "<u8").tobytes()]


TARGETS = [
    Target("notes", _note, _note_seeds, mutate_json),
    Target("steps", _steps, _step_seeds),
    Target("rows", _batch_rows, lambda: [pack_rows(_rows()).tobytes()]),
    Target("stream", _stream, _stream_seeds),
]
