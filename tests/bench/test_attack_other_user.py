"""What another user of a machine, without root, sees of the ranks on it. docs/threat-model.md cites this."""

from __future__ import annotations

import os
import re
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.support.launch import TIMEOUT, Launcher

NOBODY = 65534
PROMPT = "the lazy dog"
# Prints which of the paths it can open, or list; the first is its own.
PROBE = """
for path in /proc/self/environ "$@"; do
    if [ -d "$path" ]; then [ -n "$(ls "$path" 2>/dev/null)" ]; else ( : < "$path" ) 2>/dev/null; fi && echo "$path"
done
true
"""
OF_PROCESS = ("mem", "environ", "maps", "smaps", "pagemap", "stack", "syscall", "auxv", "io", "fd", "map_files")


def _ranks(mark: str) -> list[int]:
    """The processes of the run that has `mark` in its environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environment, arguments = (place / "environ").read_bytes(), (place / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in environment and arguments.split(b"\0")[1:3] == [b"-m", b"tpimpi"]:
            found.append(int(place.name))
    return found


def _shared(pid: int) -> list[str]:
    """Files that a rank shares memory through."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return re.findall(r"^\S+ rw-s .* (/\S+)$", maps, re.MULTILINE)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user can be tried by root alone")
def test_memory_environment_and_files_of_ranks_are_closed_to_another_user(
    mpirun: Launcher, cache: dict[str, str], tiny: Path
) -> None:
    mark = f"tpimpi-other-user-{uuid.uuid4()}"
    process = subprocess.Popen(
        mpirun.command(2, ["-m", "tpimpi", "--model", str(tiny), "--max-tokens", "8", "--ignore-eos"]),
        env={**os.environ, **mpirun.env, **cache, "TPIMPI_TEST_MARK": mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"{PROMPT}\n".encode())
        process.stdin.flush()
        assert process.stdout.readline() != b"", "no answer"
        pids = _ranks(mark)
        assert len(pids) == 2
        shared = sorted({path for pid in pids for path in _shared(pid)})
        arguments = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]  # which anybody can
        paths = [*(f"/proc/{pid}/{name}" for pid in pids for name in OF_PROCESS), *shared]
        tried = subprocess.run(
            ["/bin/sh", "-c", PROBE, "probe", *paths],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
        )
        process.stdin.close()
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert tried.stdout.split() == ["/proc/self/environ"]
    assert not [text for text in arguments if PROMPT in text]
    if mpirun.mpi == "openmpi":
        assert shared, "ranks share no memory: the test sees nothing"
