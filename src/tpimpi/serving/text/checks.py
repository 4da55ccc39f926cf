"""Whatever a tokenizer library or a model's file does wrong becomes a ModelError of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tpimpi.errors import ModelError


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns whatever a tokenizer library raises over its input into a ModelError that begins with `what`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        raise ModelError(f"{what}: {error}; download or convert the model again") from error


@contextmanager
def needing(packages: str) -> Iterator[None]:
    """Turns an import that fails into a ModelError that says which packages to install."""
    try:
        yield
    except Exception as error:  # a package that is broken, or of another version, fails as it likes
        raise ModelError(
            f"the model's tokenizer needs a package that cannot be imported ({type(error).__name__}: {error}); "
            f"pip install {packages}"
        ) from error


def is_unicode(text: str) -> bool:
    """False for lone surrogates: undecodable bytes of argv arrive as such, and JSON can spell them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
