"""bench/home: what is left after errors, signals and kills; its options and its file of devices."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import home
from bench.home import devices
from tests.support.home_cases import left_of
from tests.support.homes import HOME, needs_home, output
from tests.support.launch import ROOT, TIMEOUT, Launcher

pytestmark = pytest.mark.alone

# Nothing stays


@needs_home
@pytest.mark.slow
def test_nothing_stays_after_an_error_with_programs_running() -> None:
    with pytest.raises(RuntimeError, match="ours"), home.Home(2) as two:
        # One that has lost its environment, and one that has left its session
        two.start(1, ["env", "-i", "sleep", "100"])
        two.start(0, ["setsid", "--fork", "sleep", "100"]).wait()
        deadline = time.monotonic() + TIMEOUT
        while not two.pids(0) or not two.pids(1):
            assert time.monotonic() < deadline
        strays = two.pids(0) | two.pids(1)
        raise RuntimeError("ours")
    assert not left_of(two.id)
    for pid in strays:
        stat = Path(f"/proc/{pid}/stat")  # a child of ours that was not waited for stays as a zombie
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def start_command(mpi: str) -> tuple[subprocess.Popen[str], str]:
    """`bench.home run` of a program that sleeps, once it runs on both devices; and the home's id."""
    program = ["sh", "-c", 'echo "up $TPIMPI_EMULATED_HOME"; exec sleep 100']
    process = subprocess.Popen(
        [*HOME, "run", "--devices", "2", "--mpi", mpi, "--", *program],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    if not all(line.startswith("up ") for line in lines):
        process.kill()
        pytest.fail(f"{lines}, {process.communicate()[1]}")
    return process, lines[0].split()[1]


@needs_home
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_nothing_stays_after_a_signal(mpirun: Launcher, number: signal.Signals) -> None:
    process, name = start_command(mpirun.mpi)
    assert left_of(name)
    process.send_signal(number)
    assert output(process).code not in (0, -number)
    assert not left_of(name)


@needs_home
@pytest.mark.slow
def test_what_a_killed_run_leaves_is_cleaned(mpirun: Launcher) -> None:
    process, name = start_command(mpirun.mpi)
    process.kill()
    process.wait()
    deadline = time.monotonic() + TIMEOUT
    while left_of(name):  # another run may be cleaning it too
        done = subprocess.run([*HOME, "clean"], cwd=ROOT, timeout=TIMEOUT, check=False)
        assert done.returncode == 0
        assert time.monotonic() < deadline
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()


@needs_home
def test_the_command_passes_input_output_and_exit_code_through(mpirun: Launcher) -> None:
    command = [*HOME, "run", "--devices", "2", "--latency", "1ms", "--mpi", mpirun.mpi, "--"]
    # Open MPI hands no end of input on, so one line is read.
    program = [
        "sh",
        "-c",
        "case $(uname -n) in laptop) read line; echo got $line;; *) echo bad >&2; sleep 1; exit 7;; esac",
    ]
    done = subprocess.run(
        [*command, *program], cwd=ROOT, input="a line\n", capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.stdout == "got a line\n"
    assert "bad" in done.stderr
    assert done.returncode == 7


@needs_home
def test_in_a_terminal_it_answers_and_ends_with_its_input(mpirun: Launcher, tiny: Path) -> None:
    program = [sys.executable, "-m", "tpimpi", "--model", str(tiny), "--raw", "--max-tokens", "4", "--quiet"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(  # `setsid --ctty` makes the terminal that of a session of its own, as a shell has it
        ["setsid", "--ctty", *HOME, "run", "--devices", "2", "--mpi", mpirun.mpi, "--", *program],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        cwd=ROOT,
        env={**os.environ, "TERM": "dumb"},  # which cannot move a cursor: what it shows ends with the prompt
    )
    os.close(theirs)
    try:
        shown = read_terminal(ours, lambda text: text.endswith("> "), "a prompt")
        os.write(ours, b"the quick\n")
        read_terminal(ours, lambda text: text.endswith("\n> "), f"the next prompt, after {shown!r}")
        os.write(ours, b"\x04")  # Ctrl-D
        assert process.wait(60) == 0
    finally:
        process.terminate()
        process.wait()
        os.close(ours)


def read_terminal(terminal: int, ready: Callable[[str], bool], what: str) -> str:
    """What comes out of the terminal until `ready` says that it is there; fails after a minute."""
    text, deadline = "", time.monotonic() + 60
    while not ready(text):
        assert time.monotonic() < deadline, f"no {what}: {text!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 4096).decode(errors="replace").replace("\r\n", "\n")
    return text


# The file and the options


def test_the_example_file_holds_four_unequal_devices() -> None:
    made, link = devices.read_devices(ROOT / "hostfiles" / "emulated-home.toml")
    assert [device.name for device in made] == ["laptop", "desktop", "mini-pc", "pi"]
    assert link == devices.Link(0.001, pytest.approx(0.0001), 37.5e6)
    assert (made[0].memory, made[1].bandwidth, made[2].cores) == (4_000_000_000, 125e6, 0.5)
    assert (made[3].disk, made[3].read_bps, made[3].latency_s) == (1_000_000_000, 40_000_000, 0.002)
    assert made[3].env == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "between 1 and 64 tables"),
        ("[[device]]\nname = 'a'\ncore = 1", "unknown key 'core'; known are bandwidth, cache, cores"),
        ("[[device]]\nname = 'a'\n[[device]]\nname = 'a'", "two devices are called a"),
        ("[[device]]\nname = 'A_b'", "device name 'A_b'"),
        ("[[device]]\nname = '../x'", "device name '../x'"),
        ("[[device]]\nname = 'a'\ncores = 0", "cores of a is 0.0"),
        ("[[device]]\nname = 'a'\ncores = 'two'", "cores is 'two', must be a number"),
        ("[[device]]\nname = 'a'\nlatency = '2'", "latency is '2', must be a time"),
        ("[[device]]\nname = 'a'\nlatency = '..ms'", "latency is '..ms', must be a time"),
        ("[[device]]\nname = 'a'\nbandwidth = '5M'", "bandwidth is '5M', must be a bandwidth"),
        ("[[device]]\nname = 'a'\nmemory = 5", "memory is 5, must be a text in quotes"),
        ("[[device]]\nname = 'a'\ndisk = '1G'\ncache = 'x'", "has disk and cache; give one"),
        ("[[device]]\nname = 'a'\nenv = { 'A-B' = '1' }", "'A-B', which is no name of a variable"),
        ("[link]\nloss = '1'\n[[device]]\nname = 'a'", "link: unknown key 'loss'"),
        ("[link", "devices.toml: "),
    ],
)
def test_a_file_that_describes_no_home_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    with pytest.raises(devices.InputError, match=re.escape(message)):
        devices.read_devices(path)


@pytest.mark.parametrize(
    ("text", "rate"), [("300Mbit/s", 37.5e6), ("1 Gbit/s", 125e6), ("40MB/s", 40e6), ("8kbit/s", 1000.0)]
)
def test_bandwidth_in_bits_and_bytes(text: str, rate: float) -> None:
    assert devices.parse_bandwidth(text, "--bandwidth") == rate


@pytest.mark.parametrize(("text", "seconds"), [("300us", 3e-4), ("2ms", 2e-3), ("0.5 s", 0.5)])
def test_durations(text: str, seconds: float) -> None:
    assert devices.parse_duration(text, "--latency") == pytest.approx(seconds)
