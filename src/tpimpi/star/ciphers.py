"""The ciphers of sealed links: those of the system's OpenSSL, through our extension, or of the package cryptography.

Both make the same bytes. The first is faster for a message of 2 KB between two layers: 15 instead of 25 us with what 8 MB of
weights leave in the caches, 25 instead of 44 with 64 MB, 0.9 instead of 1.4 over and over (Zen 4). And a rank that has it
does without the package, which takes 9 MB (see handshakes).
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Protocol

from tpimpi.compute.arrays import Bytes
from tpimpi.system.link_keys import KEY_BYTES

if TYPE_CHECKING:
    from tpimpi._native import LinkCipher

AES, CHACHA = "AES-256-GCM", "ChaCha20-Poly1305"
_NONCE = struct.Struct("<IQ")  # tag, number


class Cipher(Protocol):
    """Of one direction of a link, with its key; used by one thread at a time. The nonce is tag and number."""

    def seal(self, tag: int, number: int, data: Bytes, frame: Bytes, /) -> None:
        """uint8 [n] into uint8 [n + SEAL_BYTES]."""

    def open(self, tag: int, number: int, frame: Bytes, into: Bytes, /) -> bool:
        """uint8 [n + SEAL_BYTES] into uint8 [n], also the frame's own beginning; False, and zeros, where it is not what was
        sealed."""


def make_cipher(name: str, key: bytes, *, opens: bool) -> Cipher:
    """`name` is AES or CHACHA; `key` has KEY_BYTES. It opens messages, or seals them."""
    native = native_cipher(name)
    return PackageCipher(name, key) if native is None else native(name, key, opens)


@functools.cache
def native_cipher(name: str) -> type[LinkCipher] | None:
    """The extension's class, where it finds an OpenSSL that has this cipher; else None."""
    try:
        import hashlib  # noqa: F401 - where Python's is not linked into it, that loads its OpenSSL, in whatever folder that is

        from tpimpi._native import LinkCipher

        LinkCipher(name, bytes(KEY_BYTES), False)
    except (ImportError, RuntimeError):
        return None
    return LinkCipher


class PackageCipher:
    """A Cipher of the package cryptography."""

    def __init__(self, name: str, key: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

        self._cipher = AESGCM(key) if name == AES else ChaCha20Poly1305(key)
        self._wrong = InvalidTag

    def seal(self, tag: int, number: int, data: Bytes, frame: Bytes, /) -> None:
        """See Cipher."""
        self._cipher.encrypt_into(_NONCE.pack(tag, number), memoryview(data), None, memoryview(frame))

    def open(self, tag: int, number: int, frame: Bytes, into: Bytes, /) -> bool:
        """See Cipher."""
        try:
            self._cipher.decrypt_into(_NONCE.pack(tag, number), memoryview(frame), None, memoryview(into))
        except self._wrong:
            into[:] = 0
            return False
        return True
