"""What can go wrong, as one small tree.

    TpimpiError            anything tpimpi ends a run for            exit code 1
    ├── InputError         what the user gave cannot be used         exit code 2
    │   ├── ModelError     a model: its config, tensors, tokenizer
    │   └── SliceError     a slice file: broken, or of something else
    ├── StarError          another rank is gone, late, or says nonsense
    │   ├── LostError      the connection to another rank broke
    │   └── AuditError     another rank computes or says what its weights do not give
    ├── DamagedMemoryError weights in memory are not what was read any more
    └── StorageError       a disk is full, or a file cannot be written

A message is one line and names the thing, the value found, the value needed, and what to do about it.
"""

import errno


def printable(text: str) -> str:
    """A text without anything that a terminal would obey, whatever a file, a library or another host put into it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """A text as one line, `printable`."""
    return printable(" ".join(text.split()))


class TpimpiError(Exception):
    """Base of every error that is reported to the user as one line."""

    exit_code = 1
    where: str | None = None  # the rank that it befell ("r2 home-pi"), where that is not the one that says it

    def __str__(self) -> str:
        return one_line(super().__str__())


class InputError(TpimpiError):
    """What the user gave (an option, a prompt, a path) cannot be used."""

    exit_code = 2


class ModelError(InputError):
    """A model directory or GGUF file is missing, broken, or not of a kind that tpimpi computes."""


class SliceError(InputError):
    """A slice file is missing, broken, or does not belong to this run."""


class StarError(TpimpiError):
    """Another rank did not answer in time, or sent something that the protocol does not allow."""


class UnsealError(Exception):
    """A sealed message does not open; who receives it says whose it was."""


class LostError(StarError):
    """The connection to another rank broke: its process died, or its machine or network is gone."""


class AuditError(StarError):
    """What another rank sent is not what its part of the model gives."""


class DamagedMemoryError(TpimpiError):
    """Weights in this machine's memory are not what was read any more."""


class StorageError(TpimpiError):
    """The disk is full, or a file could not be written."""


_REMEDIES = {
    errno.EACCES: "let this user read and write it, or use another place",
    errno.EPERM: "let this user read and write it, or use another place",
    errno.EROFS: "use another place, which can be written",
    errno.ENOSPC: "make room, or use another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n 4096)",
    errno.ENAMETOOLONG: "use a shorter path",
}
MAX_VALUE_CHARACTERS = 40  # of a value that a message shows
MAX_PATH_CHARACTERS = 200  # of a path that a message shows


def shorten(text: str, most: int = MAX_VALUE_CHARACTERS) -> str:
    """A value as messages show it: of a longer one the beginning, and … in the place of the rest."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shorten_path(path: object, most: int = MAX_PATH_CHARACTERS) -> str:
    """A path as messages show it: of a longer one the end, which says most, and … in the place of the rest."""
    text = str(path)
    return text if len(text) <= most else f"…{text[1 - most :]}"


def as_ours(error: Exception) -> TpimpiError:
    """`error`, or what stands for it where it is not one of ours: with a remedy where the cause is plain."""
    if isinstance(error, TpimpiError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return TpimpiError("out of memory; give a smaller --memory or --context, or more ranks")
    if isinstance(error, ImportError):
        if error.name == "torch":
            return TpimpiError(
                "package torch is missing on this host; install it there (pip install torch), or the native kernels (a C++ "
                "compiler and Python's headers, then pip install -e . again), or give --backend numpy, which is slow"
            )
        what = f"package {error.name} is missing" if isinstance(error, ModuleNotFoundError) else text
        return TpimpiError(f"{what} on this host; install tpimpi there with what it needs (pip install -e .)")
    if isinstance(error, OSError) and error.strerror:
        what = _REMEDIES.get(error.errno or 0, "mend that, or use another place")
        return TpimpiError(f"{shorten_path(error.filename or 'the system')}: {error.strerror}; {what}")
    return TpimpiError(
        f"internal error: {type(error).__name__}: {text}; set TPIMPI_TRACEBACK=1 to see where, and please report it"
    )
