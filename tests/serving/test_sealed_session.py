"""--session-key-file: a session that a passphrase encrypts, line by line, and that goes on wherever a run was ended."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from tests.support.launch import Result
from tests.support.messages import assert_one_line
from tpimpi.errors import InputError
from tpimpi.serving.sealed_lines import LineSeal
from tpimpi.serving.session import SAMPLING, Session, save
from tpimpi.serving.transcript import Turn

PASSPHRASE = b"correct horse battery staple"
OPTIONS = {**dict.fromkeys(SAMPLING, 0), "top_p": 1.0, "repetition_penalty": 1.0, "seed": None, "raw": False}
TURNS = [
    Turn("Zanzibar?\n", [1, 2], 77, [3, 8], "stop", "né", "quixotic"),
    Turn("b", [1, 2, 3, 8, 4], 0, [5]),
]
SECRETS = [b"Zanzibar", "né".encode(), b"quixotic", b"fingerprint", b"token", PASSPHRASE]


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are made quickly, here: of a run they are as always."""
    monkeypatch.setattr("tpimpi.serving.sealed_lines.SCRYPT_N", 2)


def opened(path: Path, passphrase: bytes | None = PASSPHRASE) -> Session:
    session = Session(str(path), passphrase=passphrase)
    session.options({}, OPTIONS)
    session.check_model("m", "abc", 9)
    return session


def write(path: Path) -> bytes:
    """TURNS, as a run writes them; the file."""
    session = opened(path)
    session.keep_reasoning(True)
    for turn in TURNS:
        session.begin(Turn(turn.prompt, turn.ids, turn.seed))
        for token in turn.tokens:
            session.add(token)
        if turn.ended is not None:
            session.end(turn.ended, turn.text, turn.reasoning)
    session.close()
    return path.read_bytes()


def turns(path: Path) -> list[Turn]:
    session = opened(path)
    session.close()
    return session.turns


def test_the_file_is_as_described(tmp_path: Path) -> None:
    """By the ciphers themselves, and scrypt with the parameters that are stated."""
    whole = write(tmp_path / "s")
    assert not [secret for secret in SECRETS if secret in whole]
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    first, *lines = whole.splitlines(keepends=True)
    about = json.loads(first)
    assert set(about) == {"tpimpi sealed session", "salt", "check"} and about["tpimpi sealed session"] == 1
    made = Scrypt(salt=bytes.fromhex(about["salt"]), length=48, n=2, r=8, p=3).derive(PASSPHRASE)
    assert made[32:].hex() == about["check"]
    cipher, before, plain, nonces = ChaCha20Poly1305(made[:32]), first, [], set()
    for line in lines:
        sealed = base64.b64decode(line)
        text = cipher.decrypt(sealed[:12], sealed[12:], before)
        assert len(text) % 64 == 0
        plain.append(json.loads(text))
        before = sealed[-16:]
        nonces.add(sealed[:12])
    assert len(nonces) == len(lines)
    header, *rest = plain
    assert header["tpimpi session"] == 3 and header["fingerprint"] == "abc"
    assert rest == [
        {"prompt": "Zanzibar?\n", "ids": [1, 2], "seed": 77},
        {"token": 3},
        {"token": 8},
        {"end": "stop", "text": "né", "reasoning": "quixotic"},
        {"prompt": "b", "ids": [1, 2, 3, 8, 4], "seed": 0},
        {"token": 5},
    ]
    assert turns(tmp_path / "s") == TURNS
    other = write(tmp_path / "t").splitlines()
    assert not set(whole.splitlines()) & set(other), "the same conversation twice is not the same file"


def test_cut_at_any_byte_it_goes_on_from_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "s"
    whole = write(path)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        session = opened(path)
        assert path.read_bytes() == whole[:cut], "opening changes nothing"
        lines = whole[:cut].count(b"\n") - 1  # sealed ones
        reached = [min(len(turn.tokens), max(0, lines - begun)) for turn, begun in zip(TURNS, (2, 6), strict=True)]
        assert [turn.tokens for turn in session.turns] == [
            turn.tokens[:count] for turn, count, begun in zip(TURNS, reached, (2, 6), strict=True) if lines >= begun
        ], cut
        turn = session.unfinished or Turn("x", [7], 5)
        session.begin(turn)
        session.add(6)
        session.close()
        assert turns(path)[-1].tokens[-1] == 6, cut


def test_the_shapes_of_lines_tell_no_token(tmp_path: Path) -> None:
    session = Session(str(tmp_path / "s"), passphrase=PASSPHRASE)
    session.options({}, OPTIONS)
    session.check_model("m", "abc", 300_000)
    session.begin(Turn("p", [1], 0))
    for token in (1, 99, 299_999):
        session.add(token)
    session.close()
    assert len({len(line) for line in (tmp_path / "s").read_bytes().splitlines()[-3:]}) == 1


def _swap(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], lines[4], lines[3], *lines[5:]]


def _flip(lines: list[bytes]) -> list[bytes]:
    changed = bytearray(lines[3])
    changed[40] ^= 1 if chr(changed[40] ^ 1).isalnum() else 2
    return [*lines[:3], bytes(changed), *lines[4:]]


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (_swap, 4),
        (_flip, 4),
        (lambda lines: [*lines[:3], *lines[4:]], 4),
        (lambda lines: [*lines[:4], lines[3], *lines[4:]], 5),
        (lambda lines: [*lines[:2], b"AAAA\n", *lines[3:]], 3),
        (lambda lines: [*lines[:2], b"not base64 \xff\n", *lines[3:]], 3),
        (lambda lines: [*lines[:4], b'{"token": 3}\n', *lines[4:]], 5),
    ],
    ids=["swapped", "flipped", "left out", "repeated", "short", "no base64", "plain"],
)
def test_what_was_changed_is_found(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], broken: int) -> None:
    path = tmp_path / "s"
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))
    with pytest.raises(InputError, match=f"is broken in line {broken}, .* cut it off before that line"):
        Session(str(path), passphrase=PASSPHRASE)


def test_lines_of_another_file_are_found(tmp_path: Path) -> None:
    """Of another session of the same passphrase, and of another continuation of the same session."""
    one, other = write(tmp_path / "s").splitlines(keepends=True), write(tmp_path / "t").splitlines(keepends=True)
    (tmp_path / "u").write_bytes(b"".join([*one[:4], *other[4:]]))
    with pytest.raises(InputError, match="is broken in line 5"):
        Session(str(tmp_path / "u"), passphrase=PASSPHRASE)
    continued = []
    for token in (5, 6):
        (tmp_path / "s").write_bytes(b"".join(one[:3]))
        session = opened(tmp_path / "s")
        session.add(token)
        session.add(7)
        session.close()
        continued.append((tmp_path / "s").read_bytes().splitlines(keepends=True))
    (tmp_path / "s").write_bytes(b"".join([*continued[0][:4], *continued[1][4:]]))
    with pytest.raises(InputError, match="is broken in line 5"):
        Session(str(tmp_path / "s"), passphrase=PASSPHRASE)


def test_what_was_cut_off_behind_a_whole_line_is_an_earlier_run(tmp_path: Path) -> None:
    """What the format cannot tell from a run that ended there, as its head says."""
    lines = write(tmp_path / "s").splitlines(keepends=True)
    (tmp_path / "s").write_bytes(b"".join(lines[:6]))
    assert turns(tmp_path / "s") == TURNS[:1]


def test_files_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    plain = opened(tmp_path / "plain", None)
    plain.begin(Turn("a", [1], 0))
    plain.close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name, passphrase, said in (
        ("s", None, "is encrypted; give the file of its passphrase: --session-key-file FILE"),
        ("s", b"wrong", "the passphrase in --session-key-file is not the one that it was begun with"),
        ("plain", PASSPHRASE, "is not encrypted, and --session-key-file is given; leave that out, or begin another"),
    ):
        with pytest.raises(InputError, match=said):
            Session(str(tmp_path / name), passphrase=passphrase)
    for first in (b'{"tpimpi sealed session": 2, "salt": "", "check": ""}\n', b'{"tpimpi sealed session": "x"\n'):
        (tmp_path / "later").write_bytes(first)
        with pytest.raises(InputError, match="is encrypted in a way that this tpimpi does not know"):
            Session(str(tmp_path / "later"), passphrase=PASSPHRASE)
    (tmp_path / "text").write_text("a diary\n")
    with pytest.raises(InputError, match="is there, and is no session"):
        Session(str(tmp_path / "text"), passphrase=PASSPHRASE)
    assert {path: path.read_bytes() for path in before} == before


def test_undo_cancelled_and_a_copy_of_it(tmp_path: Path) -> None:
    """What changes the version of a plain session in its place; and /save."""
    write(tmp_path / "s")
    session = opened(tmp_path / "s")
    session.add(6)
    session.end("cancelled", "x")
    session.undo()
    session.system = "Be brief."
    session.begin(Turn("c", [2], 1))
    session.end("end", "d")
    header = {"model": "m", "fingerprint": "abc", "vocabulary": 9, "options": OPTIONS}
    save(str(tmp_path / "copy"), session, header)
    session.close()
    expected = [TURNS[0], Turn("c", [2], 1, [], "end", "d")]
    for name in ("s", "copy"):
        assert turns(tmp_path / name) == expected
        assert not [secret for secret in [*SECRETS, b"brief"] if secret in (tmp_path / name).read_bytes()]


def test_what_is_kept_beside_is_of_this_session(tmp_path: Path) -> None:
    one, other = LineSeal(PASSPHRASE), LineSeal(PASSPHRASE)
    sealed = one.seal_beside(b"cache", b"key")
    assert LineSeal(PASSPHRASE, one.first_line).open_beside(b"cache", sealed) == b"key"
    for seal, what, data in ((other, b"cache", sealed), (one, b"other", sealed), (one, b"cache", sealed[:20])):
        with pytest.raises(ValueError):
            seal.open_beside(what, data)


def test_a_run_keeps_its_conversation_and_the_key_of_its_cache_encrypted(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, session, report = tmp_path / "key", tmp_path / "s", tmp_path / "report.json"
    key.write_text("correct horse battery staple\n")
    key.chmod(0o600)
    options = ("--model", str(tiny), "--format", "f32", "--max-tokens", "5", "--ignore-eos", "--quiet")
    options = (*options, "--session", str(session), "--keep-cache", str(tmp_path / "kept"), "--report", str(report))
    sealed = ("--session-key-file", str(key))
    for run, prompt in enumerate(("the quick brown fox", "the lazy dog")):
        result = tpimpi(*options, *sealed, "--prompt", prompt)
        assert result.code == 0, result.err
        (answer,) = json.loads(report.read_text())["answers"]
        assert (answer["cached_tokens"] > 0) == bool(run), result.err
        entry = (tmp_path / "s.cache").read_bytes()
        assert entry.startswith(b'{"tpimpi sealed cache": "') and b'"key"' not in entry
    monkeypatch.undo()
    about = json.loads(session.read_bytes().splitlines()[0])
    made = Scrypt(salt=bytes.fromhex(about["salt"]), length=48, n=1 << 15, r=8, p=3).derive(PASSPHRASE)
    assert made[32:].hex() == about["check"], "the strength that is stated"
    with_it = Session(str(session), passphrase=PASSPHRASE)
    with_it.close()
    assert [turn.prompt for turn in with_it.turns] == ["the quick brown fox", "the lazy dog"]
    assert b"quick" not in session.read_bytes()
    # Another session's, or a damaged one, is none: everything is computed again.
    (tmp_path / "s.cache").write_bytes(entry[:60] + b'"}\n')
    result = tpimpi(*options[:-2], *sealed, "--prompt", "again", "--report", str(report))
    assert json.loads(report.read_text())["answers"][0]["cached_tokens"] == 0

    before = session.read_bytes()
    key.write_text("wrong\n")
    refused = tpimpi(*options, *sealed, "--prompt", "x")
    assert_one_line(refused, "--session .*: the passphrase in --session-key-file is not the one")
    key.chmod(0o644)
    assert_one_line(tpimpi(*options, *sealed, "--prompt", "x"), "key can be read by others; type: chmod 600 ")
    key.write_text("\n")
    key.chmod(0o600)
    assert_one_line(tpimpi(*options, *sealed, "--prompt", "x"), "--session-key-file .* is empty; write a passphrase")
    alone = tpimpi("--model", str(tiny), *sealed, "--prompt", "x")
    assert_one_line(alone, "--session-key-file is given and --session is not")
    assert session.read_bytes() == before
