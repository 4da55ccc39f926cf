"""Tokenizers that are tried in a process of their own. That a run says one line is in tests/cli/test_bad_input.py."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tokenizer_cases import CHATML, assets_of
from tpimpi.errors import ModelError, TpimpiError
from tpimpi.serving import tokenizer_trial
from tpimpi.serving.tokenizer_trial import TokenizerTrial, try_tokenizer

# A process that says much for one tokenizer, and then ends itself by a signal.
TALKER = """#!{python}
import os, struct, sys
os.write(1, struct.pack("<Q", 0))
(nbytes,) = struct.unpack("<Q", sys.stdin.buffer.read(8))
sys.stdin.buffer.read(nbytes)
os.write(2, b"word\\n" * 99999 + b"the last one\\n")
os.kill(os.getpid(), {number})
"""
# Of an e 16 to the power of 16 are made: there is no memory for them.
MANY = [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 16}] * 16


@pytest.fixture(scope="module")
def trial() -> Iterator[TokenizerTrial]:
    with contextlib.closing(TokenizerTrial()) as made:
        yield made


@pytest.fixture
def good(tokenizer_json: bytes) -> dict[str, bytes]:
    return assets_of(tokenizer_json, tokenizer={"chat_template": CHATML, "eos_token": "<|im_end|>"})


def changed(assets: dict[str, bytes], **values: object) -> dict[str, bytes]:
    return {**assets, "tokenizer.json": json.dumps({**json.loads(assets["tokenizer.json"]), **values}).encode()}


def test_what_ends_its_process_is_named_and_the_next_gets_another(
    trial: TokenizerTrial, good: dict[str, bytes]
) -> None:
    assert trial.problem(good, 600) == ""
    first = trial._process
    assert trial.problem(good, 600) == "" and trial._process is first, "one process is for many"
    problem = trial.problem(changed(good, normalizer={"type": "Sequence", "normalizers": MANY}), 600)
    assert problem is not None and problem.startswith("was ended by SIGABRT (memory allocation of "), problem
    assert trial.problem(good, 600) == "" and trial._process is not first


def test_what_a_run_can_say_itself_is_left_to_it(trial: TokenizerTrial, good: dict[str, bytes]) -> None:
    for assets in ({"tokenizer.json": b"{}"}, {"tokenizer.json": b"\xff"}, changed(good, decoder=None)):
        assert trial.problem(assets, 600) == ""
    assert trial.problem(good, 3) == ""  # ids that the model has no row for


def test_a_panic_is_no_reason_to_try_it_again(trial: TokenizerTrial, good: dict[str, bytes]) -> None:
    model = json.loads(good["tokenizer.json"])["model"] | {"continuing_subword_prefix": "e" * 99}
    problem = trial.problem(changed(good, model=model), 600)
    assert problem is not None and problem.startswith("failed (range "), problem


def test_one_that_does_not_end_is_ended(
    trial: TokenizerTrial, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trial.problem(good, 600) == ""
    monkeypatch.setattr(tokenizer_trial, "MAX_WAIT_S", 0.0)
    assert trial.problem(good, 600) == "took more than 0 s"
    assert trial._process is None


def test_nothing_is_imported_from_the_current_folder(
    good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the folder of the model."""
    written = tmp_path / "written"
    for name in ("resource", "msgspec", "tpimpi"):
        (tmp_path / f"{name}.py").write_text(f"open({str(written)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(TokenizerTrial()) as trial:
        assert trial.problem(good, 600) == ""
    assert not written.exists()


def talker(folder: Path, number: int) -> str:
    path = folder / f"talker-{number}"
    path.write_text(TALKER.format(python=sys.executable, number=int(number)))
    path.chmod(0o700)
    return str(path)


def test_one_that_says_much_is_heard(good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe has room for."""
    monkeypatch.setattr(tokenizer_trial, "MAX_WAIT_S", 20.0)
    monkeypatch.setattr(sys, "executable", talker(tmp_path, signal.SIGSEGV))
    with contextlib.closing(TokenizerTrial()) as trial:
        assert trial.problem(good, 600) == "was ended by SIGSEGV (the last one)"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_the_system_ends_is_no_fault_of_the_model(
    number: int, good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPIMPI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", talker(tmp_path, number))
    with pytest.raises(TpimpiError, match=r"was ended from outside, by SIG\w+: perhaps memory is short"):
        try_tokenizer(good, 600, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_without_room_for_a_process_it_is_not_tried(
    good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPIMPI_CACHE", str(tmp_path))
    for program in (str(tmp_path / "none"), "/bin/false"):
        monkeypatch.setattr(sys, "executable", program)
        try_tokenizer(good, 600, tmp_path)
    assert not list(tmp_path.iterdir()), "nor remembered as one that was"


def test_it_is_tried_once_on_a_host(good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPIMPI_CACHE", str(tmp_path))
    tried: list[int] = []
    monkeypatch.setattr(TokenizerTrial, "problem", lambda self, assets, vocab: tried.append(vocab) or "")
    for assets, vocab in ((good, 600), (dict(reversed(good.items())), 600), (good, 700), ({**good, "a": b""}, 600)):
        try_tokenizer(assets, vocab, tmp_path)
    assert tried == [600, 700, 600], "other files, or other ids, are another tokenizer"
    try_tokenizer({"gguf.json": b"{}"}, 800, tmp_path)
    assert len(tried) == 3
    monkeypatch.setenv("TPIMPI_CACHE", str(tmp_path / ("a" * 300)))  # no name that a file may have
    try_tokenizer(good, 600, tmp_path)
    assert len(tried) == 4
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPIMPI_CACHE", str(tmp_path / "file"))  # no place to remember it in
    monkeypatch.setattr(TokenizerTrial, "problem", lambda self, assets, vocab: "was ended by SIGSEGV")
    with pytest.raises(
        ModelError, match=r"tokenizer\.json of \S+ cannot be used: a process that loaded it was ended by"
    ):
        try_tokenizer(good, 600, tmp_path)
