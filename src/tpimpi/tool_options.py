"""The options of the commands beside a run: parsed, and checked as far as that needs no model."""

from __future__ import annotations

import argparse

from tpimpi.backends import NAMES
from tpimpi.buffers import PAGE
from tpimpi.errors import InputError
from tpimpi.formats import WEIGHT_FORMATS
from tpimpi.memory import parse_size
from tpimpi.options import MOST_THREADS, Parser
from tpimpi.report import check_writable
from tpimpi.shapes import SHAPES

MOST_RANKS = 4096
MOST_POSITIONS = 1 << 16  # that are benched at once
MOST_SIDE = 1 << 20  # rows or columns of a matrix that is benched
MOST_SECONDS = 3600  # of each measurement
MOST_READERS = 64  # of a disk that is benched
MOST_READ = 64 << 20  # bytes of each of their reads


def bench_parser() -> argparse.ArgumentParser:
    """Options of `bench`: `what` is kernels or disk."""
    parser = Parser(
        prog="python -m tpimpi bench",
        description="Measure what this machine gives.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="kernels|disk", help="what is measured")
    kernels = "Time the kernels on matrices that the caches do not hold, beside torch where it is installed."
    disk = "Read as the ranks of a run do: through the page cache, and past it with 1 to 8 reads in flight."
    for name, about, add in (("kernels", kernels, _add_kernels), ("disk", disk, _add_disk)):
        command = commands.add_parser(name, description=about, help=about, allow_abbrev=False)
        add(command)
        command.add_argument("--json", metavar="FILE", help="write everything that was measured as JSON")
        parser.epilog = f"{parser.epilog or ''}{command.format_help()}\n"
    return parser


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--formats", default=",".join(WEIGHT_FORMATS), metavar="F,F", help="weight formats (default: %(default)s)"
    )
    parser.add_argument(
        "--positions",
        default="1,4,8,16,128,512",
        metavar="N,N",
        help="numbers of positions computed at once (default: %(default)s)",
    )
    parser.add_argument(
        "--shape",
        default="11008x4096",
        metavar="OUTxIN",
        help="rows and columns of the matrix (default: %(default)s, Llama 7B's)",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument(
        "--backend", choices=NAMES, help="bench this one (default: native where it is installed, else the others)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="of each measurement, at least one call (default 1)"
    )


def _add_disk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="a slice file, a folder of slices, or any file (default: the cache folder)",
    )
    parser.add_argument(
        "--readers", type=int, default=1, metavar="N", help="that read at once, as ranks do (default 1)"
    )
    parser.add_argument("--size", default="8MiB", metavar="SIZE", help="of a read (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of each measurement (default 2)")


def slice_parser() -> argparse.ArgumentParser:
    """Options of `slice`."""
    parser = Parser(prog="python -m tpimpi slice", description="Make the ranks' slices of a model.", allow_abbrev=False)
    parser.add_argument("--model", metavar="PATH", help="Hugging Face directory or .gguf file (default: as in a run)")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="how many slices to make")
    parser.add_argument("--shares", metavar="3,1,1,1", help="proportion of the model for each rank (default: equal)")
    parser.add_argument("--format", default="auto", help=f"auto, {', '.join(WEIGHT_FORMATS)} (default: as in a run)")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets rank-R-of-N.h5 for each rank R")
    parser.add_argument("--quiet", action="store_true", help="only errors")
    return parser


def synth_parser() -> argparse.ArgumentParser:
    """Options of `synth`."""
    parser = Parser(
        prog="python -m tpimpi synth",
        description="Write random weights in a known model's shape, to measure speed and memory with: no tokenizer, and "
        "answers without sense.",
        allow_abbrev=False,
    )
    shapes = f"{', '.join(SHAPES)}, or the path of a config.json or of its folder"
    parser.add_argument("--shape", required=True, metavar="NAME", help=shapes)
    parser.add_argument("--layers", type=int, metavar="N", help="so many layers (default: as the shape has)")
    parser.add_argument("--format", default="q4_0", help=f"{', '.join(WEIGHT_FORMATS)} (default q4_0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other weights for another one (default 0)")
    parser.add_argument(
        "--as",
        dest="kind",
        default="slices",
        choices=("slices", "hf", "gguf"),
        help="slices (the default), or the same weights as a Hugging Face folder in bf16 or as a GGUF file",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="how many slices to make")
    parser.add_argument("--shares", metavar="3,1,1,1", help="proportion of the model for each rank (default: equal)")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="folder of the slices, or of hf; or the .gguf file"
    )
    parser.add_argument("--quiet", action="store_true", help="only errors")
    return parser


def inspect_parser() -> argparse.ArgumentParser:
    """Options of `inspect`."""
    parser = Parser(
        prog="python -m tpimpi inspect",
        description="Show what a model, a slice file or a folder of them holds.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--verify", action="store_true", help="read and check everything")
    return parser


# What argparse cannot check


def check_bench(options: argparse.Namespace) -> None:
    """Raise InputError for an option of `bench` that is out of range."""
    if options.what == "disk":
        read_size(options.size)
        if not 1 <= options.readers <= MOST_READERS:
            raise InputError(f"--readers is {options.readers}, must be 1 to {MOST_READERS}")
    else:
        bench_formats(options.formats)
        bench_positions(options.positions)
        bench_shape(options.shape)
        if not 1 <= options.threads <= MOST_THREADS:
            raise InputError(f"--threads is {options.threads}, must be 1 to {MOST_THREADS}")
    if not 0 < options.seconds <= MOST_SECONDS:
        raise InputError(f"--seconds is {options.seconds:g}, must be a number over 0, at most {MOST_SECONDS}")
    if options.json is not None:
        check_writable(options.json, "--json")


def bench_formats(text: str) -> list[str]:
    """The meaning of `bench --formats`: some of WEIGHT_FORMATS, each once."""
    formats = text.split(",")
    for fmt in formats:
        if fmt not in WEIGHT_FORMATS:
            raise InputError(f"--formats has {fmt[:40]!r}, must be some of {', '.join(WEIGHT_FORMATS)}")
    return list(dict.fromkeys(formats))


def bench_positions(text: str) -> list[int]:
    """The meaning of `bench --positions`, in ascending order."""
    return sorted({_count(number, "--positions", MOST_POSITIONS) for number in text.split(",")})


def bench_shape(text: str) -> tuple[int, int]:
    """The meaning of `bench --shape`: (rows, columns)."""
    parts = text.split("x")
    if len(parts) != 2:
        raise InputError(f"--shape is {text[:40]!r}, must be rows and columns, such as 11008x4096")
    rows, columns = (_count(number, "--shape", MOST_SIDE) for number in parts)
    return rows, columns


def read_size(text: str) -> int:
    """The meaning of `bench disk --size`: bytes, as O_DIRECT wants them."""
    size = parse_size(text, "--size", least=PAGE)
    if size % PAGE or size > MOST_READ:
        raise InputError(f"--size is {text[:40]}, must be a multiple of {PAGE} bytes, at most {MOST_READ >> 20}MiB")
    return size


def _count(text: str, option: str, most: int) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= most:
        raise InputError(f"{option} has {text[:40]!r}, must be a whole number from 1 to {most}")
    return int(text)


def ranks_of_slices(options: argparse.Namespace) -> int:
    """The meaning of `slice --ranks`, and a check of `--out`."""
    if not 1 <= options.ranks <= MOST_RANKS:
        raise InputError(f"--ranks is {options.ranks}, must be 1 to {MOST_RANKS}")
    if not options.out:
        raise InputError("--out is empty; give the folder that gets the slices")
    ranks: int = options.ranks
    return ranks
