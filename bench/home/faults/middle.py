"""A program between the devices of an emulated home: it ends their TCP connections, and passes on what it wants.

Each device's connections to others are led to a port of ours by its own packet filter (nftables, `redirect`), and go on
from there to whom they were meant for. Neither end sees that: addresses stay, and only times and ports differ. What is to be
done to the messages is a `Harm` (harm.py); the launcher's connections pass as they are.
"""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType

from bench.home.faults import frames, ucx_frames
from bench.home.faults.frames import Frame, Splitter
from bench.home.faults.harm import CutError, Flow, Harm
from bench.home.faults.ucx_frames import UcxSplitter
from bench.home.home import Home
from bench.home.scripts import NETWORK
from bench.home.sweep import HomeError
from tpimpi.errors import InputError

SO_MARK = 36  # of <asm-generic/socket.h>: what we send is not led to us again
SO_ORIGINAL_DST = 80  # of <linux/netfilter_ipv4.h>
MARK = 0x7470
RECEIVE_BYTES = 1 << 18
SPLITTERS: dict[str, Callable[[], tuple[Splitter | UcxSplitter, Splitter | UcxSplitter]]] = {
    "openmpi": frames.splitters,
    "mpich": ucx_frames.splitters,
}
_RULES = """
table ip middle {{
    chain output {{
        type nat hook output priority -100;
        meta mark != {mark} ip daddr {network} ip daddr != {own} tcp dport 1-65535 redirect to :{port}
    }}
}}
"""


class Middle:
    """Between all devices of `home` while it is entered; does `harm` to what passes of that MPI's messages.

    Raises InputError, HomeError."""

    def __init__(self, home: Home, mpi: str = "openmpi") -> None:
        self.home, self.mpi = home, mpi
        self.harm = Harm()
        self._stack = contextlib.ExitStack()
        self._ended = False

    def __enter__(self) -> Middle:
        if shutil.which("nft") is None:
            raise InputError("no nft on this machine, which leads connections through the program; install nftables")
        try:
            for rank, own in enumerate(self.home.addresses):
                listener = self._stack.enter_context(self.home.socket(rank))
                listener.bind(("0.0.0.0", 0))
                listener.listen(64)
                port = listener.getsockname()[1]
                rules = _RULES.format(mark=MARK, network=NETWORK, own=own, port=port)
                done = self.home.run(rank, ["nft", "-f", "-"], stdin=None, input=rules)
                if done.returncode:
                    raise HomeError(f"nft refuses to redirect connections here: {done.stderr.strip()[:300]}")
                self._stack.callback(self.home.run, rank, ["nft", "delete", "table", "ip", "middle"])
                threading.Thread(target=self._accept, args=(rank, listener), daemon=True).start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._stack.close()

    def _accept(self, rank: int, listener: socket.socket) -> None:
        while not self._ended:
            try:
                if not select.select([listener], [], [], 0.5)[0]:
                    continue
                near = listener.accept()[0]
            except (OSError, ValueError):  # it was closed
                return
            threading.Thread(target=self._join, args=(rank, near), daemon=True).start()

    def _join(self, rank: int, near: socket.socket) -> None:
        """Go on with a connection of device `rank` to whom it was meant for."""
        address = near.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        port, host = struct.unpack_from("!2xH4s", address)
        to = self.home.addresses.index(socket.inet_ntoa(host))
        far = self.home.socket(rank)
        try:
            far.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK)
            far.connect((self.home.addresses[to], port))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            there_splitter, back_splitter = SPLITTERS[self.mpi]()
            back = threading.Thread(target=self._pass_on, args=((to, rank), far, near, back_splitter), daemon=True)
            back.start()
            self._pass_on((rank, to), near, far, there_splitter)
            back.join()
        except OSError:  # nobody listens there
            pass
        finally:
            near.close()
            far.close()

    def _pass_on(
        self, flow: Flow, source: socket.socket, sink: socket.socket, splitter: Splitter | UcxSplitter
    ) -> None:
        """What device flow[0] sends to device flow[1], until it ends."""
        try:
            while True:
                harm = self.harm
                if not select.select([source], [], [], harm.patience_s)[0]:
                    frames = harm.late(flow)
                else:
                    if not (data := source.recv(RECEIVE_BYTES)):
                        break
                    frames = _meet(harm, flow, splitter, data)
                if frames:
                    sink.sendall(b"".join(frame.data for frame in frames))
            sink.shutdown(socket.SHUT_WR)
        except CutError as cut:
            with contextlib.suppress(OSError):
                sink.sendall(cut.before)
            _shut(source, sink)
        except (OSError, ValueError):  # an end is gone: so the other is to learn
            _shut(source, sink)


def _meet(harm: Harm, flow: Flow, splitter: Splitter | UcxSplitter, data: bytes) -> list[Frame]:
    passed = []
    for frame in splitter.feed(data):
        try:
            passed += harm.meet(flow, frame)
        except CutError as cut:
            raise CutError(b"".join(frame.data for frame in passed) + cut.before) from None
    return passed


def _shut(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
