"""What rank 0 settles before ranks take memory: the allreduce, the partition, the slices; and the config that says it all.

A run does this once, `perplexity --against` once for each of its two models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tpimpi.cli.options import ComputeOptions, ModelOptions, NetworkOptions
from tpimpi.cli.process import say
from tpimpi.cli.slicing import ensure_slices, say_left_out
from tpimpi.cli.values import AUTO, share_weights
from tpimpi.compute.experts import RoutingTrace
from tpimpi.diagnostics.options import MeasureOptions, Workload
from tpimpi.engine import ranks as ranks_of_run
from tpimpi.engine.budget import per_rank
from tpimpi.engine.engine import DEFAULT_CONTEXT, EngineConfig
from tpimpi.engine.overlap import largest_sum
from tpimpi.engine.ranks import RankInfo
from tpimpi.errors import SliceError
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import MIXES, ModelFormats
from tpimpi.star import Star, launcher_kind, settle
from tpimpi.system import placement
from tpimpi.weights.find import header_of_slices, hidden_of_slices
from tpimpi.weights.locations import SliceLocation, cache_name, cache_names, model_path
from tpimpi.weights.make import check_format, choose_formats, wanted_formats
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import Partition, describe_shares, make_partition
from tpimpi.weights.sources import Source, open_source

PROMPT_TOKENS = 16  # of the prompt that shares are chosen for, and that `plan` predicts where nobody says how many


@dataclass(frozen=True)
class RunSlices:
    """The slices of a run: a folder that the user names, or a folder in each host's cache; and what their headers must say
    (an empty text: whatever they say)."""

    folder: str | None
    cache_name: str | None
    fingerprint: str
    format: str
    shares: str


def prepare(
    star: Star,
    ranks: Sequence[RankInfo],
    model: ModelOptions,
    compute: ComputeOptions,
    network: NetworkOptions,
    *,
    context: int | None,
    quiet: bool,
    trace: bool = False,
    draft: int | None = 0,
    keep_cache: str | None = None,
    audit: float | None = 0.0,
) -> EngineConfig:
    """Rank 0: choose the allreduce and the partition, make the slices that are not there, and say how to use them.

    `context` is how many positions the user wants room for, None where nothing is said; see EngineConfig for `draft`,
    `keep_cache` and `audit`.
    """
    if model.slices is None:
        with open_source(model_path(model.model)) as source:
            say_left_out(source, quiet=quiet)
            formats = choose_formats(source, model.format)
            network = tune_links(star, network, source.config.hidden, quiet=quiet)
            how = (compute, network)
            partition = choose_partition(star, ranks, source, formats, model.shares, *how, context=context, quiet=quiet)
            slices = ensure_cached_slices(star, source, partition, formats, quiet=quiet)
    else:
        network = tune_links(star, network, hidden_of_slices(model.slices, len(ranks)), quiet=quiet)
        slices = given_slices(model, model.slices, len(ranks))
    memory = compute.memory_sizes
    return EngineConfig(
        folder=slices.folder,
        cache_name=slices.cache_name,
        fingerprint=slices.fingerprint,
        shares=slices.shares,
        format=slices.format,
        backend=compute.backend,
        threads=compute.threads,
        allreduce=network.allreduce,
        wire=network.wire,
        timeout=network.timeout,
        cores_shared_by=ranks_of_run.cores_shared_by(ranks),
        memory=None if memory is None else per_rank(list(memory), len(ranks)),
        window=compute.window,
        kv_format=compute.kv,
        trace=trace,
        kernels=compute.kernels,
        chunk=compute.prompt_chunk,
        predict=compute.predict,
        draft=draft,
        keep_cache=keep_cache,
        audit=audit,
    )


def tune_links(star: Star, network: NetworkOptions, hidden: int, *, quiet: bool) -> NetworkOptions:
    """Measure the links, where that was not done yet; the allreduce is then a rule. `hidden` is the model's width."""
    if star.latency is not None:
        return network
    largest = largest_sum(hidden, star.rank.size)
    rule, line = settle.settle_allreduce(star, network.allreduce, network.wire, largest)
    say(None if quiet else line)
    return replace(network, allreduce=rule)


def choose_partition(
    star: Star,
    ranks: Sequence[RankInfo],
    source: Source,
    formats: ModelFormats,
    shares: str | None,
    compute: ComputeOptions,
    network: NetworkOptions,
    *,
    context: int | None = None,
    look_in_cache: bool = True,
    quiet: bool,
) -> Partition:
    """The shares that the user gives, or with `auto` those that are predicted to be fastest, which measures the ranks.

    With `look_in_cache` shares of which the slices are there already are taken where they are about as good."""
    if shares != AUTO:
        return make_partition(source.config, share_weights(shares, len(ranks)))
    from tpimpi.diagnostics.planner.command import Survey, choose_shares  # which most runs do without

    wanted, measuring = workload(source.config, formats, compute, context), measure_options(compute, network)
    names = cache_names(source, formats) if look_in_cache else None
    return make_partition(
        source.config, choose_shares(Survey(star, ranks, wanted, measuring), len(ranks), names, quiet=quiet)
    )


def workload(
    config: ModelConfig,
    formats: ModelFormats,
    compute: ComputeOptions,
    context: int | None,
    prompt_tokens: int = PROMPT_TOKENS,
    routing: RoutingTrace | None = None,
    parallel: int = 1,
    accepted: float | None = None,
    draft: tuple[ModelConfig, ModelFormats] | None = None,
) -> Workload:
    """What a run would have to do, as far as it matters for its speed."""
    return Workload(
        config=config,
        formats=formats,
        context=min(context or DEFAULT_CONTEXT, config.context),
        prompt=min(prompt_tokens, config.context - 1),
        memory=compute.memory_sizes,
        kv_format=compute.kv,
        window=compute.window,
        chunk=compute.prompt_chunk,
        routing=routing,
        parallel=parallel,
        accepted=accepted,
        draft=draft,
    )


def measure_options(compute: ComputeOptions, network: NetworkOptions) -> MeasureOptions:
    """How the ranks would compute and add."""
    return MeasureOptions(compute.backend, compute.threads, network.allreduce, network.wire, compute.kernels)


def ensure_cached_slices(
    star: Star, source: Source, partition: Partition, formats: ModelFormats, *, quiet: bool
) -> RunSlices:
    """Have every rank's slice in the cache of its host: made now, where it is not there."""
    name = cache_name(source, partition, formats)
    ensure_slices(star, source, partition, formats, SliceLocation(None, name), quiet=quiet)
    return RunSlices(None, name, source.fingerprint(), formats.key(), partition.describe())


def given_slices(model: ModelOptions, folder: str, ranks: int) -> RunSlices:
    """The slices of --slices, and what --model, --format and --shares say of them."""
    fingerprint = ""
    if model.model is not None:
        with open_source(model_path(model.model)) as source:
            fingerprint = source.fingerprint()
    # Of a mix the key depends on the number of layers, which the slices know.
    if model.format in MIXES:
        _check_mix(folder, model.format, ranks)
    fmt = ""
    if model.format not in ("auto", *MIXES):
        check_format(model.format)
        fmt = ModelFormats.of(model.format, layers=1).key()
    shares = "" if model.shares is None else describe_shares(share_weights(model.shares, ranks))
    return RunSlices(folder, None, fingerprint, fmt, shares)


def _check_mix(folder: str, mix: str, ranks: int) -> None:
    """Raise SliceError where the slices are there, and are not in this mix of `--format`."""
    header = header_of_slices(folder, ranks)
    if header is None:  # which is said where they are opened
        return
    wanted = wanted_formats(mix, header.config, header.formats.router)
    if header.formats != wanted:
        raise SliceError(
            f"slice file {Path(folder) / slice_name(0, ranks)} has format {header.formats.describe()}, --format {mix} is "
            f"{wanted.describe()}; leave --format out, or make slices in that format"
        )


def say_what_slows(
    star: Star, ranks: Sequence[RankInfo], compute: ComputeOptions, network: NetworkOptions, *, quiet: bool
) -> None:
    """Say on stderr what makes this run slower than it could be, or blind."""
    if quiet:
        return
    say(ranks_of_run.without_native(ranks) if compute.backend == "auto" else None)
    say(ranks_of_run.bound_to_one_core(ranks) if compute.threads is None else None)
    say(placement.crowded(launcher_kind(), [rank.host for rank in ranks], placement.given_hosts()))
    say(ranks_of_run.without_heartbeat(star, network.timeout))
