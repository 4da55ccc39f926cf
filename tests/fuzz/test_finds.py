"""What fuzzing, and reading the code for it, has found: each kind once more, as it was."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest

from tests.fuzz import seeds
from tests.fuzz.limits import within_limits
from tests.fuzz.ranks import _Model, _Told
from tests.support.configs import config
from tpimpi.engine.protocol import MAGIC, Operation, _follow_one, receive_header
from tpimpi.errors import InputError, ModelError, SliceError, StarError
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.serving.text.chat_template import ChatTemplate
from tpimpi.star.control import decode_note
from tpimpi.system.hostfile import read_hostfile
from tpimpi.system.link_keys import decode_keys
from tpimpi.weights.notes import DistributeSlices
from tpimpi.weights.receive import _header_from, indexes_of
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.sources import open_source

pytestmark = pytest.mark.timeout(60)


def test_a_hostfile_of_blanks_is_read_at_once(tmp_path: Path) -> None:
    """From each blank on, all others were looked at: an hour for a file of 1 MB."""
    path = tmp_path / "hosts"
    path.write_text("pi" + " " * 1_000_000 + "slots = 2")
    with within_limits():
        assert read_hostfile(str(path))[0].ranks == 2


def test_link_keys_that_are_no_text_are_refused() -> None:
    with pytest.raises(InputError, match="no file of link keys"):
        decode_keys(b'{"tpimpi link keys": 1, "host": "\xff"}', "FILE")


@pytest.mark.parametrize("depth", [300, 600, 900, 5000])
def test_a_deep_note_is_nonsense(depth: int) -> None:
    """In a field of any type, which is understood and then looked through for unknown fields."""
    shape = config()
    formats = ModelFormats.for_model("q4_0", shape)
    note: dict[str, Any] = {"task": "distribute slices", "model": "m", "fingerprint": "f", "config": shape.to_dict()}
    note |= {"formats": formats.to_dict(), "weights": [1], "folder": None, "cache_name": "c", "verify": False}
    text = json.dumps({**note, "config": {"a": "@"}}).replace('"@"', '{"a":' * depth + "1" + "}" * depth)
    try:
        decode_note(text.encode(), DistributeSlices, "r0 desk")
    except StarError as error:
        assert "r0 desk sent a note that makes no sense" in str(error)


@pytest.mark.parametrize("positions", [1 << 28, 1 << 40, 1 << 62])
@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.STEP, Operation.PAGES])
def test_no_memory_is_taken_for_a_step_that_makes_no_sense(operation: Operation, positions: int) -> None:
    words = [MAGIC, operation, positions, 0, 0]
    if operation == Operation.PAGES:
        words = [MAGIC, operation, 64, 0, 0, positions, positions, positions]
    model: Any = _Model()
    model.open_pages = lambda *asked: pytest.fail(f"pages {asked} are made")
    star = _Told(np.array(words, np.int64).tobytes())
    with within_limits(), pytest.raises(StarError):
        _follow_one(model, star, *receive_header(star))


@pytest.mark.parametrize("runs", [[(0, 10**12)], [(0, 3)] * 4, [(3, 1)], [(-2, 1)], [(2, 5), (0, 1)]])
def test_tiles_that_a_slice_has_not_cannot_be_missing(runs: list[tuple[int, int]]) -> None:
    """Rank 0 made a list of them."""
    with within_limits(), pytest.raises(StarError, match="r1 pi says that it lacks tiles"):
        indexes_of(runs, 4, "r1 pi")
    assert indexes_of([(0, 2), (3, 4)], 4, "r1 pi") == [0, 1, 3]


@pytest.mark.parametrize(
    "change", [{"formats": {}}, {"weights": []}, {"config": {"layers": "a"}}, {"weights": [0, -1]}]
)
def test_a_plan_of_slices_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    """Formats that lack one that the config needs were an internal error, and so were others."""
    shape = config()
    formats: Any = ModelFormats.for_model("q4_0", shape).to_dict()
    kept = [[count, {part: fmt for part, fmt in of.items() if part != "v"}] for count, of in formats["layers"]]
    note = DistributeSlices("m", "f", shape.to_dict(), {**formats, "layers": kept}, [1], None, "c", False)
    for one in (note, msgspec.structs.replace(note, **{"formats": formats, **change})):
        with pytest.raises((StarError, InputError)):
            _header_from(one, 0, 1)


# Slices


def _header_to_pipe(file: h5py.File, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    del file["header"]
    file["header"] = h5py.ExternalLink(str(folder / "pipe"), "/header")


def _group_to_pipe(file: h5py.File, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    del file["layers"]
    file["layers"] = h5py.ExternalLink(str(folder / "pipe"), "/layers")


def _soft(file: h5py.File, folder: Path) -> None:
    file.move("header", "elsewhere")
    file["header"] = h5py.SoftLink("/elsewhere")


def _numbers_in_pipe(file: h5py.File, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    sums = file["checksums"][...]
    del file["checksums"]
    file.create_dataset("checksums", sums.shape, sums.dtype, external=[(str(folder / "pipe"), 0, sums.nbytes)])


def _virtual(file: h5py.File, folder: Path) -> None:
    sums = file["checksums"][...]
    del file["checksums"]
    layout = h5py.VirtualLayout(sums.shape, sums.dtype)
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "checksums", shape=sums.shape)
    file.create_virtual_dataset("checksums", layout)


def _large_pieces(file: h5py.File, folder: Path) -> None:
    """A few bytes that unpack to a piece of 1 GB."""
    header = file["header"][...]
    del file["header"]
    made = file.create_dataset(
        "header", header.shape, header.dtype, maxshape=(None,), chunks=(1 << 30,), compression="gzip"
    )
    made.id.write_direct_chunk((0,), _packed(1 << 30))


def _packed(size: int) -> bytes:
    import zlib

    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)), packer.flush()])


@pytest.mark.parametrize(
    "change",
    [_header_to_pipe, _group_to_pipe, _soft, _numbers_in_pipe, _virtual, _large_pieces],
    ids=lambda f: f.__name__,
)
def test_a_slice_that_leads_elsewhere_is_refused(change: Callable[[h5py.File, Path], None], tmp_path: Path) -> None:
    path = tmp_path / "rank-0-of-1.h5"
    path.write_bytes(seeds.slice_file())
    with h5py.File(path, "r+") as file:
        change(file, tmp_path)
    with within_limits(), pytest.raises(SliceError, match=r"link to somewhere else|in another file|has pieces of"):
        SliceFile(path)


# Chat templates

_USER = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for m in messages * 9 recursive %}{% if loop.depth < 40 %}{{ loop(messages * 9) }}{% endif %}{% endfor %}",
        "{{ ('a' * messages | length * 999999999) | length }}",
        "{{ 'a' * 9999999999 }}",
        "{{ 'a'.ljust(9999999999) | length }}{{ 'a' | center(9999999999) | length }}",
        "{{ '%9999999999d' % 3 }}",
        "{{ '{:>9999999999}'.format('a') }}",
        "{% set ns = namespace(a='aaaaaaaaaa') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) | length }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 9 ** (9 ** (messages | length * 9)) }}",
        "{{ messages | tojson(indent=999999999) }}",
    ],
)
def test_a_chat_template_cannot_go_on_for_ever_nor_take_all_memory(source: str) -> None:
    template = ChatTemplate(source, {})
    with within_limits():
        for _ in range(3):  # as a tokenizer does, to see what it can
            with pytest.raises(ModelError, match="chat template fails"):
                template.render(_USER)


# Sizes


def test_counts_beyond_any_model_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for counts, said in (((1 << 21, 0), "2097152 tensors"), ((0, 1 << 17), "131072 keys")):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(64 << 20))
        with within_limits(), pytest.raises(ModelError, match=said):
            open_source(path)


def test_an_array_beyond_any_vocabulary_is_refused(tmp_path: Path) -> None:
    data, key = seeds.gguf_file(), b"tokenizer.ggml.scores"
    count = 1 << 23
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, count) + bytes(count)
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:8] + struct.pack("<QQ", tensors, keys + 1) + entry + data[24:])
    with within_limits(), open_source(path) as source, pytest.raises(ModelError, match="8388608 elements"):
        source.tokenizer_assets()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("piece", ["[],", '{"a":0},', '"ab",'])
def test_json_of_many_parts_does_not_fill_the_memory(name: str, piece: str, tmp_path: Path) -> None:
    """As much of it as a file could once have."""
    text = ('{"a": [' + piece * ((40 << 20) // len(piece)) + "0]}").encode()
    for path in seeds.hf_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if name == "model.safetensors":
        (tmp_path / "model.safetensors.index.json").unlink()
    if name == "model.safetensors":
        text = struct.pack("<Q", len(text)) + text
    (tmp_path / name).write_bytes(text)
    with within_limits(), pytest.raises(ModelError):
        open_source(tmp_path)


def test_a_tokenizer_without_end_is_refused(tmp_path: Path) -> None:
    for path in seeds.hf_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(4 << 30)  # which takes nothing on the disk
    with within_limits(), open_source(tmp_path) as source, pytest.raises(ModelError, match="no such file"):
        source.tokenizer_assets()
