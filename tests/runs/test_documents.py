"""Every command in README, CONTRIBUTING and docs: it runs, or stands in a list that says why it cannot run in a test.

A block of a page is run by bash as a reader would type it, one after the other, in a folder that looks like a checkout: what
one block makes (slices, a prompt) the next may use. Long commands are made shorter (SHORTER), never left out for that alone.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launch import ROOT, Launcher, run_command
from tests.support.pages import PAGES

FIRST_WORDS = set(
    re.findall(
        r"\S+",
        ".venv/bin/tpimpi "
        "apt-get bash echo export for git mpirun pip printf python python3 qsub ruff sbatch seq source ssh-copy-id sudo "
        "tpimpi while",
    )
)

# What cannot run in a test, by a pattern for the whole line, and why.
NOT_HERE = {
    r"(sudo )?(env \S+ )?bash jobs/\S+\.sh.*": "CI runs the scripts themselves",
    r"(apt-get|git|pip|python3 -m venv|ssh-copy-id) .*": "changes the machine, or needs another",
    r"bash bench/\S+\.sh .*": "builds another program, for minutes",
    r"(sbatch|qsub) .*": "needs a batch system; tests/runs/test_jobs.py has one",
    r"(sudo )?sysctl .*": "changes the machine",
    r"(sudo )?(env \S+ )?python (-m bench\.|bench/)\S+.*": "hours, or root; tests/bench runs them",
    r"export MPI4PY_MPIABI=mpich .*": "the suite's --mpi mpich does that",
    r"python -m pytest .*": "a test within a test",
    r".*slices-7b.*--other-.*": "measures for a long time",
}

# Commands that are made shorter, or more plain, than they stand on a page.
SHORTER = (
    (r"--model PATH", "--model '{smollm2}'"),
    (r"“…”|\"…\"", '"Name a colour."'),
    (r"--shape llama-2-7b\b", "--shape llama-2-7b --layers 2"),
    (r"--shape llama-3\.1-8b\b", "--shape llama-3.1-8b --layers 2"),
    (r"(tpimpi bench kernels)\b", r"\1 --seconds 0.01 --positions 1 --shape 256x256"),
    (r"(tpimpi bench disk \S+)", r"\1 --seconds 0.1"),
    (r"(tpimpi bench allreduce)", r"\1 --repeats 1 --sizes 576"),
    (r"(-m tpimpi --.*--max-tokens) \d+", r"\1 8"),
    (r"(tpimpi perplexity \S+)", r"\1 --max-tokens 600"),
    (r"(-m tpimpi)(?=\s+--|\s*(?:#.*)?$)(?!.*--max-tokens)", r"\1 --max-tokens 8"),
)


def blocks() -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each block of commands, in the order of the pages."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for found in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.M | re.S):
            lines = [line.removeprefix(found[1]).rstrip() for line in found[3].replace("\\\n", "").splitlines()]
            if found[2] in ("", "sh", "bash") and lines and lines[0].split(" ", 1)[0] in FIRST_WORDS:
                yield f"{page}:{text.count(chr(10), 0, found.start()) + 2}", lines


BLOCKS = dict(blocks())
FIRST = next(name for name, lines in BLOCKS.items() if any("mpirun" in line for line in lines))  # in the short suite


def runs_here(line: str) -> bool:
    command = re.split(r"\s+#\s", line, maxsplit=1)[0].strip()
    return bool(command) and not any(re.fullmatch(pattern, command) for pattern in NOT_HERE)


def is_output(line: str) -> bool:
    """A line that a block shows of what a command prints."""
    return bool(line) and not line.startswith((" ", "#")) and line.split(" ", 1)[0] not in (*FIRST_WORDS, "done", "do")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A folder with what a checkout has, an environment, and the files that pages speak of."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("bench", "docs", "hostfiles", "jobs", "src", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "home.txt").write_text("localhost\n" * 4)
    (folder / "prompt.txt").write_text("Name a colour.\n")
    (folder / "questions.txt").write_text("Name a colour.\nName a fruit.\n")
    (folder / "text").mkdir()
    (folder / "text" / "alice29.txt").write_text((ROOT / "LICENSE").read_text())
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == FIRST else pytest.mark.slow)
        for name, lines in BLOCKS.items()
        if any(map(runs_here, lines))
    ],
)
def test_commands_of_a_page_run(
    name: str, checkout: Path, smollm2: Path, mpirun: Launcher, cache: dict[str, str], tmp_path: Path
) -> None:
    if mpirun.mpi != "openmpi" and not any(line.startswith("mpirun") for line in BLOCKS[name]):
        pytest.skip("it starts no ranks by mpirun: run with --mpi openmpi")
    script = ["set -eo pipefail"]
    for line in BLOCKS[name]:
        if not runs_here(line) or is_output(line):
            continue
        if line.startswith("source ") and mpirun.mpi != "openmpi":
            continue  # would put Open MPI's mpirun first again
        for pattern, instead in SHORTER:
            line = re.sub(pattern, instead.replace("{smollm2}", str(smollm2)), line)  # noqa: PLW2901
        line = line.replace("--map-by node ", "")  # noqa: PLW2901  (one machine carries all ranks)
        if re.search(r"tpimpi (serve|up)\b", line):
            line = f"{sys.executable} -m tests.support.serve_once {line.split(' #')[0]}"  # noqa: PLW2901
        elif line.startswith("mpirun") and "<" not in line:  # each has somebody who types
            line = f"""{{ {line.split(" #")[0]}; }} <<<'Name a colour.'"""  # noqa: PLW2901
        script.append(line)
    env = {**mpirun.env, **cache, "TPIMPI_LINK_KEYS": str(tmp_path / "link-keys")}
    env["PATH"] = f"{Path(mpirun.program).parent}:{os.environ['PATH']}"
    result = run_command(
        ["bash", "-c", "\n".join(script)], env=env, cwd=checkout, stdin="Name a colour.\n", timeout=200
    )
    assert result.code == 0, f"{chr(10).join(script)}\n{result.out[-2000:]}\n{result.err[-4000:]}"


def test_what_does_not_run_here_is_still_there() -> None:
    lines = [re.split(r"\s+#\s", line, maxsplit=1)[0].strip() for block in BLOCKS.values() for line in block]
    for pattern in NOT_HERE:
        assert any(re.fullmatch(pattern, line) for line in lines), f"no page has a command like {pattern}"


def test_a_session_in_the_checkout_is_ignored_by_git() -> None:
    """It holds what was said. What the pages call one is in no list of files to be committed."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no checkout of git")
    names = {name for page in PAGES for name in re.findall(r"--session ([a-z][\w.]+)", (ROOT / page).read_text())}
    assert names == {"chat.jsonl", "chat.sealed"}
    ignored = run_command(
        ["git", "check-ignore", "--no-index", *sorted(names), "docs/measurements.jsonl"], env={}, cwd=ROOT
    )
    assert ignored.out.split() == ["chat.jsonl", "chat.sealed"]
