"""`bench`: what the kernels, a disk, or the network between the ranks give."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpimpi.cli.network_options import add_seal
from tpimpi.cli.parser import Parser
from tpimpi.cli.process import Job, say
from tpimpi.cli.run_parser import add_kernels
from tpimpi.cli.values import MAX_THREADS, count, path_given, seconds, some_of, whole_number, whole_numbers
from tpimpi.compute.backends import BACKEND_NAMES
from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.diagnostics.bench.options import AllreduceBenchOptions, DiskBenchOptions, KernelBenchOptions
from tpimpi.engine.ranks import gather_rank_infos
from tpimpi.errors import InputError, shorten
from tpimpi.star import ALGORITHMS, WIRES, Star
from tpimpi.star.control import StopNote, send_note, stop_others_on_error
from tpimpi.system.buffers import PAGE_BYTES
from tpimpi.system.files import check_writable, write_json
from tpimpi.system.units import parse_size

MAX_POSITIONS = 1 << 16  # that are benched at once
MAX_SIDE = 1 << 20  # rows or columns of a matrix that is benched
MAX_SECONDS = 3600  # of each measurement
MAX_NUMBERS = 1 << 26  # that are added at once
MAX_ROUNDS = 1000
MAX_READERS = 64  # of a disk that is benched
MAX_READ_BYTES = 64 << 20  # of each of their reads
SECONDS = seconds("--seconds", most=MAX_SECONDS, needed=f"a number over 0, at most {MAX_SECONDS}")


def bench_parser() -> argparse.ArgumentParser:
    """Options of `bench`: `what` is kernels, disk or allreduce."""
    parser = Parser(
        prog="python -m tpimpi bench",
        description="Measure what this machine gives, and the network between several.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="what", required=True, metavar="kernels|disk|allreduce", help="what is measured"
    )
    kernels = "Time the kernels on matrices that the caches do not hold, beside torch where it is installed."
    disk = "Read as the ranks of a run do: through the page cache, and past it with 1 to 8 reads in flight."
    allreduce = "Under mpirun: time every way of adding over the ranks, beside two hops between rank 0 and another."
    whats = (("kernels", kernels, _add_kernels), ("disk", disk, _add_disk), ("allreduce", allreduce, _add_allreduce))
    for name, about, add in whats:
        command = commands.add_parser(name, description=about, help=about, allow_abbrev=False)
        add(command)
        command.add_argument("--json", metavar="FILE", help="write everything that was measured as JSON")
        parser.epilog = f"{parser.epilog or ''}{command.format_help()}\n"
    return parser


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--formats",
        type=some_of("--formats", WEIGHT_FORMATS),
        default=",".join(WEIGHT_FORMATS),
        metavar="F,F",
        help="weight formats (default: %(default)s)",
    )
    parser.add_argument(
        "--positions",
        type=whole_numbers("--positions", MAX_POSITIONS),
        default="1,4,8,16,128,512",
        metavar="N,N",
        help="numbers of positions computed at once (default: %(default)s)",
    )
    parser.add_argument(
        "--shape",
        type=matrix_shape,
        default="11008x4096",
        metavar="OUTxIN",
        help="rows and columns of the matrix (default: %(default)s, Llama 7B's)",
    )
    parser.add_argument(
        "--threads", type=whole_number("--threads", 1, MAX_THREADS), default=1, metavar="N", help="default 1"
    )
    add_kernels(parser)
    parser.add_argument(
        "--backend",
        choices=BACKEND_NAMES,
        help="bench this one (default: native where it is installed, else the others)",
    )
    parser.add_argument(
        "--seconds", type=SECONDS, default=1.0, metavar="S", help="of each measurement, at least one call (default 1)"
    )


def _add_disk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=path_given("the path", "a file or a folder, or leave it out"),
        nargs="?",
        metavar="PATH",
        help="a slice file, a folder of slices, or any file (default: the cache folder)",
    )
    parser.add_argument(
        "--readers",
        type=whole_number("--readers", 1, MAX_READERS),
        default=1,
        metavar="N",
        help="that read at once, as ranks do (default 1)",
    )
    parser.add_argument(
        "--size", type=read_bytes, default="8MiB", metavar="SIZE", help="of a read (default %(default)s)"
    )
    parser.add_argument("--seconds", type=SECONDS, default=2.0, metavar="S", help="of each measurement (default 2)")


def _add_allreduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        type=whole_numbers("--sizes", MAX_NUMBERS),
        default="576,4096,8192,65536,1048576",
        metavar="N,N",
        help="numbers that are added at once (default: %(default)s)",
    )
    names = ",".join(ALGORITHMS)
    parser.add_argument(
        "--algorithms",
        type=some_of("--algorithms", tuple(ALGORITHMS)),
        default=names,
        metavar="A,A",
        help="some of %(default)s (default: all)",
    )
    parser.add_argument(
        "--wire",
        type=some_of("--wire", WIRES),
        default="f32",
        metavar="W,W",
        help=f"some of {','.join(WIRES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=whole_number("--repeats", 1, MAX_ROUNDS),
        default=7,
        metavar="N",
        help="rounds (default %(default)s)",
    )
    add_seal(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw time against size as a PNG (needs matplotlib)")
    parser.add_argument("--quiet", action="store_true", help="only the table, and errors")


# The meaning of single values


def matrix_shape(text: str) -> tuple[int, int]:
    """The meaning of `--shape`: (rows, columns)."""
    parts = text.split("x")
    if len(parts) != 2:
        raise InputError(f"--shape is {shorten(text)!r}, must be rows and columns, such as 11008x4096")
    rows, columns = (count(number, "--shape", MAX_SIDE) for number in parts)
    return rows, columns


def read_bytes(text: str) -> int:
    """The meaning of `--size`: bytes, as O_DIRECT wants them."""
    size = parse_size(text, "--size", least=PAGE_BYTES)
    if size % PAGE_BYTES or size > MAX_READ_BYTES:
        raise InputError(
            f"--size is {shorten(text)}, must be a multiple of {PAGE_BYTES} bytes, at most {MAX_READ_BYTES >> 20}MiB"
        )
    return size


# The options


BenchOptions = KernelBenchOptions | DiskBenchOptions | AllreduceBenchOptions


def parse_bench(arguments: Sequence[str]) -> BenchOptions:
    """The options of the bench that the first argument names. Raises InputError for what cannot be used."""
    parsed = bench_parser().parse_args(arguments)
    json = None if parsed.json is None else Path(parsed.json)
    if json is not None:
        check_writable(parsed.json, "--json")
    if parsed.what == "kernels":
        return KernelBenchOptions(
            formats=tuple(parsed.formats),
            positions=tuple(parsed.positions),
            shape=parsed.shape,
            threads=parsed.threads,
            kernels=parsed.kernels,
            backend=parsed.backend,
            seconds=parsed.seconds,
            json=json,
        )
    if parsed.what == "disk":
        path = None if parsed.path is None else Path(parsed.path)
        return DiskBenchOptions(path, parsed.readers, read_bytes=parsed.size, seconds=parsed.seconds, json=json)
    if parsed.plot is not None:
        from tpimpi.diagnostics.plots import check_plot  # which most runs do without

        check_plot(parsed.plot)
    return AllreduceBenchOptions(
        sizes=tuple(parsed.sizes),
        algorithms=tuple(parsed.algorithms),
        wires=tuple(parsed.wire),
        rounds=parsed.repeats,
        json=json,
        plot=None if parsed.plot is None else Path(parsed.plot),
        quiet=parsed.quiet,
    )


# The commands


def bench_alone(job: Job) -> int:
    """`bench kernels` and `bench disk`."""
    options = parse_bench(job.arguments[1:])
    if isinstance(options, AllreduceBenchOptions):
        raise InputError("bench allreduce measures between ranks; start it with mpirun -np 2, or more")
    found = _bench_disk(options) if isinstance(options, DiskBenchOptions) else _bench_kernels(options)
    if options.json is not None:
        write_json(options.json, found, "--json")
    return 0


def _bench_kernels(options: KernelBenchOptions) -> dict[str, Any]:
    """Measure, and print the table; returns what `--json` writes."""
    from tpimpi.compute.backends import load_backend
    from tpimpi.diagnostics.bench import kernels

    backend, remark = kernels.choose_backend(options.backend)
    say(remark)
    load_backend(backend, options.threads, options.kernels)  # what is wrong with these is said before the work
    say(kernels.duration(options.formats, options.positions, options.seconds))
    shape, threads = options.shape, options.threads
    bench = kernels.Bench(backend, options.formats, options.positions, shape, threads, options.kernels)
    table, limits = bench.run(options.seconds, say)
    kernels.print_table(table, bench.title(), limits)
    return bench.as_json(table, limits)


def _bench_disk(options: DiskBenchOptions) -> dict[str, Any]:
    """Measure, and print the table; returns what `--json` writes."""
    from tpimpi.diagnostics.bench import disk
    from tpimpi.weights.locations import cache_folder

    with disk.Bench(options.path or cache_folder(), options.readers, options.read_bytes) as bench:
        table = bench.run(options.seconds, _say_round)
        disk.print_table(table, bench.title())
        return bench.as_json(table)


def _say_round(number: int, rounds: int) -> None:
    say(f"round {number} of {rounds}")


def bench_together(star: Star, job: Job) -> int:
    """Rank 0 of `bench allreduce`."""
    from tpimpi.diagnostics.bench import allreduce

    with stop_others_on_error(star):
        hosts = [rank.host for rank in gather_rank_infos(star, job.arguments)]
        options = parse_bench(job.arguments[1:])
        assert isinstance(options, AllreduceBenchOptions)  # the others are done by a process alone
        allreduce.bench(options, star, hosts)
    send_note(star, StopNote(0))
    return 0
