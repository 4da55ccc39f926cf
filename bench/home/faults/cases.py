"""The kinds of trouble: how a run is started, when it is broken, how, and what a user has to see."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from bench.home.faults.screen import Screen, rank_process
from bench.home.home import Home

RANKS = 4
NAMES = ("laptop", "desktop", "mini-pc", "pi")  # of their devices
MESSAGE_TIMEOUT_S = 10.0  # from the breaking until the rank or its host is named
PROMPT = "Tell me of the sea, and of those who live by it."
LONG_PROMPT = PROMPT + " The harbour is old, and the wind comes from the west." * 120


class Case:
    """One kind of trouble: how the run is started, when it is broken, and how."""

    options: tuple[str, ...] = ("--max-tokens", "1500", "--ignore-eos", "--raw", "--speculate", "off")
    prompt: str | None = PROMPT
    allowed_s = MESSAGE_TIMEOUT_S
    compared = True  # whether what was printed must be the beginning of the undisturbed text

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

    prompt = LONG_PROMPT
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
# Broken before the run begins: the time runs from its start.
BROKEN_BEFORE = ("full-disk", "corrupt-slice", "other-version")
# Rank 0's version is what the others' are compared with, and only the others have small disks.
NOT_RANK_0 = ("full-disk", "other-version")
