"""What a rank needs to hold and to run its part of a model, in bytes: for a run, and for a run that is only planned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tpimpi.engine.budget import Needs
from tpimpi.engine.expert_slots import min_slots
from tpimpi.engine.overlap import DENSE_CHUNK
from tpimpi.engine.ring import FEWEST_TILES, USUAL_TILES
from tpimpi.models.kv.cache import PAGE, WINDOWED, KVShape, layer_kinds, pages_of, resolve_kv_format
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import Record

LONGEST_DRAFT = 15  # tokens: 16 rows with the last one's, for which the kernels read each weight once
# So much more than a run without drafts a rank 0 may take for the logits of all rows of a draft, where nobody says how long
# drafts are. With a prompt of so many positions, which takes memory too, that holds already.
_DRAFT_BYTES = 1_500_000
_SHORT_PROMPT = 32  # positions
KEPT_POSITIONS = 1024  # that a conversation can take back, where layers have windows, without being computed anew
EXPERT_RUN_BYTES = 8 << 20  # between the stages of the experts that are computed at once: see kernels/experts.cpp


def work_bytes(
    header: Header,
    records: Sequence[Record],
    backend: str,
    context: int,
    logit_rows: int,
    *,
    chunk: int = DENSE_CHUNK,
    experts: Sequence[Record] = (),
    all_partials: bool = False,
    draft: int = 0,
) -> int:
    """Memory, at most, of activations and messages on this rank, beside cache and weights.

    Counted for a step of `chunk` positions (or `context`, if that is less), through the `records` of a cycle and one of the
    `experts`, which all positions may use; and on rank 0 the logits of `logit_rows` positions. `all_partials`:
    every rank gets those of all, as the hub does. With a `draft`, for the last token and so many drafted ones instead, of
    all of which rank 0 has the logits.
    """
    config, ranks = header.config, header.partition.ranks
    positions = min(1 + draft if draft else chunk, context)
    # Hidden vectors at once: in step or follow, forward, norm and partial; and those on the star, which the hub has of every
    # rank, the others of two at most; each is held twice while it is received.
    vectors = 7 + 2 * (ranks if header.rank == 0 or all_partials else 2)
    inner = largest = heads = 0
    for record in (*records, *experts[:1]):
        rows = {part.name: part.shape[0] for part in record.parts if part.is_matrix}
        gathered = 2 * config.hidden if record.expert >= 0 else 0  # the vectors that use it, and what it gives for them
        inner = max(inner, 3 * rows.get("q", 0) + 4 * rows.get("k", 0), 3 * rows.get("gate", 0) + gathered)
        heads = max(heads, record.heads.size)
        largest = max([largest, *(math.prod(part.shape) for part in record.parts if part.is_matrix)])
    work = 4 * positions * (vectors * config.hidden + inner + max(config.hidden, inner) // 2)
    work += EXPERT_RUN_BYTES if experts else 0
    if (
        backend != "native"
    ):  # which decodes a matrix to use it, and whose library takes memory of its own when it begins
        work += 12 * largest + 48_000_000
        work += 16 * positions * config.hidden if experts else 0  # the router's vectors in f64, twice
        # Nor does it go through the keys and values piece by piece: scores, mask and weights, and keys and values in f32.
        kv_heads = header.share.kv_heads.size
        work += 4 * context * (3 * heads * positions + 4 * max(heads, kv_heads) * config.head_dim)
    if header.rank == 0:
        held = 5 * (1 + draft) + 8 if draft else (12 + 12 * (logit_rows > 1)) * logit_rows
        work += (held + 64) * config.vocab
    return work


def needs_of_model(
    header: Header,
    records: Sequence[Record],
    *,
    tiles: int,
    base: int,
    backend: str,
    kv_format: str,
    allreduce: str,
    context: int,
    chunk: int = DENSE_CHUNK,
    logit_rows: int = 1,
    experts: Sequence[Record] = (),
    expert_count: int = 0,
    draft: int | None = 0,
) -> Needs:
    """What one rank needs to hold `context` positions of one model, of which it has the slice `header`.

    `records` are its tiles, or those of a layer of each kind and of the head; `tiles` the bytes of all of them. `base` is
    what the rank has resident before. `backend`, `kv_format` and `allreduce` (see star.parse_rule) are those of the run;
    `chunk` is how many positions are computed at once; `logit_rows` how many positions rank 0 computes logits of at once;
    `experts` are the tiles of an expert of each layer, or of each kind of layer, of `expert_count` experts in all layers.
    `draft` is how many tokens are drafted at most, None for as many as take hardly more memory: see Needs.draft.
    """
    shape = kv_shape_of(header, kv_format, chunk)
    largest = max((record.nbytes for record in records), default=0)
    expert = max((record.nbytes for record in experts), default=0)
    all_partials = allreduce.endswith("exchange")  # also of long sums

    def work(positions: int, draft: int = 0) -> int:
        return work_bytes(
            *(header, records, backend, context, logit_rows),
            chunk=positions,
            experts=experts,
            all_partials=all_partials,
            draft=draft,
        )

    if draft is None:
        most = work(min(chunk, _SHORT_PROMPT)) + _DRAFT_BYTES
        draft = max((n for n in range(1, min(LONGEST_DRAFT, chunk - 1) + 1) if work(1, n) <= most), default=0)
    return Needs(
        base=base,
        cache=shape.nbytes(context),
        work=max(work(chunk), work(1, draft) if draft else 0),
        min_buffers=min(tiles, FEWEST_TILES * largest),
        usual_buffers=min(tiles, USUAL_TILES * largest),
        tiles=tiles,
        min_experts=min_slots(expert_count) * expert,
        experts=expert_count * expert,
        position_work=work(2) - work(1) + (0 if shape.ring is None else shape.page_bytes(WINDOWED) // PAGE),
        draft=draft,
    )


def needs_together(needs: Sequence[Needs]) -> Needs:
    """What one rank needs for several models that compute by turns: each has its cache and tiles, all share the work."""
    return Needs(
        base=needs[0].base,
        cache=sum(need.cache for need in needs),
        work=max(need.work for need in needs),
        min_buffers=sum(need.min_buffers for need in needs),
        usual_buffers=sum(need.usual_buffers for need in needs),
        tiles=sum(need.tiles for need in needs),
        min_experts=sum(need.min_experts for need in needs),
        experts=sum(need.experts for need in needs),
        position_work=max(need.position_work for need in needs),
        draft=min(need.draft for need in needs),
    )


def kv_shape_of(header: Header, kv_format: str, chunk: int) -> KVShape:
    """This rank's pages of keys and values; `kv_format` is one of KV_FORMATS, `chunk` positions are computed at once."""
    config = header.config
    fmt = resolve_kv_format(kv_format, header.formats.layer_formats(), config.head_dim)
    window = max(config.attention_windows, default=0)
    ring = pages_of(window + chunk + KEPT_POSITIONS) + 2 if window else None  # a window and a chunk may begin anywhere
    return KVShape(layer_kinds(config), header.share.kv_heads.size, config.head_dim, fmt, ring)
