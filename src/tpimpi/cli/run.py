"""A run, on rank 0: options, slices and memory on every rank, then answers, then what was measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from tpimpi.cli import remarks
from tpimpi.cli.answers import show_answer
from tpimpi.cli.audit import open_tile_copies, settle_audit
from tpimpi.cli.options import DROP, GenerateOptions, OutputOptions, RunOptions, SamplingOptions
from tpimpi.cli.prepare import prepare, say_what_slows
from tpimpi.cli.process import Job, leave_on_signals, say
from tpimpi.cli.run_options import parse_run
from tpimpi.cli.values import read_passphrase
from tpimpi.diagnostics.trace_file import left_out, write_trace
from tpimpi.engine import startup
from tpimpi.engine.allotment import print_memory
from tpimpi.engine.engine import Engine, OpenedEngine
from tpimpi.engine.experts import Experts
from tpimpi.engine.ranks import RankInfo, gather_rank_infos
from tpimpi.engine.trace import RankTrace
from tpimpi.errors import InputError
from tpimpi.serving.conversation import Conversation, SamplingParams
from tpimpi.serving.llm import LLM, load_llm, load_tokenizer_of_slices
from tpimpi.serving.report import Report
from tpimpi.serving.sampling import Sampler, make_sampler, naming_the_model
from tpimpi.serving.session import Session
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.serving.transcript import Transcript, Turn
from tpimpi.star import Star
from tpimpi.star.control import stop_others_on_error
from tpimpi.system.files import replacing
from tpimpi.system.given_file import read_text
from tpimpi.system.memory import release_freed_memory
from tpimpi.system.terminal import STDIN, Input, is_terminal

AFTER_CTRL_C_S = 0.5  # Open MPI's launcher first ends standard input, then the ranks


def run(star: Star, job: Job) -> int:
    """Rank 0 of a run. Returns its exit code."""
    with stop_others_on_error(star):
        ranks = gather_rank_infos(star, job.arguments)
        options = parse_run(job.arguments)
        star.allow_silence(options.network.silence)
        if options.generate.batch_file is not None:
            from tpimpi.cli.batch import load_batch  # which most runs do without

            batch = load_batch(star, job, ranks, options)
        else:
            batch = None
            options, llm, first = load(star, job, ranks, options)
    if batch is not None:
        return batch.run()
    output = options.output
    with job.others_waiting():
        startup.start(star)
        if (problem := llm.take_kept()) is not None and not output.quiet:
            say(remarks.computed_again(problem))
        llm.report.load_s = job.seconds()
        code, answers = answer_all(llm, first, job, options)
        if not answers and not is_chat(options.generate):
            time.sleep(AFTER_CTRL_C_S)
        if given_by_options(options.generate) and not output.quiet:
            say(remarks.unread(job))
        if (problem := llm.keep()) is not None:
            say(remarks.not_kept(job, problem))
        traces = llm.finish()
    if not answers and code == 0 and not is_chat(options.generate):
        raise InputError(
            "no prompt: standard input ended without a line; give --prompt, --prompt-file, or lines of text"
        )
    if output.record_routing is not None:
        with replacing(Path(output.record_routing), "--record-routing", private=True) as file:
            np.save(file, experts_to_record(llm).recorded_routing())
    write_what_was_measured(llm.report, llm.engine, traces, output)
    return code


def load(star: Star, job: Job, ranks: Sequence[RankInfo], options: RunOptions) -> tuple[RunOptions, LLM, Turn | None]:
    """All that comes before the first token: returns the options, what answers, and the turn that is to be answered first.

    Raises InputError for what cannot be used; the other ranks are to be stopped then.
    """
    session = kept = None
    if options.generate.session is not None:
        key_file = options.generate.session_key_file
        passphrase = None if key_file is None else read_passphrase("--session-key-file", key_file)
        session = Session(options.generate.session, passphrase=passphrase)
        job.at_end.callback(session.close)
        options = replace(options, generate=with_session(options.generate, session))
        if options.generate.keep_cache is not None:
            from tpimpi.serving.kept_cache import KeptCache  # which most runs do without

            kept = KeptCache(session)
    if is_chat(options.generate):
        import tpimpi.cli.chat  # noqa: F401  (now, so that its memory is counted)
    hosts = [rank.host for rank in ranks]
    prompt = given_prompt(options.generate, hosts)
    params = sampling_params(options.generate, hosts)
    template, system = given_template(options.generate), given_system(options.generate, hosts)
    params = replace(params, system=system)
    if options.output.record_routing is not None:  # which is to be that of the text alone
        params = replace(params, speculate=0)
    quiet = options.output.quiet
    if session is not None and not quiet:
        leave_on_signals(partial(remarks.kept, session))
        say(remarks.other_system(session, system))
    engine = open_engine(star, ranks, options, draft=params.speculate)
    tokenizer, tokenizer_bytes = load_tokenizer_of_slices(engine.file, template)
    draft = draft_engine(ranks, options, tokenizer, engine)
    transcript = Transcript() if session is None and is_chat(options.generate) else session
    conversation = Conversation.begin(engine.header, tokenizer, params, transcript)
    report = Report(engine.header.model, engine.header.format, engine.backend.name, star.algorithm, star.sealed)
    llm, allotments = load_llm(
        engine, conversation, report, conversation.next_turn(prompt), tokenizer_bytes, kept, draft
    )
    job.at_end.callback(llm.close)
    if options.output.record_routing is not None:
        experts_to_record(llm).record_routing()
    report.prompt_chunk = engine.chunk
    first = llm.conversation.next_turn(prompt)  # is there still room?
    if not quiet:
        print_memory(allotments, always=options.compute.memory is not None)
    return options, llm, first


def open_engine(
    star: Star, ranks: Sequence[RankInfo], options: RunOptions, *, draft: int | None = 0, parallel: int = 1
) -> OpenedEngine:
    """The model that the options name, with slices on every rank, to answer so many prompts at once; see EngineConfig for
    `draft`."""
    quiet = options.output.quiet
    if not quiet:
        say(remarks.loading(options.model))
    say_what_slows(star, ranks, options.compute, options.network, quiet=quiet)
    config = prepare(
        *(star, ranks, options.model, options.compute, options.network),
        context=options.generate.context,
        quiet=quiet,
        trace=options.output.trace is not None,
        draft=draft,
        keep_cache=options.generate.keep_cache,
        audit=settle_audit(options, ranks),
    )
    release_freed_memory()  # of the model's file
    engine = startup.open_engines(star, replace(config, parallel=parallel))
    try:
        remark = open_tile_copies(engine, options)
    except BaseException:
        engine.close()
        raise
    if not quiet:
        say(remark)
    return engine


def draft_engine(
    ranks: Sequence[RankInfo],
    options: RunOptions,
    tokenizer: Tokenizer | TokenIds,
    engine: OpenedEngine,
    *,
    parallel: int = 1,
) -> OpenedEngine | None:
    """The model that drafts for `engine`'s, whose `tokenizer` this is, for so many prompts at once; None without --draft."""
    if options.generate.draft is None:
        return None
    from tpimpi.cli.draft import open_draft  # which most runs do without

    return open_draft(ranks, options, tokenizer, engine.header.model, parallel)


# What the options mean


def with_session(generate: GenerateOptions, session: Session) -> GenerateOptions:
    """The options with those that the conversation was begun with. Raises InputError for one that is given otherwise."""
    return replace(generate, sampling=SamplingOptions(**session.options(generate.given, asdict(generate.sampling))))


def given_prompt(generate: GenerateOptions, hosts: Sequence[str]) -> str | None:
    """The prompt that the options give, or None where prompts come from standard input."""
    if generate.prompt is not None:
        refuse_on_other_hosts("--prompt", "--prompt-file FILE, which rank 0 alone reads, or standard input", hosts)
        prompt = generate.prompt
    elif generate.prompt_file is not None:
        prompt = read_text("--prompt-file", generate.prompt_file).removesuffix("\n")
    else:
        return None
    if not prompt.strip():
        raise InputError("the prompt is empty; give some text")
    return prompt


def given_template(generate: GenerateOptions) -> str | None:
    """The chat template that the options give. Raises InputError for one that is not used or holds nothing."""
    if generate.chat_template is None:
        return None
    if generate.sampling.raw:
        raise InputError("--raw does without a chat template, and --chat-template is given; leave one of them out")
    template = read_text("--chat-template", generate.chat_template)
    if not template.strip():
        raise InputError(f"--chat-template {generate.chat_template} is empty; give a file that holds a template")
    return template


def given_system(generate: GenerateOptions, hosts: Sequence[str]) -> str | None:
    """The system prompt that the options give. Raises InputError for one that has no meaning."""
    if generate.system is not None and generate.system_file is not None:
        raise InputError("--system and --system-file are both given; give one of them")
    option = "--system" if generate.system is not None else "--system-file"
    if generate.system is None and generate.system_file is None:
        return None
    if generate.sampling.raw:
        raise InputError(
            f"--raw does without a chat template, which a system prompt needs; leave out --raw, or {option}"
        )
    if generate.system is not None:
        refuse_on_other_hosts("--system", "--system-file FILE, which rank 0 alone reads", hosts)
        system = generate.system
    else:
        system = read_text("--system-file", generate.system_file or "").removesuffix("\n")
    if not system.strip():
        raise InputError(f"{option} is empty; give some text, or leave it out")
    return system


def refuse_on_other_hosts(option: str, instead: str, hosts: Sequence[str]) -> None:
    """Raise InputError where other hosts than rank 0's can see the argument of `option`."""
    others = sorted(set(hosts) - {hosts[0]})
    if others:
        raise InputError(
            f"{option} stands in the process list of every host, also of {', '.join(others)}, where others may read it; "
            f"use {instead}"
        )


def sampling_params(generate: GenerateOptions, hosts: Sequence[str]) -> SamplingParams:
    """How prompts are to be answered. Raises InputError for what cannot be used."""
    sampling = generate.sampling
    if generate.overflow == DROP and sampling.raw:
        raise InputError(
            "--raw makes one text of a conversation, without turns to drop; leave out --raw, or --overflow"
        )

    return SamplingParams(
        sample=sampler_of(sampling),
        seed=sampling.seed,
        max_tokens=generate.max_tokens,
        context=generate.context,
        raw=sampling.raw,
        stops=stop_texts(generate, hosts),
        ignore_eos=generate.ignore_eos,
        drop=generate.overflow == DROP,
        speculate=generate.speculate,
    )


def sampler_of(sampling: SamplingOptions) -> Callable[[int, int], Sampler]:
    """What makes the samplers of these options, from a seed and how many draws were made before. Raises InputError for
    what cannot be used."""

    def sampler(seed: int | None, drawn: int) -> Sampler:
        try:
            sample = make_sampler(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                seed=seed,
                drawn=drawn,
            )
        except ValueError as error:
            raise InputError(f"--{error}") from error

        return naming_the_model(sample)

    sampler(sampling.seed, 0)  # so that a bad value is said now
    return sampler


def stop_texts(generate: GenerateOptions, hosts: Sequence[str]) -> list[str]:
    """The texts before which an answer ends. Raises InputError for what cannot be used."""
    stops = list(generate.stop)
    if stops:
        refuse_on_other_hosts("--stop", "--stop-file FILE, which rank 0 alone reads", hosts)
    if generate.stop_file is not None:
        stops += [line for line in read_text("--stop-file", generate.stop_file).splitlines() if line]
    if "" in stops:
        raise InputError("--stop is empty; give the text to stop before")
    try:
        "".join(stops).encode()
    except UnicodeEncodeError as error:
        raise InputError("--stop holds bytes that are not UTF-8; write it in UTF-8") from error
    return stops


def given_by_options(generate: GenerateOptions) -> bool:
    """Whether the prompt is an option's; else prompts come from standard input."""
    return generate.prompt is not None or generate.prompt_file is not None


def is_chat(generate: GenerateOptions) -> bool:
    """Whether the run is a conversation with somebody at a terminal."""
    return not given_by_options(generate) and is_terminal(STDIN)


# Answers


def answer_all(llm: LLM, first: Turn | None, job: Job, options: RunOptions) -> tuple[int, int]:
    """Answer the first turn, and where the options have no prompt every line of standard input.

    Returns the exit code, and how many answers there were.
    """
    code, answers = 0, 0
    if is_chat(options.generate):
        from tpimpi.cli.chat import Chat  # which most runs do without

        return code, Chat(llm, options, job).run(first)
    session, quiet = llm.conversation.session, options.output.quiet
    if first is not None:
        if not quiet:
            say(remarks.going_on(session, first))
        show_answer(llm, first, options.output)
        answers += 1
    if given_by_options(options.generate):
        return code, answers
    for line in (job.input or Input()).lines():
        if not line.strip():
            continue
        left_out = llm.conversation.left_out
        try:
            turn = llm.conversation.turn(line)
        except InputError as error:
            code = error.exit_code
            say(f"{job.name()}: {error}")
            continue
        if not quiet:
            say(remarks.left_out(llm.conversation.left_out - left_out))
        show_answer(llm, turn, options.output)
        answers += 1
    return code, answers


def experts_to_record(llm: LLM) -> Experts:
    """The model's experts. Raises InputError where it has none."""
    if (experts := llm.engine.model.experts) is None:
        raise InputError("--record-routing: the model is no mixture of experts; leave it out")
    return experts


def write_what_was_measured(report: Report, engine: Engine, traces: Sequence[RankTrace], output: OutputOptions) -> None:
    """The report, the trace, the plot and the table, as far as they are wanted."""
    if output.report is not None:
        report.write(Path(output.report))
    if output.trace is not None:
        write_trace(Path(output.trace), traces, [str(block) for block in engine.opened.order])
        say(left_out(traces))
    if output.plot is not None:
        from tpimpi.diagnostics.plots import Timeline, plot_memory

        timelines = [Timeline(f"r{r.rank} {r.host}", r.timeline, r.memory_bytes) for r in report.ranks]
        plot_memory(timelines, Path(output.plot))
    if not output.quiet:
        with contextlib.suppress(OSError):  # the answer stands, though nobody reads the table
            report.print_table()
