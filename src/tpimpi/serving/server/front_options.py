"""What the front is told at its start, a line of JSON on its standard input; and what it says, lines on its output."""

from __future__ import annotations

import msgspec

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_HOST, DEFAULT_PORT = LOOPBACK[0], 8080
DEFAULT_QUEUE = 64
DEFAULT_GRACE_S = 30.0
DEFAULT_TIME_LIMIT_S = 3600.0


class FrontOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`socket` is where rank 0 connects; `folder`, if there is one, is removed when the front ends; `outlives` says whether
    the front stays when rank 0 has gone, for another to come. `queue` is how many requests wait beside those that are
    answered, `parallel` of these where rank 0 has yet to say it. `names` are other names of the model; times in seconds: for
    `journal_wait` another server may still have the journal, a file that the passphrase encrypts."""

    socket: str
    folder: str = ""
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    api_key_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    queue: int = DEFAULT_QUEUE
    parallel: int = 8
    time_limit: float = DEFAULT_TIME_LIMIT_S
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    journal: str | None = None
    journal_passphrase: str = ""
    journal_wait: float = 0.0
    outlives: bool = False

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)


class Listening(msgspec.Struct, frozen=True):
    """Where the front listens, or why it cannot."""

    url: str = ""
    problem: str = ""


class State(msgspec.Struct, frozen=True):
    """Of a front that outlives rank 0: whether there is a rank 0 that answers."""

    ready: bool


def died(rank: str) -> str:
    """What is said of a rank whose process has ended."""
    return f"{rank} has ended: its process died or was killed; the run ends here"


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own, for itself alone."""
    return host in LOOPBACK or host.startswith("127.")
