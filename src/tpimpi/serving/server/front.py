"""The front: a process beside rank 0 that has the sockets of HTTP, the keys and the queue. It computes nothing.

    python -m tpimpi.serving.server.front

Its options come as a line of JSON on standard input (FrontOptions); where it listens goes as a line to standard output
(Listening). It ends when rank 0 does, unless it is to outlive it, or with its standard input before rank 0 has connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import select
import shutil
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import uvicorn

from tpimpi.errors import InputError, shorten_path
from tpimpi.serving.server.front_options import FrontOptions, Listening, State
from tpimpi.serving.server.http_protocol import MAX_HEADER_BYTES, TimedProtocol
from tpimpi.serving.server.journal import OPTION, Journal
from tpimpi.serving.server.kept import Kept
from tpimpi.serving.server.keys import Keys
from tpimpi.serving.server.link import RankLink
from tpimpi.serving.server.metrics import Metrics
from tpimpi.serving.server.routes import application
from tpimpi.system.given_file import open_file

KEEP_ALIVE_S = 30
LAST_WORDS_S = 2  # clients have so long to take what is said at the end
BACKLOG = 1024
LOCK_LOOK_S = 0.2  # between looks at whether another server has let the journal go


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield


def main() -> None:
    """Run until the end."""
    line = sys.stdin.buffer.readline()
    if not line:
        return
    try:
        options = msgspec.json.decode(line, type=FrontOptions)
        keys = None if options.api_key_file is None else Keys(options.api_key_file)
        check_certificates(options)
        link = RankLink(options)
        kept = Kept(link)
        journal = open_journal(options, kept)
        listener = listen(options)
    except (InputError, msgspec.MsgspecError) as error:
        say(Listening(problem=str(error)))
        sys.exit(InputError.exit_code)
    for name in ("uvicorn.error", "asyncio"):  # what clients do wrong is not said here
        logging.getLogger(name).setLevel(logging.ERROR)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection is one, those that say nothing too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is for rank 0, that says what becomes of us
    try:
        asyncio.run(serve(options, listener, link, kept, journal, keys))
    finally:
        if options.folder:  # who made it may have been killed
            shutil.rmtree(options.folder, ignore_errors=True)


def say(what: Listening | State) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
        sys.stdout.buffer.flush()


def check_certificates(options: FrontOptions) -> None:
    """Raise InputError for files that make no TLS."""
    if options.tls_cert is None or options.tls_key is None:
        return
    for option, path in (("--tls-cert", options.tls_cert), ("--tls-key", options.tls_key)):
        open_file(option, path, "give a certificate and its key, in PEM").close()
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        names = f"{shorten_path(options.tls_cert)}, --tls-key {shorten_path(options.tls_key)}"
        why = error.strerror or str(error)
        raise InputError(f"--tls-cert {names} cannot be used: {why}; give a certificate and its key, in PEM") from error


def open_journal(options: FrontOptions, kept: Kept) -> Journal | None:
    """The journal, of which `kept` takes what is there; where the server before this one still ends, once it has. Raises
    InputError where it cannot be used, and SystemExit where whoever started us ends before."""
    if options.journal is None:
        return None
    until, waits = time.monotonic() + options.journal_wait, False
    while True:
        try:
            return Journal(options.journal, options.journal_passphrase.encode(), kept.take, kept.records)
        except InputError as error:
            if not isinstance(error.__cause__, BlockingIOError) or time.monotonic() > until:
                raise
        if not waits:
            waits, wait = True, f"waiting for its end, up to {options.journal_wait:.0f} s"
            print(f"tpimpi: {OPTION} {shorten_path(options.journal)} is in use by another run; {wait}", file=sys.stderr)
        if _ends_within(LOCK_LOOK_S):
            sys.exit()


def _ends_within(seconds: float) -> bool:
    """Wait so long, or until standard input ends; whether it has."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1 << 12)


def listen(options: FrontOptions) -> socket.socket:
    """The socket of HTTP. Raises InputError where there can be none."""
    try:
        infos = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on {options.host} port {options.port}: {why}; give another --host or --port"
        ) from error
    listener.setblocking(False)
    return listener


def url_of(options: FrontOptions, port: int) -> str:
    scheme = "http" if options.tls_cert is None else "https"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{scheme}://{host}:{port}"


async def serve(
    options: FrontOptions,
    listener: socket.socket,
    link: RankLink,
    kept: Kept,
    journal: Journal | None,
    keys: Keys | None,
) -> None:
    metrics = Metrics()
    link.on_figures = metrics.take
    if options.outlives:
        link.on_state = say
    config = uvicorn.Config(
        application(options, link, kept, metrics, keys),
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_WORDS_S,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    server = _Server(config)

    def end() -> None:
        kept.end()
        server.should_exit = True

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, link.end if options.outlives else end)
    threading.Thread(target=_watch_stdin, args=(loop, link), daemon=True).start()
    if journal is not None:
        kept.use(journal, options.time_limit)
    tidying = asyncio.ensure_future(kept.tidy_now_and_then())
    ranks = await link.listen()
    say(Listening(url=url_of(options, listener.getsockname()[1])))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    over = asyncio.ensure_future(link.ended.wait())
    await asyncio.wait({serving, over}, return_when=asyncio.FIRST_COMPLETED)
    end()
    await serving
    over.cancel()
    tidying.cancel()
    ranks.close()


def _watch_stdin(loop: asyncio.AbstractEventLoop, link: RankLink) -> None:
    """Whoever started us holds it open: where that has ended before rank 0 came, so do we."""
    while os.read(sys.stdin.fileno(), 1 << 12):
        pass
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(link.parent_gone)


if __name__ == "__main__":
    main()
