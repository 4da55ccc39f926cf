"""What a signal ends, wherever it comes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.cli_cases import slicing
from tests.support.launch import run_command
from tests.support.terminal import terminal
from tpimpi.cli.serve import _end
from tpimpi.errors import LostError
from tpimpi.serving.server.loop import ServerLoop


@pytest.mark.alone
@pytest.mark.slow_but("15")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_slicing_leaves_what_can_go_on(smollm2: Path, tmp_path: Path, number: signal.Signals) -> None:
    # f32 takes longer than this test does to notice that it has begun.
    command = slicing(smollm2, tmp_path / "out", "--format", "f32")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.rank-1*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Traceback" not in err
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {f".rank-{rank}-of-2.h5.partial" for rank in range(2)}


def test_a_signal_in_a_callback_of_a_library_ends_slicing(tiny: Path, tmp_path: Path) -> None:
    """An exception would be dropped there, and the slicing go on to its end: seen in one of 40."""
    program = (
        "import os, signal, sys, weakref\n"
        "import tpimpi.weights.make as make\n"
        "from tpimpi.cli.main import main\n"
        "class Thing: pass\n"
        "def build(*arguments):\n"
        "    thing = Thing()\n"
        "    reference = weakref.ref(thing, lambda reference: os.kill(os.getpid(), signal.SIGINT))\n"
        "    del thing\n"
        "make.build_tiles = build\n"
        "main(sys.argv[1:])\n"
    )
    result = run_command([sys.executable, "-c", program, *slicing(tiny, tmp_path / "out")[3:]], env={}, timeout=60)
    assert (result.code, result.out, "Traceback" in result.err) == (128 + signal.SIGINT, "", False), result.err
    assert not list((tmp_path / "out").iterdir()), "files of full size in which nothing was written"


def test_a_signal_removes_no_slice_that_another_process_has_begun_since(tiny: Path, tmp_path: Path) -> None:
    """One that we left, with nothing written to it, is not ours any more."""
    program = (
        "import os, pathlib, signal, sys\n"
        "import tpimpi.weights.make as make\n"
        "from tpimpi.cli.main import main\n"
        "def build(source, writers, *arguments):\n"
        "    for writer in writers: writer.close()\n"
        "    writers[0].temporary.write_text('of another')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "make.build_tiles = build\n"
        "main(sys.argv[1:])\n"
    )
    result = run_command([sys.executable, "-c", program, *slicing(tiny, tmp_path / "out")[3:]], env={}, timeout=60)
    assert result.code == 128 + signal.SIGTERM, result.err
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["of another"]


def test_a_signal_while_the_prompt_is_written_is_no_error() -> None:
    """A stream that is being written refuses to be written to by a signal's handler."""
    program = (
        "import io, os, signal, sys\n"
        "class Raw(io.RawIOBase):\n"
        "    def writable(self): return True\n"
        "    def write(self, data):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        return os.write(2, data)\n"
        "from tpimpi.cli.chat import LineReader\n"
        "from tpimpi.system.terminal import Input\n"
        "sys.stderr = io.TextIOWrapper(io.BufferedWriter(Raw()))\n"
        "LineReader(Input())\n"
        "print('> ', file=sys.stderr, flush=True)\n"
    )
    result = run_command([sys.executable, "-c", program], env={}, timeout=60)
    assert (result.err, result.code) == ("\nCtrl-D or /bye leaves\n> \n", 0)


def test_what_a_signal_is_to_do_may_wait_for_a_lock_of_the_main_thread() -> None:
    program = (
        "import os, signal, threading, time\n"
        "from tpimpi.cli.process import call_aside_on_signals\n"
        "told = threading.Event()\n"
        "call_aside_on_signals(told.set)\n"
        "with told._cond:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.2)\n"
        "assert told.wait(30)\n"
    )
    assert run_command([sys.executable, "-c", program], env={}, timeout=60).code == 0


def test_a_signal_removes_what_is_no_use_half_written(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys\n"
        "from tpimpi.cli.process import leave_on_signals\n"
        "from tpimpi.system.files import whole_file\n"
        "leave_on_signals()\n"
        "with whole_file(pathlib.Path(sys.argv[1], 'whole')) as file: file.write(b'whole')\n"
        "with whole_file(pathlib.Path(sys.argv[1], 'half')) as file: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    result = run_command([sys.executable, "-c", program, str(tmp_path)], env={}, timeout=60)
    assert (result.code, result.err) == (128 + signal.SIGTERM, "")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_signal_leaves_a_terminal_without_its_bar_and_with_its_cursor() -> None:
    program = (
        "import time\n"
        "from tpimpi.cli.process import leave_on_signals\n"
        "from tpimpi.system.terminal import progress_bar\n"
        "leave_on_signals()\n"
        "with progress_bar('slicing', quiet=False) as update:\n"
        "    update(1, 2)\n"
        "    time.sleep(60)\n"
    )
    with terminal([sys.executable, "-c", program], {"TERM": "xterm"}) as run:
        while "slicing" not in run.seen:
            run.until("")
        run.type("\x03")
        code, _ = run.end()
    assert code == 128 + signal.SIGINT
    assert run.seen.count("\x1b[?25l") >= 1 and run.seen.endswith("\x1b[2K\x1b[?25h"), repr(run.seen)


def test_a_rank_that_was_lost_ends_a_server_though_the_handlers_exception_was_dropped() -> None:
    told: list[str] = []
    loop = SimpleNamespace(lost=None, end=lambda: told.append("end"))
    ranks = [SimpleNamespace(host="desk"), SimpleNamespace(host="pi")]
    with pytest.raises(LostError, match="r1 pi"):
        _end(cast("Any", loop), cast("Any", ranks), cast("Any", SimpleNamespace(ended=lambda: [1])))
    assert told == ["end"]
    running = SimpleNamespace(
        lost=loop.lost, _connection=SimpleNamespace(say=told.append), _ready=str, _hear=lambda: None
    )
    with pytest.raises(LostError, match="r1 pi"):
        ServerLoop.run(cast("Any", running))


def test_a_signal_is_heard_inside_a_call_of_a_library() -> None:
    """The launcher kills soon after its SIGTERM: the line must not wait for a call that takes long, as under a load."""
    program = (
        "import ctypes, tpimpi.cli.process as process\n"
        "process.leave_on_signals(lambda: 'kept')\n"
        "print('ready', flush=True)\n"
        "mutex = ctypes.create_string_buffer(64)\n"
        "while True: ctypes.CDLL(None).pthread_mutex_lock(mutex)\n"  # the second time for ever, whatever the signal
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    time.sleep(0.2)  # into the call
    process.terminate()
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (err, process.returncode) == (b"\nkept\n", 128 + signal.SIGTERM)
