"""What is said of a slice file that cannot be used: one line with its remedy."""

from __future__ import annotations

import errno
import json
import os
import shlex
import stat
from pathlib import Path

from tpimpi.errors import SliceError, StorageError
from tpimpi.system.disk import error_number
from tpimpi.weights.locations import in_cache
from tpimpi.weights.slices.names import parse_slice_name

# What the operating system says of a disk, a network, a lock or a limit, and not of what is in the file.
NOT_THE_FILE = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN, errno.ENODEV, errno.ENXIO),
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG),
    *(errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EDEADLK),
}
_REMEDIES = {
    errno.EACCES: "let this user read it, or use slices elsewhere (--slices)",
    errno.EMFILE: "raise the limit of open files (ulimit -n 4096)",
    errno.ENAMETOOLONG: "use a shorter path",
}


def not_a_file(path: Path, mode: int) -> SliceError | None:
    """What stands in a slice's place, where that is no file."""
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    return SliceError(f"{path} is {kind} where a slice file is needed; remove it, and make the slices again")


def unreadable(path: Path, number: int) -> SliceError:
    """The system does not let us read it; `number` is its errno."""
    what = _REMEDIES.get(number, "check the disk or network it is on, or use slices elsewhere (--slices)")
    return SliceError(f"slice file {path} cannot be read: {os.strerror(number)}; {what}")


def missing(path: Path) -> SliceError:
    """It is not there; perhaps slices for another number of ranks are."""
    wanted, folder = parse_slice_name(path.name), shlex.quote(str(path.parent))
    found = {parsed[1] for other in path.parent.glob("*.h5") if (parsed := parse_slice_name(other.name))}
    if wanted and found and wanted[1] not in found:
        made_for = " and ".join(str(ranks) for ranks in sorted(found))
        return SliceError(
            f"the slices in {path.parent} are for {made_for} ranks, this run has {wanted[1]}; start as many ranks, "
            f"or make slices for {wanted[1]} with: python -m tpimpi slice --ranks {wanted[1]} --out {folder}"
        )
    return SliceError(
        f"slice file {path} is missing; make it with: python -m tpimpi slice --out {folder} (under mpirun as in a run, "
        "with its --model, --format and --shares), or copy it there from the host that has it"
    )


def in_words(error: Exception) -> str:
    """What is wrong with a file that raised this when it was opened, in plain words."""
    if isinstance(error, UnicodeDecodeError | json.JSONDecodeError | RecursionError):
        return "its header is no JSON"
    if isinstance(error, KeyError):
        return str(error.args[0]) if "object" in str(error) else f"its header has no {error}"  # HDF5 speaks of objects
    if isinstance(error, ValueError | OSError | RuntimeError) and "values to unpack" not in str(error):
        return str(error)  # ours, and what HDF5 says
    return "its header holds other values than a slice's"


def broken(path: Path, what: str) -> SliceError:
    """What is in the file is wrong."""
    out = "" if in_cache(path.parent) else f" --out {shlex.quote(str(path.parent))}"
    return SliceError(
        f"slice file {path} is broken ({what}); delete it and make the slices again, or mend it with: "
        f"python -m tpimpi slice --verify{out} (under mpirun as in a run, with its --model, --format and --shares)"
    )


def changed(path: Path, what: str) -> SliceError:
    """Another program has written to the file since it was opened."""
    return SliceError(
        f"slice file {path} was changed while this run was using it: {what} is no longer what it was; make the "
        "slices again if they are not whole (slice --verify), and start when nothing writes to them"
    )


def failing(path: Path, what: str, error: Exception) -> SliceError | StorageError:
    """An error of the system, of HDF5 or EOFError while `what` was read."""
    number = error_number(error)
    of_the_system = isinstance(error, OSError) and error.errno is not None
    if number is not None and (of_the_system or number in NOT_THE_FILE):
        return StorageError(
            f"slice file {path} can no longer be read at {what}: {os.strerror(number)}; "
            "check the disk or network it is on, and start again"
        )
    return broken(path, f"{what}: {error}")
