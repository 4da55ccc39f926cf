"""The keys of this host for sealed links: one small file, for its owner alone.

A home is a set of hosts that know one another's public keys (X25519, RFC 7748). Each host has a file with its own private
key and the public keys of all: a JSON object, 0600, at `key_file()`. A host without the private key of another cannot pose
as it. Hosts that share a home folder, as on a cluster, share one file, and are one host to one another's keys.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tpimpi.errors import InputError, shorten_path
from tpimpi.system.files import replacing

FORMAT_VERSION = 1
KEY_BYTES = 32  # of an X25519 key
PATH_VARIABLE = "TPIMPI_LINK_KEYS"  # names another file than the usual one: a path, never a key
MAKE_KEYS = "python -m tpimpi doctor --hostfile FILE --make-keys"
MAKE_OWN_KEYS = "python -m tpimpi doctor --make-keys"  # where hosts share a home folder
_MOST_BYTES = 1 << 20


class LinkKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"version": "tpimpi link keys"}):
    """What the file holds: the name of this host, the day on which the keys of the home were made (ISO 8601), this host's
    private key, and the public keys of all hosts by their names; keys in hexadecimal digits."""

    version: int
    host: str
    made: str
    private: str
    public: dict[str, str]

    def private_key(self) -> bytes:
        """32 bytes."""
        return bytes.fromhex(self.private)

    def public_key(self, host: str) -> bytes | None:
        """32 bytes; None of a host that is not of this home."""
        key = self.public.get(host)
        return None if key is None else bytes.fromhex(key)


def key_file() -> Path:
    """Where this user's file is on this host."""
    import platformdirs

    given = os.environ.get(PATH_VARIABLE)
    return Path(given) if given else platformdirs.user_config_path("tpimpi") / "link-keys.json"


def make_keys(hosts: Sequence[str], made: str) -> dict[str, LinkKeys]:
    """New keys of a home of these hosts, made on that day: each host's file."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    private = {host: X25519PrivateKey.generate() for host in hosts}
    public = {host: key.public_key().public_bytes_raw().hex() for host, key in private.items()}
    return {
        host: LinkKeys(FORMAT_VERSION, host, made, key.private_bytes_raw().hex(), public)
        for host, key in private.items()
    }


def encode_keys(keys: LinkKeys) -> bytes:
    """The file's bytes."""
    return msgspec.json.format(msgspec.json.encode(keys), indent=1) + b"\n"


def decode_keys(data: bytes, what: str) -> LinkKeys:
    """What the bytes of a file say; `what` names it. Raises InputError."""
    remedy = f"make new keys: {MAKE_KEYS}"
    try:
        keys = msgspec.json.decode(data, type=LinkKeys)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{what} is no file of link keys ({error}); {remedy}") from None
    if keys.version != FORMAT_VERSION:
        raise InputError(f"{what} has version {keys.version}, this tpimpi reads {FORMAT_VERSION}; {remedy}")
    for name, key in [("private", keys.private), *keys.public.items()]:
        try:
            good = len(bytes.fromhex(key)) == KEY_BYTES
        except ValueError:
            good = False
        if not good:  # which is not shown: it may be most of a key
            raise InputError(f"{what}: the key {name!r} is not {2 * KEY_BYTES} hexadecimal digits; {remedy}")
    if keys.host not in keys.public:
        raise InputError(f"{what} has no public key of its own host {keys.host!r}; {remedy}")
    return keys


def read_keys(path: Path | None = None) -> LinkKeys | None:
    """This host's keys, or None where it has none. Raises InputError for a file that cannot be used, or that others may
    read."""
    path = key_file() if path is None else path
    what = f"the file of link keys {shorten_path(path)}"
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise InputError(f"{what} is no file; remove it, and make keys: {MAKE_KEYS}")
            if about.st_mode & 0o077 or about.st_uid not in (os.geteuid(), 0):
                raise InputError(
                    f"{what} has mode {about.st_mode & 0o777:03o} and owner {about.st_uid}: others can read or change it; "
                    f"make new keys ({MAKE_KEYS}), or, if you know that nobody did: chmod 600"
                )
            data = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{what}: {error.strerror}; let this user read it, or make new keys: {MAKE_KEYS}") from error
    return decode_keys(data, what)


def write_keys(keys: LinkKeys, path: Path | None = None) -> Path:
    """Put this host's keys into its file, for its owner alone, in place of earlier ones. Raises StorageError."""
    path = key_file() if path is None else path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replacing(path, PATH_VARIABLE, private=True) as file:
        file.write(encode_keys(keys))
    return path
