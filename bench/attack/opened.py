"""Notes what this process opens of sealed messages: what root on a machine, or its owner, can do to any program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.attack.messages import RECEIVED
from bench.attack.record import Log
from tpimpi.star import ciphers


def record_opened(path: Path) -> None:
    """From now on, of ciphers that are made. Of whom a message is, is not noted: it counts as rank 0's."""
    make, log = ciphers.make_cipher, Log(path)

    def make_recorded(name: str, key: bytes, *, opens: bool) -> Any:
        cipher = make(name, key, opens=opens)
        return Recorded(cipher, log) if opens else cipher

    ciphers.make_cipher = make_recorded


class Recorded:
    """A cipher that opens messages."""

    def __init__(self, cipher: ciphers.Cipher, log: Log) -> None:
        self._cipher, self._log = cipher, log

    def open(self, tag: int, number: int, frame: Any, into: Any) -> bool:
        """See ciphers.Cipher."""
        opened = self._cipher.open(tag, number, frame, into)
        if opened:
            self._log.write(RECEIVED, 0, 0, tag, bytes(memoryview(into).cast("B")) + bytes(16))
        return opened
