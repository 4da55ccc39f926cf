"""Things that break in a home cluster, each tried many times over the emulated home; Linux, as root.

    python bench/home_faults.py [--rounds 20] [--mpi openmpi] [--kinds kill-decode,cut] [--silence 8] [--json FILE]

Every round starts four ranks on four devices and breaks one thing on a device that chance picks. It is well if the rank or
its host is named on the user's screen within the time allowed, the exit code is not 0, no process of ours is left on any
device, and what was printed is the beginning of the undisturbed answer. Prints a table: how many rounds went well, and the
median and longest times until the message and until the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))
from home import Home, HomeError
from home_devices import Device, Link

RANKS = 4
ALLOWED = 10.0  # seconds until the message
STARTING = 90.0  # seconds until a run is where it is to be broken
DISK = 2 << 30  # bytes of a device's own disk
LEAVING = 15.0  # seconds after the end in which the last process has to go
PROMPT = "Tell me of the sea, and of those who live by it."
LONG = PROMPT + " The harbour is old, and the wind comes from the west." * 120
NAMES = ("laptop", "desktop", "mini-pc", "pi")


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


class Screen:
    """What a run prints, with the time of each line of standard error."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.text, self.lines = process, "", list[tuple[float, str]]()
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read_text, self._read_lines)]
        for thread in self._threads:
            thread.start()

    def _read_text(self) -> None:
        assert self.process.stdout is not None
        while piece := os.read(self.process.stdout.fileno(), 4096):
            self.text += piece.decode(errors="replace")

    def _read_lines(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip("\n\0")))

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until `ready`. Raises TimeoutError."""
        end = time.monotonic() + STARTING
        while not ready():
            if time.monotonic() > end or self.process.poll() is not None:
                said = "\n".join(line for _, line in self.lines[-5:])
                raise TimeoutError(f"the run did not get to {what}: {self.text[-100:]!r} {said}")
            time.sleep(0.01)

    def ended(self, timeout: float) -> bool:
        """Whether the run ends within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return self.process.poll() is not None

    def join(self) -> None:
        """Read what is left."""
        for thread in self._threads:
            thread.join(2)


def ours(home: Home, rank: int) -> dict[int, str]:
    """Processes of tpimpi on a device: id and command line."""
    found = {}
    for pid in home.pids(rank):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "-m tpimpi" in command and not re.match(r"\S*(mpirun|mpiexec|prterun|prted|hydra)", command):
                found[pid] = command
    return found


def rank_process(home: Home, rank: int) -> int:
    """The process of the rank on device `rank`, which has threads of ours; not the shells around it."""
    mine = [pid for pid, command in ours(home, rank).items() if Path(command.split()[0]).name.startswith("python")]
    if not mine:
        raise HomeError(f"rank {rank} has no process any more")
    return max(mine, key=lambda pid: len(list(Path(f"/proc/{pid}/task").iterdir())))


class Case:
    """One kind of trouble: how the run is started, when it is broken, and how."""

    options: tuple[str, ...] = ("--max-tokens", "1500", "--ignore-eos", "--raw")
    prompt: str | None = PROMPT
    allowed = ALLOWED
    compared = True  # whether what was printed must be the beginning of the undisturbed text
    mended = False

    def __init__(self, home: Home, mpi: str, silence: float) -> None:
        self.home, self.mpi, self.silence = home, mpi, silence

    def command(self) -> list[str]:
        prompt = self.home.folder / "prompt.txt"
        arguments = [
            sys.executable,
            "-m",
            "tpimpi",
            *self.options,
            "--silence",
            str(self.silence),
            "--allreduce",
            "star",
        ]
        if self.prompt is not None:
            prompt.write_text(self.prompt)
            arguments += ["--prompt-file", str(prompt)]
        return arguments

    def prepare(self, rank: int) -> None:
        """Before the run starts."""

    def reach(self, screen: Screen) -> None:
        """Wait until the run is where it is to be broken."""
        screen.until(lambda: len(screen.text) > 60, "an answer")
        time.sleep(random.uniform(0, 0.3))

    def break_it(self, rank: int) -> None:
        os.kill(rank_process(self.home, rank), signal.SIGKILL)

    def mend(self, rank: int) -> None:
        """After the run."""

    def named(self, line: str, rank: int) -> bool:
        """Whether a line on the screen names the rank or its host, as one that is in trouble."""
        host = re.escape(NAMES[rank])
        launcher = rf"on node {host}\b|RUNNING AT {host}\b|rank {rank} .*\b{host}\b"
        return re.search(rf"\br{rank} {host}\b.*(:|no sign of life|runs tpimpi)|{launcher}", line) is not None


class KillDecode(Case):
    """kill -9 of a rank while tokens are made."""


class KillPrefill(Case):
    """kill -9 of a rank while the prompt is read."""

    prompt = LONG
    options = ("--max-tokens", "5", "--raw", "--memory", "600M")

    def reach(self, screen: Screen) -> None:
        screen.until(lambda: any("pinned" in line for _, line in screen.lines), "its table of memory")
        time.sleep(random.uniform(0.1, 0.4))


class KillSlicing(Case):
    """kill -9 of a rank while slices are made and sent."""

    options = ("--max-tokens", "5", "--format", "f32")

    def prepare(self, rank: int) -> None:
        for device in range(RANKS):
            for folder in self.home.cache(device).glob("*-f32-*"):
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()

    def reach(self, screen: Screen) -> None:
        def begun() -> bool:
            return any(path.stat().st_size > 0 for path in self.home.cache(1).glob("*-f32-*/.*partial*"))

        screen.until(begun, "slicing")
        time.sleep(random.uniform(0, 0.5))


class KillIdle(Case):
    """kill -9 of a rank while the user thinks."""

    prompt = None
    options = ("--max-tokens", "12", "--raw")

    def reach(self, screen: Screen) -> None:
        assert screen.process.stdin is not None
        screen.process.stdin.write(PROMPT + "\n")
        screen.process.stdin.flush()
        screen.until(lambda: screen.text.endswith("\n"), "the end of an answer")
        time.sleep(random.uniform(0.5, 1.5))


class Cut(Case):
    """A device's interface goes down while tokens are made."""

    def break_it(self, rank: int) -> None:
        self.home.cut(rank)

    def mend(self, rank: int) -> None:
        self.home.mend(rank)

    def named(self, line: str, rank: int) -> bool:
        # With rank 0's own link cut, it is the others that rank 0 misses.
        return any(super(Cut, self).named(line, other) for other in ([rank] if rank else range(1, RANKS)))


class Unplug(Cut):
    """Nothing passes any more, though the interface is up: the cable is out, or the Wi-Fi is gone."""

    def break_it(self, rank: int) -> None:
        self.home.cut(rank, silently=True)


class Stop(Case):
    """SIGSTOP of a rank: it hangs."""

    def break_it(self, rank: int) -> None:
        self._pid = rank_process(self.home, rank)
        os.kill(self._pid, signal.SIGSTOP)


class StopIdle(KillIdle):
    """SIGSTOP of a rank while the user thinks."""

    def break_it(self, rank: int) -> None:
        os.kill(rank_process(self.home, rank), signal.SIGSTOP)


class FullDisk(KillSlicing):
    """A device's disk fills up while its slice is being written. Only devices that have a small disk of their own."""

    options = ("--max-tokens", "5", "--format", "f32")

    def prepare(self, rank: int) -> None:
        super().prepare(rank)
        self._fill = self.home.cache(rank) / "filler"
        free = shutil.disk_usage(self.home.cache(rank)).free
        with self._fill.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(0, free - (32 << 20)))

    def reach(self, screen: Screen) -> None:
        pass

    def break_it(self, rank: int) -> None:
        pass

    def mend(self, rank: int) -> None:
        self._fill.unlink()


class CorruptSlice(Case):
    """A few bytes of a slice are overwritten on one host, before the run."""

    def prepare(self, rank: int) -> None:
        path = next(self.home.cache(rank).glob(f"*/rank-{rank}-of-{RANKS}.h5"))
        self._saved = path, path.read_bytes()
        data = bytearray(self._saved[1])
        for place in range(len(data) // 8, len(data), len(data) // 8):
            data[place : place + 64] = bytes(byte ^ 0x5A for byte in data[place : place + 64])
        path.write_bytes(data)

    def reach(self, screen: Screen) -> None:
        pass

    def break_it(self, rank: int) -> None:
        pass

    def mend(self, rank: int) -> None:
        self._saved[0].write_bytes(self._saved[1])


class OtherVersion(Case):
    """A host has another version of tpimpi: 0.0.1."""

    def prepare(self, rank: int) -> None:
        self._file = Path(self.home.devices[rank].env["PYTHONPATH"]) / "sitecustomize.py"
        self._file.write_text(
            f"import platform\nif platform.node() == {NAMES[rank]!r}:\n    import tpimpi\n    tpimpi.__version__ = '0.0.1'\n"
        )

    def reach(self, screen: Screen) -> None:
        pass

    def break_it(self, rank: int) -> None:
        pass

    def mend(self, rank: int) -> None:
        self._file.unlink()


KINDS: dict[str, type[Case]] = {
    "kill-prefill": KillPrefill,
    "kill-decode": KillDecode,
    "kill-slicing": KillSlicing,
    "kill-idle": KillIdle,
    "cut": Cut,
    "unplug": Unplug,
    "stop": Stop,
    "stop-idle": StopIdle,
    "full-disk": FullDisk,
    "corrupt-slice": CorruptSlice,
    "other-version": OtherVersion,
}
_BEFORE = ("full-disk", "corrupt-slice", "other-version")  # broken before the run begins: the time runs from its start


NOT_RANK_0 = (
    "full-disk",
    "other-version",
)  # its version is what the others are compared with; the others have small disks


def try_once(kind: str, home: Home, mpi: str, rank: int, silence: float, whole: str) -> Outcome:
    """One round. `whole` is the undisturbed answer to PROMPT."""
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
        before = len(screen.lines) if kind not in _BEFORE else 0
        broken = time.monotonic()
        case.break_it(rank)
        allowed = STARTING if kind in _BEFORE else case.allowed + 20
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
        end = time.monotonic() + LEAVING
        while left := [f"r{r} {c}" for r in range(RANKS) for c in ours(home, r).values()]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        outcome.left = left
        outcome.wrong = outcome.wrong or _wrong(outcome, case, kind, screen, whole)
        if outcome.wrong:
            outcome.line += " | " + " / ".join(line for _, line in (*screen.lines[-8:], *printed[-4:]))
    except TimeoutError as error:
        outcome.wrong = str(error)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        for device in range(RANKS):
            for pid in home.pids(device) if outcome.left or outcome.wrong else ():
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if b"-m\0tpimpi" in command or b"/prted\0" in command or b"hydra_pmi_proxy\0" in command:
                        os.kill(pid, signal.SIGKILL)
        case.mend(rank)
    return outcome


def _wrong(outcome: Outcome, case: Case, kind: str, screen: Screen, whole: str) -> str:
    if outcome.code == 0:
        return "exit code 0"
    if outcome.message_s is None:
        return "nobody was named"
    if outcome.message_s > case.allowed and kind not in _BEFORE:
        return f"named after {outcome.message_s:.1f} s"
    if outcome.left:
        return f"{len(outcome.left)} processes left"
    text = re.split(r"\n?(?:=|-){20}", screen.text.replace("> ", ""))[0].strip(
        "\n"
    )  # the launcher's banner comes behind
    if case.prompt == PROMPT and kind != "full-disk" and not whole.startswith(text[: len(whole)]):
        return f"printed {text[-60:]!r}, which is not in the undisturbed answer"
    return ""


@contextlib.contextmanager
def home_with_slices(mpi: str) -> Iterator[tuple[Home, str]]:
    """Four devices with their slices, and the undisturbed answer to PROMPT."""
    with tempfile.TemporaryDirectory() as other:
        environment = {"PYTHONPATH": other}
        devices = [Device(name, disk=DISK if rank else None, env=environment) for rank, name in enumerate(NAMES)]
        yield from _home_with_slices(mpi, devices)


def _home_with_slices(mpi: str, devices: list[Device]) -> Iterator[tuple[Home, str]]:
    with Home(devices, Link(latency_s=0.0005)) as home:
        case = Case(home, mpi, 30)
        case.options = ("--max-tokens", "200", "--ignore-eos", "--raw", "--quiet")
        process = home.mpirun(case.command(), ranks=RANKS, mpi=mpi, stdout=subprocess.PIPE, text=True)
        whole, _ = process.communicate(timeout=STARTING)
        if process.returncode:
            raise SystemExit(f"the undisturbed run ended with exit code {process.returncode}")
        yield home, whole.strip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--silence", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    random.seed(options.seed)
    outcomes: list[Outcome] = []
    with home_with_slices(options.mpi) as (home, whole):
        for number in range(options.rounds):
            for kind in options.kinds.split(","):
                rank = random.randrange(1 if kind in NOT_RANK_0 else 0, RANKS)
                outcome = try_once(kind, home, options.mpi, rank, options.silence, whole)
                outcomes.append(outcome)
                said = f"{outcome.message_s:.1f} s" if outcome.message_s is not None else "-"
                verdict = outcome.wrong and f"NOT WELL: {outcome.wrong} [{outcome.line}]"
                print(
                    f"{number + 1:2} {kind:14} r{rank} named after {said}, ended after {outcome.end_s:.1f} s, "
                    f"exit code {outcome.code}  {verdict or outcome.line[:90]}",
                    flush=True,
                )
    print(f"\n{options.mpi}, {options.rounds} rounds, silence {options.silence:g} s")
    print(f"{'kind':14} {'well':>7} {'named':>14} {'ended':>14}  exit codes")
    for kind in options.kinds.split(","):
        mine = [outcome for outcome in outcomes if outcome.kind == kind]
        named = [outcome.message_s for outcome in mine if outcome.message_s is not None] or [float("nan")]
        ended = [outcome.end_s for outcome in mine]
        codes = ", ".join(str(code) for code in sorted({outcome.code for outcome in mine}))
        print(
            f"{kind:14} {sum(not o.wrong for o in mine):3}/{len(mine):<3} {median(named):5.1f}/{max(named):5.1f} s "
            f"{median(ended):6.1f}/{max(ended):5.1f} s  {codes}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    sys.exit(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
