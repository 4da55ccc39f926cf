"""--session: a conversation in a file. Whatever ends a run, the next one goes on as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpimpi.errors import InputError
from tpimpi.serving import session as session_module
from tpimpi.serving.sampling import make_sampler
from tpimpi.serving.session import Session
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.transcript import Turn
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


def test_reasoning_is_kept_apart_in_a_file_of_version_2(tmp_path: Path) -> None:
    path = tmp_path / "s"
    line = '{"end": "end", "text": "né", "reasoning": "hé"}\n'
    version_2 = FIRST.replace('session": 1', 'session": 2') + "".join(LINES[:3])
    for begun, keeps in ((True, True), (False, False)):
        session = opened(path)
        session.keep_reasoning(begun)
        session.begin(Turn("Grüße\n", [1, 2], 77))
        session.add(3)
        session.add(8)
        session.end("end", "né", "hé")
        assert session.turns[0].reasoning == "hé"
        session.close()
        assert path.read_text() == (version_2 + line if keeps else WHOLE.decode().split('{"end')[0] + line[:27] + "}\n")
        again = opened(path)
        again.keep_reasoning(not begun)  # of no meaning to one that was begun
        assert (again.turns[0].text, again.turns[0].reasoning) == ("né", "hé" if keeps else "")
        again.begin(Turn("b", [4], 0))
        again.end("stop", "", "hm")
        again.close()
        assert json.loads(path.read_text().splitlines()[-1]) == {"end": "stop", "text": ""} | (
            {"reasoning": "hm"} if keeps else {}
        )
        path.unlink()
    for broken in ('{"end": "end", "text": ""}', '{"end": "end", "text": "", "reasoning": 1}'):
        path.write_text(f"{version_2}{broken}\n")
        with pytest.raises(InputError, match="is broken in line 5"):
            Session(str(path))


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


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_beyond_all_measure_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Nor taken for a last line that is not whole, and cut off."""
    path, found = tmp_path / "s", FIRST + LINES[0] + "7" * 5000 + end
    path.write_text(found)
    monkeypatch.setattr(session_module, "MAX_LINE_BYTES", 5000)
    with pytest.raises(InputError, match=f"{path} is broken in line 3, which has 5000 bytes or more; cut it off"):
        Session(str(path))
    assert path.read_text() == found


def test_another_version_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text(FIRST.replace('session": 1', 'session": 4'))
    with pytest.raises(InputError, match="is of format version 4, this tpimpi knows versions 1 to 3; use the one"):
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


def test_what_changes_a_conversation_is_in_a_file_of_version_3(tmp_path: Path) -> None:
    path, version_3 = tmp_path / "s", FIRST.replace('session": 1', 'session": 3')
    path.write_bytes(WHOLE)
    session = opened(path)
    session.undo()
    assert path.read_text() == version_3 + "".join(LINES) + '{"undo": 1}\n'
    session.system = "Sei höflich."
    assert path.read_text().endswith('{"undo": 1}\n'), "written with the turn that has it"
    session.begin(Turn("c", [1], 2))
    session.add(4)
    session.end("cancelled", "x", "hm")
    session.system = None
    session.begin(Turn("d", [1], 3))
    session.end("end", "y")
    session.close()
    assert path.read_text().splitlines()[-8:] == [
        '{"undo": 1}',
        '{"system": "Sei höflich."}',
        '{"prompt": "c", "ids": [1], "seed": 2}',
        '{"token": 4}',
        '{"end": "cancelled", "text": "x", "reasoning": "hm"}',
        '{"system": null}',
        '{"prompt": "d", "ids": [1], "seed": 3}',
        '{"end": "end", "text": "y"}',
    ]
    again = opened(path)
    assert [(turn.prompt, turn.ended, turn.reasoning) for turn in again.turns] == [
        ("Grüße\n", "stop", ""),
        ("c", "cancelled", "hm"),
        ("d", "end", ""),
    ]
    assert (again.system, again.turns == session.turns) == (None, True)
    again.close()
    # What was of version 2 keeps its empty reasoning; version 1 knows none of these lines.
    path.write_text(version_3 + "".join(LINES[:3]) + '{"end": "end", "text": "", "reasoning": ""}\n{"undo": 1}\n')
    empty = opened(path)
    assert empty.turns == []
    empty.close()
    for line in ('{"undo": 1}', '{"system": "x"}', '{"end": "cancelled", "text": ""}'):
        path.write_text(FIRST + "".join(LINES[: 4 if "system" in line else 3]) + line + "\n")
        with pytest.raises(InputError, match=r"is broken in line [56]"):
            Session(str(path))
    for line in ('{"undo": 0}', '{"undo": 2}', '{"undo": "1"}', '{"system": 5}'):
        path.write_text(version_3 + "".join(LINES[:4]) + line + "\n")
        with pytest.raises(InputError, match="is broken in line 6"):
            Session(str(path))


def test_a_conversation_is_saved_beside_and_renamed(tmp_path: Path) -> None:
    from tpimpi.serving.session import save
    from tpimpi.serving.transcript import Transcript

    path, talk = tmp_path / "s", Transcript()
    talk.system = "Be terse."
    for number, ended in ((1, "end"), (2, "cancelled")):
        talk.begin(Turn(f"p{number}", [1, number], number))
        talk.add(3)
        talk.end(ended, "né")
    header = {"model": "m", "fingerprint": "abc", "vocabulary": 9, "options": DEFAULTS}
    for _ in range(2):  # a new file, and a session that is there
        save(str(path), talk, header)
        session = opened(path)
        assert (session.turns, session.system) == (talk.turns, "Be terse.")
        with pytest.raises(InputError, match=r"/save .* is in use by another run"):
            save(str(path), talk, header)
        session.close()
    assert path.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [path]
    path.write_text("a letter")
    with pytest.raises(InputError, match=r"/save .* is there, and is no session"):
        save(str(path), talk, header)
    assert path.read_text() == "a letter"
