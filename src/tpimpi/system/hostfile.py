"""Hostfiles, as Open MPI and MPICH read them: a host a line, as `host slots=4` (Open MPI), `host:4` (MPICH) or `host`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from shlex import quote

from tpimpi.errors import InputError, shorten
from tpimpi.system.given_file import open_file
from tpimpi.system.launcher import OPEN_MPI

MAX_BYTES = 1 << 20
_BYTE_ORDER_MARK = "\ufeff"
# No name begins with a dash, which ssh would take for an option.
_HOST = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][\w.-]*)@)?(?P<host>\w[\w.-]*|\[[0-9A-Fa-f:.]+\]|[0-9A-Fa-f]*:[0-9A-Fa-f:]+)"
)
_SLOTS_KEYS = ("slots", "cpu", "count")
# All that Open MPI 5 reads behind a host's name; it stops at anything else.
_OPEN_MPI_KEYS = frozenset(
    [*_SLOTS_KEYS, "port", "username", "user-name", "user_name"]
    + [f"{key}{sep}max" for key in _SLOTS_KEYS for sep in "-_"]
    + [f"max{sep}{key}" for key in ("slots", "cpu") for sep in "-_"]
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
    text = hostfile_text(given).removeprefix(_BYTE_ORDER_MARK)
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if words := _words(line):
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


def hostfile_text(given: str) -> str:
    """The text of a hostfile, with its line ends as they are. Raises InputError."""
    try:
        with open_file("--hostfile", given, "give a file with a host a line") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"--hostfile {given} has over {MAX_BYTES} bytes; give a file with a host a line")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--hostfile {given!r}: {error}; give a text file with a host a line") from error


def _words(line: str) -> list[str]:
    """The words of a line without its comment; `slots = 4` is one word, as Open MPI reads it."""
    words = " ".join(
        line.partition("#")[0].split()
    )  # or a long run of blanks would be looked through from each of them
    return re.sub(r" ?= ?", "=", words).split()


def refused_lines(given: str, launcher: str) -> list[str]:
    """What the launcher of that kind would not read, though `read_hostfile` does: the line, why, and what to do.

    As Open MPI 5.0 and MPICH 5.0 were seen to do. Raises InputError where the file cannot be read.
    """
    problems, with_slots = [], dict[str, int]()
    for number, line in enumerate(hostfile_text(given).split("\n"), start=1):
        where, said = f"line {number}", line.partition("#")[0]
        if said.startswith(_BYTE_ORDER_MARK):
            problems.append(
                f"{where} begins with a byte order mark; type: sed -i '1s/^\\xef\\xbb\\xbf//' {quote(given)}"
            )
        said = said.removeprefix(_BYTE_ORDER_MARK)
        if launcher == OPEN_MPI and said.endswith("\r"):
            problems.append(f"{where} ends with a carriage return; type: sed -i 's/\\r$//' {quote(given)}")
        words = _words(said)
        if other := next((character for character in said if not character.isascii()), ""):
            problems.append(f"{where} has {other!a}, which is not ASCII; write it without, or in a comment")
        if launcher != OPEN_MPI or not words:
            continue
        keys = [word.partition("=")[0] for word in words[1:]]
        if unknown := [key for key in keys if key not in _OPEN_MPI_KEYS]:
            problems.append(f"{where} has {unknown[0]}=, which Open MPI does not know; write NAME slots=N")
        if any(key in _SLOTS_KEYS for key in keys) and with_slots.setdefault(words[0], number) != number:
            problems.append(
                f"{where} says again how many slots {words[0]} has, as line {with_slots[words[0]]} does; write it once"
            )
    return problems


def _host(words: list[str], where: str) -> Host:
    name, colon, count = words[0], False, 1
    if (match := re.fullmatch(r"(\[.*\]|[^:]*):(\d{1,6})", name)) is not None:
        name, colon, count = match[1], True, int(match[2])
    if (found := _HOST.fullmatch(name)) is None:
        raise InputError(f"{where}: {shorten(words[0])!r} is no host; write a name or an address, such as desktop.home")
    slots = False
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or not key.replace("_", "").replace("-", "").isalpha():
            raise InputError(
                f"{where}: {shorten(word)!r} is not understood; write one host a line, and slots=N behind it"
            )
        if key in _SLOTS_KEYS:
            if not value.isdecimal() or len(value) > 6:
                raise InputError(f"{where}: {key} is {shorten(value)!r}, must be a number up to 999999")
            slots, count = True, int(value)
    if count < 1:
        raise InputError(f"{where}: {count} ranks on {name}; give 1 or more, or leave the line out")
    user = f"{found['user']}@" if found["user"] else ""
    address = found["host"].strip("[]")
    return Host(f"{user}{address}", address, count, slots, colon)
