"""Values of options that argparse, Python or the system would answer in words of their own."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.launch import Result, run_command
from tests.support.messages import assert_one_line
from tpimpi.cli.completion import command_parser
from tpimpi.cli.parser import COMMANDS, Parser
from tpimpi.cli.run_parser import run_parser
from tpimpi.errors import InputError, as_ours, shorten, shorten_path
from tpimpi.serving.session import Session


def parsers() -> Iterator[argparse.ArgumentParser]:
    yield run_parser()
    for command in COMMANDS:
        parser = command_parser(command)
        assert parser is not None
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def test_two_dashes_are_no_value_of_any_option() -> None:
    """argparse of Python 3.11 and 3.12 makes an empty list of `--option=--`."""
    asked = 0
    for parser in parsers():
        assert isinstance(parser, Parser)
        for option in (name for name in parser._option_string_actions if name.startswith("--")):
            with pytest.raises(
                InputError, match=rf"^{option} is '--', which is no value of an option.*; see: .*--help$"
            ):
                parser.parse_args([f"{option}=--"])
            asked += 1
    assert asked > 100
    with pytest.raises(InputError, match="unrecognized arguments: --nonsense=--"):
        run_parser().parse_args(["--nonsense=--"])


def test_two_dashes_make_no_slices_in_the_current_folder(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    result = tpimpi("slice", "--model", str(tiny), "--ranks", "1", "--out=--", cwd=tmp_path)
    assert_one_line(result, "--out is '--'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--prompt-file="], "--prompt-file is empty; give the name of a file"),
        (["--prompt", "x", "--stop-file="], "--stop-file is empty"),
        (["--prompt", "x", "--slices="], "--slices is empty; give the folder of the slices"),
        (["perplexity", ""], "the text's name is empty; give a file"),
        (["doctor", "--hostfile="], "--hostfile is empty; give the name of a file"),
        (["doctor", "--slices="], "--slices is empty"),
        (["inspect", ""], "the path is empty; give the path of a model or of slices"),
        (["bench", "disk", ""], "the path is empty; give a file or a folder, or leave it out"),
        (["--prompt", "x", "--format", "9" * 5000], r"--format is '9{39}…', must be auto"),
        (["--prompt-file", f"/nowhere/{'d' * 80}/end.txt"], r"--prompt-file /nowhere/d{80}/end\.txt: No such file"),
        (["--prompt-file", f"/nowhere/{'d/' * 200}end.txt"], r"--prompt-file …[d/]*/end\.txt: No such file"),
        (["bench", "kernels", "--backend", "numpy", "--kernels", "avx2"], "--kernels is avx2, a level of the native"),
    ],
)
def test_a_bad_value_is_one_line(tpimpi: Callable[..., Result], tiny: Path, arguments: list[str], pattern: str) -> None:
    assert_one_line(tpimpi(*arguments, env={"TPIMPI_MODEL": str(tiny)}), pattern)


def test_values_are_shortened_with_a_sign() -> None:
    assert shorten("x" * 40) == "x" * 40
    assert shorten("x" * 41) == "x" * 39 + "…"
    assert shorten_path(Path("/" + "y" * 199)) == "/" + "y" * 199
    assert shorten_path("/" + "y" * 196 + "/end") == "…" + "y" * 195 + "/end"
    error = as_ours(PermissionError(13, "Permission denied", "/home/rank-0-of-1.h5"))
    assert re.match(r"/home/rank-0-of-1\.h5: Permission denied; let this user read and write it", str(error))


FIRST = '{{"tpimpi session": 1, "model": "m", "fingerprint": "f", "vocabulary": 9, "options": {}}}\n'
OPTIONS = (
    '{{"temperature": {t}, "top_k": 0, "top_p": {p}, "min_p": 0.0, "repetition_penalty": {r}, "seed": null, '
    '"raw": false}}'
)


@pytest.mark.parametrize("name", "tpr")
@pytest.mark.parametrize("value", ["1" + "0" * 400, "true", "-1", "null", "NaN"])
def test_a_session_with_an_option_that_is_none_is_broken_in_line_1(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(FIRST.format(OPTIONS.format(t="1.0", p="1.0", r="1.0")))
    Session(str(path)).close()
    path.write_text(FIRST.format(OPTIONS.format(**{"t": "1.0", "p": "1.0", "r": "1.0", name: value})))
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"^--session .*chat\.jsonl is broken in line 1, .*…'; cut it off"):
        Session(str(path))
    assert path.read_bytes() == before


def test_a_session_that_is_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"^--session .*link is a link to .*gone, which is not there; give"):
        Session(str(tmp_path / "link"))


# Streams and variables


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        ("cache >/dev/full", 1, "cannot write to standard output: No space left on device; write it elsewhere"),
        ("--help >/dev/full", 1, "cannot write to standard output: No space left"),
        ("--bogus 2>/dev/full", 2, ""),
    ],
)
def test_a_stream_that_cannot_be_written(cache: dict[str, str], command: str, code: int, line: str) -> None:
    result = run_command(["bash", "-c", f"{sys.executable} -m tpimpi {command}"], env=cache, timeout=60)
    assert result.code == code, result.err
    assert len(result.our_lines) == bool(line), result.err
    assert line in result.err and "Traceback" not in result.err and "Exception ignored" not in result.err


@pytest.mark.parametrize(
    "variables", [{"_ARGCOMPLETE": "x", "COMP_LINE": "tpimpi "}, {"_ARGCOMPLETE": ""}, {"_ARGCOMPLETE": "1"}]
)
def test_a_completion_that_no_shell_asks_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], variables: dict[str, str]
) -> None:
    from tpimpi.cli.completion import complete

    monkeypatch.delenv("COMP_POINT", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        complete()
    assert left.value.code == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("value", "shown"), [("0", False), ("", False), ("1", True)])
def test_a_traceback_is_shown_where_it_is_asked_for(tpimpi: Callable[..., Result], value: str, shown: bool) -> None:
    assert ("Traceback" in tpimpi("--nonsense", env={"TPIMPI_TRACEBACK": value}).err) == shown
