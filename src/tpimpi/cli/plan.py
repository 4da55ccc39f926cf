"""`plan`: how fast a model would be with 1 rank, 2, … of those that are there, and how to share it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tpimpi.cli.options import ComputeOptions, NetworkOptions
from tpimpi.cli.parser import Parser, offer
from tpimpi.cli.prepare import PROMPT_TOKENS, measure_options, workload
from tpimpi.cli.process import Job
from tpimpi.cli.run_options import check_combinations, parsed_into
from tpimpi.cli.run_parser import MAX_PARALLEL, add_computing, add_shares
from tpimpi.cli.values import AUTO, given_model, path_given, seconds, share_weights, whole_number
from tpimpi.compute.experts import RoutingTrace
from tpimpi.diagnostics.options import PlanOptions
from tpimpi.diagnostics.planner.command import plan
from tpimpi.engine.ranks import gather_rank_infos
from tpimpi.errors import InputError
from tpimpi.models.config import ModelConfig
from tpimpi.models.shapes import load_shape
from tpimpi.models.weight_formats import FORMAT_CHOICES, ModelFormats
from tpimpi.star import Star
from tpimpi.star.control import StopNote, send_note, stop_others_on_error
from tpimpi.system.files import check_writable
from tpimpi.weights.locations import model_path
from tpimpi.weights.make import choose_formats, wanted_formats
from tpimpi.weights.sources import open_source
from tpimpi.weights.sources.synthetic import read_trace


@dataclass(frozen=True)
class PlanCommand:
    """What the command line says; PlanOptions are made of it once the model is known."""

    model: str | None
    shape: str | None
    layers: int | None
    format: str | None
    shares: str | None
    context: int | None
    prompt_tokens: int
    parallel: int
    accepted: float | None
    draft: str | None
    routing: str | None
    json: str | None
    quiet: bool


def plan_parser() -> argparse.ArgumentParser:
    """Options of `plan`: those of a run, as far as they say what is computed, and how."""
    parser = Parser(
        prog="python -m tpimpi plan",
        description="Predict how fast a model would be with 1 rank, 2, … of those that mpirun starts, from measuring each "
        "number for some seconds; nothing is sliced or loaded.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=given_model, metavar="PATH", help="where the model is (default: as in a run)")
    group.add_argument("--shape", metavar="NAME", help="instead: a known model's shape, or a config.json (see synth)")
    group.add_argument(
        "--layers", type=int, metavar="N", help="with --shape: so many layers (default: as the shape has)"
    )
    weights = group.add_argument("--format", help="as in a run (default: auto; with --shape q4_0)")
    offer(weights, (AUTO, *FORMAT_CHOICES))
    add_shares(group)
    group.add_argument(
        "--context",
        type=whole_number("--context"),
        metavar="N",
        help="positions to keep room for (default: 2048, or the model's limit)",
    )
    group.add_argument(
        "--prompt-tokens",
        type=whole_number("--prompt-tokens"),
        default=PROMPT_TOKENS,
        metavar="N",
        help="of the first token (default 16)",
    )
    group.add_argument(
        "--parallel",
        type=whole_number("--parallel", 1, MAX_PARALLEL),
        default=1,
        metavar="N",
        help="also say how many tokens a second so many sequences get together, each of --context positions",
    )
    _add_drafts(group)
    group.add_argument(
        "--routing",
        type=path_given("--routing", "a trace of routing, .npy"),
        metavar="FILE",
        help="of a mixture: experts are chosen as in this trace, uint16 [positions, layers, experts a token] (default: all "
        "equally likely, the worst case)",
    )
    add_computing(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write everything as JSON")
    group.add_argument("--quiet", action="store_true", help="do not say what is being measured")
    return parser


def _add_drafts(group: argparse._ArgumentGroup) -> None:
    """What says how a run would draft tokens."""
    group.add_argument(
        "--accepted",
        type=seconds("--accepted", 0, 1, "over 0 and at most 1, such as 0.6"),
        metavar="P",
        help="also say how long a token takes with the draft that is best where this part of drafted tokens is accepted "
        "(over 0, at most 1), and how many it drafts",
    )
    group.add_argument(
        "--draft",
        type=path_given("--draft", "the path of a model"),
        metavar="MODEL",
        help="with --accepted: these drafts are of this model, whose time and memory on rank 0 count (default: they are of "
        "the text, and cost nothing)",
    )


def parse_plan(arguments: Sequence[str]) -> tuple[PlanCommand, ComputeOptions, NetworkOptions]:
    """The options of `plan`. Raises InputError for what cannot be used."""
    parsed = plan_parser().parse_args(arguments)
    command = parsed_into(PlanCommand, parsed)
    compute, network = parsed_into(ComputeOptions, parsed), parsed_into(NetworkOptions, parsed)
    check_combinations(compute, network)
    if command.model is not None and command.shape is not None:
        raise InputError("--model and --shape are both given; give one of them")
    if command.layers is not None and command.shape is None:
        raise InputError("--layers is for --shape; leave it out, or name a shape")
    if command.draft is not None and command.accepted is None:
        raise InputError("--draft is given without --accepted; say which part of its tokens is accepted, such as 0.6")
    if command.json is not None:
        check_writable(command.json, "--json")
    return command, compute, network


def plan_together(star: Star, job: Job) -> int:
    """Rank 0 of `plan`; the other ranks measure when they are told to."""
    with stop_others_on_error(star):
        ranks = gather_rank_infos(star, job.arguments)
        command, compute, network = parse_plan(job.arguments[1:])
        star.allow_silence(network.silence)
        config, formats, name = _planned_model(command)
        trace = None if command.routing is None else read_trace(config, name, Path(command.routing))
        plan(star, ranks, _plan_options(command, compute, network, config, formats, trace, len(ranks)), name)
    send_note(star, StopNote(0))
    return 0


def _planned_model(command: PlanCommand) -> tuple[ModelConfig, ModelFormats, str]:
    """What `plan` is about: the model's config, its formats and its name."""
    if command.shape is not None:
        shape = load_shape(command.shape, command.layers)
        return shape.config, wanted_formats(command.format or "q4_0", shape.config), shape.name
    with open_source(model_path(command.model)) as source:
        return source.config, choose_formats(source, command.format or "auto"), source.name


def _draft_model(command: PlanCommand) -> tuple[ModelConfig, ModelFormats] | None:
    """The model of --draft, in the formats of a run; None without one."""
    if command.draft is None:
        return None
    with open_source(model_path(command.draft)) as source:
        return source.config, choose_formats(source, AUTO)


def _plan_options(
    command: PlanCommand,
    compute: ComputeOptions,
    network: NetworkOptions,
    config: ModelConfig,
    formats: ModelFormats,
    trace: RoutingTrace | None,
    ranks: int,
) -> PlanOptions:
    """For a model and so many ranks. Raises InputError where the options do not suit these."""
    if (command.context or 1) > config.context:
        raise InputError(
            f"--context is {command.context}, this model has {config.context} positions; give at most that"
        )
    if command.prompt_tokens >= config.context:
        raise InputError(
            f"--prompt-tokens is {command.prompt_tokens}, this model has {config.context} positions; give fewer"
        )
    return PlanOptions(
        workload=workload(
            *(config, formats, compute, command.context, command.prompt_tokens, trace),
            parallel=command.parallel,
            accepted=command.accepted,
            draft=_draft_model(command),
        ),
        measuring=measure_options(compute, network),
        shares=None if command.shares in (None, AUTO) else tuple(share_weights(command.shares, ranks)),
        json=None if command.json is None else Path(command.json),
        quiet=command.quiet,
    )
