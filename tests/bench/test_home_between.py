"""A program between the devices of an emulated home: what it reads and writes of MPI's frames, and each kind of harm
once, by real MPI. bench/home/faults/between.py tries each many times, and says what is well."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Iterator

import pytest

from bench.home import Home, Link
from bench.home.faults import between, harm, ucx_frames
from bench.home.faults.frames import Splitter
from bench.home.faults.middle import Middle
from tests.support.homes import LACKING
from tests.support.launch import Launcher

pytestmark = pytest.mark.alone

# As Open MPI 5.0.11 sent them: a connection's beginning, and the headers of a message of its own (communicator 0, tag -34,
# 4 bytes follow) and of one of tpimpi (communicator 3, tag 12611, sequence 901, 2320 bytes follow).
HANDSHAKE = bytes.fromhex("0100da81020000004f50414c2d5443502d42544c007f0000")
OWN = bytes.fromhex("41010000120000004100000002000000deffffff0100") + b"\3\0\0\0"
OURS = bytes.fromhex("410100001e0900004100030000000000433100008503")
SEQUENCE_AT = len(OURS) - 2
# The rest of a large message: two pieces, to these addresses.
REST = struct.pack("<BBHI4Q", 0, 2, 2, 0, 0x7F0000001000, 3000, 0x7F0000009000, 500) + b"\5" * 3500


def message(sequence: int, fill: int) -> bytes:
    return OURS[:SEQUENCE_AT] + struct.pack("<H", sequence) + bytes([fill]) * 2320


@pytest.mark.parametrize("step", [1, 1000, 1 << 20])
def test_frames_are_found_however_they_come(step: int) -> None:
    sent = HANDSHAKE + OWN + message(901, 1) + REST + message(902, 2)
    splitter = Splitter()
    frames = list(splitter.feed(sent[:24]))  # the library sends it at once
    for at in range(24, len(sent), step):
        frames += splitter.feed(sent[at : at + step])
    assert b"".join(frame.data for frame in frames) == sent
    assert [(frame.communicator, frame.tag, frame.ours) for frame in frames[1:]] == [
        (0, -34, False),
        (3, 12611, True),
        (0, 0, False),
        (3, 12611, True),
    ]
    assert [frame.payload for frame in frames[1:] if frame.match_at] == [b"\3\0\0\0", b"\1" * 2320, b"\2" * 2320]


# As UCX under MPICH 5.0.2 sent them: how a connection begins each way, and a message of the library's own (context 1). As
# its headers are: one of tpimpi (context 496, tag 12611, of rank 2), the two parts of a large one, and a put of 700 bytes.
UCX_CONNECTS = bytes.fromhex("78563412bebafeca201d000000010000000000000000000000000200e80f0a4d00020000000000000000")
UCX_ANSWERS = bytes.fromhex("200400000003000000")
UCX_OWN = bytes.fromhex("021000000007000000010001000100000001000000")
UCX_OURS = struct.pack("<BIIHH", 2, 8 + 2320, 12611, 2, 496)
UCX_FIRST = struct.pack("<BIIHHQQ", 3, 24 + 500, 7, 0, 496, 700, 99) + b"\6" * 500
UCX_MIDDLE = struct.pack("<BIQQ", 4, 16 + 200, 99, 500) + b"\6" * 200
UCX_PUT = struct.pack("<BIQQI", 33, 20, 0x7F0000001000, 700, 1) + b"\2" * 700


@pytest.mark.parametrize("step", [1, 1000, 1 << 20])
def test_frames_of_ucx_are_found_in_both_directions(step: int) -> None:
    connecting, other = ucx_frames.splitters()
    messages = UCX_OWN + UCX_OURS + b"\1" * 2320 + UCX_FIRST + UCX_MIDDLE + UCX_PUT + UCX_OURS + b"\3" * 2320
    for splitter, first, own in ((connecting, UCX_CONNECTS, 2), (other, UCX_ANSWERS, 1)):
        sent = first + messages
        frames = [frame for at in range(0, len(sent), step) for frame in splitter.feed(sent[at : at + step])]
        assert b"".join(frame.data for frame in frames) == sent and not splitter.plain
        found = [(frame.communicator, frame.tag, frame.ours) for frame in frames[own:]]
        of_ours = (496, 12611, True)
        assert found == [(1, 7, False), of_ours, (496, 7, False), (0, 0, False), (0, 0, False), of_ours]
        assert [frame.payload for frame in frames if frame.ours] == [b"\1" * 2320, b"\3" * 2320]
    frames[-1].replace(b"short")
    assert frames[-1].data == struct.pack("<BIIHH", 2, 8 + 5, 12611, 2, 496) + b"short"


def test_other_connections_beside_those_of_ucx_pass_as_they_are() -> None:
    connecting, other = ucx_frames.splitters()
    for splitter, data in ((connecting, b"HYD\0\0\0\0\0\1\0\0\0"), (other, b"\2" * 50)):
        (frame,) = splitter.feed(data)
        assert frame.data == data and splitter.plain and frame.at == 0, "it has no headers of MPI"


def test_the_launchers_bytes_pass_as_they_are() -> None:
    frames = list(Splitter().feed(b"prterun-laptop-1@0" + bytes(100)))
    assert [bytes(frame.data) for frame in frames] == [b"prterun-laptop-1@0" + bytes(100)]
    assert not frames[0].ours


def test_after_a_message_was_left_out_the_counts_of_mpi_have_no_gap() -> None:
    drop = harm.Drop((0, 1), random.Random(0))
    drop.due = True
    splitter, passed = Splitter(), []
    for frame in splitter.feed(HANDSHAKE + b"".join(message(n & 0xFFFF, n % 251) for n in range(65530, 65560))):
        passed += drop.meet((0, 1), frame)
    sequences = [struct.unpack_from("<H", frame.data, SEQUENCE_AT)[0] for frame in passed[1:]]
    assert sequences == [n & 0xFFFF for n in range(65530, 65559)]
    assert drop.done.startswith("dropped: 2320 bytes")
    [other] = drop.meet((1, 0), next(iter(_begun().feed(message(901, 1)))))
    assert bytes(other.data) == message(901, 1)  # the other direction has a count of its own


def test_a_message_that_is_cut_has_headers_that_fit() -> None:
    cut = harm.Shorten((0, 1), random.Random(1))
    cut.due = True
    passed = [f for n in range(20) for frame in _begun().feed(message(n, n)) for f in cut.meet((0, 1), frame)]
    short = [frame for frame in passed if len(frame.payload) < 2320]
    assert len(short) == 1
    assert struct.unpack_from("<I", short[0].data, 4)[0] == len(short[0].data) - 8 == 14 + len(short[0].payload)


def _begun() -> Splitter:
    splitter = Splitter()
    list(splitter.feed(HANDSHAKE))
    return splitter


@pytest.fixture(scope="module")
def middle(mpirun: Launcher) -> Iterator[Middle]:
    if LACKING or shutil.which("nft") is None:
        pytest.skip(LACKING or "no nft")
    with Home(between.RANKS, Link(latency_s=0.0005)) as home, Middle(home, mpirun.mpi) as made:
        yield made


@pytest.fixture(scope="module")
def answers(middle: Middle) -> dict[str, str]:
    """Through the program, which does nothing."""
    middle.harm = harm.Harm()
    return between.undisturbed(middle.home, "on", middle.mpi)


@pytest.mark.parametrize("kind", [*harm.KINDS, between.KEY])
@pytest.mark.slow
def test_harm_is_named_and_nothing_is_answered_wrongly(middle: Middle, answers: dict[str, str], kind: str) -> None:
    outcome = between.try_once(kind, middle, "on", answers, random.Random(kind))
    assert not outcome.wrong, outcome
    assert outcome.done


@pytest.mark.slow
def test_without_seals_damage_is_found_and_forgery_is_believed(middle: Middle, answers: dict[str, str]) -> None:
    """The harm that the other test shows to be found is one that does change answers."""
    outcome = between.try_once("flip", middle, "off", answers, random.Random("plain"))
    assert not outcome.wrong, outcome
    middle.harm = forge = harm.Forge((1, 0), random.Random(0))
    screen = between.start(middle.home, between.PROMPT, "off", "star", middle.mpi)
    between.reach("answer", screen, forge, random.Random(0))
    forge.due = True
    assert screen.ended(between.START_TIMEOUT_S)
    screen.join()
    assert forge.done
    assert screen.process.returncode == 0
    assert between.answer_of(screen) != answers[between.PROMPT]
