"""`perplexity`, on rank 0; the other ranks follow as they do in a run."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from tpimpi.cli.options import PerplexityOptions
from tpimpi.cli.perplexity_options import parse_perplexity
from tpimpi.cli.prepare import prepare, say_what_slows
from tpimpi.cli.process import Job, print_answer
from tpimpi.engine import startup
from tpimpi.engine.allotment import print_memory
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.rank_memory import RankMemory
from tpimpi.engine.ranks import RankInfo, gather_rank_infos
from tpimpi.serving.llm import load_tokenizer_of_slices
from tpimpi.serving.perplexity import Measurement
from tpimpi.star import Star
from tpimpi.star.control import stop_others_on_error
from tpimpi.system.files import write_json
from tpimpi.system.given_file import read_text


def perplexity(star: Star, job: Job) -> int:
    """Rank 0 of `perplexity`. Returns its exit code."""
    with stop_others_on_error(star):
        options, measurement, memory = load(star, job)
    output = options.output
    with job.others_waiting():
        startup.start(star)
        load_s = job.seconds()
        result = measurement.run(memory.engines, quiet=output.quiet)
        result.load_s, result.ranks = load_s, startup.finish(star, memory)[0][0]
    print_answer(result.line() + "\n")
    if output.report is not None:
        write_json(Path(output.report), result.as_json(), private=True)
    if not output.quiet:
        with contextlib.suppress(OSError):
            result.print_table()
    return 0


def load(star: Star, job: Job) -> tuple[PerplexityOptions, Measurement, RankMemory]:
    """All that comes before the first chunk. Raises InputError for what cannot be used."""
    ranks = gather_rank_infos(star, job.arguments)
    options = parse_perplexity(job.arguments[1:])
    star.allow_silence(options.network.silence)
    text = read_text("the text", options.text)
    say_what_slows(star, ranks, options.compute, options.network, quiet=options.output.quiet)
    configs = (replace(config, chunk_logits=True) for config in engine_configs(star, ranks, options))
    engines = [startup.open_engines(star, config) for config in list(configs)]
    tokenizer, tokenizer_bytes = load_tokenizer_of_slices(engines[0].file)
    measurement = Measurement(
        *(engines, tokenizer, options.text, text),
        context=options.context,
        max_tokens=options.max_tokens,
        second_half=options.second_half,
    )
    memory, allotments = startup.allot_memory(star, engines, measurement.context, tokenizer_bytes)
    job.at_end.callback(memory.close)
    if not options.output.quiet:
        print_memory(allotments, always=options.compute.memory is not None)
    return options, measurement, memory


def engine_configs(star: Star, ranks: list[RankInfo], options: PerplexityOptions) -> list[EngineConfig]:
    """The config of the model, and with --against that of the reference: the same model in another format."""
    context, quiet, network = options.context, options.output.quiet, options.network
    configs = [prepare(star, ranks, options.model, options.compute, network, context=context, quiet=quiet)]
    if options.against is not None:
        model = replace(options.model, format=options.against, slices=None)
        network = replace(network, allreduce=configs[0].allreduce)  # the rule that was chosen
        compute = replace(options.compute, kv="auto")
        configs.append(prepare(star, ranks, model, compute, network, context=context, quiet=quiet))
    return configs
