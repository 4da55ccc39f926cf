"""Frames between two machines: captured on a device of the emulated home, and put together to the streams that TCP carried.

What is captured is a file as tcpdump writes it, so its files do as well (Ethernet, IPv4, no VLAN):

    tcpdump -i eth0 -s 0 -w FILE.pcap tcp
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tpimpi.errors import InputError

ETH_P_ALL, ETH_P_IP = 0x0003, 0x0800
SO_RCVBUFFORCE, SOL_PACKET, PACKET_STATISTICS = 33, 263, 6
BUFFER_BYTES = 1 << 28
LARGEST_FRAME_BYTES = 1 << 17  # TCP leaves it to the card to cut what it sends
ETHERNET = 1
FILE_HEAD = struct.Struct("<IHHiIII")  # magic, version (two), zone, accuracy, longest, link type
FRAME_HEAD = struct.Struct("<IIII")  # seconds, microseconds, bytes kept, bytes there were
MAGIC = 0xA1B2C3D4
PORT_BYTES = 4  # both


class Flow(NamedTuple):
    """One direction of a TCP connection: addresses of 4 bytes, and both ports as they are in the header."""

    source: bytes
    destination: bytes
    ports: bytes


class Capture:
    """While it is entered, frames of `eth0` of a network namespace go to a file. `sock`: AF_PACKET, SOCK_RAW, made there."""

    def __init__(self, sock: socket.socket, path: Path) -> None:
        self._sock, self._path = sock, path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.lost = 0  # frames that came faster than they were taken

    def __enter__(self) -> Capture:
        self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        self._sock.bind(("eth0", ETH_P_ALL))
        self._sock.settimeout(0.1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        _, self.lost = struct.unpack("II", self._sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self._sock.close()

    def _run(self) -> None:
        with self._path.open("wb") as file:
            file.write(FILE_HEAD.pack(MAGIC, 2, 4, 0, 0, LARGEST_FRAME_BYTES, ETHERNET))
            while True:
                try:
                    frame = self._sock.recv(LARGEST_FRAME_BYTES)
                except TimeoutError:
                    if self._stop.is_set():
                        return
                    continue
                file.write(FRAME_HEAD.pack(0, 0, len(frame), len(frame)) + frame)


def read_frames(path: Path) -> Iterator[bytes]:
    """The frames of a file. Raises InputError for one that is none."""
    with path.open("rb") as file:
        head = file.read(FILE_HEAD.size)
        if len(head) < FILE_HEAD.size or FILE_HEAD.unpack(head)[0] != MAGIC or FILE_HEAD.unpack(head)[-1] != ETHERNET:
            raise InputError(
                f"{path} is no capture of Ethernet frames; make one with: tcpdump -i eth0 -s 0 -w FILE tcp"
            )
        while len(head := file.read(FRAME_HEAD.size)) == FRAME_HEAD.size:
            yield file.read(FRAME_HEAD.unpack(head)[2])


def segment(frame: bytes) -> tuple[Flow, int, bytes] | None:
    """The flow of a frame, its sequence number (RFC 9293) and its data; None for what is no TCP over IPv4."""
    if len(frame) < 14 + 20 + 20 or int.from_bytes(frame[12:14], "big") != ETH_P_IP:
        return None
    packet = frame[14:]
    head, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
    if packet[9] != socket.IPPROTO_TCP:
        return None
    tcp = packet[head : total or None]
    data = tcp[(tcp[12] >> 4) * 4 :]
    flow = Flow(packet[12:16], packet[16:20], tcp[:PORT_BYTES])
    sequence = int.from_bytes(tcp[4:8], "big") + (1 if tcp[13] & 2 else 0)  # SYN takes a number
    return flow, sequence, data


def streams(path: Path) -> dict[Flow, list[bytes]]:
    """What each flow carried, in order and once; in several parts where something was not captured."""
    segments: dict[Flow, list[tuple[int, bytes]]] = {}
    for frame in read_frames(path):
        if (found := segment(frame)) is None or not found[2]:
            continue
        flow, sequence, data = found
        mine = segments.setdefault(flow, [])
        last = mine[-1][0] if mine else sequence
        mine.append((last + ((sequence - last + (1 << 31)) & 0xFFFFFFFF) - (1 << 31), data))  # numbers come again
    return {flow: _joined(mine) for flow, mine in segments.items()}


def _joined(segments: list[tuple[int, bytes]]) -> list[bytes]:
    parts: list[bytearray] = []
    end = 0
    for start, data in sorted(segments, key=lambda one: one[0]):
        if not parts or start > end:
            parts.append(bytearray(data))
            end = start + len(data)
        elif start + len(data) > end:  # what was sent again is there already
            parts[-1] += data[end - start :]
            end = start + len(data)
    return [bytes(part) for part in parts]
