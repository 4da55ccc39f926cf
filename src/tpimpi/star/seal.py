"""Sealed messages: encrypted and authenticated for one receiver, with a nonce that is counted and never sent.

A message to a rank is sealed with the key of that pair, direction and communicator, by AES-256-GCM (NIST SP 800-38D), or
ChaCha20-Poly1305 (RFC 8439) where a host has no AES instructions. The nonce is the tag and the number of messages that went
before with that tag: MPI delivers messages of one sender, communicator and tag in order, so both sides count alike. One that
was changed, repeated, left out, exchanged for another or sent by somebody else does not open.
"""

from __future__ import annotations

import hmac
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpimpi.compute.arrays import Bytes
from tpimpi.errors import UnsealError
from tpimpi.star import ciphers
from tpimpi.system.handshakes import Secrets

TAGS = 1 << 14  # tags are below that (pieces.py)


@dataclass(frozen=True)
class LinkSecrets:
    """What this rank shares with another after their handshake: 32 bytes each for what it sends and for what it gets, and
    the handshake's hash, into which ranks, sizes, versions and the job went."""

    sent: bytes
    received: bytes
    hash: bytes

    @classmethod
    def of(cls, secrets: Secrets, *, initiator: bool) -> LinkSecrets:
        """Of the side that began the handshake, or answered."""
        ours, theirs = (secrets.initiator, secrets.responder) if initiator else (secrets.responder, secrets.initiator)
        return cls(ours, theirs, secrets.hash)


class Seal:
    """Seals and opens one rank's messages of one communicator. Messages of one peer and tag are counted by one thread at a
    time."""

    def __init__(
        self, cipher: str, secrets: Mapping[int, LinkSecrets], communicator: str = "main", hosts: Sequence[str] = ()
    ) -> None:
        """`cipher` is AES or CHACHA; `secrets` by the other's rank; `communicator` names which of the run's it is; `hosts`
        are those whose keys the ranks have proved to have, in rank order."""
        self.cipher, self._secrets, self._communicator, self.hosts = cipher, dict(secrets), communicator, tuple(hosts)
        make, links = ciphers.make_cipher, secrets.items()
        self._to = {peer: make(cipher, self._key(link.sent, link.hash), opens=False) for peer, link in links}
        self._from = {peer: make(cipher, self._key(link.received, link.hash), opens=True) for peer, link in links}
        self._sent: dict[int, array[int]] = {}  # by peer: how many messages of each tag
        self._due: dict[int, array[int]] = {}

    def _key(self, secret: bytes, handshake: bytes) -> bytes:
        """HKDF of RFC 5869 with SHA-256, whose first block is the key."""
        info = f"tpimpi {self.cipher} {self._communicator}".encode()
        return hmac.digest(hmac.digest(handshake, secret, "sha256"), info + b"\x01", "sha256")

    def derive(self, communicator: str) -> Seal:
        """The same links' seal for another communicator, with keys of its own."""
        return Seal(self.cipher, self._secrets, f"{self._communicator}/{communicator}", self.hosts)

    def close(self, peer: int, tag: int, data: Bytes, frame: Bytes) -> None:
        """Seal the next message to `peer`: uint8 [n] into uint8 [n + SEAL_BYTES]."""
        self._to[peer].seal(tag, self._next(self._sent, peer, tag), data, frame)

    def expect(self, peer: int, tag: int) -> int:
        """The number of the next message from `peer`; messages are to be received in the order in which this is asked."""
        return self._next(self._due, peer, tag)

    def open(self, peer: int, tag: int, number: int, frame: Bytes, into: Bytes) -> None:
        """Open a message: uint8 [n + SEAL_BYTES] into uint8 [n], also the frame's own beginning. Raises UnsealError."""
        if not self._from[peer].open(tag, number, frame, into):
            raise UnsealError

    @staticmethod
    def _next(counts: dict[int, array[int]], peer: int, tag: int) -> int:
        of_peer = counts.get(peer)
        if of_peer is None:  # in another thread too, maybe: one array counts for both, or nonces come twice
            of_peer = counts.setdefault(peer, array("Q", bytes(8 * TAGS)))
        number = of_peer[tag]
        of_peer[tag] = number + 1
        return number
