"""Wake-on-LAN: machines that sleep, and whose network card listens."""

from __future__ import annotations

import re

from tpimpi.errors import InputError, StarError, shorten
from tpimpi.system.hostfile import hostfile_text
from tpimpi.system.network import CABLE, WIRELESS, interfaces

_MAY_LEAD_THERE = (CABLE, WIRELESS)
_PAIR = r"\b[0-9A-Fa-f]{2}"
# Six pairs, and no more: a seventh before or after them makes it something else.
_MAC = re.compile(rf"(?<!{_PAIR}[:-]){_PAIR}([:-])(?:{_PAIR}\1){{4}}{_PAIR}\b(?![:-]{_PAIR}\b)")
# What somebody took for one: about as many groups, or the right digits in groups of four or in none; no time or day.
_NEARLY = re.compile(
    r"(?<![\w:.-])(?:\w{1,3}(?:[:-]\w{1,3}){4,}|[\dA-F]{4}([:.-])[\dA-F]{4}\1[\dA-F]{4}|(?=\d*[A-F])[\dA-F]{12})"
    r"(?!\w|[:.-]\w)",
    re.ASCII | re.IGNORECASE,
)


def macs_of(hostfile: str) -> dict[str, str]:
    """By the first word of its line, the hardware address in the comment of each host that has one there:

    desktop.home  # 00:11:22:33:44:55

    Raises InputError where there is none, or one that is not whole.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(hostfile_text(hostfile).splitlines(), start=1):
        words, _, comment = line.partition("#")
        if not words.split():
            continue
        name = words.split()[0].partition(":")[0]
        if (mac := _MAC.search(comment)) is not None:
            found[name] = mac[0]
        elif (nearly := _NEARLY.search(comment)) is not None and any(map(str.isdecimal, nearly[0])):
            raise InputError(
                f"--wake: {shorten(nearly[0])!r} in line {number} of {hostfile} is no address of a network card; write six "
                f"pairs of digits, as: {name} # 00:11:22:33:44:55"
            )
    if not found:
        raise InputError(
            f"--wake: no line of {hostfile} has the address of a network card; write it there, as: "
            "desktop.home # 00:11:22:33:44:55"
        )
    return found


def wake(macs: list[str]) -> None:
    """Send each the packet that wakes it, to all machines of every network here. Raises InputError without the package, and
    StarError where no network takes one."""
    try:
        import wakeonlan
    except ImportError as error:
        raise InputError("--wake needs wakeonlan, which is missing here; pip install 'tpimpi[serve]'") from error
    sent, problem = False, "there is none"
    for interface in interfaces():
        # A packet to all goes out where its sender's address is; without one, on the way to the internet alone.
        for network in interface.networks if interface.kind in _MAY_LEAD_THERE else ():
            try:
                wakeonlan.wake(*macs, interface=network.partition("/")[0])
            except OSError as error:
                problem = error.strerror or str(error)
            else:
                sent = True
    if not sent:
        raise StarError(f"--wake: no packet could be sent on any network ({problem}); see to the network here")
