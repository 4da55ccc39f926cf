"""Notes what the library of ciphers opens for this process: what root on a machine, or its owner, can do to any program."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import aead

from bench.attack.messages import RECEIVED
from bench.attack.record import Log

NONCE = struct.Struct("<IQ")  # as star/seal.py has it: tag, count


def record_opened(path: Path) -> None:
    """From now on; before anything has imported the ciphers. Of whom a message is, is not noted: it counts as rank 0's."""
    log = Log(path)
    for name in ("AESGCM", "ChaCha20Poly1305"):
        setattr(aead, name, _recorded(getattr(aead, name), log))


def _recorded(cipher: Any, log: Log) -> type:
    class Recorded:
        def __init__(self, key: bytes) -> None:
            self._cipher = cipher(key)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cipher, name)

        def decrypt_into(self, nonce: bytes, data: Any, associated: Any, into: Any) -> int:
            size: int = self._cipher.decrypt_into(nonce, data, associated, into)
            tag, _ = NONCE.unpack(nonce)
            log.write(RECEIVED, 0, 0, tag, bytes(memoryview(into).cast("B")[:size]) + bytes(16))
            return size

    return Recorded
