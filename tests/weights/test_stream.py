"""The messages by which slices are sent."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tests.support.distribute_cases import by_one_process
from tests.support.slices import datasets
from tpimpi.errors import StarError
from tpimpi.star.control import decode_note, to_json
from tpimpi.weights.locations import SliceLocation
from tpimpi.weights.make import choose_formats, make_header
from tpimpi.weights.notes import DistributeSlices
from tpimpi.weights.receive import _receive
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.slices.writer import SliceWriter
from tpimpi.weights.sources import open_source
from tpimpi.weights.stream import CHECKSUM, DATA, END, MESSAGE_BYTES, StreamWriter, frames


class _Messages:
    """A star's end that gives what is put into it."""

    def __init__(self, messages: list[np.ndarray]) -> None:
        self.messages = deque(messages)

    def take_bulk(self, source: int) -> np.ndarray:
        assert source == 0
        return self.messages.popleft()


def _packed(header, tiles: dict[int, dict[str, np.ndarray]]) -> list[np.ndarray]:
    messages: list[np.ndarray] = []
    packer = StreamWriter(1, header, list(tiles))
    packer.send = lambda rank, message: messages.append(message)
    for index, parts in tiles.items():
        for name, data in parts.items():
            packer.write(index, name, data)
    packer.end(END)
    return messages


@pytest.fixture
def tiles(tiny: Path, tmp_path: Path):
    """The header of a slice and the bytes of its tiles' parts."""
    by_one_process(tiny, [1, 1], "q8_0", tmp_path / "one")
    file = SliceFile(tmp_path / "one" / slice_name(1, 2))
    found = {}
    for index, record in enumerate(file.records):
        tile = file.load(record)
        found[index] = {
            part.name: tile.matrices[part.name].data
            if part.is_matrix
            else tile.parts[part.name].reshape(-1).view(np.uint8)
            for part in record.parts
        }
    file.close()
    return file.header, found


def test_parcels_bring_tiles_whole(tiles, tmp_path: Path) -> None:
    header, found = tiles
    messages = _packed(header, found)
    assert max(message.nbytes for message in messages) <= MESSAGE_BYTES
    writer = SliceWriter(tmp_path / slice_name(1, 2), header)
    _receive(_Messages([np.empty(0, np.uint8), *messages]), writer)  # type: ignore[arg-type]
    writer.finish()
    writer.publish()
    assert datasets(tmp_path / slice_name(1, 2)) == datasets(tmp_path / "one" / slice_name(1, 2))


def test_large_pieces_are_cut_for_parcels(tiles) -> None:
    header, _ = tiles
    packer, messages = StreamWriter(1, header, [3]), []
    packer.send = lambda rank, message: messages.append(message)
    sizes = [part.nbytes for part in header.records[3].parts]
    packer._left[3] = 5 * MESSAGE_BYTES + 3
    data = np.random.default_rng(0).integers(0, 256, 5 * MESSAGE_BYTES + 3, np.uint8)
    packer.write(3, "gate", data)
    packer.end(END)
    assert sizes and all(message.nbytes <= MESSAGE_BYTES for message in messages)
    seen = [frame for message in messages for frame in frames(message)]
    assert np.array_equal(np.concatenate([piece for _, kind, piece in seen if kind == DATA]), data)
    (checksum,) = [piece for _, kind, piece in seen if kind == CHECKSUM]
    assert int(checksum.view("<u8")[0]) == xxhash.xxh3_64_intdigest(data)


@pytest.mark.parametrize("place", [24 + 5, 8, 0, 16, 20])
def test_a_parcel_that_is_damaged_on_its_way_is_refused(tiles, tmp_path: Path, place: int) -> None:
    """In the data, the kind, the index, and the size of its first frame."""
    header, found = tiles
    messages = _packed(header, found)
    messages[0][place] ^= 0x5A
    writer = SliceWriter(tmp_path / slice_name(1, 2), header)
    with pytest.raises(StarError, match=r"rank 0 sent|otherwise than rank 0 sent it"):
        _receive(_Messages(messages), writer)  # type: ignore[arg-type]
    assert 0 in writer.missing
    writer.close()
    again = SliceWriter(tmp_path / slice_name(1, 2), header)
    assert 0 not in again.claimed
    again.discard()


def test_frames_that_make_no_sense_are_refused(tiles, tmp_path: Path) -> None:
    header, found = tiles

    def frame(index: int, kind: int, data: bytes, size: int | None = None) -> np.ndarray:
        padded = data + bytes(-len(data) % 8)
        head = np.array([index, kind, len(data) if size is None else size], "<u8").tobytes()
        return np.frombuffer(head + padded, np.uint8)

    first = found[0]["attn_norm"].tobytes()
    cases = [
        [frame(0, DATA, first + b"12345678")],  # across the border of two parts
        [frame(99, DATA, b"12345678")],
        [frame(0, DATA, b"")],
        [frame(0, DATA, b"1234", size=2**62)],
        [frame(0, CHECKSUM, b"12345678")],  # before the tile is there
        [frame(0, DATA, first), frame(0, CHECKSUM, b"1234")],
        [frame(0, 77, b"")],
        [frame(0, END, b"")],  # with tiles missing
        [np.zeros(23, np.uint8)],
    ]
    for messages in cases:
        writer = SliceWriter(tmp_path / slice_name(1, 2), header)
        with pytest.raises(StarError, match="rank 0 sent"):
            _receive(_Messages(messages), writer)  # type: ignore[arg-type]
        writer.close()
    assert not list(tmp_path.glob(".*"))


def test_a_header_is_the_same_on_both_ends(tiny: Path) -> None:
    """Rank 0 tells the others what a header is made of; each makes its own."""
    from tpimpi.weights.distribute import _job_note
    from tpimpi.weights.receive import _header_from

    with open_source(tiny) as source:
        plan, formats = make_partition(source.config, [1.5, 0.1, 7]), choose_formats(source, "q4_1")
        for rank in (1, 2):
            header = make_header(source, plan, rank, formats)
            note = _job_note(header, SliceLocation("/slices", None), verify=False)
            assert _header_from(decode_note(to_json(note), DistributeSlices, "r0"), rank, 3) == header
        with pytest.raises(StarError, match="a plan for 3 ranks, the run has 4"):
            _header_from(note, 1, 4)
