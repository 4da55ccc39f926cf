"""Files of our own, and of the user: slices, sessions and what stands beside them, batches, hostfiles, keys of links."""

from __future__ import annotations

import json
from random import Random
from types import SimpleNamespace
from typing import Any

import h5py
import msgspec
import numpy as np
import xxhash

from tests.fuzz import seeds
from tests.fuzz.mutate import files_in, joined, mutate_bytes, mutate_files, mutate_json
from tests.fuzz.target import Target, written
from tests.support.slices import checked_contents
from tpimpi.engine.page_files import PageFiles, PagesHeader, UnusableError
from tpimpi.errors import InputError
from tpimpi.serving.batch_file import PART, BatchAnswers, read_items
from tpimpi.serving.kept_cache import SUFFIX, KeptCache, _ids_of
from tpimpi.serving.server import wire
from tpimpi.serving.server.front_options import FrontOptions
from tpimpi.serving.server.journal import Begun, Forgotten, Held, Record, Replied
from tpimpi.serving.server.kept import Kept
from tpimpi.serving.server.link import RankLink
from tpimpi.serving.session import Session
from tpimpi.system.hostfile import read_hostfile, refused_lines
from tpimpi.system.launcher import MPICH, OPEN_MPI
from tpimpi.system.link_keys import encode_keys, make_keys, read_keys
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import Header


def _slice(data: bytes) -> None:
    checked_contents(written("slices/rank-0-of-1.h5", data))


def _slice_header(data: bytes) -> None:
    """A header in a file whose checksums are right, so that all that it says is looked at."""
    path = written("slices/rank-0-of-1.h5", seeds.slice_file())
    with h5py.File(path, "r+") as file:
        sums = np.array([xxhash.xxh3_64_intdigest(data), *file["checksums"][1:]], np.uint64)
        del file["header"], file["checksums"]
        file["header"], file["checksums"] = np.frombuffer(data, np.uint8), sums
    checked_contents(path)


def _slice_header_seeds() -> list[bytes]:
    slices = SliceFile(written("slices/rank-0-of-1.h5", seeds.slice_file()))
    header: Header = slices.header
    slices.close()
    return [header.to_json()]


def _mutate_slice(data: bytes, random: Random) -> bytes:
    """What HDF5 says of the file, at its beginning and end, more often than the numbers of its tiles."""
    if random.randrange(3):
        edge = 4096
        return (
            mutate_bytes(data[:edge], random) + data[edge:]
            if random.randrange(2)
            else data[:-edge] + mutate_bytes(data[-edge:], random)
        )
    return mutate_bytes(data, random)


_OPTIONS = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 5,
    "raw": False,
}


def _session_seed(version: int) -> bytes:
    first = {"tpimpi session": version, "model": "m", "fingerprint": "abc", "vocabulary": 9, "options": _OPTIONS}
    lines: list[dict[str, Any]] = [first]
    if version == 3:
        lines.append({"system": "s"})
    lines += [{"prompt": "Grüße\n", "ids": [1, 2], "seed": 77}, {"token": 3}, {"end": "stop", "text": "né"}]
    if version == 2:
        lines[-1]["reasoning"] = "r"
    if version == 3:
        lines += [{"undo": 1}, {"system": None}]
    lines += [{"prompt": "b", "ids": [1, 2, 3], "seed": 0}, {"token": 5}]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _session(data: bytes) -> None:
    conversation, kept = files_in(data, 2)
    path = written("session", conversation)
    beside = path.with_name(path.name + SUFFIX)
    beside.unlink(missing_ok=True)
    if kept:
        beside.write_bytes(kept)
    session = Session(str(path))
    try:
        session.options({}, _OPTIONS)
        session.check_model("m", "abc", 9)
        cache = KeptCache(session)
        if (entry := cache._entry) is not None:
            for turn in session.turns:
                _ids_of(turn, entry)
        if session.unfinished is not None:
            session.add(1)
            session.end("stop", "a")
    finally:
        session.close()
    if session.turns:
        Session(str(path)).close()  # what was written to it is understood


def _session_seeds() -> list[bytes]:
    kept = {
        "tpimpi cache": 1,
        "name": "0" * 32,
        "key": "1" * 64,
        "positions": 2,
        "first": 0,
        "context": 64,
        "hash": "ab",
    }
    beside = json.dumps(kept).replace('": ', '":', 1).encode()
    return [joined([_session_seed(version), beside]) for version in (1, 2, 3)]


def _mutate_lines(data: bytes, random: Random) -> bytes:
    """A line is another, is there again, or elsewhere."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    match random.randrange(5):
        case 0:
            lines.insert(random.randrange(len(lines)), lines[at])
        case 1:
            del lines[at]
        case _:
            lines[at] = (
                mutate_json(lines[at], random) if lines[at][:1] in (b"{", b"[") else mutate_bytes(lines[at], random)
            )
    return b"\n".join(lines)


def _journal(data: bytes) -> None:
    """The lines of a server's journal, as they are when they are opened: what was taken in is understood again."""
    kept, again = (Kept(RankLink(FrontOptions(socket=""))) for _ in range(2))
    for line in data.split(b"\n"):
        kept.take(msgspec.json.decode(line, type=Record))
    for record in kept.records():
        again.take(msgspec.json.decode(msgspec.json.encode(record), type=Record))


def _journal_seeds() -> list[bytes]:
    asks = [
        wire.Ask(0, "", wire.Text("a"), wire.Sampling(logit_bias={3: -1.0}), 9, ["x"]),
        wire.Ask(0, "o", wire.Chat([{"role": "user", "content": "b"}]), wire.Sampling(seed=5)),
    ]
    part = wire.Part(4, "Grüße\n", "", [3, 4], [wire.TokenLogprob(b"\xff", -0.5, [(b"a", -1.5)])])
    done = wire.Done(5, "end", 2, 0)
    records: list[Record] = [Begun(number, "o", f"k{number}", "f", 1.5, "m", 2, asks) for number in (1, 2)]
    records += [Replied([(1, 0, wire.Began(4, 7)), (2, 1, part), (1, 0, part)]), Replied([(1, 0, done), (1, 1, done)])]
    records += [Held(2, held=True), Begun(2, "o", "k2", "f", 1.5, "n", 2, asks), Forgotten(2)]
    return [b"\n".join(map(msgspec.json.encode, records[:most])) for most in (len(records), 4)]


_ITEMS = [{"custom_id": "a", "prompt": "p"}, {"custom_id": "b", "messages": [{"role": "user", "content": "c"}]}]
_ABOUT = {"prompts": "ab12", "options": {"seed": 1}}


def _batch(data: bytes) -> None:
    prompts, part = files_in(data, 2)
    path = written("batch/in", prompts)
    items, _ = read_items(str(path))
    for item in items:
        item.messages("s")
    written("batch/out" + PART, part)
    answers = BatchAnswers(str(path.with_name("out")), items, _ABOUT)
    try:
        answers.use_model("w")
        assert len(answers.left) <= len(items)
    finally:
        answers.close()


def _batch_seeds() -> list[bytes]:
    body = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    body |= {"body": {"messages": [{"role": "user", "content": "c"}], "max_tokens": 3, "stop": ["x"], "seed": 1}}
    prompts = "".join(json.dumps(one) + "\n" for one in (*_ITEMS, body)).encode()
    first = {"tpimpi batch": 1, **_ABOUT, "weights": "w"}
    answer = {"custom_id": "a", "text": "t", "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 40}
    part = "".join(json.dumps(one) + "\n" for one in (first, answer, {"custom_id": "b", "error": "e"})).encode()
    return [joined([prompts, part]), prompts]


_PAGES = PageFiles.__new__(PageFiles)
object.__setattr__(_PAGES, "rank", 0)
object.__setattr__(_PAGES, "identity", {"fingerprint": "f", "format": "q4_0", "shares": "1"})


def _pages(data: bytes) -> None:
    cache: Any = SimpleNamespace(shape=SimpleNamespace(fmt="f16"))
    _PAGES._header(data, "ab", cache, 3)


def _pages_seeds() -> list[bytes]:
    return [PagesHeader(1, "ab", 0, "f", "q4_0", "1", "f16", 3, [0, 0]).line()]


def _hostfile(data: bytes) -> None:
    path = str(written("hosts", data))
    for host in read_hostfile(path):
        assert host.ranks >= 1 and not host.name.startswith("-")
        assert not any(character.isspace() or not character.isprintable() for character in host.name)
    for launcher in (OPEN_MPI, MPICH):
        refused_lines(path, launcher)


_HOSTS = [
    b"desktop slots=2\nuser@laptop.home slots = 1 max_slots=3 # mine\n\n127.0.0.1\n",
    b"\xef\xbb\xbfa:4\n[fe80::1]:2\r\n::1\n",
]


def _keys(data: bytes) -> None:
    path = written("keys", data)
    path.chmod(0o600)
    keys = read_keys(path)
    if keys is not None:
        assert len(keys.private_key()) == 32
        assert all(len(keys.public_key(host) or b"") == 32 for host in keys.public)


def _keys_seeds() -> list[bytes]:
    return [encode_keys(keys) for keys in make_keys(["a", "b.home"], "2026-01-02").values()]


_BROKEN = (ValueError, KeyError, OverflowError, RecursionError)  # which the file of the journal is said to be then
TARGETS = [
    Target("slice-file", _slice, lambda: [seeds.slice_file()], _mutate_slice),
    Target("slice-header", _slice_header, _slice_header_seeds, mutate_json),
    Target("session", _session, _session_seeds, mutate_files(_mutate_lines, mutate_json)),
    Target("journal", _journal, _journal_seeds, _mutate_lines, _BROKEN),
    Target("batch", _batch, _batch_seeds, mutate_files(_mutate_lines, _mutate_lines)),
    Target("page-file", _pages, _pages_seeds, mutate_json, (UnusableError,)),
    Target("hostfile", _hostfile, lambda: list(_HOSTS), _mutate_lines),
    Target("link-keys", _keys, _keys_seeds, mutate_json, (InputError,)),
]
