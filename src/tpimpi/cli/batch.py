"""A run with --batch-file, on rank 0: many prompts, answered several at once, into a file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice

import xxhash

from tpimpi.cli import remarks
from tpimpi.cli.options import DEFAULT_PARALLEL, RunOptions, SamplingOptions
from tpimpi.cli.process import Job, leave_on_signals, say
from tpimpi.cli.run import (
    draft_engine,
    given_system,
    given_template,
    open_engine,
    sampler_of,
    sampling_params,
    write_what_was_measured,
)
from tpimpi.engine import startup
from tpimpi.engine.allotment import print_memory
from tpimpi.engine.needs import LONGEST_DRAFT
from tpimpi.engine.ranks import RankInfo
from tpimpi.errors import InputError, shorten
from tpimpi.serving.batch_file import BatchAnswers, Item, read_items
from tpimpi.serving.batched import Answering, BatchedLLM, Query, load_batched
from tpimpi.serving.conversation import Conversation, SamplingParams
from tpimpi.serving.llm import load_tokenizer_of_slices
from tpimpi.serving.report import Report
from tpimpi.serving.speculation import Speculation
from tpimpi.star import Star

PROGRESS_INTERVAL_S = 10.0


def load_batch(star: Star, job: Job, ranks: Sequence[RankInfo], options: RunOptions) -> BatchRun:
    """All that comes before the first step. Raises InputError for what cannot be used."""
    generate, output = options.generate, options.output
    hosts = [rank.host for rank in ranks]
    params = sampling_params(generate, hosts)
    params = replace(params, system=given_system(generate, hosts))
    template = given_template(generate)
    items, prompts = read_items(generate.batch_file or "")
    own = {item.custom_id: _params_of(item, params, generate.sampling) for item in items}  # a bad value is said now
    answers = BatchAnswers(generate.out or "", items, _about(prompts, params, template, options))
    job.at_end.callback(answers.close)
    whole = len(items)
    if not output.quiet:
        leave_on_signals(lambda: remarks.batch_goes_on(whole - len(answers.left), whole))
    together = max(1, min(generate.parallel or DEFAULT_PARALLEL, len(answers.left)))
    engine = open_engine(star, ranks, options, parallel=together)
    answers.use_model(engine.header.fingerprint)
    tokenizer, tokenizer_bytes = load_tokenizer_of_slices(engine.file, template)
    draft = draft_engine(ranks, options, tokenizer, engine, parallel=together)
    conversation = Conversation.begin(engine.header, tokenizer, params)
    queries, refused = _queries(items, answers, conversation, own)
    report = Report(engine.header.model, engine.header.format, engine.backend.name, star.algorithm, star.sealed)
    speculate = LONGEST_DRAFT if params.speculate is None else params.speculate
    speculation = Speculation(speculate, always=params.speculate is not None)
    wanted = max((len(query.ids) + query.max_tokens for query in queries.values()), default=1)
    llm, allotments = load_batched(
        *(engine, tokenizer, report, speculation),
        context=params.context or min(conversation.limit, wanted),
        together=together,
        tokenizer_bytes=tokenizer_bytes,
        draft=draft,
    )
    job.at_end.callback(llm.close)
    report.prompt_chunk = engine.chunk
    if not output.quiet:
        print_memory(allotments, always=options.compute.memory is not None)
        say(remarks.room_for_pages(llm.room, together))
    return BatchRun(job, options, llm, answers, queries, refused)


def _about(prompts: str, params: SamplingParams, template: str | None, options: RunOptions) -> dict[str, object]:
    """What has to be the same when a run goes on, by its name; of texts a hash. `prompts` is that of the file."""
    generate = options.generate
    texts = json.dumps([params.system, template, params.stops])
    return {
        "prompts": prompts,
        "system prompt, template or stop texts": xxhash.xxh3_128_hexdigest(texts.encode()),
        "options": {
            **asdict(generate.sampling),
            **{name: getattr(generate, name) for name in ("max_tokens", "context", "ignore_eos")},
        },
    }


def _params_of(item: Item, params: SamplingParams, sampling: SamplingOptions) -> SamplingParams:
    """How a prompt of the file is to be answered. Raises InputError."""
    own = {name: value for name in ("temperature", "top_p", "seed") if (value := getattr(item.body, name)) is not None}
    changed = replace(sampling, **own)
    try:
        sample = sampler_of(changed) if own else params.sample
    except InputError as error:
        raise InputError(f"--batch-file, custom_id {shorten(item.custom_id)!r}: {error}") from error
    stops = params.stops if item.stops is None else item.stops
    return replace(
        params, sample=sample, seed=changed.seed, stops=stops, max_tokens=item.max_tokens or params.max_tokens
    )


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
        messages = item.messages(conversation.system)
        try:
            if not own.raw and messages[0]["role"] == "system":
                conversation.tokenizer.check_system(messages[0]["content"])
            ids = conversation.ids_of(item.body.prompt, messages)
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
        llm, job, output, answers = self._llm, self._job, self._options.output, self._answers
        with job.others_waiting():
            startup.start(llm.memory.star)
            llm.report.load_s = job.seconds()
            for custom_id, why in self._refused.items():
                answers.add(custom_id, why)
                say(f"{job.name()}: custom_id {shorten(custom_id)!r}: {why}")
            self._answer()
            traces = llm.finish()
        answers.finish()
        write_what_was_measured(llm.report, llm.engine, traces, output)
        return InputError.exit_code if answers.failed else 0

    def _answer(self) -> None:
        llm, output = self._llm, self._options.output
        waiting = iter(self._queries.items())
        open_: dict[Answering, str] = {}
        whole, done, said, short = len(self._queries), 0, time.monotonic(), False
        while True:
            # As many as a scheduler looks at: each that waits takes memory.
            for custom_id, query in islice(waiting, llm.wanted):
                open_[llm.submit(query)] = custom_id
            if not open_:
                return
            for answering in llm.step():
                if answering.ended is None:
                    continue
                answer = answering.answer()
                self._answers.add(open_.pop(answering), answer)
                llm.report.add(answer, keep=output.report is not None)
                done += 1
            if output.quiet:
                continue
            if llm.figures.preempted and not short:
                short = True
                say(remarks.short_of_pages(llm.room))
            if time.monotonic() - said > PROGRESS_INTERVAL_S:
                said = time.monotonic()
                say(remarks.batch_progress(done, whole))
