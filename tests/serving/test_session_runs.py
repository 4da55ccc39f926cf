"""--session in runs: interrupted, gone on with, by any number of ranks."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.support.launch import PROGRAMS, TIMEOUT, Launcher, Result
from tests.support.messages import assert_one_line, patterns_in
from tests.support.session_cases import cut
from tpimpi.serving.session import Session
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.transcript import Turn
from tpimpi.weights.sources import open_source

# Runs of a tiny model, on one rank


def turns_of(path: Path) -> list[Turn]:
    with closing(Session(str(path))) as session:
        return session.turns


def talk(tpimpi: Callable[..., Result], model: Path, *arguments: str, stdin: str | None = None) -> Result:
    return tpimpi("--model", str(model), "--format", "f32", "--quiet", *arguments, stdin=stdin)


SAMPLED = ("--temperature", "0.8", "--top-k", "40", "--repetition-penalty", "1.1")


FOX = ("--prompt", "the quick brown fox")


@pytest.mark.parametrize("sampling", [(), (*SAMPLED, "--seed", "7"), SAMPLED], ids=["greedy", "seed", "no seed"])
@pytest.mark.slow_but("seed")
def test_an_interrupted_answer_becomes_what_it_would_have_been(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path, sampling: tuple[str, ...]
) -> None:
    path, report = tmp_path / "s", tmp_path / "report.json"
    tokens = ("--max-tokens", "30", "--ignore-eos", "--session", str(path))
    first = talk(tpimpi, tiny, *FOX, *sampling, *tokens)
    assert first.code == 0, first.err
    written = path.read_bytes()
    assert len(written.splitlines()) == 33
    if "--temperature" not in sampling or "--seed" in sampling:
        assert talk(tpimpi, tiny, *FOX, *sampling, *tokens[:-2]).out == first.out, "the same without --session"
    # The lines: the first, the prompt, and a token each.
    for lines, again in [(2, FOX), (3, ()), (14, sampling), (30, FOX), (32, ())]:
        cut(path, lines)
        result = talk(tpimpi, tiny, *again, *tokens, "--report", str(report))
        assert (result.code, result.out) == (0, first.out), (lines, result.err)
        assert path.read_bytes() == written
        answer = json.loads(report.read_text())["answers"][0]
        assert answer["text"] == first.out.removesuffix("\n")
        assert answer["token_ids"] == [json.loads(line)["token"] for line in written.splitlines()[2:32]]


def test_an_answer_that_only_lacked_its_end_is_not_made_longer(tpimpi, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = talk(tpimpi, tiny, *FOX, "--max-tokens", "12", "--ignore-eos", "--session", str(path))
    text = first.out.removesuffix("\n")
    stop = text[len(text) // 2 :][:2]
    before = text[: text.find(stop)]
    assert len(before) >= 2
    written = path.read_text().splitlines(keepends=True)
    path.write_text("".join(written[:-1]))
    again = talk(tpimpi, tiny, "--max-tokens", "12", "--ignore-eos", "--session", str(path), "--stop", stop)
    assert (again.code, again.out) == (0, before + "\n"), again.err
    assert json.loads(path.read_text().splitlines()[-1]) == {"end": "stop", "text": before}
    assert len(path.read_text().splitlines()) == len(written)
    # And with fewer tokens allowed than there are, it ends where it is.
    path.write_text("".join(written[:-1]))
    again = talk(tpimpi, tiny, "--max-tokens", "1", "--session", str(path))
    assert (again.code, again.out) == (0, first.out), again.err
    assert path.read_text() == "".join(written)


def test_lines_are_turns_of_one_conversation(tpimpi, tiny: Path, tmp_path: Path) -> None:
    path, report = tmp_path / "s", tmp_path / "report.json"
    options = ("--max-tokens", "5", "--ignore-eos", "--session", str(path))
    result = talk(tpimpi, tiny, *options, "--report", str(report), stdin="the fox\nthe dog\n")
    assert result.code == 0, result.err
    answers = json.loads(report.read_text())["answers"]
    assert result.out == "".join(answer["text"].removesuffix("\n") + "\n" for answer in answers)
    result = talk(tpimpi, tiny, *options, "--prompt", "jumps")
    assert result.code == 0, result.err
    turns = turns_of(path)
    assert [(turn.prompt, turn.ended, len(turn.tokens)) for turn in turns] == [
        ("the fox", "max_tokens", 5),
        ("the dog", "max_tokens", 5),
        ("jumps", "max_tokens", 5),
    ]
    assert [turn.text for turn in turns[:2]] == [answer["text"] for answer in answers]
    # The second turn begins with what the first one's prompt has before its end, and that was not computed again.
    assert (answers[0]["cached_tokens"], answers[0]["rows_computed"]) == (0, len(turns[0].ids) + 4)
    assert (held := answers[1]["cached_tokens"]) == len(turns[0].ids) - 1
    assert answers[1]["rows_computed"] == len(turns[1].ids) - held + 4
    with open_source(tiny) as source:
        tokenizer = load_tokenizer(source.tokenizer_assets(), source.config.vocab)
    for number, turn in enumerate(turns):
        said = [(before.prompt, before.text) for before in turns[:number]]
        assert turn.ids == tokenizer.encode_chat(turn.prompt, said)
    # Interrupted in its last answer, it is gone on with before the next line.
    cut(path, len(path.read_text().splitlines()) - 3)
    result = talk(tpimpi, tiny, *options, stdin="jumps\n")
    assert result.code == 0, result.err
    again = turns_of(path)
    assert again[:2] == turns[:2]
    assert (again[2].prompt, again[2].tokens, again[3].prompt) == ("jumps", turns[2].tokens, "jumps")
    assert result.out == "".join(turn.text.removesuffix("\n") + "\n" for turn in again[2:])


def test_a_system_prompt_stays_until_there_is_another_and_old_turns_are_dropped(
    tpimpi, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    options = ("--model", str(tiny), "--format", "f32", "--max-tokens", "5", "--ignore-eos", "--session", str(path))
    (tmp_path / "system").write_text("the lazy dog\n")
    with_file = tpimpi(*options, "--system-file", str(tmp_path / "system"), stdin="the fox\n")
    assert with_file.code == 0, with_file.err
    result = tpimpi(*options, "--system", "the quick fox", "--prompt", "the dog")
    assert result.code == 0, result.err
    said = f"the conversation in {path} had another system prompt: now it has this\n"
    assert said in result.err and said not in with_file.err
    lines = "".join(f"jumps over {number}\n" for number in range(6))
    result = tpimpi(*options, "--overflow", "drop", "--context", "60", stdin=lines)
    assert result.code == 0, result.err
    assert "had another system prompt" not in result.err
    assert "the context is full: the model no longer gets the oldest " in result.err
    with open_source(tiny) as source:
        tokenizer = load_tokenizer(source.tokenizer_assets(), source.config.vocab)
    turns = turns_of(path)
    assert len(turns) == 8
    first = (turns[0].prompt, turns[0].text)
    assert turns[0].ids == tokenizer.encode_chat("the fox", system="the lazy dog")
    assert turns[1].ids == tokenizer.encode_chat("the dog", [first], system="the quick fox")
    begin = tokenizer.encode_chat("", system="the quick fox")[:-2]
    assert all(turn.ids[: len(begin)] == begin and len(turn.ids) <= 55 for turn in turns[1:])
    assert talk(tpimpi, tiny, *options, "--context", "60", stdin=lines).code == 2, "it has no room any more"


def test_a_raw_conversation_is_one_text(tpimpi, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = ("--max-tokens", "4", "--ignore-eos", "--session", str(path))
    assert talk(tpimpi, tiny, *options, "--raw", stdin="the fox\n").code == 0
    assert talk(tpimpi, tiny, *options, stdin=" the dog\n").code == 0
    with open_source(tiny) as source:
        tokenizer = load_tokenizer(source.tokenizer_assets(), source.config.vocab)
    first, second = turns_of(path)
    assert first.ids == tokenizer.encode("the fox")
    assert second.ids == [*first.ids, *first.tokens, *tokenizer.encode(" the dog", special=False)]


def test_a_conversation_that_is_too_long(tpimpi, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = ("--max-tokens", "200", "--ignore-eos", "--session", str(path))
    assert talk(tpimpi, tiny, *options, *FOX).code == 0
    written = path.read_bytes()
    assert json.loads(written.splitlines()[-1])["end"] == "context"
    result = talk(tpimpi, tiny, *options, "--prompt", "the dog")
    assert_one_line(result, r"the conversation has \d+ tokens, the context is 128 positions; begin another --session")
    assert path.read_bytes() == written
    cut(path, 20)
    result = talk(tpimpi, tiny, *options, "--context", "5")
    assert_one_line(result, r"the conversation has \d+ tokens, the context is 5 positions")


@pytest.mark.slow
def test_what_is_wrong_with_a_session_is_one_line(tpimpi, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = ("--max-tokens", "8", "--ignore-eos", "--session", str(path))
    assert_one_line(talk(tpimpi, tiny, *FOX, "--session", str(tmp_path)), "is a folder")
    assert_one_line(
        talk(tpimpi, tiny, "--prompt", "x" * 9000, *options), "tokens, the context is 128 positions; shorten"
    )
    assert_one_line(talk(tpimpi, tiny, *FOX, *options, "--temperature", "-1"), "--temperature is -1")
    assert_one_line(talk(tpimpi, tiny, *options), "no prompt: standard input ended without a line")
    assert not path.exists()
    assert talk(tpimpi, tiny, *FOX, *options).code == 0
    assert_one_line(talk(tpimpi, tiny, *options), "no prompt: standard input ended without a line")
    assert_one_line(
        talk(tpimpi, tiny, *FOX, *options, "--seed", "1"), "--seed is given, and the conversation was begun"
    )
    assert_one_line(talk(tpimpi, tiny, *FOX, *options, "--report", str(path)), "is a file that this run reads")
    new = str(tmp_path / "new")
    both = talk(tpimpi, tiny, *FOX, "--session", new, "--report", new)
    assert_one_line(both, "--session and --report are both .*; give each a file of its own")
    cut(path, 5)
    written = path.read_bytes()
    assert_one_line(talk(tpimpi, tiny, "--prompt", "the dog", *options), "an interrupted answer to another prompt")
    session = Session(str(path))
    assert_one_line(talk(tpimpi, tiny, *options), "is in use by another run")
    session.close()
    path.write_bytes(changed := written.replace(b'"vocabulary": 300', b'"vocabulary": 301'))
    assert_one_line(talk(tpimpi, tiny, *options), r"begun with the model .* \(301 token ids, .*this run has .* \(300 ")
    assert path.read_bytes() == changed


# Killed on several ranks


@pytest.fixture
def begun() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs that are killed at the end, if they still run."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def rank_of(process: psutil.Process) -> str | None:
    try:
        if "tpimpi" not in process.cmdline():
            return None
        variables = process.environ()
    except psutil.Error:
        return None
    return variables.get("OMPI_COMM_WORLD_RANK", variables.get("PMI_RANK"))


@pytest.fixture(scope="module")
def undisturbed(cache: dict[str, str]) -> str:
    command = [sys.executable, "-m", "tpimpi", *TALE]
    return subprocess.run(
        command, env={**os.environ, **cache}, capture_output=True, check=True, text=True, timeout=TIMEOUT
    ).stdout


TALE = ("--format", "f32", "--allreduce", "star", "--quiet", "--max-tokens", "40", "--prompt", "Why is the sky blue?")
BETWEEN_MESSAGES = b"\xa5" * 16  # in no pattern: what is found is within one message


@pytest.mark.parametrize(("ranks", "victim", "ranks_then"), [(3, 0, 2), (2, 1, 4)])
@pytest.mark.slow
def test_killed_in_mid_answer_it_goes_on_with_other_ranks(
    mpirun: Launcher, cache, undisturbed: str, begun, tmp_path: Path, ranks: int, victim: int, ranks_then: int
) -> None:
    path = tmp_path / "s"
    arguments = ("-m", "tpimpi", *TALE, "--session", str(path))
    said = tmp_path / "stderr"
    with said.open("wb") as log:
        process = subprocess.Popen(
            mpirun.command(ranks, arguments),
            env={**os.environ, **mpirun.env, **cache},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    begun.append(process)
    deadline = time.monotonic() + TIMEOUT

    def lines() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    while lines() < 2 + 9:
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.005)
    (killed,) = [p for p in psutil.Process(process.pid).children(recursive=True) if rank_of(p) == str(victim)]
    killed.kill()
    assert process.wait(TIMEOUT) != 0
    (turn,) = turns_of(path)
    assert 9 <= len(turn.tokens) < 40 and turn.ended is None
    result = mpirun(ranks_then, *arguments, env=cache)
    assert (result.code, result.out) == (0, undisturbed), result.err


def given_away(messages: list[bytes], words: set[str], ids: list[int]) -> list[str]:
    """The words, and the ids that follow each other, that are in the messages."""
    patterns = {word: word.encode() for word in words}
    # Three ids of two bytes: two of them, four bytes, are in 60 MB of partials by chance.
    for three in zip(ids, ids[1:], ids[2:], strict=False):
        patterns[f"{three} as <u2"] = np.array(three, "<u2").tobytes()
    for pair in itertools.pairwise(ids):
        patterns |= {f"{pair} as {dtype}": np.array(pair, dtype).tobytes() for dtype in ("<i4", "<i8", "<f4")}
        patterns[f"{pair} as text"] = f"{pair[0]}, {pair[1]}".encode()
    return patterns_in(BETWEEN_MESSAGES.join(messages), list(patterns.items()))


@pytest.mark.slow
def test_other_ranks_get_nothing_of_the_conversation(mpirun: Launcher, cache, tmp_path: Path) -> None:
    path = tmp_path / "s"
    arguments = (str(PROGRAMS / "recorded_run.py"), str(tmp_path), "--session", str(path), "--max-tokens", "12")
    first = mpirun(2, *arguments, "--ignore-eos", env=cache, stdin="Zanzibar ornithologist\nquixotic melodies\n")
    assert first.code == 0, first.err
    cut(path, 24)
    result = mpirun(2, *arguments, env=cache, stdin="elderberries\n")
    assert result.code == 0, result.err
    turns = turns_of(path)
    assert len(turns) == 3
    words = {"Zanzibar", "ornithologist", "quixotic", "melodies", "elderberries", str(turns[0].seed)}
    words |= {word for word in result.out.split() if len(word) > 5}
    ids = [*turns[-1].ids, *turns[-1].tokens]
    messages = [
        data for rank in (0, 1) for *_, data in pickle.loads((tmp_path / f"messages-{rank}.pickle").read_bytes())
    ]
    assert len(messages) > 100
    assert given_away(messages, words, ids) == []
    # The search would find them.
    for planted in (b"x melodies", np.array(ids[5:9], "<i4").tobytes(), json.dumps(ids).encode()):
        assert given_away([planted], words, ids)
