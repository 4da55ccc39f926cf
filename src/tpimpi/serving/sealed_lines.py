"""Lines of a file that a passphrase encrypts (--session-key-file, --journal-key-file), so that the file still grows only at
its end.

The first line is clear: what the file is (a session, or a journal), the version of this format, a salt, and by what a wrong
passphrase is known:

    {"tpimpi sealed session": 1, "salt": "HEX", "check": "HEX"}

Each line after it is one line of the plain file, without its line end, with blanks up to a multiple of PADDED_BYTES, in
base64: a random nonce (12 bytes), the text encrypted with ChaCha20-Poly1305 (RFC 8439), and its tag (16 bytes). The key
is the first 32 bytes of scrypt (RFC 7914; N, r and p below) of the passphrase and the salt, "check" are the next 16.
Authenticated beside each line is the tag of the line before it, and with the first one the clear line. So a line opens
at its own place in its own file alone: lines that were changed, exchanged, left out in the middle or taken from another
file, or from another continuation of the same one, are found. What is missing at the end is not: a file that was cut
off behind a whole line is one of a run that ended there.

Nonces are random, not counted: after a crash, or from a copy of the file, two different lines can come to stand at the same
place, and a counter would then be used twice. Two of 2**32 random ones are the same with a chance of 2**-33.
"""

from __future__ import annotations

import base64
import copy
import json
import os

VERSION = 1
PADDED_BYTES = 64  # so that a line's length does not tell which token it has
SALT_BYTES, KEY_BYTES, CHECK_BYTES, NONCE_BYTES, TAG_BYTES = 32, 32, 16, 12, 16
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 15, 8, 3  # 32 MiB, the strength that OWASP advises
_SCRYPT_MOST_BYTES = 64 << 20  # what OpenSSL may take for it


class WrongPassphraseError(Exception):
    """The passphrase is not the one with which the file was begun."""


class LineSeal:
    """Seals the lines of one file one after the other, or opens them; `first_line` stands before them."""

    def __init__(self, passphrase: bytes, first_line: bytes | None = None, what: str = "session") -> None:
        """Of a file that begins with that line, or of a new one; `what` it is. Takes 32 MiB of memory for a moment.

        Raises WrongPassphraseError, and ValueError, KeyError or TypeError for a line that is none of ours."""
        import hashlib  # with OpenSSL, which runs without a passphrase do without

        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        name = f"tpimpi sealed {what}"
        about = {} if first_line is None else json.loads(first_line)
        if first_line is not None and (set(about) != {name, "salt", "check"}):
            raise ValueError(about)
        if about.get(name, VERSION) != VERSION:
            raise ValueError(about)
        salt = os.urandom(SALT_BYTES) if first_line is None else bytes.fromhex(about["salt"])
        made = hashlib.scrypt(
            passphrase,
            salt=salt,
            n=SCRYPT_N,
            r=SCRYPT_R,
            p=SCRYPT_P,
            maxmem=_SCRYPT_MOST_BYTES,
            dklen=KEY_BYTES + CHECK_BYTES,
        )
        key, check = made[:KEY_BYTES], made[KEY_BYTES:].hex()
        if first_line is None:
            about = {name: VERSION, "salt": salt.hex(), "check": check}
            first_line = json.dumps(about).encode() + b"\n"
        elif about["check"] != check:
            raise WrongPassphraseError
        self.first_line = first_line
        self._cipher, self._before = ChaCha20Poly1305(key), first_line

    def again(self) -> LineSeal:
        """With the same key and first line, for another file from its beginning."""
        other = copy.copy(self)
        other._before = self.first_line
        return other

    def seal(self, line: bytes) -> bytes:
        """The next line as it stands in the file, from a plain one with its line end."""
        text = line.removesuffix(b"\n")
        sealed = self._encrypt(text.ljust(-(-len(text) // PADDED_BYTES) * PADDED_BYTES), self._before)
        self._before = sealed[-TAG_BYTES:]
        return base64.b64encode(sealed) + b"\n"

    def open(self, line: bytes) -> bytes:
        """What the next line of the file holds, with blanks at its end. Raises ValueError where it is not that line."""
        sealed = base64.b64decode(line.removesuffix(b"\n"), validate=True)
        text = self._decrypt(sealed, self._before)
        self._before = sealed[-TAG_BYTES:]
        return text

    def seal_beside(self, what: bytes, data: bytes) -> bytes:
        """Something that is kept beside the file, by its name: in base64."""
        return base64.b64encode(self._encrypt(data, b"beside " + what))

    def open_beside(self, what: bytes, sealed: bytes) -> bytes:
        """What `seal_beside` sealed. Raises ValueError where it is not that."""
        return self._decrypt(base64.b64decode(sealed, validate=True), b"beside " + what)

    def _encrypt(self, text: bytes, beside: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, text, beside)

    def _decrypt(self, sealed: bytes, beside: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        if len(sealed) < NONCE_BYTES + TAG_BYTES:
            raise ValueError("too short")
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], beside)
        except InvalidTag:
            raise ValueError("not what was sealed there") from None
