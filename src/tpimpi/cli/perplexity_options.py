"""The parser of `perplexity`: from arguments to options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tpimpi.cli.options import ComputeOptions, ModelOptions, NetworkOptions, OutputOptions, PerplexityOptions
from tpimpi.cli.outputs import check_outputs
from tpimpi.cli.parser import Parser, offer
from tpimpi.cli.run_options import check_combinations, parsed_into
from tpimpi.cli.run_parser import add_computing, add_model
from tpimpi.cli.values import against_format, path_given, whole_number
from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.errors import InputError
from tpimpi.serving.perplexity import CHUNK_POSITIONS

NOTHING_TO_PREDICT = ": a token is predicted from those before it"  # with fewer than two


def perplexity_parser() -> argparse.ArgumentParser:
    """Options of `perplexity`: those of a run, as far as they say how to compute."""
    parser = Parser(
        prog="python -m tpimpi perplexity",
        description="How well a model predicts a text, and what a format costs against another. Works under mpirun too.",
        allow_abbrev=False,
    )
    text = path_given("the text's name", "a file in UTF-8")
    parser.add_argument("text", type=text, metavar="FILE", help="a text in UTF-8, read by rank 0 alone")
    group = parser.add_argument_group("measuring")
    against = group.add_argument(
        "--against",
        type=against_format,
        metavar="FORMAT",
        help="run the model in this format too, f32 say, and give the mean KL divergence from it; both are held in memory",
    )
    offer(against, WEIGHT_FORMATS)
    group.add_argument(
        "--context",
        type=whole_number("--context", 2, why=NOTHING_TO_PREDICT),
        metavar="N",
        help=f"positions of each chunk, 2 or more (default {CHUNK_POSITIONS}, or what the model has)",
    )
    group.add_argument(
        "--max-tokens",
        type=whole_number("--max-tokens", 2, why=NOTHING_TO_PREDICT),
        metavar="N",
        help="use the first N tokens of the text (default: all)",
    )
    second_half = "score the second half of each whole chunk alone, as llama.cpp's llama-perplexity does (default: all)"
    group.add_argument("--second-half", action="store_true", help=second_half)
    add_model(parser)
    add_computing(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="only the result, and errors")
    group.add_argument("--report", metavar="FILE", help="write everything that was measured as JSON")
    return parser


def parse_perplexity(arguments: Sequence[str]) -> PerplexityOptions:
    """The options of `perplexity`. Raises InputError for what cannot be used."""
    parsed = perplexity_parser().parse_args(arguments)
    options = PerplexityOptions(
        text=parsed.text,
        against=parsed.against,
        context=parsed.context,
        max_tokens=parsed.max_tokens,
        second_half=parsed.second_half,
        model=parsed_into(ModelOptions, parsed),
        compute=parsed_into(ComputeOptions, parsed),
        network=parsed_into(NetworkOptions, parsed),
        output=OutputOptions(quiet=parsed.quiet, report=parsed.report),
    )
    check_combinations(options.compute, options.network, options.model)
    check_outputs(options.output, (options.model.model, options.text))
    if options.against is not None and options.model.slices is not None and options.model.model is None:
        raise InputError("--against makes slices of its own, for which --slices is not enough; give --model too")
    return options
