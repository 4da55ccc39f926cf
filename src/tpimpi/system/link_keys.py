"""The keys of this host for sealed links: one small file, for its owner alone.

A home is a set of hosts that know one another's public keys (X25519, RFC 7748). Each host has a file with its own private
key and the public keys of all: a JSON object, 0600, at `key_file()`. A host without the private key of another cannot pose
as it. Hosts that share a home folder, as on a cluster, share one file, and are one host to one another's keys.

`python -m tpimpi.system.link_keys new` (or `replace`) takes a host's file from its standard input: `doctor --make-keys` runs
it there over ssh, so that no key is ever in an argument, in an environment or in a file of the machine that made it.
"""

from __future__ import annotations

import datetime
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tpimpi.errors import InputError, StorageError, TpimpiError, shorten_path
from tpimpi.system.files import replacing

FORMAT_VERSION = 1
KEY_BYTES = 32  # of an X25519 key
PATH_VARIABLE = "TPIMPI_LINK_KEYS"  # names another file than the usual one: a path, never a key
MAKE_KEYS = "python -m tpimpi doctor --hostfile FILE --make-keys"
REPLACE_KEYS = f"{MAKE_KEYS} --rotate-keys"  # where a host has some, good or not
MAKE_OWN_KEYS = "python -m tpimpi doctor --make-keys"  # where hosts share a home folder
NEW, REPLACE = "new", "replace"  # what is to be done with a file that comes over ssh
SAID = "tpimpi-keys "  # what its answer begins with
_MAX_BYTES = 1 << 20
_FIRST_KEY = "tpimpi link keys"  # by which a file is known


class LinkKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"version": _FIRST_KEY}):
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


class KeysFound(msgspec.Struct, frozen=True):
    """What is told of a host's file of keys: nothing that is secret. `problem` says why it cannot be used, "" where it can;
    `table` is a hash of the public keys of its home, the same on all of its hosts."""

    file: str
    there: bool = False
    problem: str = ""
    host: str = ""
    made: str = ""
    table: str = ""


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
    remedy = f"make new keys: {REPLACE_KEYS}"
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
        # A pipe in its place, which another may have put there, is not waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise InputError(f"{what} is no file; remove it, and make keys: {MAKE_KEYS}")
            if about.st_mode & 0o077 or about.st_uid not in (os.geteuid(), 0):
                raise InputError(
                    f"{what} has mode {about.st_mode & 0o777:03o} and owner {about.st_uid}: others can read or change it; "
                    f"make new keys ({REPLACE_KEYS}), or, if you know that nobody did: chmod 600"
                )
            data = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(
            f"{what}: {error.strerror}; let this user read it, or make new keys: {REPLACE_KEYS}"
        ) from error
    return decode_keys(data, what)


def write_keys(keys: LinkKeys, path: Path | None = None) -> Path:
    """Put this host's keys into its file, for its owner alone, in place of earlier ones. Raises StorageError, and InputError
    where something that is no file of link keys stands there, which is left as it is."""
    path = key_file() if path is None else path
    _check_replaceable(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the folder {shorten_path(path.parent)} cannot be made: {error.strerror}; let this user write there, or set "
            f"{PATH_VARIABLE} to another place for the file"
        ) from error
    with replacing(path, PATH_VARIABLE, private=True) as file:
        file.write(encode_keys(keys))
    return path


def _check_replaceable(path: Path) -> None:
    """Raise InputError where there is something that keys may not be written over: a device, a pipe, a file of others."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES)
            ours = not data or _FIRST_KEY.encode() in data  # a damaged one too
        else:
            ours = not path.exists()
    except OSError:
        return  # who writes says why that cannot be
    if not ours:
        raise InputError(
            f"{shorten_path(path)} is no file of link keys, so none are written over it; remove it, or set {PATH_VARIABLE} "
            "to another place for the file"
        )


# What `doctor` is told, and how it puts a file here


def find_keys(path: Path | None = None) -> KeysFound:
    """What can be told of this host's file."""
    path = key_file() if path is None else path
    try:
        keys = read_keys(path)
        if keys is not None:
            _check_pair(keys, f"the file of link keys {shorten_path(path)}")
    except InputError as error:
        return KeysFound(str(path), there=True, problem=str(error))
    if keys is None:
        return KeysFound(str(path))
    return KeysFound(str(path), True, "", keys.host, keys.made, _hash_of_table(keys))


def _hash_of_table(keys: LinkKeys) -> str:
    import hashlib

    return hashlib.sha256(msgspec.json.encode(sorted(keys.public.items()))).hexdigest()


def _check_pair(keys: LinkKeys, what: str) -> None:
    """Raise InputError where the private key is not that of this host's public one, or the day is none."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    public = X25519PrivateKey.from_private_bytes(keys.private_key()).public_key().public_bytes_raw()
    if public != keys.public_key(keys.host):
        raise InputError(
            f"{what}: the private key is not that of the host {keys.host!r}; make new keys: {REPLACE_KEYS}"
        )
    try:
        datetime.date.fromisoformat(keys.made)
    except ValueError:
        raise InputError(f"{what}: made is {keys.made!r}, must be a day; make new keys: {REPLACE_KEYS}") from None


def put_keys(data: bytes, *, replace: bool) -> KeysFound:
    """Have this host's file hold these bytes, unless it is there and is not to be replaced; what is there then.

    A host that shares its home folder with one that has got its file of the same home already keeps that. Raises InputError,
    StorageError.
    """
    keys = decode_keys(data, "what came over ssh")
    there = find_keys()
    if there.table == _hash_of_table(keys):
        return there
    if there.there and not replace:
        raise InputError(f"{shorten_path(there.file)} is there already; to replace it, give --rotate-keys")
    return find_keys(write_keys(keys))


def main() -> None:
    """Take the file from standard input, and say what is there then in a line of JSON behind SAID."""
    try:
        found = put_keys(sys.stdin.buffer.read(_MAX_BYTES), replace=sys.argv[1:] == [REPLACE])
    except TpimpiError as error:
        found = KeysFound("", problem=str(error))
    print(SAID + msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    main()
