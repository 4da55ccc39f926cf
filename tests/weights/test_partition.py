"""Dealing heads and columns: everything is owned once, whatever the model, the ranks and the shares."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.configs import config
from tests.support.drawn import examples
from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.compute.formats.packed import packed_bytes, weight_bytes
from tpimpi.errors import InputError
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import LayerFormats, ModelFormats
from tpimpi.weights.slices.partition import (
    TILE_LIMIT_BYTES,
    Span,
    attention_tiles,
    head_tiles,
    make_partition,
    mlp_tiles,
)

LLAMA_70B = config(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=32000)
LLAMA_405B = config(hidden=16384, intermediate=53248, heads=128, kv_heads=8, head_dim=128, vocab=128256)

models = st.builds(
    lambda group, kv_heads, hidden, intermediate, head_dim: config(
        heads=group * kv_heads, kv_heads=kv_heads, hidden=hidden, intermediate=intermediate, head_dim=head_dim
    ),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([64, 100, 8192]),
    st.integers(1, 30000),
    st.sampled_from([20, 64, 128]),
)
layer_formats = st.builds(LayerFormats, *[st.sampled_from(WEIGHT_FORMATS)] * 7)
weights = st.lists(st.floats(0, 10), min_size=1, max_size=9).filter(lambda w: sum(w) > 1e-3)


@examples(300)
@given(models, weights, layer_formats)
def test_everything_is_owned_exactly_once(model: ModelConfig, shares: list[float], formats: LayerFormats) -> None:
    plan = make_partition(model, shares)
    group = model.heads // model.kv_heads
    heads, columns = [], []
    for share in plan.shares:
        heads += range(*share.heads)
        columns += range(*share.columns)
        # A border between ranks never divides a run of 32 columns.
        assert share.columns.start % 32 == 0 or not share.columns.size
        tiles = list(attention_tiles(model, share, formats))
        assert [h for tile in tiles for h in range(*tile.heads)] == list(range(*share.heads))
        assert [k for tile in tiles for k in range(*tile.kv_heads)] == list(range(*share.kv_heads))
        cached = 0
        for tile in tiles:
            cached += tile.kv_heads.size
            expected = [head // group - share.kv_heads.start for head in range(*tile.heads)]
            assert list(tile.q_to_kv) == expected
            # What a tile reads from the cache was put there by itself or an earlier tile.
            assert all(kv < cached for kv in tile.q_to_kv)
            query = weight_bytes(formats.q) + weight_bytes(formats.o)
            key_and_value = weight_bytes(formats.k) + weight_bytes(formats.v)
            size = (tile.heads.size * query + tile.kv_heads.size * key_and_value) * model.head_dim * model.hidden
            assert size <= TILE_LIMIT_BYTES or tile.heads.size + tile.kv_heads.size == 1
        runs = list(mlp_tiles(model, share.columns, formats))
        assert [c for run in runs for c in range(*run)] == list(range(*share.columns))
        # Nor does a border between tiles divide a pair of blocks, which are packed together.
        assert all(run.start % 64 == 0 for run in runs[1:])
        column = (weight_bytes(formats.gate) + weight_bytes(formats.up) + weight_bytes(formats.down)) * model.hidden
        assert all(run.size * column <= TILE_LIMIT_BYTES or run.size <= 64 for run in runs)
    assert heads == list(range(model.heads))
    assert columns == list(range(model.intermediate))


@pytest.mark.parametrize(
    ("shares", "heads"),
    [
        ([4, 2, 2, 1], [4, 2, 2, 1]),
        ([1, 1, 1], [3, 3, 3]),
        ([1] * 9, [1] * 9),
        ([0, 1], [0, 9]),
    ],
)
def test_nine_heads_follow_the_shares(shares: list[float], heads: list[int]) -> None:
    plan = make_partition(config(heads=9, kv_heads=3), shares)
    assert [share.heads.size for share in plan.shares] == heads


def test_a_divided_group_is_held_by_both_ranks() -> None:
    plan = make_partition(config(heads=9, kv_heads=3), [4, 2, 2, 1])
    assert [tuple(share.kv_heads) for share in plan.shares] == [(0, 2), (1, 2), (2, 3), (2, 3)]


def test_a_rank_without_heads_still_has_columns() -> None:
    plan = make_partition(config(heads=2, kv_heads=1), [1] * 7)
    without = [share for share in plan.shares if not share.heads.size]
    assert without
    assert all(not share.kv_heads.size for share in without)
    assert sum(share.columns.size for share in plan.shares) == 96


def test_tile_borders_of_a_large_model_do_not_depend_on_the_ranks() -> None:
    """Borders inside a share lie on one grid; only where a share ends may there be another."""
    q4_0 = ModelFormats.of("q4_0", 1).layers[0]
    for model in (LLAMA_70B, LLAMA_405B):
        whole = {run.start for run in mlp_tiles(model, make_partition(model, [1]).shares[0].columns, q4_0)}
        for ranks in (2, 3, 8):
            for share in make_partition(model, [1] * ranks).shares:
                inside = {run.start for run in mlp_tiles(model, share.columns, q4_0)} - {share.columns.start}
                assert inside <= whole


def test_head_tiles_cover_the_vocabulary() -> None:
    runs = list(head_tiles(LLAMA_70B, "f32"))
    assert [runs[0].start, runs[-1].stop] == [0, 32000]
    assert all(a.stop == b.start for a, b in itertools.pairwise(runs))
    assert all(run.size * 8192 * 4 <= TILE_LIMIT_BYTES for run in runs)
    assert len(list(head_tiles(LLAMA_70B, "q4_0"))) < len(runs) / 6


def test_the_bytes_of_a_weight_are_those_of_a_packed_matrix() -> None:
    assert [weight_bytes(fmt) for fmt in WEIGHT_FORMATS[:6]] == [4, 2, 2, 1.0625, 0.5625, 0.625]
    for fmt in WEIGHT_FORMATS:
        with_air = {"q6_k": 53 / 52.5, "q3_k": 28 / 27.5}.get(fmt, 1)
        assert packed_bytes(fmt, 160, 768) == pytest.approx(160 * 768 * weight_bytes(fmt) * with_air, rel=1e-12)


def test_a_small_model_has_one_tile_a_block() -> None:
    smollm2 = config(hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64)
    f32 = ModelFormats.of("f32", 1).layers[0]
    for share in make_partition(smollm2, [1, 1, 1, 1]).shares:
        assert len(list(attention_tiles(smollm2, share, f32))) == 1
        assert list(mlp_tiles(smollm2, share.columns, f32)) == [Span(share.columns.start, share.columns.stop)]


@pytest.mark.parametrize("shares", [[], [0, 0], [1, -1], [float("nan"), 1], [float("inf")]])
def test_shares_that_make_no_sense_are_refused(shares: list[float]) -> None:
    with pytest.raises(InputError, match="--shares is"):
        make_partition(config(), shares)


@pytest.mark.parametrize("shares", [[1e308, 1e308], [10**400, 1], [float("inf"), 1]])
def test_shares_beyond_all_numbers_are_refused(shares: list[float]) -> None:
    with pytest.raises(InputError, match=r"--shares is .*; give one number of 0 or more for each rank"):
        make_partition(config(), shares)


def test_very_large_and_very_small_shares_are_proportions_too() -> None:
    for shares in ([1e308, 5e307], [1e308, 1], [5e-324, 5e-324], [1e308, 0, 5e-324]):
        assert sum(share.columns.size for share in make_partition(config(), shares).shares) == 96


def test_a_border_that_lies_half_way_is_the_same_on_every_python() -> None:
    """Ten times 0.1 is 1.0 or a little less, as the floats are added: borders must not depend on it."""
    plan = make_partition(config(heads=5, kv_heads=5), [0.1] * 10)
    assert [share.heads.start for share in plan.shares] == [(rank + 1) // 2 for rank in range(10)]


def test_other_shares_have_another_name() -> None:
    lists = ([1, 1], [1.0000001, 1], [1, 1.0000001], [0.1, 1], [1e-7, 1], [1234567, 1], [1234568, 1], [1e22, 1])
    described = [make_partition(config(), shares).describe() for shares in lists]
    assert len(set(described)) == len(lists)
    assert make_partition(config(), [4, 2.0, 0.5, -0.0]).describe() == "4,2,0.5,0"


def test_tiles_of_a_hostile_size_are_not_made_before_they_are_asked_for() -> None:
    vast = config(hidden=1, intermediate=2**31 - 1, heads=2**31 - 1, kv_heads=1, head_dim=2, vocab=2**31 - 1)
    share = make_partition(vast, [1]).shares[0]
    f32 = ModelFormats.of("f32", 1).layers[0]
    for tiles in (attention_tiles(vast, share, f32), mlp_tiles(vast, share.columns, f32), head_tiles(vast, "f32")):
        assert next(tiles)
