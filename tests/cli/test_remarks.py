"""What the program says of a command line that it does not understand, of ranks that differ, and of what it left out."""

from __future__ import annotations

import json
import re
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.support.launch import ROOT, Launcher, Result, run_command
from tests.support.messages import assert_one_line
from tpimpi import __version__
from tpimpi.cli import remarks
from tpimpi.cli.parser import COMMANDS
from tpimpi.cli.run_options import parse_run
from tpimpi.cli.run_parser import run_parser
from tpimpi.cli.slice import slice_parser
from tpimpi.compute.backends import KERNEL_LEVELS, load_backend
from tpimpi.errors import InputError
from tpimpi.serving.generate import GenerationFigures
from tpimpi.serving.llm import LLM
from tpimpi.serving.report import Answer
from tpimpi.serving.transcript import Transcript

PROMPT = ["--prompt", "the quick brown fox"]
CUT = "the answer was cut at --max-tokens 4; give more to have it whole"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--temp", "0.5"], "(did you mean --temperature?)"),
        (["--max_tokens=5"], "(did you mean --max-tokens?)"),
        (["--sesion", "x"], "(did you mean --session?)"),
        (["slise", "--model", "x"], "(did you mean slice?)"),
        (["perplexty", "x"], "(did you mean perplexity?)"),
        (["hello"], "(to ask that, give it with --prompt)"),
        (["What", "is", "red?"], "(to ask that, give it with --prompt)"),
        (["chat"], "(a run has no name: leave the word out, and give the prompt with --prompt, or on standard input)"),
    ],
)
def test_what_is_nearly_right_is_named(arguments: list[str], meant: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"{meant}; see: python -m tpimpi --help")):
        parse_run(arguments)


def test_a_command_names_its_own_options_and_what_is_far_off_names_nothing() -> None:
    with pytest.raises(InputError, match=r"--rank 3 \(did you mean --ranks\?\); see: python -m tpimpi slice --help"):
        slice_parser().parse_args(["--rank", "3"])
    for wrong in ("--nonsense", "xyzzy", "-q", "--"):
        with pytest.raises(InputError) as caught:
            parse_run([wrong, "zebra"])
        assert "mean" not in str(caught.value)


def test_every_command_is_in_the_help() -> None:
    text = run_parser().format_help()
    assert [name for name in COMMANDS if f"-m tpimpi {name}" not in text] == []


def test_help_ends_at_once_on_all_ranks(mpirun: Launcher) -> None:
    """Rank 0 used to leave without telling the others, which then waited for it for 10 s."""
    began = time.monotonic()
    assert mpirun(2, "-c", "from tpimpi.star import connect; connect().close()", timeout=60).code == 0
    alone = time.monotonic() - began
    began = time.monotonic()
    result = mpirun(2, "-m", "tpimpi", "--version", timeout=60)
    assert (result.code, result.our_lines) == (0, [])
    assert time.monotonic() - began < alone + 6


def test_ranks_with_other_options_are_named(mpirun: Launcher, cache: dict[str, str], tiny: Path) -> None:
    rank = [*mpirun.command(1, ["-m", "tpimpi", *PROMPT, "--max-tokens", "2"])]
    odd = ["-np", "1", *rank[rank.index("-m") - 1 :], "--bogus"]
    result = run_command([*rank, ":", *odd], env={**mpirun.env, **cache, "TPIMPI_MODEL": str(tiny)}, timeout=60)
    assert result.code == 2, result.err
    assert len(result.our_lines) == 1, result.err
    assert re.search(r"r1 \S+ was started with other options than rank 0; give all ranks the same", result.our_lines[0])
    assert "bogus" not in result.err and result.out == ""


def test_an_answer_that_is_cut_says_so(tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    env = {"TPIMPI_MODEL": str(tiny)}
    cut = tpimpi(*PROMPT, "--max-tokens", "4", "--ignore-eos", env=env)
    assert (cut.code, cut.err.count("was cut at")) == (0, 1) and CUT in cut.err.splitlines()
    quiet = tpimpi(*PROMPT, "--max-tokens", "4", "--ignore-eos", "--quiet", env=env)
    assert (quiet.out, quiet.err) == (cut.out, "")
    stop = cut.out.strip()[3:5]
    whole = tpimpi(*PROMPT, "--max-tokens", "4", "--ignore-eos", "--stop", stop, env=env)
    assert whole.code == 0 and "was cut at" not in whole.err
    full = tpimpi(*PROMPT, "--max-tokens", "200", "--ignore-eos", "--report", str(tmp_path / "r"), env=env)
    assert "the answer was cut at the end of the context, 128 positions; ask for less" in full.err
    assert json.loads((tmp_path / "r").read_text())["finish_reason"] == "length"
    assert tpimpi(*PROMPT, "--ignore-eos", "--stop", stop, "--report", str(tmp_path / "r"), env=env).code == 0
    assert json.loads((tmp_path / "r").read_text())["answers"][0]["finish_reason"] == "stop"


def test_input_that_a_prompt_leaves_unread_is_said(
    tpimpi: Callable[..., Result], mpirun: Launcher, cache: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    """A loop over the lines of a list lost all but the first: mpirun takes what is there."""
    env, options = {**cache, "TPIMPI_MODEL": str(tiny)}, [*PROMPT, "--max-tokens", "2"]
    listed = tmp_path / "list"
    listed.write_text("one\ntwo\nthree\n")
    loop = f"while read p; do {' '.join(mpirun.command(1, ['-m', 'tpimpi', *options[2:]]))} --prompt $p; done <{listed}"
    taken = run_command(["bash", "-c", loop], env={**mpirun.env, **env}, timeout=60)
    assert taken.code == 0
    assert "standard input was taken by mpirun and not used" in taken.err and "</dev/null" in taken.err
    said = "standard input was not read: the prompt is an option's"
    assert said in tpimpi(*options, env=env, stdin="and this\n").err
    for silent in (
        tpimpi(*options, env=env),
        tpimpi(*options, env=env, stdin=""),
        tpimpi(*options, "--quiet", stdin="x"),
    ):
        assert "standard input" not in silent.err
    assert "standard input" not in mpirun(2, "-m", "tpimpi", *options, env=env).err


def test_the_level_of_the_kernels_can_be_chosen(tpimpi: Callable[..., Result], tiny: Path) -> None:
    native = pytest.importorskip("tpimpi._native")
    lacking = next(level for level in KERNEL_LEVELS if level not in native.levels())
    for arguments in ([*PROMPT], ["bench", "kernels"]):
        result = tpimpi(*arguments, "--kernels", lacking, env={"TPIMPI_MODEL": str(tiny)})
        assert_one_line(result, f"--kernels is {lacking}, this processor has .*portable; give one of those")
    other = tpimpi(*PROMPT, "--kernels", "portable", "--backend", "numpy", env={"TPIMPI_MODEL": str(tiny)})
    assert_one_line(other, "--kernels is portable, a level of the native kernels, and numpy computes; leave it out")
    assert load_backend("native", 1, "portable").level == "portable"  # type: ignore[attr-defined]
    made = [
        tpimpi(*PROMPT, "--max-tokens", "3", "--kernels", level, "--quiet", env={"TPIMPI_MODEL": str(tiny)})
        for level in ("auto", native.levels()[0], "portable")
    ]
    assert [result.code for result in made] == [0, 0, 0]
    assert made[0].out == made[1].out


@pytest.mark.parametrize(
    ("line", "among", "not_among"),
    [
        ("tpimpi sl", {"slice"}, {"synth", "--model"}),
        ("tpimpi --max", {"--max-tokens"}, {"--memory"}),
        ("tpimpi slice --", {"--ranks", "--out"}, {"--prompt"}),
        ("tpimpi --backend ", {"native", "numpy"}, {"slice"}),
        ("tpimpi --format q", {"q8_0", "q4_0"}, {"auto", "f32"}),
        ("tpimpi --format=", {"--format=auto", "--format=f32"}, {"slice"}),
        ("tpimpi --kernels ", {"auto", "avx2", "portable"}, {"slice"}),
        ("tpimpi --allreduce ", {"star", "mesh"}, {"slice"}),
        ("tpimpi --wire ", {"bf16", "q8_0"}, {"slice"}),
        ("tpimpi --kv ", {"f16", "f32"}, {"slice"}),
        ("tpimpi --speculate ", {"auto", "off"}, {"slice"}),
        ("tpimpi slice --format ", {"auto", "q4_0"}, {"--out"}),
        ("tpimpi synth --format ", {"q4_0"}, {"auto"}),
        ("tpimpi synth --shape l", {"llama-2-7b"}, {"yi-34b"}),
        ("tpimpi plan --format ", {"auto", "q4_0"}, {"--out"}),
        ("tpimpi perplexity --against ", {"f32", "q4_0"}, {"auto"}),
    ],
)
def test_a_shell_completes_words(tmp_path: Path, line: str, among: set[str], not_among: set[str]) -> None:
    pytest.importorskip("argcomplete")
    out = tmp_path / "out"
    env = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    env |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(out), "COMP_TYPE": "9", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    result = run_command([sys.executable, "-m", "tpimpi"], env=env, timeout=60)
    assert result.code == 0, result.err
    words = {word.strip() for word in out.read_text().split("\n")}
    assert among <= words and not not_among & words, words


def test_the_command_tpimpi_is_the_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["tpimpi"].partition(":")
    program = f"import sys; sys.argv = ['tpimpi', '--version']; import {module} as m; sys.exit(m.{function}())"
    result = run_command([sys.executable, "-c", program], env={})
    assert (result.code, result.out) == (0, f"tpimpi {__version__}\n"), result.err


def test_what_stats_says_of_speculation() -> None:
    made = GenerationFigures(rows=40, passes=10, sampled=24, drafted=28, accepted=14)
    times = [(number // 3 + 1, number / 10) for number in range(24)]
    answer = Answer.timed("x", [7] * 24, 9, 0.0, times, 3, made, ended="max_tokens")
    report = SimpleNamespace(answers=[answer])
    llm = cast("LLM", SimpleNamespace(report=report, conversation=SimpleNamespace(limit=100)))
    lines = list(remarks.figures(llm, Transcript()))
    assert lines[-1] == "speculation: 10 passes, 2.40 tokens each (14 of 28 drafted tokens accepted)"
    answer = Answer.timed("x", [7], 9, 0.0, times[:1], 3, GenerationFigures(9, 1, 1), ended="max_tokens")
    report.answers.append(answer)
    assert not any("speculation" in line for line in remarks.figures(llm, Transcript()))
