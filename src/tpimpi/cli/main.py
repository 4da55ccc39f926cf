"""The command line: parse, wire, print, exit codes (0 done, 2 bad input, 1 anything else)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tpimpi.cli import follow, options, tool_options
from tpimpi.cli.tools import COMMANDS, SIGNALS, ensure_slices, slice_together, tool
from tpimpi.compute.arrays import F32
from tpimpi.diagnostics.trace_file import left_out, write_trace
from tpimpi.engine import ranks as ranks_of_run
from tpimpi.engine import startup
from tpimpi.engine.budget import per_rank
from tpimpi.engine.engine import Engine, EngineConfig
from tpimpi.engine.overlap import PREFILL_CHUNK, largest_sum
from tpimpi.engine.rank_memory import print_memory
from tpimpi.engine.ranks import RankInfo
from tpimpi.errors import InputError, LostError, ModelError, StorageError, as_ours
from tpimpi.models.config import ModelConfig
from tpimpi.models.shapes import load_shape
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.serving.llm import LLM, SamplingParams, load_tokenizer_of_slices
from tpimpi.serving.report import Report
from tpimpi.serving.sampling import make_sampler
from tpimpi.serving.session import Session, Turn
from tpimpi.star import WAIT_FOR_HUB_REPORT_S, Star, connect, launched_rank, launcher_kind, settle
from tpimpi.star.control import Stopped, encode_note, stop_others_on_error
from tpimpi.system import placement
from tpimpi.system.files import write_json
from tpimpi.system.terminal import STDOUT, Input, repair_streams, write_past_the_launcher
from tpimpi.weights.find import hidden_of_slices
from tpimpi.weights.locations import SliceLocation, cache_name, cache_names, model_path
from tpimpi.weights.make import choose_formats, wanted_formats
from tpimpi.weights.slices.partition import describe_shares, make_partition
from tpimpi.weights.sources import open_source

_STARTED = time.monotonic()
AFTER_CTRL_C = 0.5  # seconds: Open MPI's launcher first ends standard input, then the ranks


# The program


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and leave with its exit code."""
    repair_streams()
    _end_quietly_on_signals()
    # Arguments are taken as UTF-8 whatever the locale: what the terminal sent is in them byte for byte.
    given = sys.argv[1:] if argv is None else argv
    arguments = [os.fsencode(argument).decode("utf-8", "surrogateescape") for argument in given]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A line in one write, even with PYTHONUNBUFFERED: the launcher would put other ranks' lines within it.
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True, write_through=False)
    together = launched_rank() is not None and (arguments[:1] == ["slice"] or arguments[:2] == ["bench", "allreduce"])
    if arguments and arguments[0] in COMMANDS and not together:
        sys.exit(_guarded(lambda given, place: tool(given), arguments))
    sys.exit(_guarded(_spmd, arguments))


def _guarded(command: Callable[[list[str], _Place], int], arguments: list[str]) -> int:
    """The exit code of `command`; what it raises is said in one line, and ends the job if other ranks are at work."""
    place, line, where = _Place(), "", ""
    try:
        with place.at_end:
            code = command(arguments, place)
        if place.star is not None:
            place.star.close(failed=code != 0)
        return code
    except BrokenPipeError:
        code = 1  # whoever read our output has gone; there is nobody to tell
    except Exception as error:
        if isinstance(error, LostError) and place.star is not None and not place.star.rank.is_hub:
            time.sleep(WAIT_FOR_HUB_REPORT_S)  # rank 0 or the launcher knows better who is gone, and ends us meanwhile
        ours = as_ours(error)
        code, line, where = ours.exit_code, str(ours), ours.where or place.name()
        if os.environ.get("TPIMPI_TRACEBACK"):
            traceback.print_exc()
    if line:
        print(f"{where}: {line}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its end, and say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    if place.in_job and place.star is not None:
        time.sleep(0.2)  # the launcher relays our line; its own banner would else come before or within it
        place.star.abort(code)
    if place.star is not None:
        place.star.close(failed=True)
    return code


class _Place:
    """Where an error would be said to have happened, and whether other ranks depend on this one."""

    def __init__(self) -> None:
        self.at_end = (
            contextlib.ExitStack()
        )  # what is to be closed, also after an error: readers, which Python waits for

    star: Star | None = None
    in_job = False  # other ranks are at work: an error here must end the job

    def name(self) -> str:
        if self.star is not None and self.star.rank.size > 1:
            return str(self.star.rank)
        return "tpimpi"


def _end_quietly_on_signals() -> None:
    """Ctrl-C, or the launcher's word to stop: leave at once. What was printed was flushed as it came."""

    def leave(number: int, frame: object) -> None:
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, leave)


# A run


def _spmd(arguments: list[str], place: _Place) -> int:
    launched = launched_rank()
    typed = None
    if launched == 0:
        write_past_the_launcher()
        typed = Input()
    try:
        star = connect()
    except InputError:
        if launched == 0:
            raise
        return InputError.exit_code  # every process would say the same line
    place.star = star
    place.in_job = star.rank.size > 1
    if not star.rank.is_hub:
        try:
            follow.take_part(star)
        except Stopped as stopped:
            place.in_job = False
            return stopped.code
        return 0
    if arguments and arguments[0] in _TOGETHER:
        return _TOGETHER[arguments[0]](arguments[1:], star, place)
    return _lead(arguments, star, place, typed)


def _lead(arguments: list[str], star: Star, place: _Place, typed: Input | None) -> int:
    """Rank 0. `typed` is standard input where it is read already."""
    place.in_job = False  # until generation begins the others are told to stop, and end by themselves
    with stop_others_on_error(star):
        guests = ranks_of_run.greet(star)
        parsed = options.run_parser().parse_args(arguments)
        options.check_run(parsed)
        star.allow_silence(parsed.silence)
        session = None if parsed.session is None else Session(parsed.session)
        if session is not None:
            place.at_end.callback(session.close)
            vars(parsed).update(session.options(options.given_sampling(arguments), vars(parsed)))
        hosts = [guest.host for guest in guests]
        prompt = _prompt(parsed, hosts)
        wishes = _wishes(parsed, hosts)
        _remark(star, parsed, guests)
        engine = startup.open_engines(star, _settings(star, parsed, guests))
        tokenizer, tokenizer_bytes = load_tokenizer_of_slices(engine.file)
        report = Report(engine.header.model, engine.header.format, engine.backend.name, star.algorithm)
        hub = LLM(engine, tokenizer, wishes, report, session, tokenizer_bytes=tokenizer_bytes)
        place.at_end.callback(hub.close)
        turn = hub.interrupted() if prompt is None else hub.check(prompt)
        allotments = hub.allot_memory(None if turn is None else turn.ids)
        turn = hub.interrupted() if prompt is None else hub.check(prompt)  # is there still room?
        if not parsed.quiet:
            print_memory(allotments, always=parsed.memory is not None)
    place.in_job = star.rank.size > 1
    startup.start(star)
    report.load_s = time.monotonic() - _STARTED
    code = 0
    if turn is not None:
        _answer(hub, turn)
    if prompt is None:
        for line in (typed or Input()).lines("> "):
            if not line.strip():
                continue
            try:
                turn = hub.check(line)
            except InputError as error:
                code = error.exit_code
                print(f"{place.name()}: {error}", file=sys.stderr, flush=True)
                continue
            _answer(hub, turn)
    if turn is None:
        time.sleep(AFTER_CTRL_C)
    traces = hub.finish()
    place.in_job = False
    if turn is None and code == 0:
        raise _without_prompt()
    if parsed.report is not None:
        report.write(Path(parsed.report))
    if parsed.trace is not None:
        write_trace(Path(parsed.trace), traces, [str(block) for block in engine.order])
        _say(left_out(traces))
    if parsed.plot is not None:
        _plot_memory(report, Path(parsed.plot))
    if not parsed.quiet:
        with contextlib.suppress(OSError):  # the answer stands, though nobody reads the table
            report.print_table()
    return code


def _say(line: str | None) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)


def _plot_memory(report: Report, path: Path) -> None:
    from tpimpi.diagnostics.plots import Timeline, plot_memory

    plot_memory([Timeline(f"r{r.rank} {r.host}", r.timeline, r.memory_bytes) for r in report.ranks], path)


def _answer(hub: LLM, turn: Turn) -> None:
    """Print the answer to one prompt as it comes, and end it with a line end."""
    last = ""
    for piece in hub.answer(turn):
        last = piece
        _print(piece)
    if not last.endswith("\n"):
        _print("\n")


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write the answer to standard output: {error.strerror}; write it elsewhere"
        ) from error


def _prompt(parsed: argparse.Namespace, hosts: list[str]) -> str | None:
    """The prompt that the options give, or None where prompts come from standard input."""
    if parsed.prompt is not None and parsed.prompt_file is not None:
        raise InputError("--prompt and --prompt-file are both given; give one of them")
    if parsed.prompt is not None:
        _refuse_on_other_hosts("--prompt", "--prompt-file FILE, which rank 0 alone reads, or standard input", hosts)
        prompt: str = parsed.prompt
    elif parsed.prompt_file is not None:
        prompt = options.read_text("--prompt-file", parsed.prompt_file)
        prompt = prompt.removesuffix("\n")
    else:
        return None
    if not prompt.strip():
        raise InputError("the prompt is empty; give some text")
    return prompt


def _refuse_on_other_hosts(option: str, instead: str, hosts: list[str]) -> None:
    others = sorted(set(hosts) - {hosts[0]})
    if others:
        raise InputError(
            f"{option} stands in the process list of every host, also of {', '.join(others)}, where others may read it; "
            f"use {instead}"
        )


def _wishes(parsed: argparse.Namespace, hosts: list[str]) -> SamplingParams:
    stops = list(parsed.stop)
    if stops:
        _refuse_on_other_hosts("--stop", "--stop-file FILE, which rank 0 alone reads", hosts)
    if parsed.stop_file is not None:
        stops += [line for line in options.read_text("--stop-file", parsed.stop_file).splitlines() if line]
    if "" in stops:
        raise InputError("--stop is empty; give the text to stop before")
    try:
        "".join(stops).encode()
    except UnicodeEncodeError as error:
        raise InputError("--stop holds bytes that are not UTF-8; write it in UTF-8") from error

    def sampler(seed: int | None, drawn: int) -> Callable[[F32, Sequence[int]], int]:
        try:
            sample = make_sampler(
                temperature=parsed.temperature,
                top_k=parsed.top_k,
                top_p=parsed.top_p,
                min_p=parsed.min_p,
                repetition_penalty=parsed.repetition_penalty,
                seed=seed,
                drawn=drawn,
            )
        except ValueError as error:
            raise InputError(f"--{error}") from error

        def checked(logits: F32, history: Sequence[int]) -> int:
            try:
                return sample(logits, history)
            except ValueError as error:
                raise ModelError(
                    f"no token can be chosen: {error}; check the model, or the sampling options"
                ) from error

        return checked

    sampler(parsed.seed, 0)  # so that a bad value is said now
    return SamplingParams(
        *(sampler, parsed.seed, parsed.max_tokens, parsed.context, parsed.raw, stops, parsed.ignore_eos)
    )


def _remark(star: Star, parsed: argparse.Namespace, guests: Sequence[RankInfo]) -> None:
    """Say on stderr what makes this run slower than it could be, or blind."""
    remarks = [ranks_of_run.without_native(guests) if parsed.backend == "auto" else None]
    remarks.append(ranks_of_run.bound_to_one_core(guests) if parsed.threads is None else None)
    remarks.append(placement.crowded(launcher_kind(), [guest.host for guest in guests], placement.given_hosts()))
    remarks.append(ranks_of_run.without_watch(star, parsed.timeout))
    for remark in [] if parsed.quiet else remarks:
        _say(remark)


def _settle_allreduce(star: Star, parsed: argparse.Namespace, hidden: int) -> None:
    """Measure the links, where that was not done yet; --allreduce is then a rule."""
    if star.latency is None:
        parsed.allreduce, line = settle.settle_allreduce(
            star, parsed.allreduce, parsed.wire, largest_sum(hidden, star.rank.size)
        )
        _say(None if parsed.quiet else line)


def _settings(star: Star, parsed: argparse.Namespace, guests: Sequence[RankInfo]) -> EngineConfig:
    """Measure the links, find or make the slices, and say how to use them."""
    ranks, memory = len(guests), options.memory_sizes(parsed.memory)
    fingerprint, fmt, cached = "", "", None
    auto = parsed.shares == options.AUTO
    if auto and parsed.slices is not None:
        raise InputError(
            "--shares auto chooses shares for slices that are yet to be made; leave out --slices, or --shares"
        )
    weights = [] if auto else options.share_weights(parsed.shares, ranks)
    if parsed.slices is None:
        with open_source(model_path(parsed.model)) as source:
            formats = choose_formats(source, parsed.format)
            _settle_allreduce(star, parsed, source.config.hidden)
            if auto:
                names = cache_names(source, formats)
                from tpimpi.diagnostics.planner.command import Survey, choose_shares

                survey = Survey(
                    star,
                    guests,
                    tool_options.workload(parsed, source.config, formats),
                    tool_options.measure_options(parsed),
                )
                weights = choose_shares(survey, ranks, names, quiet=parsed.quiet)
            plan = make_partition(source.config, weights)
            fingerprint, fmt = source.fingerprint(), formats.key()
            cached = cache_name(source, plan, formats)
            ensure_slices(star, source, plan, formats, SliceLocation(None, cached), quiet=parsed.quiet)
    else:
        _settle_allreduce(star, parsed, hidden_of_slices(parsed.slices, ranks))
        if parsed.format != "auto":
            fmt = wanted_formats(parsed.format, layers=1).key()
        if parsed.model is not None:
            with open_source(model_path(parsed.model)) as source:
                fingerprint = source.fingerprint()
    return EngineConfig(
        folder=parsed.slices,
        cache_name=cached,
        fingerprint=fingerprint,
        shares=describe_shares(weights) if parsed.shares is not None or parsed.slices is None else "",
        format=fmt,
        backend=parsed.backend,
        threads=parsed.threads,
        allreduce=parsed.allreduce,
        wire=parsed.wire,
        timeout=parsed.timeout,
        cores_shared_by=ranks_of_run.cores_shared_by(guests),
        memory=None if memory is None else per_rank(memory, ranks),
        window=options.window_blocks(parsed.window),
        kv=parsed.kv,
        trace=getattr(parsed, "trace", None) is not None,
    )


def _without_prompt() -> InputError:
    return InputError("no prompt: standard input ended without a line; give --prompt, --prompt-file, or lines of text")


# Perplexity


def _measure_perplexity(arguments: list[str], star: Star, place: _Place) -> int:
    """Rank 0 of `perplexity`; the other ranks follow as they do in a run."""
    from tpimpi.serving.perplexity import Measurement

    with stop_others_on_error(star):
        guests = ranks_of_run.greet(star)
        parsed = options.perplexity_parser().parse_args(arguments)
        options.check_perplexity(parsed)
        star.allow_silence(parsed.silence)
        text = options.read_text("the text", parsed.text)
        _remark(star, parsed, guests)
        wanted = [_settings(star, parsed, guests)]
        if parsed.against is not None:
            reference = {**vars(parsed), "format": parsed.against, "kv": "auto", "slices": None}
            wanted.append(_settings(star, argparse.Namespace(**reference), guests))
        engines: list[Engine] = []
        for settings in wanted:
            apart = dataclasses.replace(settings, logits_of=PREFILL_CHUNK)
            engines.append(startup.open_engines(star, apart))
        tokenizer, tokenizer_bytes = load_tokenizer_of_slices(engines[0].file)
        limits = {"context": parsed.context, "max_tokens": parsed.max_tokens}
        measurement = Measurement(engines, tokenizer, parsed.text, text, **limits)
        memory, allotments = startup.allot_memory(star, engines, measurement.context, tokenizer_bytes)
        place.at_end.callback(memory.close)
        if not parsed.quiet:
            print_memory(allotments, always=parsed.memory is not None)
    place.in_job = star.rank.size > 1
    startup.start(star)
    load_s = time.monotonic() - _STARTED
    result = measurement.run(quiet=parsed.quiet)
    result.load_s, result.ranks = load_s, startup.finish(star, memory)[0][0]
    place.in_job = False
    _print(result.line() + "\n")
    if parsed.report is not None:
        write_json(Path(parsed.report), result.as_json())
    if not parsed.quiet:
        with contextlib.suppress(OSError):
            result.print_table()
    return 0


def _slice(arguments: list[str], star: Star, place: _Place) -> int:
    """Rank 0 of `slice` under mpirun."""
    place.in_job = False  # the others are told to stop, and end by themselves
    with stop_others_on_error(star):
        slice_together(arguments, star, ranks_of_run.greet(star))
    star.broadcast_note(encode_note(stop=0))
    return 0


def _bench(arguments: list[str], star: Star, place: _Place) -> int:
    """Rank 0 of `bench allreduce`."""
    from tpimpi.diagnostics.bench import allreduce

    place.in_job = False
    with stop_others_on_error(star):
        hosts = [guest.host for guest in ranks_of_run.greet(star)]
        allreduce.bench(tool_options.allreduce_bench_options(arguments), star, hosts)
    star.broadcast_note(encode_note(stop=0))
    return 0


def _plan(arguments: list[str], star: Star, place: _Place) -> int:
    """Rank 0 of `plan`; the other ranks measure when they are told to."""
    from tpimpi.diagnostics.planner.command import plan

    place.in_job = False
    with stop_others_on_error(star):
        guests = ranks_of_run.greet(star)
        parsed = tool_options.plan_parser().parse_args(arguments)
        tool_options.check_plan(parsed)
        star.allow_silence(parsed.silence)
        config, formats, name = _planned_model(parsed)
        plan(star, guests, tool_options.plan_options(parsed, config, formats, len(guests)), name)
    star.broadcast_note(encode_note(stop=0))
    return 0


def _doctor(arguments: list[str], star: Star, place: _Place) -> int:
    """Rank 0 of `doctor`, and all of `doctor --hostfile`."""
    from tpimpi.diagnostics.doctor import command

    place.in_job = False
    with stop_others_on_error(star):
        return command.doctor(tool_options.doctor_options(arguments, star.rank.size), star)


def _planned_model(parsed: argparse.Namespace) -> tuple[ModelConfig, ModelFormats, str]:
    """What `plan` is about: the model's config, its formats and its name."""
    if parsed.shape is not None:
        shape = load_shape(parsed.shape, parsed.layers)
        return shape.config, wanted_formats(parsed.format or "q4_0", shape.config.layers), shape.name
    with open_source(model_path(parsed.model)) as source:
        return source.config, choose_formats(source, parsed.format or "auto"), source.path.stem


# Commands that all ranks take part in; on rank 0, the others do what its notes say (follow.take_part)
_TOGETHER: dict[str, Callable[[list[str], Star, _Place], int]] = {
    "perplexity": _measure_perplexity,
    "bench": _bench,
    "plan": _plan,
    "slice": _slice,
    "doctor": _doctor,
}
