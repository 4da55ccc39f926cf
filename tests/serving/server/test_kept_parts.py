"""What is kept of requests with an Idempotency-Key, and the journal of it: the parts by themselves."""

from __future__ import annotations

import asyncio
import hashlib
import resource
import shutil
import signal
import stat
import time
from pathlib import Path

import msgspec
import pytest
from starlette.datastructures import Headers
from starlette.requests import Request

from tests.support.fronts import PASSPHRASE, READY, TIMEOUT_S, written
from tpimpi.errors import InputError
from tpimpi.serving.server import journal as journal_module
from tpimpi.serving.server import kept as kept_module
from tpimpi.serving.server import wire
from tpimpi.serving.server.bodies import BODY_DIGEST, Bodies
from tpimpi.serving.server.front_options import FrontOptions
from tpimpi.serving.server.journal import Begun, Held, Journal, Record, Replied, Reply
from tpimpi.serving.server.kept import Kept, key_of
from tpimpi.serving.server.link import RankLink
from tpimpi.serving.server.problems import ApiError

ASK = wire.Ask(0, "", wire.Text("a"), wire.Sampling())


def ended(kept: Kept, key: str, text: str = "x") -> None:
    """A request of one answer comes, and is done."""
    replies = kept.replies("", key, "f")
    with replies.joined(1) as hearing:
        replies.ask(hearing, lambda: [wire.Ask(0, "", wire.Text("a"), wire.Sampling())])
        replies.hear(0, wire.Began(1, 1))
        replies.hear(0, wire.Part(1, text, "", [1]))
        replies.hear(0, wire.Done(1, "end", 1, 0))


def known(kept: Kept, key: str) -> bool:
    """Whether that one is kept: another request with the same key is refused."""
    try:
        kept.forget(kept.replies("", key, "another"))
    except ApiError:
        return True
    return False


def test_what_is_kept_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(RankLink(FrontOptions(socket="")))
    for number in range(kept_module.MAX_KEPT + 2):
        ended(kept, str(number))
    assert [known(kept, str(number)) for number in range(4)] == [False, False, True, True]
    ended(kept, "large", "x" * (kept_module.MAX_KEPT_BYTES - 1000))
    assert known(kept, "large") and not known(kept, "200")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + kept_module.KEPT_S + 1)
    assert not known(kept, "large")


def test_what_was_under_way_is_not_forgotten_as_too_much(tmp_path: Path) -> None:
    kept = Kept(RankLink(FrontOptions(socket="")))
    journal = Journal(str(tmp_path / "journal"), PASSPHRASE.encode(), kept.take, kept.records)
    for number in range(1, kept_module.MAX_KEPT + 3):
        kept.take(Begun(number, "", str(number), "f", time.time(), "m", 1, [ASK]))

    async def use() -> None:
        kept.use(journal, TIMEOUT_S)

    asyncio.run(use())
    assert known(kept, "1") and known(kept, "2")


@pytest.mark.parametrize(
    ("answers", "choices"), [(10**30, [10**30]), (1 << 17, [1 << 17]), (2, [3]), (2, [3, -1]), (-1, [])]
)
def test_a_journal_with_answers_that_no_request_has_is_refused(answers: int, choices: list[int]) -> None:
    asks = [ASK] * len(choices)
    with pytest.raises(ValueError, match="7"):
        Kept(RankLink(FrontOptions(socket=""))).take(Begun(7, "", "k", "f", 0.0, "m", answers, asks, choices))


def test_with_another_model_clients_that_had_words_ask_again() -> None:
    link = RankLink(FrontOptions(socket=""))
    replies = Kept(link).replies("", "k", "f")
    with replies.joined(1) as before, replies.joined(1) as after:
        replies.ask(before, lambda: [ASK])
        replies.hear(0, wire.Began(1, 1))
        link.on_ready(msgspec.structs.replace(READY, fingerprint="b"))
        replies.ask(after, lambda: [ASK])
        replies.hear(0, wire.Began(2, 1))
        assert before.get_nowait() == (0, wire.Began(1, 1))
        assert isinstance(before.get_nowait()[1], ApiError) and before.empty()
        assert after.get_nowait() == (0, wire.Began(2, 1)) and after.empty()


def test_what_is_held_stays_so_in_the_journal_with_another_model(tmp_path: Path) -> None:
    path, link = tmp_path / "journal", RankLink(FrontOptions(socket=""))
    kept = Kept(link)
    journal = Journal(str(path), PASSPHRASE.encode(), kept.take, kept.records)
    begun = Begun(1, "", "k", "f", time.time(), "a", 1, [ASK])
    kept.take(begun)
    kept.take(Held(1, held=True))

    async def use() -> None:
        kept.use(journal, TIMEOUT_S)
        link.on_ready(msgspec.structs.replace(READY, fingerprint="b"))
        kept.end()

    asyncio.run(use())
    again = msgspec.json.encode(msgspec.structs.replace(begun, model="b")).decode()
    assert written(path).decode().split()[-2:] == [again, '["Held",1,true]']


def test_a_client_that_asks_after_an_error_is_answered() -> None:
    """Though it had joined before the error came: of what could not be asked, and of what rank 0 refused."""
    link = RankLink(FrontOptions(socket=""))
    too_large = msgspec.structs.replace(ASK, sampling=wire.Sampling(seed=1 << 70))
    replies = Kept(link).replies("", "k", "f")
    with replies.joined(2), replies.joined(2) as second, replies.joined(2) as third:
        with pytest.raises(ApiError), replies.joined(2) as first:
            replies.ask(first, lambda: [ASK, too_large])
        assert not link._asked
        replies.ask(second, lambda: [ASK, ASK])
        number, _ = link._asked
        link._hear(wire.Refused(number, "too long", "messages"))
        assert isinstance(second.get_nowait()[1], ApiError) and not link._asked
        replies.ask(third, lambda: [ASK, ASK])
        for number in list(link._asked):
            link._hear(wire.Began(number, 1))
        assert [third.get_nowait() for _ in range(2)] == [(0, wire.Began(4, 1)), (1, wire.Began(5, 1))]


@pytest.mark.parametrize("headers", [[], [(b"idempotency-key", b"k")]])
def test_the_body_of_a_request_without_a_key_is_not_hashed(headers: list[tuple[bytes, bytes]]) -> None:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    request = Request({"type": "http", "headers": headers}, receive)
    asyncio.run(Bodies().json(request, dict))
    assert request.scope.get(BODY_DIGEST) == (hashlib.sha256(b"{}").hexdigest() if headers else None)


def test_a_file_that_has_grown_is_written_anew(tmp_path: Path) -> None:
    """What is kept stands in it, and nothing else; where nothing is kept it is as new."""
    path, found = tmp_path / "journal", list[Record]()
    kept = list[Record]()
    journal = Journal(str(path), PASSPHRASE.encode(), found.append, lambda: kept)
    new = path.stat().st_size
    kept += [Replied([(1, 0, wire.Part(1, "x" * 5000, "", [1]))])]
    for _ in range(250):
        journal.add(Replied([(1, 0, wire.Part(1, "x" * 5000, "", [1]))]), now=True)
        assert path.stat().st_size < 2 * new + (1 << 20) + 20_000
    journal.tidy(empty=False)
    assert path.stat().st_size > new
    with pytest.raises(InputError, match="in use"):
        Journal(str(path), PASSPHRASE.encode(), found.append, lambda: kept)
    kept.clear()
    journal.tidy(empty=True)
    assert path.stat().st_size == new and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_choices_have_their_prompt_once_in_the_journal(tmp_path: Path) -> None:
    path, kept = tmp_path / "journal", Kept(RankLink(FrontOptions(socket="")))
    asks = [
        wire.Ask(0, "", wire.Text(text), wire.Sampling(seed=seed))
        for text, seed in [("Zanzibar", 5), ("Zanzibar", 6), ("Zanzibar", 7), ("Lima", 5), ("Lima", 6), ("Oslo", 9)]
    ]
    journal = Journal(str(path), PASSPHRASE.encode(), kept.take, kept.records)

    async def use() -> None:
        kept.use(journal, TIMEOUT_S)
        replies = kept.replies("", "k", "f")
        with replies.joined(1) as hearing:
            replies.ask(hearing, lambda: asks)
            kept.end()

    asyncio.run(use())
    assert written(path).count(b"Zanzibar") == 1
    shutil.copy(path, copy := tmp_path / "copy")  # as the other one is locked
    other = Kept(link := RankLink(FrontOptions(socket="")))
    read = Journal(str(copy), PASSPHRASE.encode(), other.take, other.records)

    async def go_on() -> None:
        other.use(read, TIMEOUT_S)
        assert [msgspec.structs.replace(one.ask, id=0) for one in link._asked.values()] == asks

    asyncio.run(go_on())


def test_what_could_not_be_written_is_tried_again_though_nothing_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "WRITE_AGAIN_S", 0.0)
    path, kept = tmp_path / "journal", Kept(RankLink(FrontOptions(socket="")))
    journal = Journal(str(path), PASSPHRASE.encode(), kept.take, kept.records)

    async def use() -> None:
        kept.use(journal, TIMEOUT_S)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limit[1]))
        try:
            ended(kept, "k")
            assert b"Begun" not in written(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, before)
        kept.tidy()
        assert b"Done" in written(path)

    asyncio.run(use())


def test_what_is_written_anew_can_be_read_again_however_long_an_answer_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is kept, or whose tokens come at once, is in lines of some replies each."""
    monkeypatch.setattr(journal_module, "MAX_LINE_BYTES", 3000)
    monkeypatch.setattr(journal_module, "MAX_REPLIES", 10)
    replies: list[tuple[int, int, Reply]] = [(1, 0, wire.Part(1, "x" * 20, "", [number])) for number in range(95)]
    path, found = tmp_path / "journal", list[Record]()
    journal = Journal(str(path), PASSPHRASE.encode(), found.append, lambda: [Replied(replies)])

    async def use() -> None:
        for reply in replies:
            journal.add(Replied([reply]))
        journal.flush()

    asyncio.run(use())
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    Journal(str(copy), PASSPHRASE.encode(), found.append, list)
    assert [reply for record in found if isinstance(record, Replied) for reply in record.replies] == replies * 2


def test_a_file_that_cannot_be_written_anew_is_refused_or_grows(tmp_path: Path) -> None:
    """Nothing is lost of it meanwhile."""
    path, record = tmp_path / "journal", Replied([(1, 0, wire.Part(1, "x" * 5000, "", [1]))])
    (hinders := tmp_path / ".journal.partial").mkdir()
    with pytest.raises(
        InputError, match=r"--journal .* cannot be written anew .*; make room, or give a file in a folder"
    ):
        Journal(str(path), PASSPHRASE.encode(), print, list)
    assert not path.exists()
    hinders.rmdir()
    journal = Journal(str(path), PASSPHRASE.encode(), print, lambda: [record])
    hinders.mkdir()
    for _ in range(250):  # so that it is tried
        journal.add(record, now=True)
    assert written(path).count(b"Replied") == 251
    hinders.rmdir()
    for _ in range(600):
        journal.add(record, now=True)
    assert written(path).count(b"Replied") < 600


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["7f2c-1"], "7f2c-1"),
        (['"7f2c-1"'], "7f2c-1"),
        ([r'"a \"b\\ "'], 'a "b\\ '),
        ([], None),
        ([""], ApiError),
        (["a b"], ApiError),
        (['"a'], ApiError),
        (["\xe9"], ApiError),
        (["x" * 256], ApiError),
        (["a", "a"], ApiError),
    ],
)
def test_keys_are_strings_of_rfc_8941(given: list[str], key: object) -> None:
    headers = Headers(raw=[(b"idempotency-key", one.encode("latin-1")) for one in given])
    if key is ApiError:
        with pytest.raises(ApiError, match=r"Idempotency-Key has to be .* with a blank .* between quotation marks"):
            key_of(headers)
    else:
        assert key_of(headers) == key
