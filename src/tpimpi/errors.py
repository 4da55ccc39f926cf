"""What can go wrong, as one small tree.

    TpimpiError            anything tpimpi ends a run for            exit code 1
    ├── InputError         what the user gave cannot be used         exit code 2
    │   ├── ModelError     a model: its config, tensors, tokenizer
    │   └── SliceError     a slice file: broken, or of something else
    ├── StarError          another rank is gone, late, or says nonsense
    └── StorageError       a disk is full, or a file cannot be written

A message is one line and names the thing, the value found, the value needed, and what to do about it.
"""


class TpimpiError(Exception):
    """Base of every error that is reported to the user as one line."""

    exit_code = 1
    where: str | None = None  # the rank that it befell ("r2 home-pi"), where that is not the one that says it

    def __str__(self) -> str:
        # One line, whatever a library put into the text that we pass on.
        return " ".join(super().__str__().split())


class InputError(TpimpiError):
    """What the user gave (an option, a prompt, a path) cannot be used."""

    exit_code = 2


class ModelError(InputError):
    """A model directory or GGUF file is missing, broken, or not of a kind that tpimpi computes."""


class SliceError(InputError):
    """A slice file is missing, broken, or does not belong to this run."""


class StarError(TpimpiError):
    """Another rank did not answer in time, or sent something that the protocol does not allow."""


class StorageError(TpimpiError):
    """The disk is full, or a file could not be written."""
