"""An audit, as all ranks see it: what rank 0 asks for, and how a rank answers.

After a step rank 0 sends the residual of one row as it was before one sum, and every other rank computes its part of that
sum for that row again, tile by tile. Its answer is its partial after each tile, one after another: the last is the partial
that it had sent into the sum, to the bit, since a row's numbers do not depend on the rows beside it. Two neighbours differ
by what a tile gives. With a tile of projections come the row's queries, keys and values as they leave their matrices; with a
tile of the output projection what attention gives it to project.

The request is words, int64: first and last block (see watch.AuditedSum), then the row (see batch); after them the residual,
f32 [1, hidden], and for the attention of a layer whose queries are normed over all heads the sums of squares, f32 [1, 2].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import Backend
from tpimpi.compute.experts import ExpertUse
from tpimpi.compute.formats.packed import Matrix
from tpimpi.engine.batch import pack_rows, unpack_rows
from tpimpi.engine.partials import StepState
from tpimpi.engine.watch import AuditedSum, sums_of
from tpimpi.errors import StarError
from tpimpi.models.blocks import Block
from tpimpi.models.kv.cache import StepRows
from tpimpi.models.layers.projections import Projections
from tpimpi.star import Star, Words
from tpimpi.weights.slices.layout import Record

if TYPE_CHECKING:  # which has an auditor
    from tpimpi.engine.model import Model

HEAD_WORDS = 2  # first and last block
PROJECTED = ("q", "k", "v")  # matrices of which the answer has what they give; of `o` it has what they are given


@dataclass(frozen=True)
class AuditRequest:
    """Which sum, of which row; the row's residual `x` [1, hidden], and `squares` [1, 2] where they are needed."""

    audited: AuditedSum
    rows: StepRows  # a single one
    x: F32
    squares: F32 | None = None

    def words(self) -> Words:
        """What is sent before `x` and `squares`."""
        return np.concatenate([np.array([self.audited.first, self.audited.last], np.int64), pack_rows(self.rows)])

    def send_row(self, star: Star) -> None:
        """Rank 0: send what follows the words."""
        star.broadcast(self.x, exact=True)
        if self.squares is not None:
            star.broadcast(np.ascontiguousarray(self.squares), exact=True)


def receive_request(model: Model, star: Star, words: Words) -> AuditRequest:
    """Other ranks: what rank 0 asks for with these words, and what follows them. Raises StarError where that makes no
    sense."""
    assert model.cache is not None
    first, last = words[:HEAD_WORDS].tolist() if len(words) > HEAD_WORDS else (-1, -1)
    audited = AuditedSum(first, last)
    if audited not in sums_of(model.config, model.blocks):
        raise StarError(f"rank 0 audits the sum of blocks {first} to {last}, which is none of this model's")
    rows = unpack_rows(words[HEAD_WORDS:], model.cache.pages, model.context)
    if len(rows.sequence) != 1:
        raise StarError(f"rank 0 audits {len(rows.sequence)} rows, must be 1")
    x = np.empty((1, model.config.hidden), np.float32)
    star.broadcast(x, exact=True)
    squares = None
    if needs_squares(model, audited):
        squares = np.empty((1, 2), np.float32)
        star.broadcast(squares, exact=True)
    return AuditRequest(audited, rows, x, squares)


def needs_squares(model: Model, audited: AuditedSum) -> bool:
    """Whether the sum is of an attention whose queries and keys are normed over all heads of all ranks."""
    return model.config.qk_norm_over_all and model.blocks[audited.last].kind == "attn"


def one_row(rows: StepRows, row: int) -> StepRows:
    """One of these rows, with the tables of its sequence alone."""
    sequence = int(rows.sequence[row])
    tables = tuple(table[sequence : sequence + 1] for table in rows.tables)
    return StepRows(np.zeros(1, np.int32), rows.position[row : row + 1], tables)


class _Noting:
    """A backend that notes what its matrices are given, and what they give."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.noted: list[tuple[Matrix, F32, F32]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def linear(self, x: F32, weight: Matrix, bias: F32 | None = None) -> F32:
        y = self._backend.linear(x, weight, bias)
        self.noted.append((weight, x, y))
        return y


def answer(model: Model, request: AuditRequest) -> F32:
    """What this rank computes for the row of a request: f32, flat, the parts of `answer_parts` one after another.

    Changes no number: keys and values of the row are stored again, as they were. Experts are read through the cache, and
    counted there."""
    found = [part for parts in _parts(model, request) for part in parts]
    return np.concatenate([part.reshape(-1) for part in found]) if found else np.empty(0, np.float32)


def _parts(model: Model, request: AuditRequest) -> Iterator[list[F32]]:
    """What the answer has of each tile."""
    x, audited, step = request.x, request.audited, model.state_of(request.rows)
    noting = _Noting(model.backend)
    partials = replace(model.partials, backend=cast("Backend", noting))
    projections = None
    if needs_squares(model, audited):
        assert request.squares is not None
        projections = _projected(model, x, model.blocks[audited.last - 1], step)
        partials.finish(projections, request.squares, model.blocks[audited.last].layer, step)
        projections.backend = cast("Backend", noting)
    elif model.blocks[audited.last].kind == "qkv":
        projections = Projections(cast("Backend", noting), model.config.head_dim)
    first = model.blocks[audited.first]
    h, partial = partials.normed(x, first), partials.empty(x, first)
    for block in model.blocks[audited.first : audited.last + 1]:
        for tile in model.window.tiles_out_of_turn(block):
            noting.noted.clear()
            partial += partials.of_tile(h, tile, step, projections)
            by_name = {name: noted for name, m in tile.matrices.items() for noted in noting.noted if noted[0] is m}
            outputs = [by_name[name][2] for name in PROJECTED if name in by_name]
            inputs = [by_name["o"][1]] if "o" in by_name else []
            yield [partial.copy(), *outputs, *inputs]
        if block.kind == "mlp" and model.experts is not None and model.config.router(block.layer) is not None:
            routed = model.experts.chosen(h, block.layer, request.rows.position)
            users = routed.rows_by_expert()
            model.experts.cache.begin(block.layer, list(users))
            for group in model.experts.cache.tiles():
                for tile in group:
                    use = ExpertUse(tile.matrices, tile.parts, *users[tile.record.expert])
                    activation, limit = model.config.activation, model.config.activation_limit
                    model.backend.experts(h, [use], activation, limit, partial)
                    yield [partial.copy()]


def _projected(model: Model, x: F32, block: Block, step: StepState) -> Projections:
    """The queries, keys and values of a layer that are to be normed over all heads."""
    projections = Projections(model.backend, model.config.head_dim)
    h = model.partials.normed(x, block)
    for tile in model.window.tiles_out_of_turn(block):
        model.partials.of_tile(h, tile, step, projections)
    return projections


def answer_parts(record: Record, width: int) -> dict[str, int]:
    """What an answer has of a tile, in order, and how many numbers each has: the `partial` after it, of this `width`; what
    its q, k and v give; and what its o is given."""
    parts = {part.name: part for part in record.parts if part.is_matrix}
    sizes = {"partial": width}
    if record.expert >= 0 or "gate" in parts:
        return sizes
    sizes |= {name: parts[name].shape[0] for name in PROJECTED if name in parts}
    return sizes | ({"o": parts["o"].shape[1]} if "o" in parts else {})


def split_answer(data: bytes, records: Sequence[Record], width: int, sender: str) -> list[dict[str, F32]]:
    """A rank's answer, for each of its tiles. Raises StarError, which names the `sender`, where it has another size."""
    sizes = [answer_parts(record, width) for record in records]
    due = 4 * sum(sum(of.values()) for of in sizes)
    if len(data) != due:
        raise StarError(f"{sender} answered an audit with {len(data)} bytes where {due} were due")
    numbers, at, found = np.frombuffer(data, np.float32), 0, []
    for of in sizes:
        tile = {}
        for name, size in of.items():
            tile[name] = numbers[at : at + size]
            at += size
        found.append(tile)
    return found
