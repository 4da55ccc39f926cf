"""Audits: honest ranks pass whatever they compute with, and each kind of fault is found and named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.launch import PROGRAMS
from tests.support.ranks import Ranks
from tests.support.tiny_models import write_tiny_hf
from tpimpi._native import levels
from tpimpi.engine.audit import AuditRequest, answer_parts, one_row, receive_request, split_answer
from tpimpi.engine.model import block_order
from tpimpi.engine.readers import Readers
from tpimpi.engine.watch import AuditedSum, Watch, sums_of
from tpimpi.engine.window import Window
from tpimpi.errors import DamagedMemoryError, SliceError, StarError
from tpimpi.models.kv.cache import StepRows
from tpimpi.weights.copies import SliceCopies, SourceCopies, open_copies, records_of_rank
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

RANKS = 3
KINDS = ("llama-bias", "mqa", "mistral-window", "gemma3", "olmo2", "olmo3", "cohere2", "exaone4", "granite")
MIXTURES = ("qwen3-moe", "gpt-oss", "glm4-moe")
CHUNKS = [40, 9, 1, 1, 1, 1, 1, 1]  # a long chunk in halves, a short one, tokens one by one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audits")


def sliced(folder: Path, kind: str, fmt: str = "f32") -> dict[str, str]:
    """Model and slices of a kind, made once, as a job has them."""
    path, slices = folder / "models" / kind, folder / fmt / kind
    if not path.exists():
        write_tiny_hf(path, kind)
        (path / "tokenizer.json").write_text("{}")
    if not slices.exists():
        with open_source(path) as source:
            formats = choose_formats(source, fmt)
            slice_model(source, make_partition(source.config, [1] * RANKS), formats, slices)
    return {"model": str(path), "slices": str(slices)}


def run(on_ranks: Ranks, jobs: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """What rank 0 wrote of each job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = on_ranks(RANKS, str(PROGRAMS / "audits.py"), str(folder / "jobs.json"), str(folder))
    assert result.code == 0, result.err
    return {job["name"]: json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs}


def test_honest_ranks_pass_and_answers_are_the_same(on_ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    """Of every kind of layer; and kernels of other levels, other wires, streamed tiles and batches."""
    there = levels()
    other = [there[0], there[-1], there[len(there) // 2]]
    variants: list[dict[str, Any]] = [
        *({"kind": kind} for kind in (*KINDS, *MIXTURES)),
        {"kind": "llama-bias", "kernels": other, "fmt": "q4_0"},
        {"kind": "glm4-moe", "kernels": other, "fmt": "q8_0"},
        {"kind": "olmo2", "kernels": other, "fmt": "bf16"},
        {"kind": "llama-bias", "wire": "q8_0"},
        {"kind": "olmo2", "wire": "bf16", "allreduce": "exchange"},
        {"kind": "llama-bias", "allreduce": "mesh"},
        {"kind": "llama-bias", "wire": "q8_0", "allreduce": "mesh"},
        {"kind": "olmo2", "wire": "bf16", "allreduce": "mesh"},
        {"kind": "mistral-window", "batch": True, "allreduce": "mesh"},
        {"kind": "qwen3-moe", "pins": 0.0},
        {"kind": "gemma3", "pins": 0.5},
        {"kind": "llama-bias", "batch": True},
        {"kind": "mistral-window", "batch": True},
        {"kind": "olmo3", "batch": True},
    ]
    jobs = []
    for number, variant in enumerate(variants):
        of = sliced(folder, variant["kind"], variant.get("fmt", "f32")) | variant | {"chunks": CHUNKS}
        jobs += [of | {"name": f"{number}-audited", "rate": 1.0}, of | {"name": f"{number}-plain", "rate": 0.0}]
    found = run(on_ranks, jobs, tmp_path)
    for number, variant in enumerate(variants):
        audited, plain = found[f"{number}-audited"], found[f"{number}-plain"]
        assert audited["said"] is None, (variant, audited)
        assert audited["digest"] == plain["digest"], f"audits change the answer: {variant}"
        figures = audited["figures"]
        assert figures["audits"] == figures["steps"] == len(CHUNKS), (variant, figures)
        assert figures["tiles"] and figures["against"] == "the model's file", (variant, figures)
        assert plain["figures"] is None


def test_faults_are_found_and_named(on_ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    jobs = []
    for kind in ("llama-bias", "olmo2", "cohere2", "glm4-moe"):
        of = sliced(folder, kind) | {"chunks": [9, *[1] * 40], "times": 6, "rate": 1.0}
        jobs += [of | {"name": f"{kind}-sums", "fault": "sums"}, of | {"name": f"{kind}-kernel", "fault": "kernel"}]
    llama = sliced(folder, "llama-bias") | {"chunks": [9, *[1] * 40], "times": 6, "rate": 1.0}
    jobs.append(llama | {"name": "scaled", "fault": "scaled"})
    jobs.append(llama | {"name": "slices", "fault": "kernel", "model": None})
    jobs.append(llama | {"name": "exchange", "fault": "sums", "allreduce": "exchange"})
    found = run(on_ranks, jobs, tmp_path)
    for job in jobs:
        said = found[job["name"]]["said"]
        assert said is not None, f"not found: {job['name']}, {found[job['name']]['figures']}"
        assert f"r{RANKS - 1} " in said and "layers/" in said, said
        what = (
            "sent into the sum of layer" if job["fault"] == "sums" else "gives other numbers there than rank 0 computes"
        )
        assert what in said, (job["name"], said)
    assert "computes from the slices on rank 0's disk" in found["slices"]["said"]


def test_faults_in_a_mesh_are_found(on_ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    """Of three ranks the last one is at fault. Rank 0 adds the first of 27 rows, and nothing of a single one."""
    llama = sliced(folder, "llama-bias") | {"rate": 1.0, "allreduce": "mesh", "times": 40}
    jobs = [
        llama | {"name": "rows", "fault": "hub", "chunks": [27]},
        llama | {"name": "token", "fault": "sums", "chunks": [1] * 9},
        llama | {"name": "adds", "fault": "adds", "chunks": [1] * 9},
        llama | {"name": "others", "fault": "others", "chunks": [1] * 9},
        llama | {"name": "wire", "fault": "others", "chunks": [1] * 9, "wire": "q8_0"},
        sliced(folder, "olmo2") | {"rate": 1.0, "allreduce": "mesh", "times": 40, "name": "squares", "fault": "adds"}
        | {"chunks": [1] * 9},
    ]  # fmt: skip
    found = run(on_ranks, jobs, tmp_path)
    part = r"audit: what r{}(?: \S+)? sent as its part of the sum of layer \d.* added wrongly, or r{}(?: \S+)? sent it"
    by = {
        "rows": r"audit: what r2(?: \S+)? sent into the sum of layer \d",
        "token": part.format("[12]", "[12]"),
        "adds": part.format(2, 1),
        "others": part.format(1, 2),
    }
    for job in jobs:
        said = found[job["name"]]["said"]
        assert said is not None, f"not found: {job['name']}, {found[job['name']]['figures']}"
        assert re.search(by.get(job["name"]) or by[job["fault"]], said), (job["name"], said)


def test_sums_that_are_not_added_in_rank_order_are_not_audited(on_ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    llama = sliced(folder, "llama-bias") | {"rate": 1.0}
    hidden = 64
    jobs = [
        llama | {"name": "ring", "allreduce": "ring", "chunks": CHUNKS},
        llama | {"name": "rule", "allreduce": f"star:{hidden},tree", "chunks": CHUNKS},
    ]
    found = run(on_ranks, jobs, tmp_path)
    assert found["ring"]["figures"]["audits"] == 0 and found["ring"]["figures"]["steps"] == len(CHUNKS)
    assert found["rule"]["figures"]["audits"] == CHUNKS.count(1)


def test_a_fault_ends_a_run_with_one_line(on_ranks: Ranks, tiny: Path, cache: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--model", str(tiny), "--prompt", "a b c", "--raw", "--max-tokens", "8", "--quiet"]
    honest, report = tmp_path / "honest", tmp_path / "report.json"
    plain = on_ranks(2, "-m", "tpimpi", *arguments, "--report", str(honest), env=cache)
    assert plain.code == 0, plain.err
    assert json.loads(honest.read_text())["audit"] is None, "all ranks are on this machine"
    audited = on_ranks(2, "-m", "tpimpi", *arguments, "--audit", "1", "--report", str(report), env=cache)
    assert audited.code == 0 and audited.out == plain.out, audited.err
    figures = json.loads(report.read_text())["audit"]
    assert figures["audits"] == figures["steps"] >= 8 and figures["rate"] == 1.0, figures
    for fault, said in (
        ("sums", r"^r0 .*audit: what r1 \S+ sent into the sum of layer \d .* tiles? layers/000\d/(attn|mlp)/tile-000"),
        ("flip", r"^r1 .*layers/000\d/(attn|mlp)/tile-000 of slice file .*rank-1-of-2\.h5 was right when it was read"),
    ):
        faulty = on_ranks(2, str(PROGRAMS / "lying_run.py"), fault, *arguments, "--audit", "1", env=cache)
        assert faulty.code == 1, faulty.err
        (line,) = faulty.our_lines
        assert re.search(said, line), line


def test_options_that_cannot_be_audited_are_refused(tpimpi, on_ranks: Ranks, tiny: Path, cache: dict[str, str]) -> None:
    arguments = ["--model", str(tiny), "--prompt", "a", "--max-tokens", "1"]
    for value, said in (("2", "over 0 to 1"), ("0", "over 0 to 1"), ("nan", "over 0 to 1"), ("often", "auto, off")):
        result = tpimpi(*arguments, "--audit", value)
        assert result.code == 2 and f"--audit is '{value}'" in result.err and said in result.err, result.err
    alone = tpimpi(*arguments, "--audit", "0.5")
    assert alone.code == 2 and "there is no other rank" in alone.err, alone.err
    for options, said in (
        (["--allreduce", "ring"], "partials are not added in rank order"),
        (["--backend", "numpy"], "--backend is numpy"),
    ):
        refused = on_ranks(2, "-m", "tpimpi", *arguments, *options, "--audit", "0.5", env=cache)
        assert refused.code == 2 and said in refused.err, refused.err
        assert on_ranks(2, "-m", "tpimpi", *arguments, *options, "--quiet", env=cache).code == 0


def test_a_flipped_bit_of_a_pinned_tile_is_noticed(folder: Path) -> None:
    path = Path(sliced(folder, "llama-bias")["slices"]) / slice_name(1, RANKS)
    file = SliceFile(path)
    order = block_order(file.header)
    window = Window(file, order, Readers())
    try:
        for block in order:
            for _ in window.tiles(block):
                pass
        tiles = [tile for block in order for tile in window.pinned_tiles(block) or []]
        assert len(tiles) == window._cycle.count
        for _ in range(2 * len(tiles)):
            assert window.check_next_pinned()
        window.raise_damage()
        tiles[1].matrices["down"].data.reshape(-1).view(np.uint8)[100] ^= 16
        for _ in tiles:
            window.check_next_pinned()
        with pytest.raises(
            DamagedMemoryError, match=r"layers/0000/mlp/tile-000 of slice file .*rank-1-of-3\.h5"
        ) as error:
            window.raise_damage()
        assert error.value.exit_code == 1
    finally:
        window.close()
        file.close()


def test_tiles_out_of_turn_are_those_of_the_file(folder: Path) -> None:
    """Pinned or not, in the middle of a cycle, which goes on as it would have."""
    path = Path(sliced(folder, "llama-bias")["slices"]) / slice_name(1, RANKS)
    file = SliceFile(path)
    order = block_order(file.header)
    expected = {record.path: file.load(record) for record in file.records}
    for pinned in (0, 150_000, None):
        window = Window(file, order, Readers(), pinned_bytes=pinned)
        try:
            for block in order:
                for tile in window.tiles(block):
                    assert _same(tile, expected[tile.record.path])
                before = window.turn
                for other in order:
                    again = [_same(tile, expected[tile.record.path]) for tile in window.tiles_out_of_turn(other)]
                    assert all(again) and len(again) == window.count(other)
                assert window.turn == before
        finally:
            window.close()
    file.close()


def _same(tile: Any, other: Any) -> bool:
    return tile.matrices.keys() == other.matrices.keys() and all(
        matrix.data.tobytes() == other.matrices[name].data.tobytes() for name, matrix in tile.matrices.items()
    )


@pytest.mark.parametrize("kind", ["llama-bias", "olmo2", "glm4-moe", "gpt-oss"])
def test_copies_are_the_tiles_of_the_slices(folder: Path, kind: str) -> None:
    for fmt in ("f32", "q4_0"):
        made = sliced(folder, kind, fmt)
        header = SliceFile(Path(made["slices"]) / slice_name(0, RANKS)).header
        of_source = open_copies(header, Path(made["model"]), None, _quantizer())
        of_slices = open_copies(header, None, Path(made["slices"]), _quantizer())
        assert isinstance(of_source, SourceCopies) and isinstance(of_slices, SliceCopies)
        theirs = SliceFile(Path(made["slices"]) / slice_name(1, RANKS))
        for layer in range(header.config.layers):
            every = records_of_rank(header, 1, layer)
            assert every == [record for record in theirs.records if record.block.layer == layer]
            for block in dict.fromkeys(record.block for record in every):
                records = [record for record in every if record.block == block]
                for number, record in enumerate(records[:3]):
                    for copies in (of_source, of_slices):
                        assert _same(copies.tile(records, number, 1), theirs.load(record)), (copies.what, record.path)
        of_source.close()
        of_slices.close()
        theirs.close()


def _quantizer():
    from tpimpi.compute.backends import load_quantizer

    return load_quantizer(1)


def test_copies_of_another_model_are_not_taken(folder: Path, tmp_path: Path) -> None:
    made, other = sliced(folder, "llama-bias"), sliced(folder, "olmo2")
    header = SliceFile(Path(made["slices"]) / slice_name(0, RANKS)).header
    assert open_copies(header, Path(other["model"]), tmp_path, _quantizer()) is None
    with pytest.raises(SliceError, match="is not of the slices that this run uses"):
        open_copies(header, None, Path(other["slices"]), _quantizer())


def test_the_sums_of_a_step_are_its_blocks(folder: Path) -> None:
    for kind, sums in (("llama-bias", 4), ("olmo2", 6), ("cohere2", None)):
        header = SliceFile(Path(sliced(folder, kind)["slices"]) / slice_name(1, RANKS)).header
        found = sums_of(header.config, block_order(header))
        assert [place for audited in found for place in range(audited.first, audited.last + 1)] == list(
            range(len(block_order(header)))
        )
        assert sums is None or len(found) == sums
        assert (kind == "cohere2") == (found[0] == AuditedSum(0, 1))


def test_answers_of_another_size_are_refused(folder: Path) -> None:
    header = SliceFile(Path(sliced(folder, "llama-bias")["slices"]) / slice_name(0, RANKS)).header
    records = [record for record in records_of_rank(header, 2, 0) if record.block.kind == "attn"]
    size = sum(sum(answer_parts(record, 64).values()) for record in records)
    parts = split_answer(np.arange(size, dtype=np.float32).tobytes(), records, 64, "r2 there")
    assert [list(tile) for tile in parts] == [["partial", "q", "k", "v", "o"]] * len(records)
    with pytest.raises(StarError, match=f"r2 there answered an audit with 4 bytes where {4 * size} were due"):
        split_answer(bytes(4), records, 64, "r2 there")


def test_requests_that_make_no_sense_are_refused(folder: Path) -> None:
    header = SliceFile(Path(sliced(folder, "olmo2")["slices"]) / slice_name(1, RANKS)).header
    cache = SimpleNamespace(pages=(2, 2))
    model: Any = SimpleNamespace(cache=cache, config=header.config, blocks=block_order(header), context=100)
    star: Any = SimpleNamespace(broadcast=lambda array, exact: None)
    tables = (np.array([[0, 1]], np.int32), np.array([[1, 0]], np.int32))

    def request(audited: AuditedSum, positions: list[int]) -> np.ndarray:
        rows = StepRows(np.zeros(len(positions), np.int32), np.array(positions, np.int32), tables)
        return AuditRequest(audited, rows, np.zeros((1, 64), np.float32)).words()

    for words, said in (
        (np.zeros(2, np.int64), "none of this model's"),
        (request(AuditedSum(0, 1), [3]), "blocks 0 to 1, which is none"),
        (request(AuditedSum(90, 90), [3]), "blocks 90 to 90, which is none"),
        (request(AuditedSum(1, 1), [3, 4]), "audits 2 rows, must be 1"),
        (request(AuditedSum(1, 1), [100]), "outside those that it announced"),
        (request(AuditedSum(1, 1), [3])[:-1], "rank 0 sent a step of"),
    ):
        with pytest.raises(StarError, match=said):
            receive_request(model, star, words)


def test_a_row_has_the_pages_of_its_sequence_alone() -> None:
    tables = (np.array([[3, 4], [5, 6]], np.int32), np.array([[0], [1]], np.int32))
    rows = StepRows(np.array([0, 1, 1], np.int32), np.array([70, 8, 9], np.int32), tables)
    row = one_row(rows, 2)
    assert row.position.tolist() == [9] and row.sequence.tolist() == [0]
    assert [table.tolist() for table in row.tables] == [[[5, 6]], [[1]]]


def test_a_watch_keeps_its_row_alone() -> None:
    watch = Watch(AuditedSum(2, 2), 5)
    assert watch.of_run(slice(0, 4)) is None and watch.of_run(slice(4, 8)) is watch
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    watch.note(x, 1)
    assert watch.x is None and watch.partials_of(x, 1) is None
    watch.note(x, 2)
    seen = watch.partials_of(x, 2)
    assert watch.x is not None and watch.x.tolist() == [[3, 4, 5]] and seen is not None
    assert watch.parts() == [slice(0, 3)], "rank 0 adds all"
    seen.see(1, slice(0, 4), np.array([1, 2, 3, 4], np.float32))
    seen.see(1, slice(4, 12), np.arange(5, 13, dtype=np.float32))
    assert seen.partials[1].tolist() == [4, 5, 6]
    assert watch.own is not None and watch.own.tolist() == [[3, 4, 5]]
    x[1] = 7  # what is sent becomes the sum
    assert watch.total is not None and watch.total.tolist() == [[7, 7, 7]] and watch.own.tolist() == [[3, 4, 5]]


def test_a_watch_knows_who_adds_what_of_its_row() -> None:
    x = np.zeros((3, 8), np.float32)
    for bounds, parts in (
        ([0, 10, 14, 24], [slice(0, 2), slice(2, 6), slice(6, 8)]),
        ([0, 0, 16, 24], [slice(0, 0), slice(0, 8), slice(8, 8)]),
        ([0, 24, 24, 24], [slice(0, 8), slice(8, 8), slice(8, 8)]),
    ):
        watch = Watch(AuditedSum(0, 0), 1, None, bounds)
        watch.partials_of(x, 0)
        assert watch.parts() == parts
