"""API keys: who asks. They are in one file, which the front alone reads."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping

from tpimpi.errors import InputError, shorten_path
from tpimpi.system.given_file import read_text

SHORTEST_KEY = 8  # characters
DIGEST_SHOWN = 16  # hex digits of a key without a name, as its owner
_NAMED = re.compile(r"([\w.@-]{1,64})\s*=\s*([^=\s].*)")  # a key may end with = itself, as base64 does


class Keys:
    """The keys of a file: one a line, alone or as `name=key`; lines that are empty or begin with # are left out.

    Raises InputError for a file that cannot be used.
    """

    def __init__(self, path: str) -> None:
        self._owners: list[tuple[bytes, str]] = []
        for number, line in enumerate(read_text("--api-key-file", path).splitlines(), start=1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, key = match.groups() if (match := _NAMED.fullmatch(text)) else ("", text)
            if len(key) < SHORTEST_KEY:
                raise InputError(
                    f"--api-key-file {shorten_path(path)}, line {number}: the key has fewer than {SHORTEST_KEY} characters; "
                    "make one with: openssl rand -hex 24"
                )
            digest = _digest(key)
            # Not its line: a journal has owners too, and lines of the file come and go. No name has a space.
            self._owners.append((digest, name or f"key {digest.hex()[:DIGEST_SHOWN]}"))
        if not self._owners:
            raise InputError(f"--api-key-file {shorten_path(path)} has no key; give one a line")

    def owner(self, key: str) -> str | None:
        """Whose key it is, None of nobody. All are compared, each in constant time."""
        digest, found = _digest(key), None
        for known, owner in self._owners:
            if hmac.compare_digest(known, digest):
                found = owner
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def given_key(headers: Mapping[str, str]) -> str | None:
    """The key of a request: `Authorization: Bearer KEY`, or `x-api-key: KEY`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip() or None
