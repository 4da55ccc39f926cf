"""The slice file against its own specification, read by h5py alone, and against every kind of damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash

from tests.support.configs import config
from tests.support.launch import ROOT, run_command
from tests.support.slices import checked_contents, forged
from tests.support.tiny_models import write_tiny_hf
from tpimpi.errors import SliceError, StorageError
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.weights.make import choose_formats, make_header, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import slice_records
from tpimpi.weights.slices.names import parse_slice_name, slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.slices.writer import SliceWriter
from tpimpi.weights.sources import open_source

SHARES = [2, 1, 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_hf(tmp_path_factory.mktemp("slicefile") / "model", "llama-bias")
    (path / "tokenizer.json").write_text('{"some": "tokenizer"}')
    return path


@pytest.fixture(scope="module")
def slices(model: Path) -> Path:
    folder = model.parent / "slices"
    with open_source(model) as source:
        slice_model(source, make_partition(source.config, SHARES), choose_formats(source, "f32"), folder)
    return folder


MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "rows")


def test_it_is_what_the_specification_says(slices: Path, model: Path) -> None:
    """Read with h5py and the prose alone: the parts of all ranks, put together, are the model's tensors."""
    with open_source(model) as source:
        tensors = {name: source.read(name) for name in source.tensors()}
        config = source.config
    whole: dict[str, list[np.ndarray]] = {}
    for rank in range(3):
        with h5py.File(slices / slice_name(rank, 3)) as file:
            header_bytes = file["header"][...].tobytes()
            header, sums = json.loads(header_bytes), file["checksums"][...]
            assert header["tpimpi_slice"] == 2
            assert header["rank"] == rank
            assert sums[0] == xxhash.xxh3_64_intdigest(header_bytes)
            assert ("embedding" in file) == ("head" in file) == ("tokenizer" in file) == (rank == 0)
            for record, digest in zip(header["tiles"], sums[1:], strict=True):
                parts = [file[f"{record['path']}/{name}"] for name, _, _ in record["parts"]]
                assert digest == xxhash.xxh3_64_intdigest(b"".join(part[...].tobytes() for part in parts))
                for (name, _, shape), part in zip(record["parts"], parts, strict=True):
                    numbers = part[...]
                    if name in MATRICES:  # panels of 16 rows, [panels, columns, 16]
                        assert part.shape == (-(-shape[0] // 16), shape[1], 16)
                        rows = numbers.transpose(0, 2, 1).reshape(-1, shape[1])
                        assert not rows[shape[0] :].any()
                        numbers = rows[: shape[0]]
                    assert list(numbers.shape) == shape
                    whole.setdefault(f"{record['path'].rsplit('/', 1)[0]}/{name}", []).append(numbers)
            if rank == 0:
                table = file["embedding/weight"][...]
                np.testing.assert_array_equal(table, tensors["embed_tokens.weight"])
                assert file["embedding/checksums"][3] == xxhash.xxh3_64_intdigest(table[3].tobytes())
                assert file["tokenizer/tile-000/tokenizer.json"][...].tobytes() == b'{"some": "tokenizer"}'
                np.testing.assert_array_equal(file["resident/tile-000/norm"][...], tensors["norm.weight"])
    for layer in range(config.layers):
        here, names = f"layers/{layer:04d}", f"layers.{layer}"
        for part, tensor in (("q", "q_proj"), ("q_bias", "q_proj")):
            kind = "bias" if part.endswith("bias") else "weight"
            joined = np.concatenate(whole[f"{here}/attn/{part}"])
            np.testing.assert_array_equal(joined, tensors[f"{names}.self_attn.{tensor}.{kind}"])
        for part in ("gate", "up", "gate_bias", "up_bias"):
            kind = "bias" if part.endswith("bias") else "weight"
            joined = np.concatenate(whole[f"{here}/mlp/{part}"])
            np.testing.assert_array_equal(joined, tensors[f"{names}.mlp.{part.removesuffix('_bias')}_proj.{kind}"])
        for part, tensor in (("attn/o", "self_attn.o_proj"), ("mlp/down", "mlp.down_proj")):
            joined = np.concatenate(whole[f"{here}/{part}"], axis=1)
            np.testing.assert_array_equal(joined, tensors[f"{names}.{tensor}.weight"])
    np.testing.assert_array_equal(np.concatenate(whole["head/rows"]), tensors["lm_head.weight"])


def test_a_tile_is_one_extent_of_the_file(slices: Path) -> None:
    file = SliceFile(slices / slice_name(0, 3))
    for record in file.records:
        places = file._places[record.path].offsets
        assert places is not None
        assert all(place % 4096 == 0 for place in places)
        for place, part, following in zip(places, record.parts, places[1:], strict=False):
            assert following == place + -(-part.nbytes // 4096) * 4096
    file.close()


@pytest.mark.parametrize("how", [["-f", "GZIP=1"], ["-l", "CHUNK=7x5"], ["-l", "CONTI"]])
def test_it_may_be_repacked_by_other_tools(slices: Path, tmp_path: Path, how: list[str]) -> None:
    """As h5repack would: each dataset written again in another layout by h5py."""
    original, repacked = slices / slice_name(0, 3), tmp_path / slice_name(0, 3)
    with h5py.File(original) as old, h5py.File(repacked, "w") as new:

        def copy(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                options: dict[str, object] = {}
                if how[0] == "-f":
                    options = {"compression": "gzip"}
                elif how[1].startswith("CHUNK"):
                    options = {"chunks": tuple(min(size, 7) for size in item.shape)}
                new.create_dataset(name, data=item[...], **options)

        old.visititems(copy)
    assert checked_contents(repacked) == checked_contents(original)


def damaged(path: Path, tmp_path: Path, change) -> Path:
    data = bytearray(path.read_bytes())
    changed = change(data)
    target = tmp_path / path.name
    target.write_bytes(data if changed is None else changed)
    return target


def test_a_flipped_byte_is_refused_or_means_nothing(slices: Path, tmp_path: Path) -> None:
    """Thousands of places, HDF5's own metadata among them; in processes of their own, since HDF5 is C."""
    original = slices / slice_name(0, 3)
    program = tmp_path / "flip.py"
    program.write_text(
        "import random, sys\n"
        "from pathlib import Path\n"
        "from tests.support.slices import checked_contents\n"
        "from tpimpi.errors import SliceError\n"
        "original, target = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "expected, data = checked_contents(original), bytearray(original.read_bytes())\n"
        "used = [i for i in range(len(data)) if data[i]]\n"
        "random.seed(5)\n"
        "places = list(range(0, 512)) + random.sample(used, 1200) + random.sample(range(len(data)), 300)\n"
        "refused = 0\n"
        "for place in places:\n"
        "    flipped = bytearray(data); flipped[place] ^= 1 << random.randrange(8)\n"
        "    target.write_bytes(flipped)\n"
        "    try:\n"
        "        found = checked_contents(target)\n"
        "    except SliceError as error:\n"
        "        refused += 1\n"
        "        assert str(target) in str(error) and '\\n' not in str(error), error\n"
        "    else:\n"
        "        assert found == expected, f'byte {place} changed the content unseen'\n"
        "print('refused', refused)\n"
    )
    result = run_command(
        [sys.executable, str(program), str(original), str(tmp_path / "x.h5")], env={"PYTHONPATH": str(ROOT)}
    )
    assert result.code == 0, result.err
    assert int(result.out.split()[1]) > 1000


@pytest.mark.parametrize("part", [0, 1, 100, 0.3, 0.7, 0.999, -1])
def test_a_file_cut_short_is_refused(slices: Path, tmp_path: Path, part: float) -> None:
    original = slices / slice_name(1, 3)
    size = original.stat().st_size
    length = int(part * size) if isinstance(part, float) else part % size
    with pytest.raises(SliceError, match=r"rank-1-of-3\.h5 is broken \(.*\); delete it and make the slices again, or"):
        checked_contents(damaged(original, tmp_path, lambda data: data[:length]))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "rank-0-of-1.h5"
    with h5py.File(target, "w") as file:
        file["x"] = [1, 2, 3]
    with pytest.raises(SliceError, match="is broken"):
        SliceFile(target)


@pytest.mark.parametrize("version", [1, 9])
def test_another_version_of_the_format_is_named(slices: Path, tmp_path: Path, version: int) -> None:
    target = tmp_path / "rank-1-of-3.h5"
    target.write_bytes((slices / slice_name(1, 3)).read_bytes())
    with h5py.File(target, "r+") as file:
        header = file["header"][...].tobytes().replace(b'"tpimpi_slice": 2,', b'"tpimpi_slice": %d,' % version)
        file["header"][...] = np.frombuffer(header, np.uint8)
        sums = file["checksums"][...]
        sums[0] = xxhash.xxh3_64_intdigest(header)
        file["checksums"][...] = sums
    with pytest.raises(SliceError, match=f"slice format version {version}, this tpimpi reads 2; make the slices again"):
        SliceFile(target)


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(SliceError, match=r"rank-0-of-2\.h5 is missing; make it with: python -m tpimpi slice"):
        SliceFile(tmp_path / "rank-0-of-2.h5")


def test_an_abandoned_writer_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with open_source(model) as source:
        writer = SliceWriter(
            tmp_path / "rank-1-of-3.h5",
            make_header(source, make_partition(source.config, SHARES), 1, choose_formats(source, "f32")),
        )
        assert len(list(tmp_path.iterdir())) == 1
        writer.close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_slicing_left_is_removed_by_the_next(model: Path, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leftover = tmp_path / f".rank-0-of-3.h5.{gone.pid}.partial"
    leftover.write_bytes(b"half")
    with open_source(model) as source:
        slice_model(source, make_partition(source.config, SHARES), choose_formats(source, "f32"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [slice_name(rank, 3) for rank in range(3)]


def test_a_broken_tensor_leaves_nothing_half_written(model: Path, tmp_path: Path, monkeypatch) -> None:
    from tpimpi.errors import ModelError

    with open_source(model) as source:
        read = source.read_blocks

        def failing(name: str, rows: slice | None = None):
            if name == "layers.1.mlp.down_proj.weight":
                raise ModelError("the file is gone")
            return read(name, rows)

        monkeypatch.setattr(source, "read_blocks", failing)
        with pytest.raises(ModelError):
            slice_model(source, make_partition(source.config, SHARES), choose_formats(source, "f32"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(model: Path) -> None:
    with open_source(model) as source, pytest.raises(StorageError, match="/proc/nowhere"):
        slice_model(source, make_partition(source.config, SHARES), choose_formats(source, "f32"), Path("/proc/nowhere"))


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
    began = time.monotonic()
    with pytest.raises(
        SliceError, match=r"^slice file .* is broken \(.*\); delete it and make the slices again, or mend it with: "
    ) as seen:
        SliceFile(path)
    assert time.monotonic() - began < 5
    assert str(seen.value).isprintable()
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


def test_the_plan_of_a_large_model_is_checked_in_no_time() -> None:
    large = config(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=32000)
    large = replace(large, layers=80, attention_windows=(0,) * 80)
    plan = make_partition(large, [1])
    formats = ModelFormats.of("f32", 80)
    records = tuple(slice_records(large, plan.shares[0], 0, formats, {"tokenizer.json": 10}))
    assert len(records) > 80 * 60
    header = Header(0, formats, "large", "f" * 32, large, plan, records)
    text = header.to_json()
    began = time.process_time()
    assert Header.from_json(text) == header
    assert time.process_time() - began < 3


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
    def failing(*_: object) -> None:
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
