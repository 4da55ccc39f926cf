"""Wake-on-LAN: machines that sleep, and whose network card listens."""

from __future__ import annotations

import re
from pathlib import Path

from tpimpi.errors import InputError, StarError

_MAC = re.compile(r"\b(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}\b")


def macs_of(hostfile: str) -> dict[str, str]:
    """By the first word of its line, the hardware address in the comment of each host that has one there:

    desktop.home  # 00:11:22:33:44:55
    """
    found: dict[str, str] = {}
    for line in Path(hostfile).read_text(encoding="utf-8", errors="replace").splitlines():
        words, _, comment = line.partition("#")
        if words.split() and (mac := _MAC.search(comment)) is not None:
            found[words.split()[0].partition(":")[0]] = mac[0]
    return found


def wake(macs: list[str]) -> None:
    """Send each the packet that wakes it, to all of the network. Raises InputError without the package, StarError."""
    try:
        from wakeonlan import send_magic_packet
    except ImportError as error:
        raise InputError("--wake needs wakeonlan, which is missing here; pip install 'tpimpi[serve]'") from error
    try:
        send_magic_packet(*macs)
    except OSError as error:
        raise StarError(f"--wake: no packet could be sent ({error.strerror}); see to the network here") from error
