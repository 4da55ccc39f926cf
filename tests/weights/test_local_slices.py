"""A slicing that was broken off goes on, what a host has already is found, what is broken is mended; no more is read."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.support.slices import datasets, spoil
from tests.support.tiny_models import write_tiny_hf
from tpimpi.errors import InputError, SliceError, StorageError
from tpimpi.weights.locations import in_cache
from tpimpi.weights.make import choose_formats, make_header, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import tile_spans
from tpimpi.weights.slices.local import LocalSlice
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import Span, make_partition
from tpimpi.weights.slices.writer import SliceWriter, partial_path
from tpimpi.weights.sources import Source, open_source

SHARES = [2, 1, 1]
LARGER = {"num_hidden_layers": 4, "intermediate_size": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_hf(tmp_path_factory.mktemp("local") / "model", "llama-bias", **LARGER)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPIMPI_CACHE", str(tmp_path / "cache"))


def make(
    source: Source, folder: Path, shares: list[float] | None = None, fmt: str = "q8_0", **options
) -> list[LocalSlice]:
    return slice_model(
        source, make_partition(source.config, shares or SHARES), choose_formats(source, fmt), folder, **options
    )


def alike(one: Path, other: Path, ranks: int = 3) -> None:
    for rank in range(ranks):
        assert datasets(one / slice_name(rank, ranks)) == datasets(other / slice_name(rank, ranks)), f"rank {rank}"


class Reads:
    """Notes which tensors of a source are read; breaks off, as a kill does, after so many reads."""

    def __init__(self, source: Source, monkeypatch: pytest.MonkeyPatch, most: int = 10**9) -> None:
        self.names: list[str] = []
        for method in ("read", "read_blocks"):
            original: Callable[..., np.ndarray] = getattr(Source, method)

            def reading(name: str, rows: slice | None = None, original=original) -> np.ndarray:
                self.names.append(name)
                if len(self.names) > most:
                    raise KeyboardInterrupt
                return original(source, name, rows)

            monkeypatch.setattr(source, method, reading)


def test_what_was_broken_off_goes_on_where_it_was(model: Path, tmp_path: Path, monkeypatch) -> None:
    with open_source(model) as source:
        make(source, tmp_path / "whole")
        whole = Reads(source, monkeypatch)
        make(source, tmp_path / "counted")
        middle = whole.names.index("layers.2.self_attn.q_proj.weight")
        for most in (0, 1, middle, len(whole.names) - 1):
            folder = tmp_path / f"broken-{most}"
            with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
                Reads(source, patch, most)
                make(source, folder)
            assert not list(folder.glob("rank-*"))
            with monkeypatch.context() as patch:
                again = Reads(source, patch)
                make(source, folder)
            alike(folder, tmp_path / "whole")
            assert sorted(path.name for path in folder.iterdir()) == [slice_name(rank, 3) for rank in range(3)]
            if most == middle:
                assert not [name for name in again.names if "layers.1.mlp" in name], "it was whole, and is read again"
                assert [name for name in again.names if "layers.3.mlp" in name]
            if most > middle:
                assert set(again.names) == {"embed_tokens.weight"}


def test_good_slices_are_left_alone(model: Path, tmp_path: Path, monkeypatch) -> None:
    with open_source(model) as source:
        assert [local.good for local in make(source, tmp_path / "out")] == [False] * 3
        before = [
            (path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").iterdir())
        ]
        with monkeypatch.context() as patch:
            reads = Reads(source, patch)
            assert [local.good for local in make(source, tmp_path / "out", verify=True)] == [True] * 3
        assert reads.names == []
        after = [
            (path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").iterdir())
        ]
        assert before == after
        for other in ({"fmt": "bf16"}, {"shares": [1, 1, 1]}):
            with pytest.raises(
                InputError, match=r"out/rank-0-of-3\.h5 is there in q8_0 for shares 2,1,1, asked for is .*; choose"
            ):
                make(source, tmp_path / "out", **other)
        assert before == [
            (path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").iterdir())
        ]


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_tile_that_does_not_match_is_made_again_and_no_other(
    model: Path, tmp_path: Path, monkeypatch, unfinished: bool
) -> None:
    """In a slice that --verify looks at, and in what a broken-off slicing left."""
    folder = tmp_path / "out"
    with open_source(model) as source:
        make(source, tmp_path / "whole")
        make(source, folder)
        spoil(folder / slice_name(1, 3), "layers/0002/mlp/tile-000/up", 100)
        spoil(folder / slice_name(0, 3), "embedding/weight", 70 * 7)
        spoil(folder / slice_name(0, 3), "tokenizer/tile-000/tokenizer.json")
        if unfinished:
            for rank in range(3):
                path = folder / slice_name(rank, 3)
                path.rename(partial_path(path))
        else:
            assert all(local.good for local in make(source, folder)), "without --verify tiles are not read"
        reads = Reads(source, monkeypatch)
        made = make(source, folder, verify=True)
        assert [local.broken for local in made] == ([0, 0, 0] if unfinished else [2, 1, 0])
        parts = ("gate_proj", "up_proj", "down_proj")
        wanted = {f"layers.2.mlp.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
        assert set(reads.names) == {"embed_tokens.weight"} | (wanted - {"layers.2.mlp.down_proj.bias"})
    alike(folder, tmp_path / "whole")


def test_tiles_moved_by_another_tool_are_verified_too(model: Path, tmp_path: Path) -> None:
    with open_source(model) as source:
        make(source, tmp_path / "whole")
        make(source, tmp_path / "out")
        path = tmp_path / "out" / slice_name(1, 3)
        with h5py.File(path) as file, h5py.File(tmp_path / "moved.h5", "w") as moved:
            for name in datasets(path):
                chunks = True if file[name].size else None
                moved.create_dataset(name, data=file[name][...], chunks=chunks)
        (tmp_path / "moved.h5").replace(path)
        assert make(source, tmp_path / "out", verify=True)[1].good
        with h5py.File(path, "r+") as file:
            numbers = file["layers/0001/mlp/tile-000/gate"][...]
            numbers[0, 3] ^= 1
            file["layers/0001/mlp/tile-000/gate"][...] = numbers
        assert make(source, tmp_path / "out", verify=True)[1].broken == 1
    alike(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("damage", ["nothing", "cut", "noise", "header", "another"])
def test_a_partial_file_of_no_use_is_written_anew(model: Path, tmp_path: Path, monkeypatch, damage: str) -> None:
    folder = tmp_path / "out"
    with open_source(model) as source:
        make(source, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            Reads(source, patch, 60)
            make(source, folder, [1, 1, 1] if damage == "another" else SHARES)
        partial = partial_path(folder / slice_name(1, 3))
        data = partial.read_bytes()
        if damage == "nothing":
            partial.write_bytes(b"")
        elif damage == "cut":
            partial.write_bytes(data[: len(data) // 2])
        elif damage == "noise":
            partial.write_bytes(random.Random(1).randbytes(len(data)))
        elif damage == "header":
            partial.write_bytes(data.replace(b'"fingerprint": "', b'"fingerprint": "0', 1))
        make(source, folder)
    alike(folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_slicing_killed_at_random_points_ends_whole(tmp_path: Path) -> None:
    """kill -9, again and again, until it ends."""
    model = write_tiny_hf(tmp_path / "model", "qwen3", num_hidden_layers=12, hidden_size=256, intermediate_size=1024)
    (model / "tokenizer.json").write_text("{}")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tpimpi.weights.slices.partition import make_partition\n"
        "from tpimpi.weights.make import choose_formats, slice_model\n"
        "from tpimpi.weights.sources import open_source\n"
        "print('ready', flush=True)\n"
        "with open_source(Path(sys.argv[1])) as source:\n"
        "    plan = make_partition(source.config, [3, 1, 2])\n"
        "    slice_model(source, plan, choose_formats(source, 'q4_0'), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", program, str(model), str(tmp_path / "killed")]
    subprocess.run([*command[:-1], str(tmp_path / "whole")], check=True, timeout=120)
    dice, kills = random.Random(5), 0
    for attempt in range(40):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(dice.uniform(0, 0.25) if attempt < 12 else 60 if attempt > 30 else 1)
        process.kill()
        if process.wait(timeout=60) == 0:
            break
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3, "nothing was broken off"
    alike(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


def test_tiles_of_the_same_heads_and_columns_are_taken_from_other_slices(
    model: Path, tmp_path: Path, monkeypatch
) -> None:
    """A third rank that has nothing leaves the shares of the others as they were."""
    with open_source(model) as source:
        make(source, tmp_path / "whole", [1, 1, 0])
        cache = tmp_path / "cache" / f"model-{source.fingerprint()[:12]}-q8_0-1-1-v2"
        make(source, cache, [1, 1])
        spoil(cache / slice_name(1, 2), "layers/0001/attn/tile-000/k")
        reads = Reads(source, monkeypatch)
        found = make(source, tmp_path / "out", [1, 1, 0])
        tiles = [len(local.header.records) for local in found]
        # The tokenizer is made again, and of rank 1 the tile that is broken where it was found.
        assert [local.here for local in found] == [tiles[0] - 1, tiles[1] - 1, tiles[2]]
        assert {name for name in reads.names if "mlp" in name} == set()
        assert {name for name in reads.names if "layers.1.self_attn" in name}
        assert not {name for name in reads.names if "layers.0" in name}
    alike(tmp_path / "out", tmp_path / "whole")


def test_tiles_of_another_model_or_format_are_not_taken(model: Path, tmp_path: Path) -> None:
    other = write_tiny_hf(tmp_path / "other", "llama-bias", seed=1, **LARGER)
    (other / "tokenizer.json").write_text("{}")
    with open_source(model) as source, open_source(other) as others:
        make(source, tmp_path / "whole", fmt="f32")
        make(others, tmp_path / "out", [1, 1], "f32")
        make(source, tmp_path / "out", [2, 1, 1, 0], "bf16")
        assert [local.here for local in make(source, tmp_path / "out", fmt="f32")] == [1, 1, 1]  # the norms are f32
    alike(tmp_path / "out", tmp_path / "whole")


def test_spans_of_tiles_cover_what_there_is(smollm2: Path) -> None:
    with open_source(smollm2) as source:
        plan = make_partition(source.config, [2, 1, 1])
        for layer, kind, whole in ((0, "mlp", 1536), (29, "mlp", 1536), (-1, "head", 49152)):
            spans: list[Span] = []
            for rank in range(3):
                header = make_header(source, plan, rank, choose_formats(source, "f32"))
                pairs = zip(header.records, tile_spans(header), strict=True)
                spans += [span for record, span in pairs if record.block == (kind, layer)]
            assert spans[0].start == 0 and spans[-1].stop == whole
            assert all(one.stop == other.start for one, other in itertools.pairwise(spans))


def test_a_file_that_another_process_writes_is_refused(model: Path, tmp_path: Path) -> None:
    with open_source(model) as source:
        header = make_header(source, make_partition(source.config, SHARES), 1, choose_formats(source, "f32"))
        path = tmp_path / slice_name(1, 3)
        writer = SliceWriter(path, header)
        program = "import os, fcntl, sys\nfcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        taken = subprocess.run(
            [sys.executable, "-c", program, str(partial_path(path))], check=False, stderr=subprocess.PIPE, timeout=60
        )
        assert b"BlockingIOError" in taken.stderr
        with pytest.raises(InputError, match=r"another tpimpi is writing .*rank-1-of-3\.h5; wait until it is done"):
            SliceWriter(path, header)
        writer.close()
        SliceWriter(path, header).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_of_ours_is_not_written_through(model: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "out").mkdir()
    path, victim = tmp_path / "out" / slice_name(1, 3), tmp_path / "victim"
    victim.write_text("precious")
    partial = partial_path(path)
    {"link": lambda: partial.symlink_to(victim), "pipe": lambda: os.mkfifo(partial), "folder": partial.mkdir}[kind]()
    with open_source(model) as source:
        header = make_header(source, make_partition(source.config, SHARES), 1, choose_formats(source, "f32"))
        with pytest.raises(
            InputError, match=r"\.rank-1-of-3\.h5\.partial is no file, but in the way of a slice; remove it"
        ):
            SliceWriter(path, header)
    assert victim.read_text() == "precious" and list((tmp_path / "out").iterdir()) == [partial]


def test_a_slice_of_another_model_is_not_replaced(model: Path, tmp_path: Path) -> None:
    other = write_tiny_hf(tmp_path / "other", "qwen2")
    (other / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    with open_source(other) as source:
        slice_model(source, make_partition(source.config, SHARES), choose_formats(source, "f32"), out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with (
        open_source(model) as source,
        pytest.raises(InputError, match=r"is a slice of another model, .*; remove it, or"),
    ):
        slice_model(source, make_partition(source.config, SHARES), choose_formats(source, "f32"), out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_leftovers_of_other_plans_go_when_a_slicing_is_done(model: Path, tmp_path: Path, monkeypatch) -> None:
    with open_source(model) as source:
        print_ = source.fingerprint()[:12]
        folders = [tmp_path / "cache" / f"model-{print_}-q8_0-{shares}-v2" for shares in ("1-1", "1-1-1", "9")]
        others = tmp_path / "cache" / "model-0123456789ab-q8_0-9-v2" / ".rank-0-of-1.h5.partial"
        others.parent.mkdir(parents=True)
        others.write_text("of another model")
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            Reads(source, patch, 60)
            make(source, folders[0], [1, 1])
        header = make_header(source, make_partition(source.config, [1]), 0, choose_formats(source, "q8_0"))
        folders[2].mkdir()
        writing = SliceWriter(folders[2] / slice_name(0, 1), header)
        assert len(list(folders[0].glob(".*.partial"))) == 2
        make(source, folders[1], [1, 1, 1])
        assert list(folders[0].iterdir()) == []
        assert others.exists() and writing.temporary.exists()
        writing.close()


@pytest.mark.parametrize("out", ["cache/../out", "cache/mine", "link/mine"])
def test_slices_in_a_folder_of_the_user_are_not_replaced(model: Path, tmp_path: Path, out: str) -> None:
    """However its path is written, and even where it is in the cache: only a run's own slices may be made anew."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    folder = tmp_path / out
    with open_source(model) as source:
        make(source, folder, [1])
        before = (folder / slice_name(0, 1)).read_bytes()
        with pytest.raises(
            InputError, match="is there in q8_0 for shares 1, asked for is bf16 for 1; choose another --out"
        ):
            make(source, folder, [1], "bf16")
        assert (folder / slice_name(0, 1)).read_bytes() == before
        assert in_cache(folder) == (out != "cache/../out")
        header = make_header(source, make_partition(source.config, [1]), 0, choose_formats(source, "bf16"))
        local = LocalSlice(folder / slice_name(0, 1), header, of_cache=True)
        local.look()
        assert not local.good, "one that a run made is made anew"


def test_a_slice_in_whose_place_a_directory_stands(model: Path, tmp_path: Path) -> None:
    with open_source(model) as source:
        header = make_header(source, make_partition(source.config, SHARES), 1, choose_formats(source, "f32"))
        (tmp_path / slice_name(1, 3)).mkdir()
        with pytest.raises(StorageError, match="a directory of that name is there; remove it"):
            LocalSlice(tmp_path / slice_name(1, 3), header).look()


def test_a_message_of_a_broken_slice_says_what_to_type(model: Path, tmp_path: Path) -> None:
    with open_source(model) as source:
        make(source, tmp_path)
    spoil(tmp_path / slice_name(1, 3), "layers/0002/mlp/tile-000/up")
    file = SliceFile(tmp_path / slice_name(1, 3))
    record = next(record for record in file.records if record.path == "layers/0002/mlp/tile-000")
    with pytest.raises(
        SliceError, match=r"mend it with: python -m tpimpi slice --verify --out \S+ \(under mpirun as in a run"
    ):
        file.load(record)
    file.close()
