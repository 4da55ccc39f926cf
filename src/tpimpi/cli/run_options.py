"""The options of a run: from what was parsed to frozen options, and what they mean beside each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

from tpimpi.cli.options import (
    DROP,
    ComputeOptions,
    GenerateOptions,
    ModelOptions,
    NetworkOptions,
    OutputOptions,
    RunOptions,
    SamplingOptions,
)
from tpimpi.cli.outputs import check_outputs
from tpimpi.cli.run_parser import run_parser
from tpimpi.cli.values import (
    AUTO,
)
from tpimpi.errors import InputError
from tpimpi.serving.session import SAMPLING

Options = TypeVar("Options")


# From what was parsed to options


def parse_run(arguments: Sequence[str]) -> RunOptions:
    """The options of a run. Raises InputError for what cannot be used."""
    parsed = run_parser().parse_args(arguments)
    sampling = {name: getattr(parsed, name) for name in SAMPLING}
    given = {name: value for name, value in sampling.items() if value is not None}
    generate = GenerateOptions(
        prompt=parsed.prompt,
        prompt_file=parsed.prompt_file,
        batch_file=parsed.batch_file,
        out=parsed.out,
        parallel=parsed.parallel,
        session=parsed.session,
        session_key_file=parsed.session_key_file,
        keep_cache=parsed.keep_cache,
        system=parsed.system,
        system_file=parsed.system_file,
        overflow=parsed.overflow,
        max_tokens=parsed.max_tokens,
        context=parsed.context,
        stop=tuple(parsed.stop),
        stop_file=parsed.stop_file,
        ignore_eos=parsed.ignore_eos,
        speculate=parsed.speculate,
        draft=parsed.draft,
        chat_template=parsed.chat_template,
        sampling=SamplingOptions(**given),
        given=given,
    )
    options = RunOptions(
        model=parsed_into(ModelOptions, parsed),
        compute=parsed_into(ComputeOptions, parsed),
        network=parsed_into(NetworkOptions, parsed),
        generate=generate,
        output=parsed_into(OutputOptions, parsed),
        audit=parsed.audit,
    )
    _check_generate(generate, options.output)
    _check_batch(generate, options.output)
    check_combinations(options.compute, options.network, options.model)
    inputs = (
        generate.prompt_file,
        generate.session_key_file,
        generate.batch_file,
        generate.stop_file,
        generate.session,
        generate.chat_template,
        generate.system_file,
    )
    check_outputs(options.output, (options.model.model, *inputs), generate.session, generate.out)
    return options


def _check_generate(generate: GenerateOptions, output: OutputOptions) -> None:
    """Raise InputError for options of an answer that exclude or need each other."""
    if generate.prompt is not None and generate.prompt_file is not None:
        raise InputError("--prompt and --prompt-file are both given; give one of them")
    if generate.keep_cache is not None and generate.session is None:
        raise InputError(
            "--keep-cache is given and --session is not, whose keys and values it keeps; give both, or leave it out"
        )
    if generate.session_key_file is not None and generate.session is None:
        raise InputError(
            "--session-key-file is given and --session is not, which it encrypts; give both, or leave it out"
        )
    check_draft(generate)
    if output.record_routing is not None and (generate.draft is not None or generate.speculate):
        option = "--speculate" if generate.draft is None else "--draft"
        raise InputError(
            f"--record-routing records what the text alone chooses, without {option}; leave one of them out"
        )


def check_draft(generate: GenerateOptions) -> None:
    """Raise InputError for a draft model that is not to draft."""
    if generate.draft is not None and generate.speculate == 0:
        raise InputError("--draft is given and --speculate is off; leave one of them out")


def _check_batch(generate: GenerateOptions, output: OutputOptions) -> None:
    """Raise InputError for what has no meaning with --batch-file, or without it."""
    if generate.batch_file is None:
        for option, value in (("--out", generate.out), ("--parallel", generate.parallel)):
            if value is not None:
                raise InputError(f"{option} is for --batch-file, which is not given; give it, or leave out {option}")
        return
    if generate.out is None:
        raise InputError("--batch-file is given, and no --out; give the name of a file for the answers")
    others = {
        "--prompt": generate.prompt,
        "--prompt-file": generate.prompt_file,
        "--session": generate.session,
        "--record-routing": output.record_routing,
        "--overflow": DROP if generate.overflow == DROP else None,
    }
    for option, given in others.items():
        if given is not None:
            raise InputError(f"--batch-file and {option} are both given; give one of them")


def parsed_into(group: type[Options], parsed: argparse.Namespace) -> Options:
    """A dataclass of options, each from what was parsed under its name."""
    return group(**{option.name: getattr(parsed, option.name) for option in fields(group)})  # type: ignore[arg-type]


# What options mean beside each other


def check_combinations(compute: ComputeOptions, network: NetworkOptions, model: ModelOptions | None = None) -> None:
    """Raise InputError for options that exclude each other."""
    if network.allreduce == "library" and network.wire != "f32":
        raise InputError(f"--allreduce library adds f32 alone, and --wire is {network.wire}; give another --allreduce")
    if compute.window is not None and compute.memory is not None:
        both = f"--window {compute.window} and --memory {compute.memory.given}"
        raise InputError(f"{both} are both given; give one of them")
    if model is not None and model.shares == AUTO and model.slices is not None:
        raise InputError(
            "--shares auto chooses shares for slices that are yet to be made; leave out --slices, or --shares"
        )
