"""`serve`, on rank 0: it starts the front, loads the model, and answers until it is told to end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial

from tpimpi.cli import remarks
from tpimpi.cli.options import DEFAULT_PARALLEL, ServeOptions
from tpimpi.cli.process import Job, call_on_signals, say
from tpimpi.cli.run import draft_engine, given_template, open_engine
from tpimpi.cli.serve_options import MAX_CONTEXT, front_options, listening, parse_serve
from tpimpi.engine import startup
from tpimpi.engine.allotment import print_memory
from tpimpi.engine.needs import LONGEST_DRAFT
from tpimpi.engine.ranks import RankInfo, gather_rank_infos
from tpimpi.errors import InputError, LostError, as_ours
from tpimpi.serving.batched import BatchedLLM, load_batched
from tpimpi.serving.llm import load_tokenizer_of_slices
from tpimpi.serving.report import Report
from tpimpi.serving.server.connection import Connection
from tpimpi.serving.server.front_options import died
from tpimpi.serving.server.front_process import FrontProcess
from tpimpi.serving.server.loop import ServerLoop
from tpimpi.serving.server.wire import Failed, Processes, Progress
from tpimpi.serving.speculation import Speculation
from tpimpi.star import Star
from tpimpi.star.control import stop_others_on_error
from tpimpi.system.siblings import Siblings
from tpimpi.system.terminal import watch_progress

PROGRESS_INTERVAL_S = 0.5


def serve(star: Star, job: Job) -> int:
    """Rank 0 of a server. Returns its exit code."""
    with stop_others_on_error(star):
        ranks = gather_rank_infos(star, job.arguments)
        options = parse_serve(job.arguments[1:])
        star.allow_silence(options.run.network.silence)
        if options.front is None:
            front = FrontProcess(partial(front_options, options))
            job.at_end.callback(front.close)
            for line in listening(front.url, options):
                say(line)
        connection = Connection(options.front or front.socket)
        job.at_end.callback(connection.close)
        with _telling_errors(connection):
            llm, loop = load(star, job, ranks, options, connection)
    with job.others_waiting(), _telling_errors(connection):
        startup.start(star)
        star.tell_end(lambda line: connection.say_last(Failed(line, 1)))
        llm.report.load_s = job.seconds()
        here = {rank: one.pid for rank, one in enumerate(ranks) if one.host == ranks[0].host}
        connection.say(Processes({pid: f"r{rank} {ranks[0].host}" for rank, pid in here.items()}))
        siblings = Siblings({rank: pid for rank, pid in here.items() if rank})
        call_on_signals(partial(_end, loop, ranks, siblings))
        loop.run()
        llm.finish()
    return 0


def _end(loop: ServerLoop, ranks: list[RankInfo], siblings: Siblings) -> None:
    """A signal came: from the user; or from the launcher, which ends all of a run whose rank has died. Raises LostError
    then, where that rank was on this machine: the launcher leaves no time to notice it otherwise."""
    for rank in siblings.ended():
        loop.lost = LostError(died(f"r{rank} {ranks[rank].host}"))
    loop.end()  # which wakes it
    if loop.lost is not None:
        raise loop.lost  # at once, wherever the main thread is; if that is where exceptions are dropped, the loop does it


@contextlib.contextmanager
def _telling_errors(connection: Connection) -> Iterator[None]:
    """The front is told what goes wrong inside, for its clients."""
    try:
        yield
    except Exception as error:
        ours = as_ours(error)
        connection.say_last(Failed(f"{ours.where}: {ours}" if ours.where else str(ours), ours.exit_code))
        raise


def load(
    star: Star, job: Job, ranks: list[RankInfo], options: ServeOptions, connection: Connection
) -> tuple[BatchedLLM, ServerLoop]:
    """All that comes before the first question. Raises InputError for what cannot be used."""
    generate, output = options.run.generate, options.run.output
    template = given_template(generate)
    together = generate.parallel or DEFAULT_PARALLEL
    progress = LoadProgress(connection)
    progress.say("opening the model")
    engine = open_engine(star, ranks, options.run, parallel=together)
    progress.say("loading the tokenizer")
    tokenizer, tokenizer_bytes = load_tokenizer_of_slices(engine.file, template)
    most = engine.header.config.context
    if generate.context is not None and generate.context > most:
        raise InputError(f"--context is {generate.context}, this model has {most} positions; give at most that")
    if generate.draft is not None:
        progress.say("opening the draft model")
    draft = draft_engine(ranks, options.run, tokenizer, engine, parallel=together)
    report = Report(engine.header.model, engine.header.format, engine.backend.name, star.algorithm, star.sealed)
    speculate = LONGEST_DRAFT if generate.speculate is None else generate.speculate
    progress.say("taking memory")
    llm, allotments = load_batched(
        *(engine, tokenizer, report, Speculation(speculate, always=generate.speculate is not None)),
        context=generate.context or min(most, MAX_CONTEXT),
        together=together,
        tokenizer_bytes=tokenizer_bytes,
        draft=draft,
    )
    job.at_end.callback(llm.close)
    report.prompt_chunk = engine.chunk
    watch_progress(None)
    if not output.quiet:
        print_memory(allotments, always=options.run.compute.memory is not None)
        say(remarks.room_for_pages(llm.room, together))
    loop = ServerLoop(
        *(llm, tokenizer, connection),
        fingerprint=engine.header.fingerprint,
        hosts=[rank.host for rank in ranks],
        promises=[allotment.promise for allotment in allotments],
        together=together,
        grace=options.grace,
    )
    return llm, loop


class LoadProgress:
    """Tells the front how far the loading is."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._said = connection, 0.0
        watch_progress(self._watch)

    def say(self, text: str, done: float | None = None) -> None:
        self._connection.say(Progress(text, done))
        self._connection.flush()

    def _watch(self, what: str, done: int, total: int) -> None:
        """Of slices that are made, or looked at."""
        if total and time.monotonic() - self._said > PROGRESS_INTERVAL_S:
            self._said = time.monotonic()
            self.say(what, done / total)
