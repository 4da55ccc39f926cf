"""A run with --batch-file, on rank 0: many prompts, answered several at once, into a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from tpimpi.cli import remarks
from tpimpi.cli.options import RunOptions, SamplingOptions
from tpimpi.cli.process import Job, leave_on_signals, say
from tpimpi.cli.run import given_system, given_template, open_engine, sampling_params, write_what_was_measured
from tpimpi.engine import startup
from tpimpi.engine.allotment import print_memory
from tpimpi.engine.needs import LONGEST_DRAFT
from tpimpi.engine.ranks import RankInfo
from tpimpi.errors import InputError
from tpimpi.serving.batch_file import BatchAnswers, Item, read_items
from tpimpi.serving.batched import Answering, BatchedLLM, Query, load_batched
from tpimpi.serving.conversation import Conversation, SamplingParams
from tpimpi.serving.llm import load_tokenizer_of_slices
from tpimpi.serving.report import Report
from tpimpi.serving.speculation import Speculation
from tpimpi.star import Star

PROGRESS_INTERVAL_S = 10.0


def load_batch(star: Star, job: Job, ranks: Sequence[RankInfo], options: RunOptions) -> BatchRun:
    """All that comes before the first step. Raises InputError for what cannot be used, and SystemExit where all prompts have
    their answers already."""
    generate, output = options.generate, options.output
    hosts = [rank.host for rank in ranks]
    params = sampling_params(generate, hosts)
    params = replace(params, system=given_system(generate, hosts))
    template = given_template(generate)
    items, prompts = read_items(generate.batch_file or "")
    samplers = {item.custom_id: _params_of(item, options, hosts) for item in items}  # a bad value is said now
    about = {"prompts": prompts, "options": {**asdict(generate.sampling), "max_tokens": generate.max_tokens}}
    answers = BatchAnswers(generate.out or "", items, about)
    job.at_end.callback(answers.close)
    if not answers.left:
        answers.finish()
        if not output.quiet:
            say(remarks.batch_done(len(items), generate.out or ""))
        raise SystemExit(0)
    if not output.quiet:
        leave_on_signals(lambda: remarks.batch_goes_on(len(items) - len(answers.left), len(items)))
    together = min(generate.parallel, len(answers.left))
    engine = open_engine(star, ranks, options, together=together)
    answers.use_model(engine.header.fingerprint)
    tokenizer, tokenizer_bytes = load_tokenizer_of_slices(engine.file, template)
    conversation = Conversation.begin(engine.header, tokenizer, params)
    queries, refused = _queries(items, answers, conversation, samplers)
    report = Report(engine.header.model, engine.header.format, engine.backend.name, star.algorithm)
    speculate = LONGEST_DRAFT if generate.speculate is None else generate.speculate
    speculation = Speculation(speculate, always=generate.speculate is not None)
    wanted = max((len(query.ids) + query.max_tokens for query in queries.values()), default=1)
    llm, allotments = load_batched(
        *(engine, tokenizer, report, speculation),
        context=params.context or min(conversation.limit, wanted),
        together=together,
        tokenizer_bytes=tokenizer_bytes,
    )
    job.at_end.callback(llm.close)
    report.prompt_chunk = engine.chunk
    if not output.quiet:
        print_memory(allotments, always=options.compute.memory is not None)
        say(remarks.room_for_pages(llm.room, together))
    return BatchRun(job, options, llm, answers, queries, refused)


def _params_of(item: Item, options: RunOptions, hosts: Sequence[str]) -> SamplingParams:
    """How a prompt of the file is to be answered. Raises InputError."""
    body, sampling = item.body, options.generate.sampling
    own = {name: value for name in ("temperature", "top_p", "seed") if (value := getattr(body, name)) is not None}
    changed = SamplingOptions(**{**asdict(sampling), **own})
    try:
        params = sampling_params(replace(options.generate, sampling=changed), hosts)
    except InputError as error:
        raise InputError(f"--batch-file, custom_id {item.custom_id!r}: {error}") from error
    stops = params.stops if item.stops is None else item.stops
    return replace(params, stops=stops, max_tokens=item.max_tokens or params.max_tokens)


def _queries(
    items: Sequence[Item], answers: BatchAnswers, conversation: Conversation, params: dict[str, SamplingParams]
) -> tuple[dict[str, Query], dict[str, str]]:
    """What is left to be answered, by custom_id, and why others cannot be."""
    queries: dict[str, Query] = {}
    refused: dict[str, str] = {}
    left = {item.custom_id for item in answers.left}
    for number, item in enumerate(items):
        if item.custom_id not in left:
            continue
        own = params[item.custom_id]
        try:
            ids = conversation.ids_of(item.body.prompt, item.messages(conversation.system))
        except InputError as error:
            refused[item.custom_id] = str(error)
            continue
        seed = own.seed_of(number if item.body.seed is None else 0)
        queries[item.custom_id] = Query(ids, own.max_tokens, own.sample(seed, 0), own.stops, own.raw, own.ignore_eos)
    return queries, refused


class BatchRun:
    """The prompts that are left, and what answers them."""

    def __init__(
        self,
        job: Job,
        options: RunOptions,
        llm: BatchedLLM,
        answers: BatchAnswers,
        queries: dict[str, Query],
        refused: dict[str, str],
    ) -> None:
        self._job, self._options, self._llm, self._answers = job, options, llm, answers
        self._queries, self._refused = queries, refused

    def run(self) -> int:
        """Answer all of them. Returns the exit code: that of bad input where a prompt cannot be answered."""
        llm, job, output = self._llm, self._job, self._options.output
        with job.others_waiting():
            startup.start(llm.memory.star)
            llm.report.load_s = job.seconds()
            for custom_id, why in self._refused.items():
                self._answers.add(custom_id, why)
                say(f"{job.name()}: custom_id {custom_id!r}: {why}")
            self._answer()
            traces = llm.finish()
        self._answers.finish()
        write_what_was_measured(llm.report, llm.engine, traces, output)
        return InputError.exit_code if self._refused else 0

    def _answer(self) -> None:
        llm, quiet = self._llm, self._options.output.quiet
        open_: dict[Answering, str] = {llm.submit(query): custom_id for custom_id, query in self._queries.items()}
        whole, said, short = len(open_), time.monotonic(), False
        while not llm.is_idle:
            for answering in llm.step():
                if answering.ended is None:
                    continue
                answer = answering.answer()
                self._answers.add(open_.pop(answering), answer)
                llm.report.add(answer)
            if not quiet and llm.figures.preempted and not short:
                short = True
                say(remarks.short_of_pages(llm.room))
            if not quiet and time.monotonic() - said > PROGRESS_INTERVAL_S:
                said = time.monotonic()
                say(f"{whole - len(open_)} of {whole} prompts answered")
