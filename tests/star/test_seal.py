"""Sealed links: single messages, then whole runs whose ranks have keys of every kind, and whose messages are altered."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tests.support.launch import PROGRAMS, Launcher
from tpimpi.errors import StarError, UnsealError
from tpimpi.star import ciphers
from tpimpi.star import seal as seal_module
from tpimpi.star.ciphers import AES, CHACHA
from tpimpi.star.seal import LinkSecrets, Seal
from tpimpi.star.secure import _hear, _Said
from tpimpi.star.start import seal_given
from tpimpi.system.link_keys import LinkKeys, make_keys, write_keys

SEALED = str(PROGRAMS / "sealed.py")
RANKS = 3


def _ends(cipher: str, communicator: str = "main") -> tuple[Seal, Seal]:
    """Rank 0's and rank 1's."""
    here, there, hash_ = bytes(range(32)), bytes(range(32, 64)), bytes(32)
    return (
        Seal(cipher, {1: LinkSecrets(here, there, hash_)}, communicator),
        Seal(cipher, {0: LinkSecrets(there, here, hash_)}, communicator),
    )


def _sealed(seal: Seal, peer: int, tag: int, data: bytes) -> np.ndarray:
    frame = np.empty(len(data) + 16, np.uint8)
    seal.close(peer, tag, np.frombuffer(data, np.uint8), frame)
    return frame


@pytest.mark.parametrize("cipher", [AES, CHACHA])
def test_messages_open_once_in_order_with_their_tag_at_their_end(cipher: str) -> None:
    hub, rank = _ends(cipher)
    frames = [_sealed(hub, 1, 3, b"the same") for _ in range(3)]
    assert len({frame.tobytes() for frame in frames}) == 3
    other_tag, back = _sealed(hub, 1, 4, b"the same"), _sealed(rank, 0, 3, b"the same")

    def opens(seal: Seal, peer: int, tag: int, number: int, frame: np.ndarray) -> bool:
        into = np.empty(8, np.uint8)
        try:
            seal.open(peer, tag, number, frame, into)
        except UnsealError:
            return False
        return into.tobytes() == b"the same"

    numbers = [rank.expect(0, 3) for _ in range(3)]
    assert [[opens(rank, 0, 3, number, frame) for frame in frames] for number in numbers] == np.eye(3).tolist()
    assert opens(rank, 0, 4, rank.expect(0, 4), other_tag)
    assert not opens(rank, 0, 3, 0, other_tag)
    assert opens(hub, 1, 3, hub.expect(1, 3), back)
    assert not opens(rank, 0, 3, 0, back), "a rank's own message sent back to it"
    beats = rank.derive("heartbeat")
    assert not opens(beats, 0, 3, 0, frames[0]), "of another communicator"
    assert opens(beats, 0, 3, 0, _sealed(hub.derive("heartbeat"), 1, 3, b"the same"))
    for place in range(24):
        changed = frames[1].copy()
        changed[place] ^= 0x80
        assert not opens(rank, 0, 3, 1, changed)


def test_keys_are_those_of_hkdf() -> None:
    made: list[bytes] = []
    secrets = LinkSecrets(bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ciphers, "make_cipher", lambda name, key, opens: made.append(key))
        Seal(AES, {1: secrets}).derive("heartbeat")
    expected = [
        HKDF(SHA256(), 32, salt=secrets.hash, info=b"tpimpi AES-256-GCM " + communicator).derive(secret)
        for communicator in (b"main", b"main/heartbeat")
        for secret in (secrets.sent, secrets.received)
    ]
    assert made == expected


def test_no_nonce_comes_twice_where_two_threads_send_for_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find no counts of the peer yet: what one has counted is not forgotten for the other's."""
    hub, frames = _ends(AES)[0], []
    make, others = seal_module.array, [lambda: frames.append(_sealed(hub, 1, 3, b"the same"))]

    def make_while_another_sends(*arguments):
        if others:
            others.pop()()
        return make(*arguments)

    monkeypatch.setattr(seal_module, "array", make_while_another_sends)
    _sealed(hub, 1, 4, b"of another sum")
    frames.append(_sealed(hub, 1, 3, b"the same"))
    assert frames[0].tobytes() != frames[1].tobytes()


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"[]",
        b'{"host": 1}',
        b'{"host": "\xff"}',
        b'{"more": ' + b"[" * 100_000,
        b'{"protocol": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda message: message[:12].decode(errors="replace"),
)
def test_what_is_no_message_of_a_handshake_is_an_error_of_ours(message: bytes) -> None:
    class Taken:
        name = staticmethod("rank {}".format)

        def take(self, *_: object) -> np.ndarray:
            return np.frombuffer(message, np.uint8)

    with pytest.raises(StarError, match=r"^rank 1 sent a handshake that makes no sense"):
        _hear(Taken(), 1, _Said, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], "auto"),
        (["--seal", "on"], "on"),
        (["serve", "--seal=off", "--port", "1"], "off"),
        (["--seal", "on", "--seal", "off"], "off"),
        (["--prompt=--seal"], "auto"),
        (["--seal"], "auto"),
        (["--seal", "perhaps"], "auto"),  # rank 0's parser says what is wrong
    ],
)
def test_the_option_is_found_before_the_parser_is_there(arguments: list[str], given: str) -> None:
    assert seal_given(arguments) == given


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys of three hosts in every state, a folder each."""
    folder, hosts = tmp_path_factory.mktemp("keys"), [f"host-{rank}" for rank in range(RANKS)]
    good, other = make_keys(hosts, "2026-01-01"), make_keys([*hosts, "stranger"], "2026-02-02")

    def put(kind: str, keys: dict[int, LinkKeys]) -> None:
        for rank, host in enumerate(hosts):
            if keys.get(rank, good[host]) is not None:
                write_keys(keys.get(rank, good[host]), folder / kind / f"{rank}.json")

    put("good", {})
    put("one host", dict.fromkeys(range(RANKS), good["host-0"]))
    put("missing", {1: None})
    put("missing on rank 0", {0: None})
    stranger = good["host-2"]
    put("posing", {2: LinkKeys(1, "host-1", stranger.made, stranger.private, stranger.public)})
    put("forging", {2: LinkKeys(1, "host-1", stranger.made, stranger.private, stranger.public)})
    put("other home", {2: other["host-2"]})
    put("stranger", {1: other["stranger"]})
    put("open to others", {})
    (folder / "open to others" / "2.json").chmod(0o644)
    put("broken", {})
    (folder / "broken" / "1.json").write_text('{"private": "00')
    # Only the pair of ranks 1 and 2 does not fit: rank 2 takes another key for rank 1's.
    changed = {**good["host-2"].public, "host-1": other["host-1"].public["host-1"]}
    put("pair", {2: LinkKeys(1, "host-2", stranger.made, stranger.private, changed)})
    return folder


@pytest.fixture(scope="module")
def said(home: Path, mpirun: Launcher) -> list[dict[str, str]]:
    """What each rank says of each kind of trouble."""
    result = mpirun(RANKS, SEALED, str(home), timeout=120)
    lines = [line for line in result.out.splitlines() if line.startswith("[")]
    assert lines, result.err
    return json.loads(lines[0])


def test_all_that_ranks_say_to_one_another_goes_over_sealed_links(said) -> None:
    assert [of_rank["well"] for of_rank in said] == [
        AES if "aes" in Path("/proc/cpuinfo").read_text() else CHACHA
    ] * RANKS


def test_ranks_have_the_names_that_they_have_proved(said) -> None:
    """Not the machine's, and not another that a rank's owner would like."""
    for rank, of_rank in enumerate(said):
        own, *others = of_rank["names"][: 1 + RANKS]
        assert own == f"r{rank} host-{rank}"
        assert others == [f"r{other} host-{other}" for other in range(RANKS)]
    for line in said[0]["names"][1 + RANKS :]:
        assert line.startswith(
            "StarError: r1 host-1 says that it is host-2, and has proved with its key that it is host-1"
        )


def test_a_rank_without_an_openssl_understands_the_others(said: list[dict]) -> None:
    assert [of_rank["package"] for of_rank in said] == [[2.0] * 3, [0.0] * 3, [1.0] * 3]


def test_messages_import_nothing(said: list[dict]) -> None:
    assert [of_rank["imported"] for of_rank in said] == [[]] * RANKS


def test_lengths_do_not_tell_how_long_a_prompt_is(said) -> None:
    """Of 5 and of 32 rows of 8 numbers they are those of 32, of 33 those of 64; of a step of 5 rows they are exact."""
    for of_rank in said:
        five, all_, more, exact = of_rank["padded"]
        assert five == all_
        assert set(five) == {32 * 8 * 4 + 16}
        assert set(more) == {64 * 8 * 4 + 16}
        assert set(exact) == {5 * 8 * 4 + 16}


@pytest.mark.parametrize(
    ("kind", "where", "words"),
    [
        ("missing", "r1", "this host has no keys for that"),
        ("missing on rank 0", None, "this host has no keys for that"),
        ("posing", "r2", "r0 host-0 has not the key that host-1 knows host-0 by"),  # for it has not host-1's
        ("forging", None, "r2 host-1 has not the key that host-0 knows host-1 by"),
        ("other home", "r2", "r0 host-0 has not the key that host-2 knows host-0 by"),
        ("stranger", None, "r1 stranger has link keys of another home than host-0, whose keys are of 2026-01-01"),
        ("open to others", "r2", "has mode 644 and owner"),
        ("broken", "r1", "is no file of link keys"),
        ("pair", "r2", "r1 host-1 has not the key that host-2 knows host-1 by"),
    ],
)
def test_keys_that_do_not_fit_end_the_run_with_a_line(said, kind: str, where: str | None, words: str) -> None:
    line, others = said[0][f"keys: {kind}"], [of_rank[f"keys: {kind}"] for of_rank in said[1:]]
    assert line.startswith("InputError 2, ")
    assert words in line
    assert "doctor --hostfile FILE --make-keys" in line
    assert line.startswith(f"InputError 2, {where}")
    assert all(re.match(r"(_Refused|Input)Error 2, None: rank 0 ended the run$", other) for other in others), others


@pytest.mark.parametrize("kind", ["good", "one host"])
def test_keys_that_fit(said, kind: str) -> None:
    assert [of_rank[f"keys: {kind}"] for of_rank in said] == [said[0]["well"]] * RANKS


def test_machines_with_the_same_keys_are_not_taken_for_one(said) -> None:
    """As those of a cluster, which share a home folder: by hosts a run decides whose memory and cores are whose."""
    assert [of_rank["one home folder"] for of_rank in said] == [["node-0", "node-1", "node-1"]] * RANKS


@pytest.mark.parametrize("kind", ["change", "repeat", "exchange", "other rank", "other tag", "plain"])
def test_a_message_that_is_not_the_one_that_was_sealed_is_an_error(said, kind: str) -> None:
    line = said[0][kind]
    if kind in ("plain", "other tag"):  # of another size, or for another sum: it does not even fit
        assert re.match(
            r"StarError: (rank 1|r1 \S+) sent \d+ bytes where \d+ were due|StarError: nothing came from", line
        ), line
    else:
        assert re.match(
            r"StarError: a message from (rank 1|r1 \S+) is not the one that it sealed for this rank", line
        ), line


def test_a_message_that_is_cut_is_an_error(said) -> None:
    assert re.match(r"StarError: (rank 1|r1 \S+) sent 252 bytes where 272 were due", said[0]["cut"]), said[0]["cut"]


def test_a_handshake_of_any_length_is_not_taken(said) -> None:
    assert said[0]["long handshake"] == "StarError: rank 1 sent 2097160 bytes where 1048576 at most were due"


def test_a_message_that_is_left_out_is_missed_within_seconds(home: Path, mpirun: Launcher) -> None:
    result = mpirun(RANKS, SEALED, str(home), "drop", timeout=60)
    assert result.code != 0
    assert "not noticed" not in result.out
    assert re.search(r"r0 \S+: a message from r1 \S+ was lost: \d+ were sent, and \d+ came", result.err), result.err


def test_a_sealed_run_says_the_same_as_a_plain_one(
    home: Path, mpirun: Launcher, cache: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "rank = os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK'))\n"
        f"os.environ['TPIMPI_LINK_KEYS'] = f'{home}/{{sys.argv[1]}}/{{rank}}.json'\n"
        "from tpimpi.cli.main import main\n"
        "main(sys.argv[2:])\n"
    )
    run = ("--model", str(tiny), "--prompt", "Hello there.", "--max-tokens", "8", "--ignore-eos")
    reports = {seal: tmp_path / f"{seal}.json" for seal in ("on", "off")}
    out = {}
    for seal, report in reports.items():
        result = mpirun(2, str(program), "one host", *run, "--seal", seal, "--report", str(report), env=cache)
        assert result.code == 0, result.err
        out[seal] = result.out
    assert out["on"] == out["off"] != ""
    assert [json.loads(report.read_text())["sealed"] for report in reports.values()] == [
        AES if "aes" in Path("/proc/cpuinfo").read_text() else CHACHA,
        None,
    ]
    for arguments, words in (
        (["missing", *run, "--seal", "on"], "links to other machines are sealed, and this host has no keys for that"),
        (
            ["one host", *run, "--seal=on", "--allreduce", "library"],
            "--allreduce library is MPI's own sum, which cannot be",
        ),
    ):
        result = mpirun(2, str(program), *arguments, env=cache)
        assert result.code == 2, result.err
        assert len(result.our_lines) == 1, result.err
        assert words in result.our_lines[0]


def test_no_key_is_ever_in_a_message(home: Path) -> None:
    """What stands in the key files: private keys are of 64 digits, and each is in its own host's file alone."""
    files = [(home / "good" / f"{rank}.json").read_text() for rank in range(RANKS)]
    private = [json.loads(text)["private"] for text in files]
    assert len(set(private)) == RANKS
    for owner, key in enumerate(private):
        assert [key in text for text in files] == [rank == owner for rank in range(RANKS)]
    assert (home / "good" / "0.json").stat().st_mode & 0o777 == 0o600
