"""The handshake of two ranks: Noise_KK_25519_ChaChaPoly_SHA256, of the Noise Protocol Framework, revision 34.

In pattern KK each side knows the other's long-term (static) public key beforehand; two messages later both have proved that
they hold the private keys, and share two secrets, one a direction, into which the keys of this one run (ephemeral) went: who
gets the long-term keys later cannot read what was recorded. Names in the code are the specification's: `h` (hash of all
that was said), `ck` (chaining key), `e` and `s` (ephemeral and static keys), `re` and `rs` (the other's).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tpimpi.system.handshakes import HandshakeError, Known, Secrets
from tpimpi.system.link_keys import KEY_BYTES

PROTOCOL = b"Noise_KK_25519_ChaChaPoly_SHA256"
MESSAGE_BYTES = KEY_BYTES + 16  # of each of the two: an ephemeral key, and the tag of an empty payload


class Handshake:
    """One side of it: the initiator calls `write_first` and `read_second`, the responder `read_first` and `write_second`."""

    def __init__(
        self,
        known: Known,
        *,
        initiator: bool,
        ephemeral: X25519PrivateKey | None = None,
    ) -> None:
        """`ephemeral` is given in tests alone."""
        self._s, self._rs = X25519PrivateKey.from_private_bytes(known.ours), _public(known.theirs)
        self._e = X25519PrivateKey.generate() if ephemeral is None else ephemeral
        self._re: X25519PublicKey | None = None
        self._initiator = initiator
        assert len(PROTOCOL) == 32  # a name of that length is the first hash as it is
        self._h = self._ck = PROTOCOL
        self._key = b""
        self._mix_hash(known.prologue)
        ours = self._s.public_key().public_bytes_raw()
        for key in (ours, known.theirs) if initiator else (known.theirs, ours):
            self._mix_hash(key)

    def write_first(self) -> bytes:
        """-> e, es, ss"""
        ours = self._write_ephemeral()
        self._mix_key(self._e, self._rs)
        self._mix_key(self._s, self._rs)
        return ours + self._encrypt()

    def read_first(self, message: bytes) -> None:
        """What the initiator wrote. Raises HandshakeError."""
        self._read_ephemeral(message)
        assert self._re is not None
        self._mix_key(self._s, self._re)
        self._mix_key(self._s, self._rs)
        self._decrypt(message[KEY_BYTES:])

    def write_second(self) -> tuple[bytes, Secrets]:
        """<- e, ee, se"""
        ours = self._write_ephemeral()
        assert self._re is not None
        self._mix_key(self._e, self._re)
        self._mix_key(self._e, self._rs)
        return ours + self._encrypt(), self._split()

    def read_second(self, message: bytes) -> Secrets:
        """What the responder wrote. Raises HandshakeError."""
        self._read_ephemeral(message)
        assert self._re is not None
        self._mix_key(self._e, self._re)
        self._mix_key(self._s, self._re)
        self._decrypt(message[KEY_BYTES:])
        return self._split()

    # The specification's SymmetricState; every key encrypts one empty payload, so the nonce is 0

    def _mix_hash(self, data: bytes) -> None:
        digest = Hash(SHA256())  # of the library that is loaded anyway: hashlib would load another OpenSSL, of 4 MB
        digest.update(self._h + data)
        self._h = digest.finalize()

    def _mix_key(self, ours: X25519PrivateKey, theirs: X25519PublicKey) -> None:
        try:
            shared = ours.exchange(theirs)
        except ValueError as error:  # a key of small order, whose product is zero
            raise HandshakeError from error
        self._ck, self._key = self._derive(shared)

    def _derive(self, material: bytes) -> tuple[bytes, bytes]:
        both = HKDF(SHA256(), 2 * KEY_BYTES, salt=self._ck, info=b"").derive(material)
        return both[:KEY_BYTES], both[KEY_BYTES:]

    def _write_ephemeral(self) -> bytes:
        ours = self._e.public_key().public_bytes_raw()
        self._mix_hash(ours)
        return ours

    def _read_ephemeral(self, message: bytes) -> None:
        if len(message) != MESSAGE_BYTES:
            raise HandshakeError
        self._re = _public(message[:KEY_BYTES])
        self._mix_hash(message[:KEY_BYTES])

    def _encrypt(self) -> bytes:
        sealed = ChaCha20Poly1305(self._key).encrypt(bytes(12), b"", self._h)
        self._mix_hash(sealed)
        return sealed

    def _decrypt(self, sealed: bytes) -> None:
        try:
            ChaCha20Poly1305(self._key).decrypt(bytes(12), sealed, self._h)
        except InvalidTag as error:
            raise HandshakeError from error
        self._mix_hash(sealed)

    def _split(self) -> Secrets:
        return Secrets(*self._derive(b""), self._h)


def _public(key: bytes) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(key)


class NoiseHandshakes:
    """A rank's handshakes with the others (see handshakes.Handshakes)."""

    def __init__(self) -> None:
        self._begun: dict[int, Handshake] = {}  # by the other's rank

    def begin(self, other: int, known: Known) -> bytes:
        """The first message to another."""
        self._begun[other] = Handshake(known, initiator=True)
        return self._begun[other].write_first()

    def finish(self, other: int, message: bytes) -> Secrets:
        """What is shared with another that answered so to the first message. Raises HandshakeError."""
        return self._begun[other].read_second(message)

    def answer(self, known: Known, message: bytes) -> tuple[bytes, Secrets]:
        """The answer to another that began so, and what is shared with it. Raises HandshakeError."""
        handshake = Handshake(known, initiator=False)
        handshake.read_first(message)
        return handshake.write_second()

    def close(self) -> None:
        """No more are made."""
        self._begun.clear()
