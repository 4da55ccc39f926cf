"""The options of the commands beside a run: parsed, and checked as far as that needs no model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tpimpi.cli.options import (
    AUTO,
    MOST_THREADS,
    Parser,
    add_computing,
    add_shares,
    check_run,
    memory_sizes,
    share_weights,
    window_blocks,
)
from tpimpi.compute.backends import NAMES
from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.diagnostics.options import AllreduceBenchOptions, DoctorOptions, MeasureOptions, PlanOptions, Workload
from tpimpi.engine.engine import CONTEXT
from tpimpi.errors import InputError
from tpimpi.models.config import ModelConfig
from tpimpi.models.shapes import SHAPES
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.star import ALGORITHMS, WIRES
from tpimpi.system.buffers import PAGE
from tpimpi.system.files import check_writable
from tpimpi.system.units import parse_size

PROMPT_TOKENS = 16  # of the first token that is predicted, where nobody says how many
MOST_RANKS = 4096
MOST_POSITIONS = 1 << 16  # that are benched at once
MOST_SIDE = 1 << 20  # rows or columns of a matrix that is benched
MOST_SECONDS = 3600  # of each measurement
MOST_NUMBERS = 1 << 26  # that are added at once
MOST_ROUNDS = 1000
MOST_READERS = 64  # of a disk that is benched
MOST_READ = 64 << 20  # bytes of each of their reads


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


def _add_allreduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        default="576,4096,8192,65536,1048576",
        metavar="N,N",
        help="numbers that are added at once (default: %(default)s)",
    )
    names = ",".join(ALGORITHMS)
    parser.add_argument("--algorithms", default=names, metavar="A,A", help="some of %(default)s (default: all)")
    parser.add_argument(
        "--wire", default="f32", metavar="W,W", help=f"some of {','.join(WIRES)} (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="draw time against size as a PNG (needs matplotlib)")
    parser.add_argument("--quiet", action="store_true", help="only the table, and errors")


def slice_parser() -> argparse.ArgumentParser:
    """Options of `slice`."""
    parser = Parser(
        prog="python -m tpimpi slice",
        description="Make the ranks' slices of a model. Under mpirun each rank's slice goes to that rank's own disk. What "
        "is there already stays; what was interrupted goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="PATH", help="Hugging Face directory or .gguf file (default: as in a run)")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="how many slices to make (default: as many as mpirun starts)"
    )
    add_shares(parser)
    parser.add_argument("--format", default="auto", help=f"auto, {', '.join(WEIGHT_FORMATS)} (default: as in a run)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="gets rank-R-of-N.h5 for each rank R (default, under mpirun: each host's cache folder, where a run looks)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every tile that is there, and make again what is broken"
    )
    parser.add_argument("--quiet", action="store_true", help="only errors")
    return parser


def plan_parser() -> argparse.ArgumentParser:
    """Options of `plan`: those of a run, as far as they say what is computed, and how."""
    parser = Parser(
        prog="python -m tpimpi plan",
        description="Predict how fast a model would be with 1 rank, 2, … of those that mpirun starts, from measuring each "
        "number for some seconds; nothing is sliced or loaded.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="PATH", help="Hugging Face directory or .gguf file (default: as in a run)")
    group.add_argument("--shape", metavar="NAME", help="instead: a known model's shape, or a config.json (see synth)")
    group.add_argument(
        "--layers", type=int, metavar="N", help="with --shape: so many layers (default: as the shape has)"
    )
    group.add_argument("--format", help="as in a run (default: auto; with --shape q4_0)")
    add_shares(group)
    group.add_argument(
        "--context", type=int, metavar="N", help="positions to keep room for (default: 2048, or the model's limit)"
    )
    group.add_argument(
        "--prompt-tokens", type=int, default=PROMPT_TOKENS, metavar="N", help="of the first token (default 16)"
    )
    add_computing(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write everything as JSON")
    group.add_argument("--quiet", action="store_true", help="do not say what is being measured")
    parser.set_defaults(max_tokens=None, report=None)
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


def doctor_parser() -> argparse.ArgumentParser:
    """Options of `doctor`."""
    parser = Parser(
        prog="python -m tpimpi doctor",
        description="Under mpirun: what every rank has, what the links between them give, what is wrong, what to type to "
        "mend it. With --hostfile, without mpirun: whether ranks can be started on those hosts. Exit code 1 where something "
        "is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("--hostfile", metavar="FILE", help="without mpirun: look at the hosts of that file, over ssh")
    parser.add_argument(
        "--ssh",
        default="ssh",
        metavar="PROGRAM",
        help="with --hostfile: instead of ssh, called as PROGRAM HOST COMMAND",
    )
    parser.add_argument("--model", metavar="PATH", help="look for the slices of that model (default: as in a run)")
    parser.add_argument("--slices", metavar="DIR", help="look for the slices in that folder")
    parser.add_argument("--format", default="auto", help="of the slices, as in a run")
    add_shares(parser)
    parser.add_argument("--json", metavar="FILE", help="write everything that was found as JSON")
    return parser


# What the diagnostics take


def workload(
    options: argparse.Namespace, config: ModelConfig, formats: ModelFormats, prompt: int = PROMPT_TOKENS
) -> Workload:
    """What the options of a run say of it, as far as it matters for its speed; `prompt` is in tokens."""
    memory = memory_sizes(options.memory)
    return Workload(
        config=config,
        formats=formats,
        context=min(options.context or CONTEXT, config.context),
        prompt=min(prompt, config.context - 1),
        memory=None if memory is None else tuple(memory),
        kv=options.kv,
        window=window_blocks(options.window),
    )


def measure_options(options: argparse.Namespace) -> MeasureOptions:
    """How the options of a run say that it computes."""
    return MeasureOptions(options.backend, options.threads, options.allreduce, options.wire)


def plan_options(options: argparse.Namespace, config: ModelConfig, formats: ModelFormats, ranks: int) -> PlanOptions:
    """The options of `plan` for a model and so many ranks. Raises InputError where they do not suit these."""
    shares = None if options.shares in (None, AUTO) else tuple(share_weights(options.shares, ranks))
    if (options.context or 1) > config.context:
        raise InputError(
            f"--context is {options.context}, this model has {config.context} positions; give at most that"
        )
    if options.prompt_tokens >= config.context:
        raise InputError(
            f"--prompt-tokens is {options.prompt_tokens}, this model has {config.context} positions; give fewer"
        )
    return PlanOptions(
        workload=workload(options, config, formats, options.prompt_tokens),
        measuring=measure_options(options),
        shares=shares,
        json=_path(options.json),
        quiet=options.quiet,
    )


def doctor_options(arguments: list[str], ranks: int) -> DoctorOptions:
    """The options of `doctor` for so many ranks. Raises InputError for what cannot be used."""
    options = doctor_parser().parse_args(arguments)
    check_doctor(options)
    shares = None
    if options.shares != AUTO and options.hostfile is None and options.slices is None:
        shares = tuple(share_weights(options.shares, ranks))
    return DoctorOptions(
        hostfile=options.hostfile,
        ssh=options.ssh,
        model=options.model,
        slices=options.slices,
        format=options.format,
        shares=shares,
        json=_path(options.json),
    )


def allreduce_bench_options(arguments: list[str]) -> AllreduceBenchOptions:
    """The options of `bench allreduce`. Raises InputError for what cannot be used."""
    options = bench_parser().parse_args(arguments)
    check_bench(options)
    return AllreduceBenchOptions(
        sizes=tuple(bench_numbers(options.sizes)),
        algorithms=tuple(some_of(options.algorithms, "--algorithms", tuple(ALGORITHMS))),
        wires=tuple(some_of(options.wire, "--wire", WIRES)),
        rounds=options.repeats,
        json=_path(options.json),
        plot=_path(options.plot),
        quiet=options.quiet,
    )


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given)


# What argparse cannot check


def check_bench(options: argparse.Namespace) -> None:
    """Raise InputError for an option of `bench` that is out of range."""
    if options.json is not None:
        check_writable(options.json, "--json")
    if options.what == "allreduce":
        bench_numbers(options.sizes)
        some_of(options.algorithms, "--algorithms", tuple(ALGORITHMS))
        some_of(options.wire, "--wire", WIRES)
        if not 1 <= options.repeats <= MOST_ROUNDS:
            raise InputError(f"--repeats is {options.repeats}, must be 1 to {MOST_ROUNDS}")
        if options.plot is not None:
            from tpimpi.diagnostics.plots import check_plot  # which most runs do without

            check_plot(options.plot)
        return
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


def check_plan(options: argparse.Namespace) -> None:
    """Raise InputError for an option of `plan` that is out of range."""
    check_run(options)
    if options.prompt_tokens < 1:
        raise InputError(f"--prompt-tokens is {options.prompt_tokens}, must be 1 or more")
    if options.model is not None and options.shape is not None:
        raise InputError("--model and --shape are both given; give one of them")
    if options.layers is not None and options.shape is None:
        raise InputError("--layers is for --shape; leave it out, or name a shape")
    if options.json is not None:
        check_writable(options.json, "--json")


def check_doctor(options: argparse.Namespace) -> None:
    """Raise InputError for options of `doctor` that cannot be used."""
    for name in ("model", "slices"):
        if options.hostfile is not None and getattr(options, name) is not None:
            raise InputError(f"--{name} is looked for under mpirun; leave it out with --hostfile")
    if not options.ssh or options.ssh.startswith("-"):
        raise InputError(f"--ssh is {options.ssh[:40]!r}; give the name or the path of a program")
    if options.json is not None:
        check_writable(options.json, "--json")


def bench_formats(text: str) -> list[str]:
    """The meaning of `bench --formats`: some of WEIGHT_FORMATS, each once."""
    return some_of(text, "--formats", WEIGHT_FORMATS)


def some_of(text: str, option: str, known: Sequence[str]) -> list[str]:
    """The meaning of an option that takes some of `known`, with commas between them: each once."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise InputError(f"{option} has {name[:40]!r}, must be some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def bench_numbers(text: str) -> list[int]:
    """The meaning of `bench allreduce --sizes`, in ascending order."""
    return sorted({_count(number, "--sizes", MOST_NUMBERS) for number in text.split(",")})


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


def ranks_of_slices(options: argparse.Namespace, launched: int | None = None) -> int:
    """The meaning of `--ranks` of `slice` and `synth`, and a check of `--out`; `launched` ranks take part under mpirun."""
    if options.ranks is None and launched is None:
        raise InputError("--ranks is missing; say how many slices to make")
    ranks = int(launched or 0) if options.ranks is None else int(options.ranks)
    if not 1 <= ranks <= MOST_RANKS:
        raise InputError(f"--ranks is {ranks}, must be 1 to {MOST_RANKS}")
    if launched is not None and ranks != launched:
        raise InputError(
            f"--ranks is {ranks}, but mpirun started {launched}, each of which gets its slice; leave --ranks out, or start "
            f"mpirun -np {ranks}"
        )
    if options.out is None and launched is None:
        raise InputError("--out is missing; give the folder that gets the slices")
    if options.out is not None and not options.out:
        raise InputError("--out is empty; give the folder that gets the slices")
    return ranks
