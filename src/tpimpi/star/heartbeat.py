"""The heartbeat: a thread on every rank that notices which rank is gone, while the main thread computes, waits or sleeps.

Every rank other than 0 sends rank 0 a heartbeat eight times within the `silence` that is allowed, and
rank 0 sends one to each of them. A rank that sent none for `silence` seconds is gone: its process hangs, its machine is
off, or the network is cut. Then rank 0 says so, as does each rank that misses rank 0, and the run ends. A rank that sends
heartbeats, or anything else, is there, however slow it is: rank 0 says for whom it waits, after a while.

Heartbeats also carry how many messages went between each two ranks. Where one waits for a message, and the other has sent
more than came for LOST_MESSAGE_S seconds, one was lost, which MPI cannot do, but somebody on the network can.

A heartbeat is three int64 (a magic number; HERE or LEAVING; the silence that is allowed, in ms, which all take from rank
0), the sender's host name (40 bytes, UTF-8, zeros behind), and int64 [ranks]: to rank 0, how many messages the sender has
sent to each rank; from it, how many each rank has sent to the receiver, as far as it knows. It goes over a communicator of
its own, which this thread alone uses (MPI_THREAD_MULTIPLE; where MPI has less there is no heartbeat).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import psutil

from tpimpi.errors import StarError
from tpimpi.star.channel import CHECK_HOST_HINT, Channel, Pending
from tpimpi.system.launcher import DAEMONS, LAUNCHERS, Rank

DEFAULT_SILENCE_S = 8.0  # a rank that sent nothing for so long is gone
SHORTEST_SILENCE_S = 1.0
FIRST_DELAY_S = 2.0  # the first heartbeat may come so much later than the silence allows
HEARTBEATS_PER_SILENCE = 8
HEADER_BYTES = 24  # of a heartbeat, before the host name
COUNTS_AT = 64  # bytes of a heartbeat before the counts of messages
HERE, LEAVING = 1, 2
HEARTBEAT_MAGIC = 0x7470_696D_7069_6265  # "tpimpibe"
HEARTBEAT_TAG = 1
WAIT_FOR_HUB_REPORT_S = 3.0  # rank 0 and the launcher have so long to say who is gone, before another rank does
GONE_GRACE_S = 2.0  # MPI has so long to end the job where a rank is gone
LOST_MESSAGE_S = 4.0
SLOW_RANK_S = 10.0  # rank 0 says for whom it waits after this time, and again each time it has doubled


class Heartbeat:
    """Sends heartbeats, receives them, and ends the run when a rank is gone. Made by `connect`; `close` ends it in order."""

    def __init__(self, channel: Channel, rank: Rank, silence: float, main: Channel) -> None:
        """`channel` is this thread's own. `main` has the main thread's messages: each is a sign of life too, and heartbeats
        may be queued behind them. Where links are sealed, the hosts of all ranks are those of the handshake."""
        self._channel, self.rank, self.silence, self._main = channel, rank, silence, main
        self._peers = list(range(1, rank.size)) if rank.is_hub else [0]
        self._proved = channel.seal is not None
        self._hosts = dict(enumerate(channel.seal.hosts)) if channel.seal is not None else {}
        self._last_sent = 0.0
        # The first heartbeat may take longer: some ranks start later than others.
        self._last_heard = dict.fromkeys(self._peers, time.monotonic() + min(silence, FIRST_DELAY_S))
        self._buffers = {peer: np.zeros(COUNTS_AT + 8 * rank.size, np.uint8) for peer in self._peers}
        self._sent = np.zeros((rank.size, rank.size), np.int64)  # messages [from, to], as they say
        self._gaps: dict[int, tuple[int, float]] = {}  # by the rank that is waited for: messages that came, since when
        self._receives = {peer: self._receive(peer) for peer in self._peers}
        self._sends: dict[int, Pending] = {}
        self._left: set[int] = set()
        self._slow_since: dict[int, float] = {}
        self._slow_said: dict[int, float] = {}
        self.at_end: Callable[[str], None] = lambda line: None  # told why the run ends, before it does
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpimpi-heartbeat", daemon=True)
        self._thread.start()

    def name(self, peer: int) -> str:
        """ "r2 home-pi", or "r2" of a rank that has not said its host, as ranks but rank 0 do not say it to one another."""
        return f"r{peer} {self._hosts.get(peer, '')}".rstrip()

    def set_hosts(self, hosts: Sequence[str]) -> None:
        """The hosts of all ranks, in rank order, as they say."""
        if not self._proved:
            self._hosts = dict(enumerate(hosts))

    def allow_silence(self, silence: float) -> None:
        """From now on a rank is gone after so many seconds; on rank 0, which tells the others."""
        if silence == self.silence:
            return
        # They send one more heartbeat of the old interval before they know the new one.
        later = time.monotonic() + min(self.silence, FIRST_DELAY_S)
        self.silence = silence
        for peer in list(self._last_heard):
            self._last_heard[peer] = later
        self._last_sent = 0.0

    def close(self) -> None:
        """Tell the others that this rank ends, wait until they say so too, and stop.

        Rank 0 leaves last: another rank waits for it as long as it sends heartbeats. So no receive is left open
        when MPI ends.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(GONE_GRACE_S)
        if self._thread.is_alive():
            return
        with contextlib.suppress(StarError):  # one that is gone needs no good-bye
            farewells = [self._channel.send(self._message(LEAVING, peer), peer, HEARTBEAT_TAG) for peer in self._peers]
            patience = GONE_GRACE_S if self.rank.is_hub else self.silence
            closed = time.monotonic()
            while self._receives or not all(map(self._channel.test, farewells)):
                now = time.monotonic()
                self._listen(now)
                if now - max(closed, *self._last_heard.values(), 0.0) > patience:
                    break
                time.sleep(0.002)
        for receive in self._receives.values():
            with contextlib.suppress(self._channel.mpi_error):  # of a rank whose connection is gone
                for request in receive.requests:
                    request.Cancel()
                    request.Wait()  # which it has to be told, or the library counts it as lost

    # The thread

    def _run(self) -> None:
        looked = 0.0
        while not self._closing.wait(self.silence / HEARTBEATS_PER_SILENCE / 4):
            now = time.monotonic()
            # If this process itself was stopped, the others get time again.
            if looked and now - looked > self.silence / 2:
                self._last_heard = {peer: max(heard, now) for peer, heard in self._last_heard.items()}
            looked = now
            try:
                if now - self._last_sent >= self.silence / HEARTBEATS_PER_SILENCE:
                    self._last_sent = now
                    self._send_all()
                self._listen(now)
            except StarError as error:
                self._broken(error)
            for peer in self._last_heard:
                self._last_heard[peer] = max(self._last_heard[peer], self._main.last_heard.get(peer, 0.0))
            if (line := self._lost_message(now)) is not None:
                self._end(line)
            if gone := [peer for peer, heard in self._last_heard.items() if now - heard > self.silence]:
                self._end(self._gone(gone, now))
            self._report_slow(now)

    def _message(self, state: int, peer: int) -> np.ndarray:
        message = np.zeros(COUNTS_AT + 8 * self.rank.size, np.uint8)
        message[:HEADER_BYTES].view(np.int64)[:] = HEARTBEAT_MAGIC, state, int(self.silence * 1000)
        host = self.rank.host.encode()[: COUNTS_AT - HEADER_BYTES]
        message[HEADER_BYTES : HEADER_BYTES + len(host)] = np.frombuffer(host, np.uint8)
        self._sent[self.rank.index] = self._main.sent
        message[COUNTS_AT:].view(np.int64)[:] = self._sent[:, peer] if self.rank.is_hub else self._main.sent
        return message

    def _send_all(self) -> None:
        for peer in self._peers:
            # One at a time: to a rank that is gone they would pile up.
            if peer not in self._left and (peer not in self._sends or self._channel.test(self._sends[peer])):
                self._sends[peer] = self._channel.send(self._message(HERE, peer), peer, HEARTBEAT_TAG)

    def _receive(self, peer: int) -> Pending:
        return self._channel.receive(self._buffers[peer], peer, HEARTBEAT_TAG)

    def _listen(self, now: float) -> None:
        for peer in self._peers:
            while peer in self._receives and self._channel.test(self._receives[peer]):
                message = self._buffers[peer]
                magic, state, allowed = (int(value) for value in message[:HEADER_BYTES].view(np.int64))
                if magic == HEARTBEAT_MAGIC:
                    # A rank that does not know the new silence yet sends at the old interval.
                    agreed = allowed == int(self.silence * 1000)
                    self._last_heard[peer] = now if agreed else max(now, self._last_heard[peer])
                    counts = message[COUNTS_AT:].view(np.int64)
                    if self.rank.is_hub:
                        self._sent[peer] = counts
                    else:
                        self._sent[:, self.rank.index] = counts
                    if not self._proved:
                        host = message[HEADER_BYTES:COUNTS_AT].tobytes().rstrip(b"\0").decode(errors="replace")
                        self._hosts[peer] = "".join(c for c in host if c.isprintable())
                    if not self.rank.is_hub and not agreed and allowed >= 1000 * SHORTEST_SILENCE_S:
                        self.allow_silence(allowed / 1000)
                if magic == HEARTBEAT_MAGIC and state == LEAVING:
                    self._left.add(peer)
                    del self._receives[peer], self._last_heard[peer]
                else:
                    self._receives[peer] = self._receive(peer)

    def _lost_message(self, now: float) -> str | None:
        """What is to be said where a message that the main thread waits for was lost; None where none was.

        What a rank counts as sent has left it. Over TCP it comes before the heartbeat that says so, or soon after.
        """
        awaited = self._main.awaited_messages
        for peer in [peer for peer in self._gaps if peer not in awaited]:
            del self._gaps[peer]
        for peer in awaited:
            came, sent = self._main.received[peer], int(self._sent[peer, self.rank.index])
            if sent <= came:
                self._gaps.pop(peer, None)
                continue
            before, since = self._gaps.setdefault(peer, (came, now))
            if before != came:
                self._gaps[peer] = (came, now)
            elif now - since > LOST_MESSAGE_S:
                return (
                    f"{self.rank}: a message from {self._main.name(peer)} was lost: {sent} were sent, and {came} came; "
                    "something on the network left it out; the run ends here"
                )
        return None

    def _broken(self, error: StarError) -> None:
        """A connection broke. The main thread says so if it is using it; else it is for us, in a moment.

        Ranks other than 0 leave it to rank 0 and the launcher for longer: they may only see what comes of it.
        """
        if not self._closing.wait(1.0 if self.rank.is_hub else WAIT_FOR_HUB_REPORT_S):
            self._end(f"{self.rank}: {error}")

    def _report_slow(self, now: float) -> None:
        """Rank 0: say for whom the run waits, though it is there."""
        if not self.rank.is_hub:
            return
        late = set(self._main.awaited)
        for peer in [peer for peer in self._slow_since if peer not in late]:
            del self._slow_since[peer]
            if self._slow_said.pop(peer, 0):
                self._say(f"{self.name(peer)} goes on")
        for peer in late & set(self._peers):
            waited = now - self._slow_since.setdefault(peer, now)
            alive = now - self._last_heard.get(peer, 0) < 2 * self.silence / HEARTBEATS_PER_SILENCE
            if alive and waited >= max(SLOW_RANK_S, 2 * self._slow_said.get(peer, 0)):
                self._slow_said[peer] = waited
                self._say(f"waiting for {self.name(peer)} for {waited:.0f} s: slow, not gone")

    def _say(self, line: str) -> None:
        self._write(f"{self.rank}: {line}")

    def _write(self, line: str) -> None:
        # One write, so that it is whole, past Python's lock of the stream, which the main thread may hold.
        data = f"{line}\n".encode()
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), data)

    def _gone(self, gone: list[int], now: float) -> str:
        """What is to be said of ranks that are gone."""
        names = ", ".join(map(self.name, gone))
        seconds = min(now - self._last_heard[peer] for peer in gone)
        return (
            f"{names}: no sign of life for {seconds:.0f} s, says {self.rank}: the process hangs, or the machine or its "
            f"network is gone; {CHECK_HOST_HINT}, or allow more with --silence; the run ends here"
        )

    def _end(self, line: str) -> None:
        """Say why, and end this rank whatever MPI does."""
        self._write(line)
        self.at_end(line)
        end_without_mpi(self.rank)
        time.sleep(0.2)  # the launcher relays our line
        self._channel.comm.Abort(1)
        os._exit(1)


def end_without_mpi(rank: Rank, grace: float = GONE_GRACE_S) -> None:
    """If MPI has not ended the job within `grace` seconds, which it cannot where the network is cut, end it without MPI.

    Rank 0 takes its launcher along, which would wait for daemons that it has lost, and all below it on this host; another
    rank takes along the launcher's daemon above it. A process of its own does so, as MPI ends this one at once.
    """
    try:
        above = [process for process in psutil.Process().parents() if process.name() in (*LAUNCHERS, *DAEMONS)]
        top = (above[-1] if rank.is_hub else above[0]) if above else psutil.Process()
        all_of_it = [top.pid, *(process.pid for process in top.children(recursive=True))]
        script = (
            "n=$1; shift; while [ $n -gt 0 ] && kill -0 $1; do sleep 0.1; n=$((n - 1)); done; kill -0 $1 && kill -9 $*"
        )
        subprocess.Popen(
            ["/bin/sh", "-c", script, "tpimpi-leaves", str(round(grace * 10)), *map(str, all_of_it)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (psutil.Error, OSError):
        pass  # the machine has no room for another process: MPI has to do
