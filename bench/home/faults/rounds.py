"""One round: a run of four ranks in which one thing breaks, and whether the user saw what has to be seen."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.home.devices import Device, Link
from bench.home.faults.cases import BROKEN_BEFORE, KINDS, NAMES, PROMPT, RANKS, Case
from bench.home.faults.screen import START_TIMEOUT_S, Screen, tpimpi_processes
from bench.home.home import Home

DISK_BYTES = 2 << 30  # of a device's own disk
LEAVE_TIMEOUT_S = 15.0  # after the end, in which the last process has to go


@dataclass
class Outcome:
    """What one round showed; times in seconds from the breaking."""

    kind: str
    mpi: str
    rank: int
    code: int = 0
    message_s: float | None = None
    end_s: float = 0.0
    line: str = ""
    left: list[str] = field(default_factory=list)
    wrong: str = ""  # why it did not go well


def try_once(kind: str, home: Home, mpi: str, rank: int, silence: float, whole: str) -> Outcome:
    """One round: start a run, break `kind` on device `rank`, and judge. `whole` is the undisturbed answer to PROMPT."""
    case, outcome = KINDS[kind](home, mpi, silence), Outcome(kind, mpi, rank)
    case.prepare(rank)
    process = home.mpirun(
        case.command(),
        ranks=RANKS,
        mpi=mpi,
        stdin=subprocess.PIPE if case.prompt is None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    screen = Screen(process)
    try:
        case.reach(screen)
        before = len(screen.lines) if kind not in BROKEN_BEFORE else 0
        broken = time.monotonic()
        case.break_it(rank)
        allowed = START_TIMEOUT_S if kind in BROKEN_BEFORE else case.allowed_s + 20
        if not screen.ended(allowed):
            outcome.wrong = f"still running after {allowed:.0f} s"
        outcome.end_s = time.monotonic() - broken
        process.kill()
        screen.join()
        outcome.code = process.wait()
        printed = [(time.monotonic(), line) for line in screen.text.splitlines()]  # MPICH's banner is there
        for moment, line in (*screen.lines[before:], *printed):
            if case.named(line, rank):
                outcome.message_s, outcome.line = max(0.0, moment - broken), line
                break
        outcome.left = left_after_all(home, RANKS)
        outcome.wrong = outcome.wrong or _wrong(outcome, case, kind, screen, whole)
        if outcome.wrong:
            outcome.line += " | " + " / ".join(line for _, line in (*screen.lines[-8:], *printed[-4:]))
    except TimeoutError as error:
        outcome.wrong = str(error)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if outcome.left or outcome.wrong:
            end_what_is_left(home, RANKS)
        case.mend(rank)
    return outcome


def left_after_all(home: Home, ranks: int) -> list[str]:
    """The processes of tpimpi that are still on the first devices after LEAVE_TIMEOUT_S."""
    end = time.monotonic() + LEAVE_TIMEOUT_S
    while left := [f"r{rank} {line}" for rank in range(ranks) for line in tpimpi_processes(home, rank).values()]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return left


def end_what_is_left(home: Home, ranks: int) -> None:
    """Kill what a run has left on the first devices, so that the next one meets none of it."""
    for device in range(ranks):
        for pid in home.pids(device):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"-m\0tpimpi" in command or b"/prted\0" in command or b"hydra_pmi_proxy\0" in command:
                    os.kill(pid, signal.SIGKILL)


def _wrong(outcome: Outcome, case: Case, kind: str, screen: Screen, whole: str) -> str:
    if outcome.code == 0:
        return "exit code 0"
    if outcome.message_s is None:
        return "nobody was named"
    if outcome.message_s > case.allowed_s and kind not in BROKEN_BEFORE:
        return f"named after {outcome.message_s:.1f} s"
    if outcome.left:
        return f"{len(outcome.left)} processes left"
    text = answer_of(screen)
    if case.prompt == PROMPT and kind != "full-disk" and not whole.startswith(text[: len(whole)]):
        return f"printed {text[-60:]!r}, which is not in the undisturbed answer"
    return ""


def answer_of(screen: Screen) -> str:
    """What was printed of the answer; the launcher's banner comes behind it."""
    return re.split(r"\n?(?:=|-){20}", screen.text.replace("> ", ""))[0].strip("\n")


@contextlib.contextmanager
def home_with_slices(mpi: str, tokens: int = 200) -> Iterator[tuple[Home, str]]:
    """Four devices with their slices, and the undisturbed answer to PROMPT, of so many tokens."""
    with tempfile.TemporaryDirectory() as other:
        environment = {"PYTHONPATH": other}
        devices = [Device(name, disk=DISK_BYTES if rank else None, env=environment) for rank, name in enumerate(NAMES)]
        yield from _home_with_slices(mpi, devices, tokens)


def _home_with_slices(mpi: str, devices: list[Device], tokens: int) -> Iterator[tuple[Home, str]]:
    with Home(devices, Link(latency_s=0.0005)) as home:
        case = Case(home, mpi, 30)
        case.options = ("--max-tokens", str(tokens), "--ignore-eos", "--raw", "--quiet", "--speculate", "off")
        process = home.mpirun(case.command(), ranks=RANKS, mpi=mpi, stdout=subprocess.PIPE, text=True)
        whole, _ = process.communicate(timeout=START_TIMEOUT_S)
        if process.returncode:
            raise SystemExit(f"the undisturbed run ended with exit code {process.returncode}")
        yield home, whole.strip("\n")
