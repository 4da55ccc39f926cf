"""Sums over all ranks: every algorithm over every wire, what auto chooses, and `bench allreduce`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.launch import PROGRAMS, Launcher
from tests.support.ranks import Ranks
from tests.support.tiny_models import write_tiny_hf
from tpimpi.engine.overlap import largest_sum
from tpimpi.errors import StarError
from tpimpi.star import Links, Wire, choose, describe, parse_rule
from tpimpi.star.channel import BufferPool, Channel
from tpimpi.star.pieces import EAGER_BYTES, LARGE_PIECE_NUMBERS, MIN_PIECE_NUMBERS, PieceChannel, even_bounds
from tpimpi.star.tuning import LinkMeasurement, worth_timing, worth_timing_largest
from tpimpi.weights.find import hidden_of_slices
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.slow_but("1", "3")
def test_every_algorithm_over_every_wire(on_ranks: Ranks, ranks: int) -> None:
    result = on_ranks(ranks, str(PROGRAMS / "allreduce.py"))
    assert result.code == 0, result.err
    assert "all well" in result.out


# The wire


def test_bf16_on_the_wire_is_the_nearest_of_its_numbers() -> None:
    """1 + 2^-8 lies between 1 and 1 + 2^-7, and goes to the even one; a little more goes up."""
    values = np.array([1, -2.5, 1 + 2**-8, 1 + 2**-8 + 2**-20, np.inf, 0], np.float32)
    packed = Wire("bf16").pack(values)
    assert packed.nbytes == 12
    assert Wire("bf16").unpack(packed, 6).tolist() == [1, -2.5, 1, 1 + 2**-7, np.inf, 0]


def test_q8_0_on_the_wire_is_a_block_as_in_gguf() -> None:
    """An f16 scale and 32 int8 codes; 127 steps of 1 are exact."""
    values = np.arange(-31, 33, 2).astype(np.float32)
    values[0] = 127
    packed = Wire("q8_0").pack(values)
    assert packed[:2].tobytes() == np.float16(1).tobytes()
    assert packed[2:].view(np.int8).tolist() == values.tolist()
    assert Wire("q8_0").unpack(packed, 32).tolist() == values.tolist()


def test_what_a_wire_cannot_carry_is_said() -> None:
    with pytest.raises(StarError, match="not finite, which --wire q8_0 cannot carry; use --wire f32"):
        Wire("q8_0").pack(np.array([1, np.nan], np.float32))


@pytest.mark.parametrize(("count", "ranks"), [(1, 2), (8192, 4), (65_536, 4), (262_144, 8), (1 << 20, 3), (1 << 22, 2)])
@pytest.mark.parametrize("latency", [1e-3, 1e-6])
def test_pieces_are_all_of_a_sum_and_fit_into_what_is_sent_at_once(count: int, ranks: int, latency: float) -> None:
    class Alone(Channel):
        def __init__(self) -> None:
            self.rank, self.size, self.latency = 0, ranks, latency

    pieces = PieceChannel(Alone(), Wire())
    parts = pieces.parts(count)
    for cut in (pieces.cut(0, count), [piece for part in parts for piece in part]):
        assert [piece.start for piece in cut] == [0, *(piece.stop for piece in cut[:-1])] and cut[-1].stop == count
        assert all(4 * (piece.stop - piece.start) < EAGER_BYTES - 512 for piece in cut)
    # A part of which something is to flow while it is added comes in pieces of its own.
    assert all(len(part) > 1 for part in parts) == (
        count / ranks > (MIN_PIECE_NUMBERS if latency == 1e-3 else LARGE_PIECE_NUMBERS)
    )


def test_buffers_are_lent_to_one_at_a_time() -> None:
    buffers = BufferPool()
    first, second = buffers.take(100_000), buffers.take(100_000)
    assert not np.shares_memory(first, second)
    buffers.give(first[:-8])  # a message without its checksum
    again = buffers.take(70_000)
    assert again.size == 70_000 and np.shares_memory(first, again)
    assert not np.shares_memory(buffers.take(70_000), again)
    small = buffers.take(100)
    buffers.give(small)  # not worth keeping
    assert not np.shares_memory(buffers.take(100), small)
    buffers.give(second)
    buffers.clear()
    assert not np.shares_memory(buffers.take(100_000), second)


def test_parts_are_whole_blocks_as_equal_as_can_be() -> None:
    assert even_bounds(100, 3) == [0, 32, 64, 100]
    assert even_bounds(31, 4) == [0, 0, 0, 0, 31]
    assert even_bounds(4096, 4) == [0, 1024, 2048, 3072, 4096]


# What auto chooses

MS = 1e-3


def test_a_rule_names_the_algorithm_for_each_size() -> None:
    infinite = float("inf")
    assert parse_rule("ring") == [(infinite, "ring")]
    assert parse_rule("exchange:8192,star:65536,mesh") == [(8192, "exchange"), (65536, "star"), (infinite, "mesh")]


def test_with_much_latency_the_exchange_is_chosen_for_the_small_and_the_mesh_for_the_large() -> None:
    """2 ms one way, 37.5 MB/s: with four ranks a star takes 4 ms and 0.32 us a number, a mesh 4 ms and half of that."""
    sizes = (4096, 16_384, 65_536)
    star = [(n, 4 * MS + n * 0.32e-6) for n in sizes]
    mesh = [(n, 4 * MS + n * 0.16e-6) for n in sizes]
    exchange = [(n, 2 * MS + n * 0.32e-6) for n in sizes[:2]]
    rule = choose({"star": star, "exchange": exchange, "mesh": mesh}, 4)
    # A tenth below the star are the exchange up to 50,000 numbers and the mesh from 3200 on; below the mesh is the exchange
    # up to 12,500.
    assert rule == "exchange:8192,mesh"
    line = describe(rule, Links([2.1 * MS, 1.9 * MS], {"star": star}), 4)
    assert line == "allreduce: exchange up to 32 KiB, mesh above (latency 2.1 ms, 38 MB/s)"


def test_the_exchange_gives_way_to_a_faster_mesh_and_to_the_memory_that_it_takes() -> None:
    """6.25 MB/s, 0.3 ms: bytes are what takes the time, of which a mesh sends half."""
    sizes = (4096, 16_384, 65_536)
    star = [(n, 0.6 * MS + n * 1.9e-6) for n in sizes]
    exchange = [(n, 0.3 * MS + n * 1.6e-6) for n in sizes[:2]]
    assert (
        choose({"star": star, "exchange": exchange, "mesh": [(n, 0.6 * MS + n * 0.96e-6) for n in sizes]}, 4) == "mesh"
    )
    assert choose({"star": star, "exchange": exchange, "mesh": [(n, 1.1 * s) for n, s in star]}, 4).startswith(
        "exchange:32768,star"
    )


def test_the_star_is_preferred_where_nothing_is_clearly_faster() -> None:
    sizes = (4096, 16_384, 65_536)
    star = [(n, 4 * MS + n * 0.1e-6) for n in sizes]
    near = [(n, 0.95 * s) for n, s in star]
    assert choose({"star": star, "exchange": near[:2], "mesh": [(n, 2.1 * s) for n, s in star]}, 4) == "star"
    # Above what was timed the mesh sends less: taken unless it was slower, far above it unless it took twice the time.
    assert (
        choose({"star": star, "exchange": near[:2], "mesh": [(n, 1.9 * s) for n, s in star]}, 4) == "star:262144,mesh"
    )
    assert choose({"star": star, "exchange": near[:2], "mesh": near}, 4) == "star:65536,mesh"
    assert choose({"star": star, "exchange": near[:2], "mesh": near}, 2) == "star"


@pytest.mark.parametrize(
    ("mesh_ms", "rule"),
    [
        # faster than the star up to 1048576 numbers, though not at 65536
        (15.0, "star:131072,mesh"),
        # a little slower: up to there the star; what is larger was not timed
        (17.0, "star:1048576,mesh"),
        # slower in the end, and by more than makes up for what it sends less
        (26.0, "star:4194304,mesh"),
    ],
)
def test_the_largest_sums_are_what_was_timed_of_them(mesh_ms: float, rule: str) -> None:
    """Four hosts whose links are faster than their processors copy, as measured in an emulated home of 1 ms."""
    star = [(4096, 2.4 * MS), (16_384, 2.5 * MS), (65_536, 3.0 * MS), (1 << 20, 16.0 * MS)]
    mesh = [(4096, 2.7 * MS), (16_384, 2.8 * MS), (65_536, 3.3 * MS), (1 << 20, mesh_ms * MS)]
    assert choose({"star": star, "exchange": [(4096, 5 * MS), (16_384, 9 * MS)], "mesh": mesh}, 4) == rule


def test_the_hub_leaves_its_core_to_a_rank_that_is_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one core, an answer is there only after the hub has given way since it asked."""
    gave_way: list[bool] = []

    class OneCore:
        size, latency, answered = 2, None, 0

        def receive(self, *_: object) -> str:
            return "answer"

        def send_to(self, *_: object) -> str:
            gave_way.clear()
            return "question"

        def wait(self, *_: object) -> None:
            pass

        def test(self, _: object) -> bool:
            self.answered += bool(gave_way)
            return bool(gave_way)

    monkeypatch.setattr("os.sched_yield", lambda: gave_way.append(True))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waited for an answer without giving way"))
    microseconds = itertools.count()  # a clock of its own: another process may take the core for milliseconds
    monkeypatch.setattr("time.monotonic", lambda: next(microseconds) * 1e-6)
    channel = OneCore()
    (latency,) = LinkMeasurement(channel, lambda *_: None)._latencies()  # type: ignore[arg-type]
    assert channel.answered >= 3 and latency < 1


@pytest.mark.parametrize(("faster", "ranks"), [(0.96, 4), (1.08, 4), (0.96, 2), (1.02, 2)])
def test_the_largest_counts_whatever_its_size(faster: float, ranks: int) -> None:
    """196608 numbers, as half a chunk of 64 positions of a model of 3072 has: no power of two."""
    star = [(4096, 2.4 * MS), (16_384, 2.5 * MS), (65_536, 3.0 * MS), (196_608, 8.0 * MS)]
    mesh = [(4096, 2.7 * MS), (16_384, 2.8 * MS), (65_536, 3.2 * MS), (196_608, 8.0 * MS * faster)]
    rule = choose({"star": star, "exchange": [(4096, 5 * MS), (16_384, 9 * MS)], "mesh": mesh}, ranks)
    chosen = {size: next(name for most, name in parse_rule(rule) if size <= most) for size in (65_536, 196_608)}
    assert chosen == {65_536: "star", 196_608: "mesh" if faster < 1 else "star"}


def test_of_two_ranks_the_exchange_may_be_what_the_largest_take() -> None:
    star = [(4096, 2.4 * MS), (65_536, 3.0 * MS), (196_608, 8.0 * MS)]
    near = [(n, 1.02 * s) for n, s in star]
    exchange = [(4096, 1.2 * MS), (65_536, 2.0 * MS), (196_608, 7.6 * MS)]
    rule = choose({"star": star, "exchange": exchange, "mesh": near}, 2)
    assert next(name for most, name in parse_rule(rule) if most >= 196_608) == "exchange"


def test_what_is_hopeless_is_not_timed_with_the_largest() -> None:
    """Two clients of a slow access point reach rank 0 well, and one another badly: the mesh took 0.3 s of 65536."""
    star = [(4096, 2.4 * MS), (16_384, 2.5 * MS), (65_536, 3.0 * MS)]
    mesh = [(4096, 20 * MS), (16_384, 80 * MS), (65_536, 300 * MS)]
    assert worth_timing_largest({"star": star, "mesh": mesh}, 1 << 18, ["star", "mesh"], 0.6) == ([], 0)
    near = [(n, 1.1 * s) for n, s in star]
    found = worth_timing_largest(
        {"star": star, "mesh": near, "exchange": mesh}, 1 << 18, ["star", "exchange", "mesh"], 0.6
    )
    assert found == (["star", "mesh"], 4)


@pytest.mark.parametrize(
    ("star_ms", "largest", "turns"),
    [
        (3.0, 1 << 20, 4),  # 3.0 + 15 * 0.67 ms: 13 ms for the largest
        (4.5, 1 << 20, 2),
        (6.0, 1 << 20, 0),  # 76 ms: once, of which nothing would be counted
        (9.0, 1 << 20, 0),  # over 100 ms each: it is the links that take the time
        (9.0, 1 << 17, 4),
        (3.0, 65_536, 0),  # timed already
    ],
)
def test_the_largest_is_timed_where_links_are_fast(star_ms: float, largest: int, turns: int) -> None:
    star = [(4096, 2.4 * MS), (16_384, 2.5 * MS), (65_536, star_ms * MS)]
    names = ["star", "mesh"]
    assert worth_timing_largest({"star": star, "mesh": star}, largest, names, 0.6) == (names if turns else [], turns)
    slow = star[:2]  # the links were too slow for 65536
    assert worth_timing_largest({"star": slow, "mesh": slow}, largest, names, 0.6) == ([], 0)


@pytest.mark.parametrize("took", [0.001, 0.025, 0.08, 0.4])
def test_measuring_takes_well_under_a_second_where_links_are_slow(took: float) -> None:
    """A star of 16384 numbers took so long, because of its bytes: then all that is timed, star, exchange and mesh, with the
    mesh as long as the star at worst, takes under 1.5 s where that star takes 0.4 s, and else under a second."""
    sizes, repeats = worth_timing(took)
    stars = repeats * sum(took * size / 16_384 for size in sizes)
    exchanges = repeats * sum(took * size / 16_384 for size in sizes if size <= 32_768)
    assert took + 2 * stars + exchanges < (1.5 if took == 0.4 else 1.0)


@pytest.mark.parametrize("sizes", [(1024, 4096), (4096, 16_384)])
def test_what_is_chosen_where_only_small_sums_were_timed(sizes: tuple[int, int]) -> None:
    """1.25 MB/s, 2 ms: of 1024 numbers the mesh takes 8.9 ms, and the exchange 11.8; of fewer nothing is known."""
    star = [(n, 4 * MS + n * 9.6e-6) for n in sizes]
    mesh = [(n, 4 * MS + n * 4.8e-6) for n in sizes]
    exchange = [(n, 2 * MS + n * 9.6e-6) for n in sizes]
    assert choose({"star": star, "exchange": exchange, "mesh": mesh}, 4) == "mesh"


def test_two_ranks_exchange_whatever_the_size() -> None:
    sizes = (4096, 16_384, 65_536)
    star = [(n, 4 * MS + n * 0.1e-6) for n in sizes]
    exchange = [(n, 2 * MS + n * 0.05e-6) for n in sizes]
    assert choose({"star": star, "exchange": exchange, "mesh": star}, 2) == "exchange"


# The command line


def test_bench_prints_and_writes_what_it_measured(on_ranks: Ranks, tmp_path: Path) -> None:
    options = ["--sizes", "64,20000", "--repeats", "2", "--wire", "f32,q8_0", "--json", str(tmp_path / "found.json")]
    options += ["--plot", str(tmp_path / "found.png")]
    result = on_ranks(3, "-m", "tpimpi", "bench", "allreduce", *options)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["hosts"]) == 3 and len(found["latencies"]) == 2 and set(found["rules"]) == {"f32", "q8_0"}
    assert [(row["wire"], row["numbers"]) for row in found["rows"]] == [
        *(("f32", 64), ("f32", 20000)),
        *(("q8_0", 64), ("q8_0", 20000)),
    ]
    algorithms = {"star", "exchange", "mesh", "ring", "tree", "library"}
    for row in found["rows"]:
        assert set(row["seconds"]) == (algorithms if row["wire"] == "f32" else algorithms - {"library"})
        assert row["star_by_two_hops"] == row["seconds"]["star"] / row["two_hops"] > 0
        assert row["auto"] in algorithms
    assert "two hops" in result.out and "20000" in result.out
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_bench_of_one_process_and_bad_sizes_are_refused(tpimpi, mpirun: Launcher) -> None:
    result = tpimpi("bench", "allreduce")
    assert result.code == 2
    assert result.our_lines == ["tpimpi: bench allreduce measures between ranks; start it with mpirun -np 2, or more"]
    result = mpirun(2, "-m", "tpimpi", "bench", "allreduce", "--sizes", "0")
    assert result.code == 2
    assert "--sizes has '0', must be a whole number from 1" in result.err


def test_the_library_adds_f32_alone(mpirun: Launcher, tiny: Path, cache: dict[str, str]) -> None:
    options = ["--model", str(tiny), "--prompt", "x", "--allreduce", "library", "--wire", "bf16"]
    result = mpirun(2, "-m", "tpimpi", *options, env=cache)
    assert result.code == 2
    assert len(result.our_lines) == 1, result.err
    assert "--allreduce library adds f32 alone, and --wire is bf16" in result.our_lines[0]


@pytest.mark.slow
def test_what_auto_chose_is_said_and_gives_the_stars_text(
    on_ranks: Ranks, smollm2: Path, cache: dict[str, str]
) -> None:
    options = ["--model", str(smollm2), "--format", "f32", "--max-tokens", "24", "--prompt", "Why is the sky blue?"]
    said = on_ranks(3, "-m", "tpimpi", *options, env=cache)
    assert said.code == 0, said.err
    assert "allreduce: " in said.err and " (latency " in said.err
    for more in (["--allreduce", "star"], ["--allreduce", "exchange"], ["--wire", "bf16", "--allreduce", "star"]):
        other = on_ranks(3, "-m", "tpimpi", *options, *more, "--quiet", env=cache)
        assert (other.code, other.out.strip()) == (0, said.out.strip()), other.err
        assert "allreduce: " not in other.err


def test_the_largest_sum_of_a_run_is_that_of_half_a_chunk(tmp_path: Path) -> None:
    """What `auto` times: 64 of 128 positions at once where there are others, of the hidden size that the slices name."""
    with open_source(write_tiny_hf(tmp_path / "model", "llama-3.1")) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), tmp_path)
    assert hidden_of_slices(str(tmp_path), 2) == 64
    assert hidden_of_slices(str(tmp_path), 3) == 0
    assert (largest_sum(64, 2), largest_sum(64, 1)) == (64 * 64, 128 * 64)


# A chunk in two halves


@pytest.mark.parametrize("kind", ["llama-3.1", "glm4-moe"])
def test_a_long_chunk_in_halves_gives_the_logits_of_transformers(on_ranks: Ranks, kind: str, tmp_path: Path) -> None:
    """40 positions at once, then 33 of them: the first half is computed while the sum of the second is under way. Experts
    compute both halves at once; which of them are in memory changes no bit, nor does a chunk that is not halved."""
    import torch
    from transformers import AutoModelForCausalLM

    path = write_tiny_hf(tmp_path / "model", kind)
    (path / "tokenizer.json").write_text("{}")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids = np.random.default_rng(1).integers(3, model.config.vocab_size, 73).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with open_source(path) as source:
        slice_model(
            source, make_partition(source.config, [2, 1, 1]), choose_formats(source, "f32"), tmp_path / "slices"
        )
    job = {"slices": str(tmp_path / "slices"), "ids": ids, "chunks": [40, 33]}
    jobs = [
        {**job, "name": "all"},
        {**job, "name": "window", "window": 2},
        {**job, "name": "mesh", "allreduce": "exchange:64,mesh"},
    ]
    if kind == "glm4-moe":
        jobs = [{**job, "backend": "native"} for job in jobs]
        jobs += [{**jobs[0], "name": f"pins {part}", "pins": part, "predict": 2} for part in (0, 0.4)]
        jobs += [{**jobs[0], "name": "whole", "chunks": [31, 31, 11]}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    result = on_ranks(3, str(PROGRAMS / "logits.py"), str(tmp_path / "jobs.json"), str(tmp_path))
    assert result.code == 0, result.err
    found = np.load(tmp_path / "all.npy")
    assert np.abs(found - expected).max() < 2e-4
    for job in jobs:
        np.testing.assert_array_equal(np.load(tmp_path / f"{job['name']}.npy"), found)
    for chunks in {tuple(job["chunks"]) for job in jobs}:
        alike = [job["name"] for job in jobs if tuple(job["chunks"]) == chunks]
        digests = {(tmp_path / f"{name}-rank{rank}.txt").read_text() for name in alike for rank in range(3)}
        assert len(digests) == 1, "hidden vectors differ"
