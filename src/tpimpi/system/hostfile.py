"""Hostfiles, as Open MPI and MPICH read them: a host a line, as `host slots=4` (Open MPI), `host:4` (MPICH) or `host`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tpimpi.errors import InputError

MOST_BYTES = 1 << 20
# No name begins with a dash, which ssh would take for an option.
_HOST = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][\w.-]*)@)?(?P<host>\w[\w.-]*|\[[0-9A-Fa-f:.]+\]|[0-9A-Fa-f]*:[0-9A-Fa-f:]+)"
)
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Host:
    """A host of a hostfile: `name` as ssh takes it (user@host), `address` without the user; its ranks; and the dialects
    that its lines are in."""

    name: str
    address: str
    ranks: int = 1
    slots: bool = False  # Open MPI's
    colon: bool = False  # MPICH's

    @property
    def is_loopback(self) -> bool:
        return self.address in _LOCAL


def read_hostfile(given: str) -> list[Host]:
    """The hosts in order, each once, with the ranks of all of its lines. Raises InputError."""
    path = Path(given)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise InputError(f"--hostfile {given} has over {MOST_BYTES} bytes; give a file with a host a line")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--hostfile {given}: {error.strerror}; give a file with a host a line") from error
    except ValueError as error:  # not UTF-8, or a NUL in the name
        raise InputError(f"--hostfile {given!r}: {error}; give a text file with a host a line") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if words := line.partition("#")[0].split():
            host = _host(words, f"--hostfile {given}, line {number}")
            before = hosts.get(host.name)
            if before is not None:
                host = Host(
                    host.name,
                    host.address,
                    before.ranks + host.ranks,
                    before.slots or host.slots,
                    before.colon or host.colon,
                )
            hosts[host.name] = host
    if not hosts:
        raise InputError(f"--hostfile {given} names no host; write one a line, your own first")
    return list(hosts.values())


def _host(words: list[str], where: str) -> Host:
    name, colon, count = words[0], False, 1
    if (match := re.fullmatch(r"(\[.*\]|[^:]*):(\d{1,6})", name)) is not None:
        name, colon, count = match[1], True, int(match[2])
    if (found := _HOST.fullmatch(name)) is None:
        raise InputError(f"{where}: {words[0][:60]!r} is no host; write a name or an address, such as desktop.home")
    slots = False
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or not key.replace("_", "").replace("-", "").isalpha():
            raise InputError(f"{where}: {word[:60]!r} is not understood; write one host a line, and slots=N behind it")
        if key == "slots":
            if not value.isdecimal() or len(value) > 6:
                raise InputError(f"{where}: slots is {value[:20]!r}, must be a number up to 999999")
            slots, count = True, int(value)
    if count < 1:
        raise InputError(f"{where}: {count} ranks on {name}; give 1 or more, or leave the line out")
    user = f"{found['user']}@" if found["user"] else ""
    address = found["host"].strip("[]")
    return Host(f"{user}{address}", address, count, slots, colon)
