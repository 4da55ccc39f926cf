"""Headers that do not fit their plan, and what stands in a slice's place."""

from __future__ import annotations

import cProfile
import errno
import os
import pstats
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash

from tests.support.configs import config
from tests.support.slices import checked_contents, forged
from tpimpi.errors import SliceError, StorageError
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import slice_records
from tpimpi.weights.slices.names import parse_slice_name, slice_name
from tpimpi.weights.slices.partition import make_partition

pytestmark = pytest.mark.timeout(60)  # a size that a file claims is not counted up to

# A header that does not fit its plan: every checksum is right, what it says is wrong


def first(values: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(tile for tile in values["tiles"] if tile["block"][0] == kind)


def swap_layers(values: dict[str, Any]) -> None:
    for tile in values["tiles"]:
        kind, layer = tile["block"]
        if kind in ("attn", "mlp"):
            tile["block"] = [kind, 1 - layer]


def swap_blocks(values: dict[str, Any]) -> None:
    attn = [index for index, tile in enumerate(values["tiles"]) if tile["block"][0] == "attn"]
    first_tile, second = values["tiles"][attn[0]], values["tiles"][attn[1]]
    values["tiles"][attn[0]], values["tiles"][attn[1]] = second, first_tile


TILES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no attn tile": lambda v: v["tiles"].remove(first(v, "attn")),
    "no mlp tile": lambda v: v["tiles"].remove(first(v, "mlp")),
    "no head": lambda v: v["tiles"].remove(first(v, "head")),
    "no resident": lambda v: v["tiles"].remove(first(v, "resident")),
    "no tokenizer": lambda v: v["tiles"].remove(first(v, "tokenizer")),
    "no tiles": lambda v: v["tiles"].clear(),
    "tile twice": lambda v: v["tiles"].insert(1, first(v, "mlp")),
    "one more": lambda v: v["tiles"].append(first(v, "tokenizer")),
    "another order": lambda v: v["tiles"].reverse(),
    "blocks swapped": swap_blocks,
    "layers swapped": swap_layers,
    "layer 99": lambda v: first(v, "attn").update(block=["attn", 99]),
    "layer text": lambda v: first(v, "attn").update(block=["attn", "0"]),
    "kind x": lambda v: first(v, "mlp").update(block=["x", 0]),
    "block of one": lambda v: first(v, "mlp").update(block=["mlp"]),
    "q_to_kv short": lambda v: first(v, "attn")["q_to_kv"].pop(),
    "q_to_kv wrong": lambda v: first(v, "attn").update(q_to_kv=[0] * 3),
    "q_to_kv far": lambda v: first(v, "attn").update(q_to_kv=[9, 9]),
    "q_to_kv negative": lambda v: first(v, "attn").update(q_to_kv=[-1, -1]),
    "q_to_kv null": lambda v: first(v, "attn").update(q_to_kv=None),
    "heads": lambda v: first(v, "attn").update(heads=[1, 3]),
    "kv_heads": lambda v: first(v, "attn").update(kv_heads=[1, 2]),
    "path of another": lambda v: first(v, "attn").update(path="layers/0001/attn/tile-000"),
    "no part": lambda v: first(v, "attn")["parts"].pop(),
    "parts in another order": lambda v: first(v, "mlp")["parts"].reverse(),
    "part's name": lambda v: first(v, "mlp")["parts"][0].__setitem__(0, "up"),
    "part's format": lambda v: first(v, "mlp")["parts"][0].__setitem__(1, "zzz"),
    "part's shape": lambda v: first(v, "mlp")["parts"][0].__setitem__(2, [-1, 64]),
    "tokenizer path": lambda v: first(v, "tokenizer")["parts"][0].__setitem__(0, "../../header"),
    "tokenizer name": lambda v: first(v, "tokenizer")["parts"][0].__setitem__(0, "a\x1bb"),
    "tokenizer twice": lambda v: first(v, "tokenizer")["parts"].append(first(v, "tokenizer")["parts"][0]),
    "tokenizer of numbers": lambda v: first(v, "tokenizer")["parts"][0].__setitem__(1, "f32"),
    "tokenizer's size": lambda v: first(v, "tokenizer")["parts"][0].__setitem__(2, [10**15]),
    "tile null": lambda v: v["tiles"].__setitem__(1, {}),
    "rank 1": lambda v: v.update(rank=1),
    "rank 3": lambda v: v.update(rank=3),
    "rank -1": lambda v: v.update(rank=-1),
    "rank true": lambda v: v.update(rank=True),
    "formats": lambda v: v["formats"]["layers"][0][1].update(gate="bf16"),
    "formats none": lambda v: v.pop("formats"),
    "formats null": lambda v: v.update(formats=None),
    "formats text": lambda v: v.update(formats="f32"),
    "formats more": lambda v: v["formats"].update(norm="f32"),
    "format unknown": lambda v: v["formats"].update(head="bytes"),
    "format list": lambda v: v["formats"].update(head=[]),
    "format of the embedding": lambda v: v["formats"].update(embedding="bf16"),
    "format of the head": lambda v: v["formats"].update(head="q8_0"),
    "formats of no layers": lambda v: v["formats"].update(layers=[]),
    "formats of a layer more": lambda v: v["formats"]["layers"].append(v["formats"]["layers"][0]),
    "formats of all layers": lambda v: v["formats"]["layers"][0].__setitem__(0, 10**18),
    "formats of 0 layers": lambda v: v["formats"]["layers"].insert(0, [0, v["formats"]["layers"][0][1]]),
    "formats in two runs": lambda v: v["formats"].update(layers=[[1, v["formats"]["layers"][0][1]]] * 2),
    "formats of true layers": lambda v: v["formats"].update(layers=[[True, v["formats"]["layers"][0][1]]] * 2),
    "formats lack a part": lambda v: v["formats"]["layers"][0][1].pop("o"),
    "formats of a part more": lambda v: v["formats"]["layers"][0][1].update(x="f32"),
    "model": lambda v: v.update(model=5),
    "fingerprint": lambda v: v.update(fingerprint=None),
    "weights": lambda v: v["plan"].update(weights=[1, 1, 2]),
    "weights fewer": lambda v: v["plan"].update(weights=[1, 1]),
    "weights none": lambda v: v["plan"].update(weights=[]),
    "weights vast": lambda v: v["plan"].update(weights=[10**400, 1, 1]),
    "weights text": lambda v: v["plan"].update(weights="211"),
    "weights true": lambda v: v["plan"].update(weights=[2, True, True]),
    "weights NaN": lambda v: v["plan"].update(weights=[float("nan")] * 3),
    "share": lambda v: v["plan"]["shares"][0].__setitem__(0, [0, 99]),
    "share of KV heads": lambda v: v["plan"]["shares"][0].__setitem__(1, [0, 2]),
    "share of another rank": lambda v: v["plan"]["shares"][2].__setitem__(2, [64, 64]),
    "shares fewer": lambda v: v["plan"]["shares"].pop(),
}


SCALING = {"kind": "linear", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 0}


CONFIGS: list[dict[str, Any]] = [
    *({"layers": value} for value in (0, 1, 3, 10**9, True, "2", 2.0, None)),
    *({"norm_eps": value} for value in (1e9, float("inf"), float("nan"), True, 0, "1e-5", 10**400)),
    *({"rope_theta": value} for value in (True, 0, -1, float("inf"), 1e300)),
    *({"head_dim": value} for value in (10**9, 10**30, 15, 0, 32)),
    *({"context": value} for value in (-1, 0, None, 10**30)),
    *({"kv_heads": value} for value in (0, 3, 4, 10**9, -2)),
    {"heads": 2**31 - 1, "kv_heads": 2**31 - 1},
    {"heads": 2**31 - 1, "kv_heads": 1, "hidden": 1},
    {"vocab": 2**31 - 1, "hidden": 1},
    {"intermediate": 2**31 - 1},
    {"vocab": 161},
    {"hidden": 0},
    {"qk_norm": True},
    {"qk_norm": "yes"},
    {"mlp_bias": False},
    {"o_bias": False},
    {"qkv_bias": 0},
    *({"attention_windows": value} for value in ([], [0], [0, 0, 0], [0, -1], [0, True], [0, 1.5], None, "00", 0)),
    *({"rope_scaling": value} for value in ({}, [], "linear", {"kind": "linear"})),
    *({"rope_scaling": {**SCALING, "factors": [], "kind": kind}} for kind in ("zzz", None, "factors", "llama3")),
    {"rope_scaling": {**SCALING, "factors": [1.0] * 7, "kind": "factors"}},
    {"rope_scaling": {**SCALING, "factors": [0.0] * 8, "kind": "factors"}},
    {"rope_scaling": {**SCALING, "factors": [], "factor": 0}},
    {"rope_scaling": {**SCALING, "factors": [], "kind": "llama3", "original_context": 8, "low_freq_factor": 9}},
    {"architecture": "gpt2"},
    {"architecture": ["llama"]},
    {"more": 1},
]


def refused(path: Path) -> str:
    with pytest.raises(
        SliceError, match=r"^slice file .* is broken \(.*\); delete it and make the slices again, or mend it with: "
    ) as seen:
        SliceFile(path)
    said = str(seen.value).removeprefix(f"slice file {path}")
    assert said.isprintable() and not re.search(r"[a-z]Error\b|NoneType|unpack|codec|recursion", said), said
    return str(seen.value)


@pytest.mark.parametrize("how", TILES)
def test_a_header_that_does_not_fit_its_plan_is_refused(slices: Path, tmp_path: Path, how: str) -> None:
    refused(forged(slices / slice_name(0, 3), tmp_path, TILES[how]))


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_config_that_no_model_has_is_refused(slices: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    refused(forged(slices / slice_name(0, 3), tmp_path, lambda values: values["config"].update(change)))


def test_a_header_that_is_only_written_again_is_read(slices: Path, tmp_path: Path) -> None:
    """The forger changes nothing else."""
    for rank in range(3):
        path = slices / slice_name(rank, 3)
        assert checked_contents(forged(path, tmp_path, lambda values: None)) == checked_contents(path)


def test_what_does_not_fit_is_said(slices: Path, tmp_path: Path) -> None:
    path = slices / slice_name(0, 3)
    assert "(its tiles do not fit its plan)" in refused(forged(path, tmp_path, TILES["no mlp tile"]))
    assert "(its shares do not fit its plan)" in refused(forged(path, tmp_path, TILES["weights"]))
    line = refused(forged(path, tmp_path, lambda values: values["config"].update(layers=0)))
    assert "config: layers is 0; a whole number of 1 to 4096 is needed" in line


@pytest.mark.parametrize(
    "header", [b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"tpimpi_slice": "\\u001b[31m"}', b"9" * 5000]
)
def test_a_header_of_something_else_is_refused(slices: Path, tmp_path: Path, header: bytes) -> None:
    target = tmp_path / slice_name(1, 3)
    shutil.copy(slices / slice_name(1, 3), target)
    with h5py.File(target, "r+") as file:
        del file["header"]
        file["header"] = np.frombuffer(header, np.uint8)
        file["checksums"][0] = xxhash.xxh3_64_intdigest(header)
    with pytest.raises(SliceError) as seen:
        SliceFile(target)
    assert str(seen.value).isprintable()


def test_a_small_file_cannot_promise_a_vast_header(slices: Path, tmp_path: Path) -> None:
    target = tmp_path / slice_name(1, 3)
    shutil.copy(slices / slice_name(1, 3), target)
    with h5py.File(target, "r+") as file:
        del file["header"]
        file.create_dataset("header", shape=(10**13,), dtype="u1", chunks=(2**20,))
    assert "header is (10000000000000,) uint8" in refused(target)


def test_rank_0_alone_has_the_embedding(slices: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        target = tmp_path / slice_name(rank, 3)
        shutil.copy(slices / slice_name(rank, 3), target)
        with h5py.File(target, "r+") as file:
            if rank == 0:
                del file["embedding"]
            else:
                file["embedding/weight"] = np.zeros((160, 64), np.float32)
                file["embedding/checksums"] = np.zeros(160, np.uint64)
        assert f"rank {rank} has {'no' if rank == 0 else 'an'} embedding" in refused(target)


def test_checking_the_plan_of_a_model_takes_work_in_proportion_to_its_layers() -> None:
    def calls(layers: int) -> int:
        large = config(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=32000)
        large = replace(large, layers=layers, attention_windows=(0,) * layers)
        plan = make_partition(large, [1])
        formats = ModelFormats.of("f32", layers)
        records = tuple(slice_records(large, plan.shares[0], 0, formats, {"tokenizer.json": 10}))
        assert len(records) > layers * 60
        header = Header(0, formats, "large", "f" * 32, large, plan, records)
        text = header.to_json()
        with cProfile.Profile() as profile:
            assert Header.from_json(text) == header
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    assert calls(16) < 5 * calls(4)


# What stands in a slice's place, and what the operating system says


def test_a_directory_or_a_pipe_is_not_missing(tmp_path: Path) -> None:
    for number, (make, what) in enumerate([(Path.mkdir, "a directory"), (os.mkfifo, "a named pipe")]):
        path = tmp_path / slice_name(number, 2)
        make(path)
        with pytest.raises(SliceError, match=rf"{path.name} is {what} where a slice file is needed; remove it"):
            SliceFile(path)


def test_a_path_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SliceError, match="cannot be read: File name too long; use a shorter path"):
        SliceFile(tmp_path / ("x" * 5000) / "rank-0-of-1.h5")
    (tmp_path / "file").touch()
    with pytest.raises(SliceError, match="cannot be read: Not a directory; check"):
        SliceFile(tmp_path / "file" / "rank-0-of-1.h5")


def test_a_file_that_may_not_be_read_is_one_line(slices: Path, monkeypatch) -> None:
    path = slices / slice_name(1, 3)
    for number, said in ((errno.EACCES, "Permission denied; let this user read it"), (errno.EMFILE, "ulimit -n")):

        def failing(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched, pytest.raises(SliceError, match=f"cannot be read: .*{said}") as seen:
            patched.setattr(os, "open", failing)
            SliceFile(path)
        assert "Errno" not in str(seen.value)


def test_hdf5_does_not_call_a_file_broken_that_the_disk_refuses(slices: Path, monkeypatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError("Unable to synchronously open file (unable to open file: name = 'x', errno = 116, flags = 0)")

    monkeypatch.setattr(h5py, "File", failing)
    with pytest.raises(SliceError, match="cannot be read: Stale file handle; check the disk") as seen:
        SliceFile(slices / slice_name(1, 3))
    assert "delete" not in str(seen.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_while_running_is_one_line(slices: Path, monkeypatch, number: int) -> None:
    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    file = SliceFile(slices / slice_name(0, 3))
    monkeypatch.setattr(os, "preadv", failing)
    reads = {
        "layers/0000/attn/tile-000": lambda: file.load(file.records[1]),
        "the embedding": lambda: file.embedding_rows([1]),
    }
    for what, read in reads.items():
        said = rf"rank-0-of-3\.h5 can no longer be read at {what}: {os.strerror(number)}; check"
        with pytest.raises(StorageError, match=said):
            read()
    file.close()


def test_a_chunked_embedding_that_cannot_be_read_is_one_line(slices: Path, tmp_path: Path) -> None:
    target = tmp_path / slice_name(0, 3)
    shutil.copy(slices / slice_name(0, 3), target)
    with h5py.File(target, "r+") as file:
        table = file["embedding/weight"][...]
        del file["embedding/weight"]
        packed = file.create_dataset("embedding/weight", data=table, chunks=(160, 64), compression="gzip")
        packed.id.write_direct_chunk((0, 0), b"no gzip")
    opened = SliceFile(target)
    with pytest.raises(SliceError, match="is broken"):
        opened.embedding_rows([3])
    opened.close()


@pytest.mark.parametrize(
    "name", ["rank-0-of-0.h5", "rank-2-of-2.h5", "rank-0-of-99999999999.h5", "rank-01-of-2.h5", "rank-٣-of-4.h5"]
)
def test_names_that_no_slice_has(name: str) -> None:
    assert parse_slice_name(name) is None
    assert parse_slice_name("rank-1-of-2.h5") == (1, 2)
