"""The parser of `serve`: from arguments to options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from tpimpi.cli.options import (
    DEFAULT_PARALLEL,
    ComputeOptions,
    GenerateOptions,
    ModelOptions,
    NetworkOptions,
    OutputOptions,
    RunOptions,
    ServeOptions,
)
from tpimpi.cli.parser import Parser
from tpimpi.cli.run_options import check_combinations, check_draft, parsed_into
from tpimpi.cli.run_parser import (
    add_audit,
    add_computing,
    add_context,
    add_model,
    add_parallel,
    add_speculate,
    add_template,
)
from tpimpi.cli.values import path_given, read_passphrase, seconds, whole_number
from tpimpi.errors import InputError
from tpimpi.serving.server.front_options import (
    DEFAULT_GRACE_S,
    DEFAULT_HOST,
    DEFAULT_PORT,
    DEFAULT_QUEUE,
    DEFAULT_TIME_LIMIT_S,
    FrontOptions,
    is_loopback,
)
from tpimpi.system.given_file import for_others

END_WAIT_S = 15.0  # beside its --grace, another server may take so long to end
MAX_CONTEXT = 8192  # positions of a prompt with its answer, where nothing is said and the model has more


def serve_parser() -> argparse.ArgumentParser:
    """Options of `serve`."""
    parser = Parser(
        prog="python -m tpimpi serve",
        description="Answer over HTTP: a chat page at /, OpenAI's API at /v1. Works under mpirun too.",
        allow_abbrev=False,
    )
    _add_listening(parser)
    group = parser.add_argument_group("answers")
    add_context(group, f"the model's limit, at most {MAX_CONTEXT}; each prompt with its answer has so many at most")
    add_parallel(group, "requests")
    group.add_argument(
        "--queue",
        type=whole_number("--queue", 0),
        default=DEFAULT_QUEUE,
        metavar="N",
        help=f"requests that may wait beside those; more are refused (429) (default {DEFAULT_QUEUE})",
    )
    group.add_argument(
        "--time-limit",
        type=seconds("--time-limit"),
        default=DEFAULT_TIME_LIMIT_S,
        metavar="S",
        help=f"seconds that a request may take, waiting included (default {DEFAULT_TIME_LIMIT_S:.0f})",
    )
    group.add_argument(
        "--grace",
        type=seconds("--grace"),
        default=DEFAULT_GRACE_S,
        metavar="S",
        help=f"seconds in which answers are finished when the server is told to end (default {DEFAULT_GRACE_S:.0f})",
    )
    group.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of the model, for clients that ask for a fixed one; may be given again",
    )
    for option, what in (
        (
            "--journal",
            "keep requests with an Idempotency-Key, and their answers so far, in this file too, encrypted: a server that is "
            "started with it after this one was killed goes on with them, and clients that ask again get them (default: in "
            "memory alone)",
        ),
        ("--journal-key-file", "encrypt --journal with the passphrase in this file"),
    ):
        group.add_argument(option, type=path_given(option, "the name of a file"), metavar="FILE", help=what)
    add_template(group)
    add_speculate(group)
    add_model(parser)
    add_computing(parser)
    add_audit(parser)
    parser.add_argument("--quiet", action="store_true", help="only where it listens, and errors")
    parser.add_argument("--front", help=argparse.SUPPRESS)  # what `up` gives it
    return parser


def _add_listening(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("listening")
    group.add_argument(
        "--host",
        default=DEFAULT_HOST,
        metavar="ADDRESS",
        help=f"address of rank 0's machine to listen on (default {DEFAULT_HOST}: for this machine alone); others need "
        "--api-key-file",
    )
    group.add_argument(
        "--port",
        type=whole_number("--port", 0, 65535),
        default=DEFAULT_PORT,
        metavar="N",
        help=f"(default {DEFAULT_PORT}; 0: any that is free)",
    )
    group.add_argument(
        "--api-key-file",
        type=path_given("--api-key-file", "the name of a file"),
        metavar="FILE",
        help="who may ask: a key a line, or name=key; read on rank 0's machine alone. What was computed for one is not used "
        "for another",
    )
    group.add_argument(
        "--insecure", action="store_true", help="listen on other addresses without keys: anybody may ask"
    )
    for option, what in (("--tls-cert", "a certificate, with its chain"), ("--tls-key", "its key")):
        group.add_argument(
            option, type=path_given(option, "the name of a file"), metavar="FILE", help=f"{what}, in PEM"
        )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which clients may call this server; may be given again",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="another site whose pages may use this server, https://chat.example say; may be given again",
    )


def parse_serve(arguments: Sequence[str]) -> ServeOptions:
    """The options of `serve`. Raises InputError for what cannot be used."""
    parsed = serve_parser().parse_args(arguments)
    generate = GenerateOptions(
        context=parsed.context,
        parallel=parsed.parallel,
        speculate=parsed.speculate,
        draft=parsed.draft,
        chat_template=parsed.chat_template,
    )
    run = RunOptions(
        model=parsed_into(ModelOptions, parsed),
        compute=parsed_into(ComputeOptions, parsed),
        network=parsed_into(NetworkOptions, parsed),
        generate=generate,
        output=OutputOptions(quiet=parsed.quiet),
        audit=parsed.audit,
    )
    check_combinations(run.compute, run.network, run.model)
    check_draft(generate)
    listening = ("host", "port", "api_key_file", "tls_cert", "tls_key", "front")
    names = (*listening, "grace", "queue", "time_limit", "journal", "journal_key_file")
    options = ServeOptions(
        run=run,
        allow_host=tuple(parsed.allow_host),
        allow_origin=tuple(parsed.allow_origin),
        name=tuple(parsed.name),
        **{name: getattr(parsed, name) for name in names},
    )
    if (options.tls_cert is None) != (options.tls_key is None):
        given = "--tls-cert" if options.tls_key is None else "--tls-key"
        raise InputError(f"{given} is given alone; TLS needs --tls-cert and --tls-key")
    if (options.journal is None) != (options.journal_key_file is None):
        raise InputError(
            "--journal-key-file is given alone; give the file that it encrypts: --journal FILE"
            if options.journal is None
            else "--journal has prompts and answers, so it is encrypted; give the file of a passphrase: --journal-key-file"
        )
    if not is_loopback(options.host) and options.api_key_file is None and not parsed.insecure:
        raise InputError(
            f"--host is {options.host}, where other machines can ask, and there is no --api-key-file; give one, or "
            "--insecure where anybody may ask"
        )
    return options


def front_options(options: ServeOptions, socket: str, *, outlives: bool = False) -> FrontOptions:
    """What the front is told; rank 0 connects to `socket`, and others after it where the front outlives it. Raises
    InputError for a file of a passphrase that cannot be used."""
    key_file = options.journal_key_file
    passphrase = "" if key_file is None else read_passphrase("--journal-key-file", key_file).decode()
    return FrontOptions(
        socket=socket,
        host=options.host,
        port=options.port,
        api_key_file=options.api_key_file,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        queue=options.queue,
        parallel=options.run.generate.parallel or DEFAULT_PARALLEL,
        time_limit=options.time_limit,
        allow_hosts=options.allow_host,
        allow_origins=options.allow_origin,
        names=options.name,
        journal=options.journal,
        journal_passphrase=passphrase,
        journal_wait=options.grace + END_WAIT_S,
        outlives=outlives,
    )


def listening(url: str, options: ServeOptions) -> Iterator[str]:
    """Lines that say where the server listens, and to whom."""
    yield f"tpimpi: {url} · chat page, API at /v1"
    host = options.host
    if options.api_key_file is None and not is_loopback(host):
        yield f"anybody who reaches {host} may ask: --insecure is given, and no --api-key-file"
    # A remark only: a file of secrets that is handed to a container can often be read by all in it.
    if options.api_key_file is not None and (remark := for_others("--api-key-file", options.api_key_file)) is not None:
        yield remark
