"""What an emulated home takes from the machine, and how it is given back, whoever made it and however that ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.home.wire import program_path
from bench.limits import remove_groups
from tpimpi.errors import TpimpiError

TAG_VARIABLE = "TPIMPI_EMULATED_HOME"  # in the environment of all that runs in a home: its id
HOMES_FOLDER = Path("/var/tmp")  # not TMPDIR, which may be another one when it is time to clean
PREFIX = "tpimpi-home-"
REMOVAL_TIMEOUT_S = 10.0  # for processes to die, and loop devices to go


class HomeError(TpimpiError):
    """The home cannot be made here, or something of it does not go."""


def make_folder(stack: contextlib.ExitStack) -> Path:
    """A folder for a home, locked for as long as this process lives."""
    # Only when it is locked does it get the name that `clean` looks for.
    name = f"{PREFIX}{secrets.token_hex(4)}"
    new = HOMES_FOLDER / f".{name}"
    new.mkdir(mode=0o755)
    fd = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, fd)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return new.rename(HOMES_FOLDER / name)


def make_disk(image: Path, nbytes: int) -> str:
    """A loop device with an empty file system of so many bytes, kept in `image`."""
    with image.open("wb") as file:
        file.truncate(nbytes)
    run_program("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
    loop = run_program("losetup", "--find", "--show", str(image)).strip()
    with contextlib.suppress(HomeError):  # not every file system allows it
        run_program("losetup", "--direct-io=on", loop)
    return loop


def run_program(program: str, *arguments: str, text: str | None = None) -> str:
    """What the finished program printed. Raises HomeError."""
    done = subprocess.run([program_path(program), *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HomeError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def network(pid: int | str) -> str:
    """The name of its network namespace, such as net:[4026532223]. Raises OSError."""
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def processes_in_network(pid: int) -> set[int]:
    """The processes in the network namespace of that one."""
    try:
        name = network(pid)
    except OSError:
        return set()
    return _processes_where(lambda folder: network(folder.name) == name)


def _networks(pids: Iterable[int]) -> set[str]:
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found.add(network(pid))
    return found


def _processes_where(test: Callable[[Path], bool]) -> set[int]:
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and test(folder):
                found.add(int(folder.name))
    return found


def _kill(find: Callable[[], set[int]]) -> None:
    """Kill what `find` finds until it finds nothing. Raises HomeError where something does not die."""
    deadline = time.monotonic() + REMOVAL_TIMEOUT_S
    while pids := find() - {os.getpid()}:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise HomeError(f"processes {', '.join(map(str, sorted(pids)))} of a home do not die")
        time.sleep(0.01)


def sweep(folder: Path) -> None:
    """Remove all of the home in `folder`: processes, namespaces, loop devices, groups, and the folder."""
    tag = f"{TAG_VARIABLE}={folder.name.removeprefix(PREFIX)}".encode()

    def tagged(place: Path) -> bool:
        return tag in (place / "environ").read_bytes().split(b"\0")

    # A process may have lost its environment, but not its namespace. The number of a namespace that is gone is given out
    # again: only where a tagged process lives in it is it still the device's.
    written = "".join(file.read_text() for file in folder.glob("where/*"))
    networks = {name for name in _networks(_processes_where(tagged)) if f"network='{name}'" in written}
    _kill(lambda: _processes_where(lambda place: network(place.name) in networks))
    _kill(lambda: _processes_where(tagged))
    _free_loops(folder)
    remove_groups(f"{folder.name}-")
    shutil.rmtree(folder)


def _free_loops(folder: Path) -> None:
    """The images' loop devices go with the mounts, a little later; one that was never mounted does not."""
    deadline = time.monotonic() + REMOVAL_TIMEOUT_S
    while loops := [file for file in Path("/sys/block").glob("loop*/loop/backing_file") if _is_in(file, folder)]:
        for file in loops:
            subprocess.run(
                [program_path("losetup"), "--detach", f"/dev/{file.parts[3]}"], check=False, capture_output=True
            )
        if time.monotonic() > deadline:
            raise HomeError(f"loop devices of {folder} stay: {', '.join(file.parts[3] for file in loops)}")
        time.sleep(0.01)


def _is_in(file: Path, folder: Path) -> bool:
    try:
        return file.read_text().startswith(f"{folder}/")
    except OSError:
        return False


def clean() -> list[str]:
    """Remove the homes whose runs are gone; returns their ids."""
    gone = []
    for folder in sorted(HOMES_FOLDER.glob(f"{PREFIX}*")):
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # just gone, or none of ours
            continue
        try:
            if os.fstat(fd).st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                sweep(folder)
                gone.append(folder.name.removeprefix(PREFIX))
        except (BlockingIOError, FileNotFoundError):  # it lives, or another run is removing it
            continue
        finally:
            os.close(fd)
    return gone
