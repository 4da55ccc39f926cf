"""`inspect`: what a model, a slice file or a folder holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tpimpi.cli.parser import Parser
from tpimpi.cli.process import Job
from tpimpi.cli.values import path_given
from tpimpi.diagnostics.inspect import inspect
from tpimpi.system.files import check_writable


def inspect_parser() -> argparse.ArgumentParser:
    """Options of `inspect`."""
    parser = Parser(
        prog="python -m tpimpi inspect",
        description="Show what a model, a slice file or a folder of them holds, and whether tpimpi runs the model.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=path_given("the path", "the path of a model or of slices"), metavar="PATH")
    parser.add_argument("--verify", action="store_true", help="read and check everything")
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON")
    return parser


@dataclass(frozen=True)
class InspectOptions:
    """What `inspect` takes."""

    path: Path
    verify: bool = False
    json: Path | None = None


def parse_inspect(arguments: Sequence[str]) -> InspectOptions:
    """The options of `inspect`. Raises InputError for what cannot be used."""
    parsed = inspect_parser().parse_args(arguments)
    if parsed.json is not None:
        check_writable(parsed.json, "--json", [parsed.path])
    return InspectOptions(Path(parsed.path), parsed.verify, None if parsed.json is None else Path(parsed.json))


def inspect_alone(job: Job) -> int:
    """The whole command."""
    options = parse_inspect(job.arguments[1:])
    inspect(
        options.path, verify=options.verify, json=options.json, check_tokenizer=partial(_check_tokenizer, options.path)
    )
    return 0


def _check_tokenizer(path: Path, assets: dict[str, bytes], vocab: int) -> None:
    """Raise ModelError where a run could make no tokenizer of these files, which are of the model at `path`."""
    from tpimpi.serving.text.load import load_tokenizer  # which only a model needs
    from tpimpi.serving.tokenizer_trial import try_tokenizer

    try_tokenizer(assets, vocab, path)
    load_tokenizer(assets, vocab)
