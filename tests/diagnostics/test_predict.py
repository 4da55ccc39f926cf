"""Predictions, worked out by hand from the planner's formulas; and the shares that take least."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tests.support.prediction import CONFIG, FORMATS, GB, WORKLOAD, predictor, speed
from tpimpi.diagnostics.options import Workload
from tpimpi.diagnostics.planner.costs import LinearCost, Measured
from tpimpi.diagnostics.planner.loads import LayerLoad, Loads
from tpimpi.diagnostics.planner.predict import Predictor, chunks
from tpimpi.diagnostics.planner.prediction import Prediction
from tpimpi.diagnostics.planner.shares import MAX_WEIGHT, best_shares
from tpimpi.engine.budget import RESERVE_BYTES
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.weights.slices.layout import slice_records
from tpimpi.weights.slices.partition import make_partition

# 16 heads of 64 and 2048 columns, so that shares of a quarter, a half or a sixteenth are whole; tiles are multiples of 4096.
ATTN, MLP, HEAD = 4 * 1024 * 1024 * 2, 3 * 1024 * 2048 * 2, 4096 * 1024 * 2  # bytes: of a layer, and of the head


# Lines


def test_a_line_goes_through_both_points() -> None:
    line = LinearCost.fit((100, 3.0), (300, 7.0))
    assert (line.fixed, line.per_byte) == (1.0, 0.02)
    assert LinearCost.fit((300, 7.0), (100, 3.0)) == line


def test_a_line_is_never_negative() -> None:
    assert LinearCost.fit((100, 1.0), (300, 6.0)) == LinearCost(0.0, 0.02)  # it would begin at -1.5
    assert LinearCost.fit((100, 5.0), (300, 3.0)) == LinearCost(4.0, 0.0)
    assert LinearCost.fit((100, 5.0), (100, 3.0)) == LinearCost(4.0, 0.0)


# What a rank has to go through


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
@pytest.mark.parametrize("fmt", ["f32", "q4_0"])
def test_loads_are_what_the_slices_hold(weights: list[float], fmt: str) -> None:
    formats = ModelFormats.of(fmt, CONFIG.layers)
    plan = make_partition(CONFIG, weights)
    for rank, share in enumerate(plan.shares):
        load = Loads(CONFIG, formats).load(share, rank)
        records = [
            r for r in slice_records(CONFIG, share, rank, formats, {}) if r.block.kind in ("attn", "mlp", "head")
        ]
        assert load.tiles == sum(record.nbytes for record in records)
        assert load.head == sum(record.nbytes for record in records if record.block.kind == "head")


def test_layers_of_different_formats_are_counted_each() -> None:
    mixed = ModelFormats((*FORMATS.layers[:7], *ModelFormats.of("f32", 3).layers), "bf16", "bf16")
    load = Loads(CONFIG, mixed).load(make_partition(CONFIG, [1.0]).shares[0], 0)
    assert load.layers == (LayerLoad(7, ATTN, MLP), LayerLoad(3, 2 * ATTN, 2 * MLP))


# Times


def test_one_rank_takes_its_layers_and_the_head() -> None:
    found = predictor(speed(2.0, 0.001), head=3.0).predict([1.0])
    assert found.compute_s == pytest.approx(10 * (0.001 + 2.0 * (ATTN + MLP) / GB))
    assert found.head_s == pytest.approx(3.0 * HEAD / GB)
    assert found.star_s == 0
    assert found.s_per_token == pytest.approx(found.compute_s + found.head_s)
    assert (found.limit, found.limit_rank) == ("compute", 0)
    assert found.first_token_s == pytest.approx(4 * found.compute_s + found.head_s)


def test_each_block_waits_for_its_slowest_rank_and_an_allreduce() -> None:
    found = predictor(speed(1.0), speed(3.0, 0.002), allreduce=0.001).predict([3.0, 1.0])
    # A block of rank 0: 3/4 of its bytes. Of rank 1: 1/4 of them three times as slow, and half of the fixed part: slower.
    attention, mlp = (max(0.75 * size / GB, 0.25 * 3 * size / GB + 0.001) for size in (ATTN, MLP))
    assert found.compute_s == pytest.approx(10 * (attention + mlp))
    assert found.star_s == pytest.approx(0.001 * (2 * 10 + 0.5))
    assert found.limit_rank == 1
    # The allreduces of a chunk were measured to take three times as long.
    slowest = [max(4 * 0.75 * size / GB, 4 * (0.25 * 3 * size / GB + 0.001)) for size in (ATTN, MLP)]
    assert found.first_token_s == pytest.approx(10 * sum(slowest) + 0.003 * 20.5)


@pytest.mark.parametrize(
    ("more", "sums", "small"),
    [
        ({"parallel_blocks": True}, 10, 0),  # one sum a layer
        (
            {"qk_norm": True, "qk_norm_over_all": True},
            20,
            10,
        ),  # and one of two numbers a position, however many there are
    ],
    ids=["parallel", "normed over all heads"],
)
def test_the_star_makes_the_sums_that_a_layer_has(more: dict[str, Any], sums: int, small: int) -> None:
    workload = dataclasses.replace(WORKLOAD, config=dataclasses.replace(CONFIG, **more))
    found = predictor(speed(1.0), speed(1.0), allreduce=0.001, workload=workload).predict([1.0, 1.0])
    assert found.star_s == pytest.approx(0.001 * (sums + small + 0.5))
    star_of_chunk = found.first_token_s - 4 * found.compute_s  # 16 positions take four times as long to compute
    assert star_of_chunk == pytest.approx(0.003 * (sums + 0.5) + 0.001 * small)


def test_no_rank_waits_between_parallel_blocks() -> None:
    """The first rank takes longer for attention, by its fixed part, the second for the MLP: they meet afterwards."""
    workload = dataclasses.replace(WORKLOAD, config=dataclasses.replace(CONFIG, parallel_blocks=True))
    found = predictor(speed(1.0, 0.02), speed(3.0), workload=workload).predict([1.0, 1.0])
    layer = (ATTN + MLP) / 2 / GB
    assert found.compute_s == pytest.approx(10 * max(0.02 + layer, 3 * layer))


def test_the_star_limits_where_it_takes_more_than_all_else() -> None:
    assert predictor(speed(), speed(), allreduce=1.0).predict([1, 1]).limit == "star"


def test_a_rank_that_is_stopped_takes_its_processor_time() -> None:
    """Half a processor, and no waiting: twice as long. With as long waits: no longer than these."""
    alone = predictor(speed(1.0, processors=0.5)).predict([1.0])
    assert alone.s_per_token == pytest.approx(2 * alone.compute_s) and alone.limit == "processor"
    waiting = predictor(speed(1.0, processors=0.5), speed(1.0), allreduce=0.1).predict([1.0, 1.0])
    assert waiting.s_per_token == pytest.approx(waiting.compute_s + waiting.star_s) and waiting.limit == "star"


def test_a_rank_that_streams_takes_its_reading_if_that_is_longer() -> None:
    tiles = 10 * (ATTN + MLP) + HEAD
    ranks = [speed(1.0, disk_bytes_per_s=10e6)]
    roomy = predictor(*ranks).predict([1.0])
    assert roomy.streamed == (0,) and roomy.disk_s == 0
    memory = (roomy.memory[0] - 40_000_000,)
    tight = predictor(*ranks, workload=dataclasses.replace(WORKLOAD, memory=memory)).predict([1.0])
    assert 40_000_000 < tight.streamed[0] < tiles
    assert tight.s_per_token == pytest.approx(tight.streamed[0] / 10e6) and tight.limit == "disk"
    assert tight.memory[0] <= memory[0]
    assert predictor(*ranks, workload=dataclasses.replace(WORKLOAD, window=2)).predict([1.0]).streamed == (tiles,)
    assert predictor(*ranks, workload=dataclasses.replace(WORKLOAD, window="all")).predict([1.0]).streamed == (0,)


def test_memory_is_what_an_engine_reckons() -> None:
    found = predictor(speed()).predict([1.0])
    tiles, cache = 10 * (ATTN + MLP) + HEAD, 2 * 10 * 16 * 128 * 64 * 2
    assert found.memory[0] > 100_000_000 + RESERVE_BYTES + tiles + cache
    assert found.memory[0] < 100_000_000 + RESERVE_BYTES + tiles + cache + 20_000_000  # to work with


def test_memory_for_messages_depends_on_the_allreduce() -> None:
    """With exchange every rank gets the partials of all, as the hub does with any."""

    def taken(rule: str) -> tuple[int, ...]:
        star = predictor(*[speed()] * 5)
        return Predictor(star.workload, dataclasses.replace(star.measured, allreduce=rule)).predict([1] * 5).memory

    chunk = 128 * 1024 * 4  # bytes of hidden vectors; held twice while they are received, from 3 ranks more
    more = [b - a for a, b in zip(taken("star"), taken("star:512,exchange"), strict=True)]
    assert more == [0, *[2 * 3 * chunk] * 4]
    assert taken("star") == taken("exchange:512,star")


def test_too_little_memory_is_said() -> None:
    found = predictor(speed(), speed(), workload=dataclasses.replace(WORKLOAD, memory=(8 * GB, 10**8))).predict([1, 1])
    assert found.problem.startswith("r1 vm has 100 MB, this rank needs at least ")
    assert math.isinf(found.s_per_token) and found.limit == "memory"


def test_a_prompt_goes_by_chunks() -> None:
    assert list(chunks(16, 128)) == [16]
    assert list(chunks(300, 128)) == [128, 128, 44]
    long = dataclasses.replace(WORKLOAD, prompt=300, context=400)
    measured = Measured((speed(1.0),), 128, 0.0, 0.0, LinearCost(0, 0), LinearCost(0, 0))
    found = Predictor(long, measured).predict([1.0])
    # 44 positions lie between one, at 1, and 128, at 4 times as long.
    assert found.first_token_s == pytest.approx(found.compute_s * (4 + 4 + 1 + 3 * 43 / 127))


def test_more_of_anything_never_takes_less() -> None:
    base = predictor(speed(1.0), speed(1.0), allreduce=0.001, head=1.0).predict([1, 1])
    slower = [
        predictor(speed(1.5), speed(1.0), allreduce=0.001, head=1.0),
        predictor(speed(1.0, 0.001), speed(1.0), allreduce=0.001, head=1.0),
        predictor(speed(1.0), speed(1.0), allreduce=0.002, head=1.0),
        predictor(speed(1.0), speed(1.0), allreduce=0.001, head=2.0),
        predictor(speed(1.0, processors=0.2), speed(1.0), allreduce=0.001, head=1.0),
    ]
    for other in slower:
        found = other.predict([1, 1])
        assert found.s_per_token > base.s_per_token
        assert found.first_token_s > base.first_token_s


# The best shares


def test_equal_ranks_get_equal_shares() -> None:
    found = best_shares(predictor(*[speed(1.0)] * 4, allreduce=0.001), 4)
    assert found.shares == "1,1,1,1"


def test_nearly_equal_ranks_too() -> None:
    """So that noise does not have a model sliced anew."""
    assert best_shares(predictor(speed(1.0), speed(1.02), speed(0.99), speed(1.01)), 4).shares == "1,1,1,1"
    assert best_shares(predictor(speed(1.0), speed(1.09)), 2).shares == "1,1"
    assert best_shares(predictor(speed(1.0), speed(1.4)), 2).shares != "1,1"


def test_a_rank_twice_as_fast_gets_twice_as_much() -> None:
    assert best_shares(predictor(speed(2.0), speed(1.0), speed(2.0)), 3).shares == "1,2,1"


def test_shares_follow_speeds() -> None:
    found = best_shares(predictor(speed(1.0), speed(2.0), speed(4.0), speed(8.0)), 4)
    # Borders are rounded to whole heads: 16 of them in 8:4:2:1 parts cannot be had better.
    assert found.shares == "8,4,2,1"
    assert max(map(int, found.shares.split(","))) <= MAX_WEIGHT


def test_rank_0_gets_less_where_its_processor_has_the_head_too() -> None:
    ranks = [speed(1.0, processors=0.5), speed(1.0, processors=0.5)]
    shares = best_shares(predictor(*ranks, head=8.0), 2).shares
    first, second = map(int, shares.split(","))
    assert first < second
    # Processor time: (10 layers of x + 8 heads) = 10 layers of (1 - x); layers are 20 MB, the head 8.4: x is about 1/3.
    layers, head = 10 * (ATTN + MLP), 8 * HEAD
    assert first / (first + second) == pytest.approx((layers - head) / 2 / layers, abs=0.04)


def test_a_rank_that_slows_the_others_down_gets_nothing() -> None:
    found = best_shares(predictor(speed(1.0), speed(1.0), speed(1000.0)), 3)
    assert found.shares == "1,1,0"


def test_a_rank_whose_memory_is_small_gets_what_it_can_pin() -> None:
    """Rank 1 would have to stream from a slow disk what is beyond its memory."""
    ranks = [speed(1.0, disk_bytes_per_s=20e6), speed(1.0, disk_bytes_per_s=20e6)]
    roomy = predictor(*ranks).predict([1, 1])
    memory = (8 * GB, roomy.memory[1] - 50_000_000)
    tight = predictor(*ranks, workload=dataclasses.replace(WORKLOAD, memory=memory))
    equal, best = tight.predict([1, 1]), best_shares(tight, 2)
    assert equal.limit == "disk" and equal.streamed[1] > 0
    assert best.streamed == (0, 0)
    assert best.s_per_token < 0.5 * equal.s_per_token


def test_the_best_is_never_worse_than_equal() -> None:
    import random

    random.seed(1)
    for _ in range(20):
        ranks = [speed(random.uniform(0.3, 5), random.uniform(0, 0.002)) for _ in range(random.randint(2, 6))]
        one = predictor(*ranks, allreduce=0.001, head=1.0)
        equal = one.predict([1] * len(ranks))
        best = best_shares(one, len(ranks))
        assert best.s_per_token <= equal.s_per_token
        ideal = sum(1 / rank.token.wall.per_byte for rank in ranks)
        bound = 10 * (ATTN + MLP) / ideal  # the fastest that so many together could be, were there nothing else
        assert best.compute_s >= bound


def test_sequences_at_once_share_what_is_read_and_waited_for() -> None:
    """Of 16: computing takes four times as long, each sum three times (see support/prediction), and reading as long."""
    for disk, ranks in ((0.0, 1), (0.0, 2), (50e6, 1)):
        work = dataclasses.replace(WORKLOAD, window=2 if disk else None, parallel=16)

        def predicted(workload: Workload, disk: float = disk, ranks: int = ranks) -> Prediction:
            speeds = [speed(disk_bytes_per_s=disk)] * ranks
            return predictor(*speeds, allreduce=0.001, head=1.0, workload=workload).predict([1.0] * ranks)

        plan, alone = predicted(work), predicted(dataclasses.replace(work, parallel=1))
        assert alone.tokens_per_s == 0 and alone.s_per_token == plan.s_per_token
        assert plan.limit == ("disk" if disk else "compute")
        blocks = plan.disk_s if disk else 4 * plan.compute_s + 3 * plan.star_s
        assert 16 / plan.tokens_per_s == pytest.approx(blocks + 4 * plan.head_s)


def test_sequences_that_have_no_memory_have_no_rate() -> None:
    work = dataclasses.replace(WORKLOAD, memory=(400_000_000,), parallel=64, context=4096)
    found = predictor(speed(disk_bytes_per_s=1e9), workload=work).predict([1.0])
    assert found.tokens_per_s == 0 and not found.problem


def test_drafts_pay_where_a_pass_costs_little_more_for_several_rows() -> None:
    """Of 16 rows computing takes four times as long and reading as long (see support/prediction), so a streamed pass is as
    long for 16 rows as for one, and gives (1 - a**16) / (1 - a) tokens; where rows cost more than they bring, none pays."""
    streamed = dataclasses.replace(WORKLOAD, window=2, accepted=0.6)
    found = predictor(speed(disk_bytes_per_s=50e6), workload=streamed).predict([1.0])
    assert found.limit == "disk" and found.draft == 15
    assert found.s_per_token / found.drafted_s_per_token == pytest.approx((1 - 0.6**16) / 0.4, rel=0.01)
    never = predictor(speed(), workload=dataclasses.replace(WORKLOAD, accepted=0.0)).predict([1.0])
    assert (never.draft, never.drafted_s_per_token) == (0, never.s_per_token)
    always = predictor(speed(), workload=dataclasses.replace(WORKLOAD, accepted=1.0)).predict([1.0])
    assert always.draft == 15 and always.s_per_token / always.drafted_s_per_token == pytest.approx(4.0, rel=0.05)
    assert predictor(speed()).predict([1.0]).drafted_s_per_token == 0


def test_a_draft_model_takes_time_and_memory_which_a_plan_counts() -> None:
    """One of a layer as the model's, without a head to speak of: drafting a token takes a tenth of what layers take."""
    small = CONFIG.with_layers(1)
    draft = (small, ModelFormats.of("bf16", 1))

    def found(of: tuple[ModelConfig, ModelFormats] | None, **more: object) -> Prediction:
        workload = dataclasses.replace(WORKLOAD, accepted=0.6, draft=of, **more)  # type: ignore[arg-type]
        return predictor(speed(disk_bytes_per_s=50e6), workload=workload).predict([1.0])

    free, drafted = found(None, window=2), found(draft, window=2)
    assert drafted.s_per_token == free.s_per_token and free.drafted_s_per_token < drafted.drafted_s_per_token
    of_text = predictor(speed(disk_bytes_per_s=50e6), workload=dataclasses.replace(WORKLOAD, window=2))
    load = of_text.loads.load(make_partition(CONFIG, [1.0]).shares[0], 0)
    each = (load.tiles - load.head) / 10 / GB  # at 1 s a GB
    pass_s = free.s_per_token  # of as many rows as these, as it waits for the disk
    wanted = min((pass_s + n * each) / sum(0.6**i for i in range(n + 1)) for n in range(16))
    assert drafted.drafted_s_per_token == pytest.approx(wanted, rel=0.02)
    # Where tiles miss the memory that it takes, a pass waits for the disk, and none is drafted.
    half = (CONFIG.with_layers(5), ModelFormats.of("bf16", 5))
    needs = of_text.needs(make_partition(CONFIG, [1.0]), 0, load)
    short = found(half, memory=(needs.most,))
    assert short.streamed == (0,) and short.drafted_streamed[0] > 4 * (ATTN + MLP)
    assert (short.draft, short.drafted_s_per_token) == (0, short.s_per_token)
    assert found(half, memory=(needs.most + load.tiles,)).drafted_streamed == (0,)
    assert found((CONFIG, FORMATS), memory=(needs.most,)).draft == 0, "there is no room for it at all"
