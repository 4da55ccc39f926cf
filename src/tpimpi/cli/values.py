"""Single values of options: callables for `type=` of argparse, and what needs the number of ranks too.

They raise InputError, which argparse lets through, so that a message is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tpimpi.cli.options import MemoryLimit
from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.engine.needs import LONGEST_DRAFT
from tpimpi.engine.window import SMALLEST_WINDOW
from tpimpi.errors import InputError, shorten, shorten_path
from tpimpi.system.given_file import read_text
from tpimpi.system.units import parse_size

MAX_THREADS = 1024
MAX_RANKS = 4096
MAX_PASSPHRASE_BYTES = 1024
# Of --shares: those that are predicted to be fastest; of --speculate: as many tokens as pay; of --audit: what costs little.
AUTO = "auto"
OFF = "off"  # of --speculate and --audit


def whole_number(option: str, least: int = 1, most: int | None = None, why: str = "") -> Callable[[str], int]:
    """A whole number from `least` to `most`; `why` ends the message for one that is less."""

    def convert(text: str) -> int:
        number = int(text)
        if most is not None and not least <= number <= most:
            raise InputError(f"{option} is {number}, must be {least} to {most}")
        if number < least:
            raise InputError(f"{option} is {number}, must be {least} or more{why}")
        return number

    convert.__name__ = "int"  # for argparse, which says "invalid int value" where int() raises ValueError
    return convert


def seconds(option: str, least: float = 0.0, most: float = math.inf, needed: str = "") -> Callable[[str], float]:
    """A number of seconds from `least` to `most`, and over 0; `needed` says so in the message."""

    def convert(text: str) -> float:
        number = float(text)
        if not (least <= number <= most and 0 < number < math.inf):
            raise InputError(f"{option} is {number:g}, must be {needed or 'a number of seconds over 0'}")
        return number

    convert.__name__ = "float"
    return convert


def path_given(option: str, what: str) -> Callable[[str], str]:
    """A path that is not empty; `what` it is of ends the message."""

    def convert(text: str) -> str:
        if not text:
            raise InputError(f"{option} is empty; give {what}")
        return text

    return convert


def program_given(option: str) -> Callable[[str], str]:
    """The name or path of a program."""

    def convert(text: str) -> str:
        if not text or text.startswith("-"):
            raise InputError(f"{option} is {shorten(text)!r}; give the name or the path of a program")
        return text

    return convert


def given_model(text: str) -> str:
    """The meaning of `--model`: where the model is. Empty, as an unset variable is, it is no wish for the default model."""
    return path_given("--model", "the path of a model, or leave --model out")(text)


def read_passphrase(option: str, path: str) -> bytes:
    """The passphrase in a file, which others must not be able to read: its one line, in UTF-8. Raises InputError."""
    text = read_text(option, path, MAX_PASSPHRASE_BYTES, secret=True).removesuffix("\n")
    if not text:
        raise InputError(f"{option} {shorten_path(path)} is empty; write a passphrase into it")
    if (lines := text.count("\n") + 1) > 1:  # so that none counts by a line end which nobody sees
        raise InputError(
            f"{option} {shorten_path(path)} has {lines} lines, must be one; write the passphrase on one line"
        )
    return text.encode()


def window_blocks(text: str) -> int | str:
    """The meaning of `--window`: a number of blocks, or "all"."""
    if text == "all":
        return text
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) < SMALLEST_WINDOW:
        raise InputError(
            f"--window is {shorten(text)!r}, must be a number of blocks, {SMALLEST_WINDOW} or more, or all"
        )
    return int(text)


def draft_length(text: str) -> int | None:
    """The meaning of `--speculate`: a number of tokens, 0 for off, None for auto."""
    if text in (AUTO, OFF):
        return None if text == AUTO else 0
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= LONGEST_DRAFT:
        raise InputError(
            f"--speculate is {shorten(text)!r}, must be auto, off, or a number of tokens, 1 to {LONGEST_DRAFT}"
        )
    return int(text)


def audit_rate(text: str) -> float | None:
    """The meaning of `--audit`: the part of the steps that are audited, 0 for off, None for auto."""
    if text in (AUTO, OFF):
        return None if text == AUTO else 0.0
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 1:
        raise InputError(f"--audit is {shorten(text)!r}, must be auto, off, or a part of the steps, over 0 to 1")
    return rate


def memory_limit(text: str) -> MemoryLimit:
    """The meaning of `--memory`: a size of all ranks, or of each, or auto."""
    if text == "auto":
        return MemoryLimit(text, None)
    sizes = text.split(",")
    if len(sizes) > 1 and {"", "auto"} & {size.strip() for size in sizes}:
        raise InputError(
            f"--memory is {shorten(text)!r}, must be auto, or one size, or a size for each rank: 900M,700M,700M"
        )
    return MemoryLimit(text, tuple(parse_size(size, "--memory") for size in sizes))


def against_format(text: str) -> str:
    """The meaning of `--against`: one of WEIGHT_FORMATS."""
    if text not in WEIGHT_FORMATS:
        raise InputError(f"--against is {shorten(text)!r}, must be one of {', '.join(WEIGHT_FORMATS)}")
    return text


def share_weights(text: str | None, ranks: int) -> list[float]:
    """The meaning of `--shares` for so many ranks; equal shares where it is not given."""
    if text is None:
        return [1.0] * ranks
    if text == AUTO:
        raise InputError(
            f"--shares {AUTO} measures the ranks' machines: start it with mpirun, or give numbers such as 2,1"
        )
    try:
        weights = [float(number) for number in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != ranks:
        needed = (
            f"{ranks} numbers with commas between them, one for each rank" if ranks > 1 else "1 number: there is 1 rank"
        )
        raise InputError(f"--shares is {shorten(text)!r}, must be {needed}")
    return weights


def slice_count(ranks: int | None, out: str | None, launched: int | None = None) -> int:
    """The meaning of `--ranks` of `slice` and `synth` beside `--out`; `launched` ranks take part under mpirun."""
    if ranks is None and launched is None:
        raise InputError("--ranks is missing; say how many slices to make")
    if launched is not None and ranks not in (None, launched):
        raise InputError(
            f"--ranks is {ranks}, but mpirun started {launched}, each of which gets its slice; leave --ranks out, or start "
            f"mpirun -np {ranks}"
        )
    if out is None and launched is None:
        raise InputError("--out is missing; give the folder that gets the slices")
    return launched or ranks or 0


def some_of(option: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """Some of `known`, with commas between them: each once."""

    def convert(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise InputError(f"{option} has {shorten(name)!r}, must be some of {', '.join(known)}")
        return list(dict.fromkeys(names))

    return convert


def whole_numbers(option: str, most: int) -> Callable[[str], list[int]]:
    """Whole numbers from 1 to `most`, with commas between them, in ascending order."""

    def convert(text: str) -> list[int]:
        return sorted({count(number, option, most) for number in text.split(",")})

    return convert


def count(text: str, option: str, most: int) -> int:
    """A whole number from 1 to `most` that is part of an option's value."""
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= most:
        raise InputError(f"{option} has {shorten(text)!r}, must be a whole number from 1 to {most}")
    return int(text)
