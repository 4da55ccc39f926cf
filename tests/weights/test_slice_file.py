"""The slice file against its own specification, read by h5py alone, and against every kind of damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash

from tests.support.launch import ROOT, run_command
from tests.support.slice_file_cases import SHARES
from tests.support.slices import checked_contents
from tpimpi.errors import SliceError, StorageError
from tpimpi.system import direct_io
from tpimpi.system.direct_io import Extent
from tpimpi.weights.make import choose_formats, make_header, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.slices.writer import SliceWriter
from tpimpi.weights.sources import open_source

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
        places = file._offsets[record.path]
        assert places is not None
        assert all(place % 4096 == 0 for place in places)
        for place, part, following in zip(places, record.parts, places[1:], strict=False):
            assert following == place + -(-part.nbytes // 4096) * 4096
    file.close()


@pytest.mark.parametrize("direct", [True, False])
def test_past_the_page_cache_an_extent_is_one_read(
    slices: Path, monkeypatch: pytest.MonkeyPatch, *, direct: bool
) -> None:
    """Else as many as it has pieces: what a read takes of the page cache is let go after it."""
    monkeypatch.setattr(direct_io, "READ_BYTES", 4096)
    file, seen = SliceFile(slices / slice_name(0, 3)), list[Extent]()
    descriptor = file._opened()
    if not descriptor.direct:
        pytest.skip("this file system has no O_DIRECT")
    descriptor.direct = direct
    read = descriptor.read
    monkeypatch.setattr(descriptor, "read", lambda piece, buffer: (seen.append(piece), read(piece, buffer)))
    record = max(file.records, key=lambda record: record.nbytes)
    file.load(record)
    file.close()
    pieces = -(-record.nbytes // 4096)
    assert pieces > 1
    assert len(seen) == (1 if direct else pieces)


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


@pytest.mark.slow
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
