"""--session: a conversation in a file. Whatever ends a run, the next one goes on as if nothing had been."""

from __future__ import annotations

import errno
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
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support.launch import PROGRAMS, TIMEOUT, Launcher, Result
from tests.support.messages import assert_one_line
from tpimpi.errors import InputError
from tpimpi.serving.sampling import make_sampler
from tpimpi.serving.session import Session, Turn
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.weights.sources import open_source

# The format, as the head of session.py has it.
OPTIONS = (
    '{"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 5, "raw": false}'
)
FIRST = f'{{"tpimpi session": 1, "model": "m", "fingerprint": "abc", "vocabulary": 9, "options": {OPTIONS}}}\n'
LINES = [
    '{"prompt": "Grüße\\n", "ids": [1, 2], "seed": 77}\n',
    '{"token": 3}\n',
    '{"token": 8}\n',
    '{"end": "stop", "text": "né"}\n',
    '{"prompt": "b", "ids": [1, 2, 3, 8, 4], "seed": 0}\n',
    '{"token": 5}\n',
]
WHOLE = (FIRST + "".join(LINES)).encode()
DEFAULTS = json.loads(OPTIONS)


def opened(path: Path) -> Session:
    """A session of the model that FIRST names."""
    session = Session(str(path))
    session.options({}, DEFAULTS)
    session.check_model("m", "abc", 9)
    return session


def test_the_file_is_as_described(tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = os.umask(0)
    try:
        session = opened(path)
    finally:
        os.umask(before)
    session.begin(Turn("Grüße\n", [1, 2], 77))
    session.add(3)
    assert path.read_bytes() == (FIRST + LINES[0] + LINES[1]).encode(), "each line at once"
    session.add(8)
    session.end("stop", "né")
    session.begin(Turn("b", [1, 2, 3, 8, 4], 0))
    session.add(5)
    session.close()
    assert path.read_bytes() == WHOLE
    assert path.stat().st_mode & 0o777 == 0o600
    again = opened(path)
    assert again.turns == [Turn("Grüße\n", [1, 2], 77, [3, 8], "stop", "né"), Turn("b", [1, 2, 3, 8, 4], 0, [5])]
    assert again.unfinished is again.turns[1]
    again.close()


def test_cut_at_any_byte_it_goes_on_from_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for cut in range(len(WHOLE) + 1):
        path.write_bytes(WHOLE[:cut])
        whole = WHOLE[:cut].rpartition(b"\n")[0] + b"\n" * (b"\n" in WHOLE[:cut])
        session = opened(path)
        assert path.read_bytes() == WHOLE[:cut], "opening changes nothing"
        if (turn := session.unfinished) is None:
            turn = Turn("x", [7], 5)
            expected = (b"" if whole else FIRST.encode()) + b'{"prompt": "x", "ids": [7], "seed": 5}\n'
        else:
            expected = b""
        session.begin(turn)
        session.add(6)
        session.close()
        assert path.read_bytes() == whole + expected + b'{"token": 6}\n', cut


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (FIRST.replace('"vocabulary": 9', '"vocabulary": "9"'), 1),
        (FIRST.replace('"raw": false', '"raw": 0'), 1),
        (FIRST.replace('"temperature": 0.0', '"temperature": null'), 1),
        (FIRST.replace('"min_p": 0.0', '"min_p": "0"'), 1),
        (FIRST.replace('"seed": 5', '"seed": []'), 1),
        (FIRST.replace(', "raw": false', ""), 1),
        (FIRST.replace('"m"', '"m", "more": 1'), 1),
        (FIRST + "nonsense\n", 2),
        (FIRST + "\0" * 40 + "\n", 2),
        (FIRST + LINES[1], 2),
        (FIRST + LINES[3], 2),
        (FIRST + FIRST, 2),
        (FIRST + LINES[0].replace("77", "-1"), 2),
        (FIRST + LINES[0].replace("[1, 2]", "[]"), 2),
        (FIRST + LINES[0].replace("[1, 2]", "[1, 9]"), 2),
        (FIRST + LINES[0].replace("[1, 2]", "[1, true]"), 2),
        (FIRST + LINES[0].replace("Grüße", "\\ud800"), 2),
        (FIRST + LINES[0] + LINES[0], 3),
        (FIRST + LINES[0] + '{"token": 9}\n', 3),
        (FIRST + LINES[0] + '{"token": -1}\n', 3),
        (FIRST + LINES[0] + '{"token": 1.0}\n', 3),
        (FIRST + LINES[0] + '{"token": true}\n', 3),
        (FIRST + LINES[0] + '{"token": 1, "more": 2}\n', 3),
        (FIRST + LINES[0] + f'{{"token": {"9" * 5000}}}\n', 3),
        (FIRST + LINES[0] + '{"end": "boredom", "text": ""}\n', 3),
        (FIRST + LINES[0] + '{"end": "stop", "text": 5}\n', 3),
        (FIRST + LINES[0] + "[" * 100_000 + "\n", 3),
        (FIRST + "".join(LINES[:3]) + '"token"\n' + LINES[3], 5),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_written(tmp_path: Path, broken: str, line: int) -> None:
    path = tmp_path / "s"
    path.write_text(broken)
    with pytest.raises(
        InputError, match=rf"--session {path} is broken in line {line}, '.*; cut it off before that line"
    ):
        Session(str(path))
    assert path.read_text() == broken


@pytest.mark.parametrize(
    "content",
    [
        *(b"my notes", b"my notes\n", b"\n", b"{}\n", b'{"text": "a report"}', b"GGUF\3\0\0\0" * 10_000, b"\0" * 5000),
        *(b'{"tpimpi session": 1' + b" " * 5000, b'{"tpimpi session"; 1}\n'),
    ],
)
def test_a_file_that_is_something_else_is_never_written(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is there, and is no session; give the name of a new file, or of a session"):
        Session(str(path))
    assert path.read_bytes() == content


def test_another_version_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text(FIRST.replace('session": 1', 'session": 2'))
    with pytest.raises(InputError, match="is of format version 2, this tpimpi knows version 1"):
        Session(str(path))


def test_what_cannot_be_a_session(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for given, pattern in [
        ("", "--session is empty"),
        (str(tmp_path), "is a folder; give the name of a file"),
        (str(tmp_path / "pipe"), "is no file that can be kept"),
        ("/dev/null", "is no file that can be kept"),
        (str(tmp_path / "none" / "s"), "No such file or directory"),
        ("s" * 300, "File name too long"),
        ("a\0b", "embedded null"),
    ]:
        with pytest.raises(InputError, match=pattern):
            Session(given)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def in_child(work: Callable[[], object]) -> str:
    """What `work` raises in a process of its own; "" for nothing."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        text = ""
        try:
            work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def test_without_permission_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(WHOLE)
    path.chmod(0)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        Session(str(path))

    assert "InputError" in (found := in_child(work)) and os.strerror(errno.EACCES) in found


def test_a_full_disk_ends_the_run_and_harms_nothing(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "s"
    path.write_bytes(WHOLE)

    def work() -> None:
        session = opened(path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(WHOLE) + 20, len(WHOLE) + 20))
        session.add(1)
        session.add(2)  # the disk takes half of this line

    found = in_child(work)
    assert "StorageError" in found and f"cannot write --session {path}" in found
    assert WHOLE + b'{"token": 1}\n' < path.read_bytes() < WHOLE + b'{"token": 1}\n{"token": 2}\n'
    session = opened(path)
    assert session.turns[1].tokens == [5, 1]
    session.close()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "s"
    session = Session(str(path))
    with pytest.raises(InputError, match="is in use by another run; wait for its end, or give another file"):
        Session(str(path))
    session.close()
    assert not path.exists(), "nothing was said"
    path.write_bytes(b"")
    opened(path).close()
    assert path.exists(), "it was there before"


def test_the_options_of_a_conversation_hold_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(WHOLE)
    session = Session(str(path))
    none = dict.fromkeys(DEFAULTS)
    assert session.options(none, {**DEFAULTS, "seed": None, "top_k": 3}) == DEFAULTS
    assert session.options({**none, "temperature": 0, "top_p": 1.0}, DEFAULTS) == DEFAULTS
    for name, value, pattern in [
        ("temperature", 0.5, "--temperature is 0.5, and the conversation was begun with 0.0; leave --temperature out"),
        ("top_k", 3, "--top-k is 3, and the conversation was begun with 0"),
        ("seed", 6, "--seed is 6, and the conversation was begun with 5"),
        ("raw", True, "--raw is given, and the conversation was begun without it"),
    ]:
        with pytest.raises(InputError, match=pattern):
            session.options({**none, name: value}, DEFAULTS)
    session.close()


@pytest.mark.parametrize(("fingerprint", "vocabulary"), [("abd", 9), ("abc", 10)])
def test_another_model(tmp_path: Path, fingerprint: str, vocabulary: int) -> None:
    path = tmp_path / "s"
    path.write_bytes(WHOLE)
    session = Session(str(path))
    with pytest.raises(
        InputError, match=rf"begun with the model m \(9 token ids, abc\), this run has n \({vocabulary} "
    ):
        session.check_model("n", fingerprint, vocabulary)
    session.close()


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}])
def test_a_sampler_goes_on_where_another_was(options: dict[str, Any]) -> None:
    logits = np.random.default_rng(5).normal(size=(30, 200)).astype(np.float32)
    whole = make_sampler(**options, seed=7)
    drawn = [whole(row, []) for row in logits]
    assert len(set(drawn)) > 15
    for made in (0, 1, 13, 29):
        later = make_sampler(**options, seed=7, drawn=made)
        assert [later(row, []) for row in logits[made:]] == drawn[made:]


def test_a_conversation_is_rendered_as_transformers_does(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    with open_source(smollm2) as source:
        tokenizer = load_tokenizer(source.tokenizer_assets(), source.config.vocab)
    texts = ["Hi.", " I am\n<SmolLM> ", "Wie heißt 'œ'?", "", "And?"]
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, texts, strict=False)]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.encode_chat("And?", [(texts[0], texts[1]), (texts[2], texts[3])]) == expected


# Runs of a tiny model, on one rank


def turns_of(path: Path) -> list[Turn]:
    with closing(Session(str(path))) as session:
        return session.turns


def talk(tpimpi: Callable[..., Result], model: Path, *arguments: str, stdin: str | None = None) -> Result:
    return tpimpi("--model", str(model), "--format", "f32", "--quiet", *arguments, stdin=stdin)


SAMPLED = ("--temperature", "0.8", "--top-k", "40", "--repetition-penalty", "1.1")
FOX = ("--prompt", "the quick brown fox")


def cut(path: Path, lines: int) -> None:
    """As if the run had been killed when so many lines, and half of one, were written."""
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:lines]) + whole[lines][:-5])


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


TALE = ("--format", "f32", "--allreduce", "star", "--quiet", "--max-tokens", "64", "--prompt", "Why is the sky blue?")


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
    assert 9 <= len(turn.tokens) < 64 and turn.ended is None
    result = mpirun(ranks_then, *arguments, env=cache)
    assert (result.code, result.out) == (0, undisturbed), result.err


def given_away(messages: list[bytes], words: set[str], ids: list[int]) -> list[str]:
    """The words, and the ids that follow each other, that are in the messages."""
    patterns = {word: word.encode() for word in words}
    for pair in itertools.pairwise(ids):
        patterns |= {f"{pair} as {dtype}": np.array(pair, dtype).tobytes() for dtype in ("<u2", "<i4", "<i8", "<f4")}
        patterns[f"{pair} as text"] = f"{pair[0]}, {pair[1]}".encode()
    return [what for what, pattern in patterns.items() if any(pattern in message for message in messages)]


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
