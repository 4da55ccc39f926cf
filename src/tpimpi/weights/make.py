"""From a model to its slices: which formats they have, and the making of all of them by one process.

`build` reads the model and bounds the memory that this takes; `slices/local` knows what is there already.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tpimpi.compute.formats import is_quantized, nearest_format
from tpimpi.compute.formats.base import Quantizer
from tpimpi.compute.formats.blocks_of_32 import BLOCK_WEIGHTS
from tpimpi.compute.formats.quantize import quantize
from tpimpi.errors import InputError, ModelError, StorageError, shorten
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import EMBEDDING_NAME, head_name, layer_specs, part_name
from tpimpi.models.weight_formats import EXPERTS_MIX, FORMAT_CHOICES, LayerFormats, ModelFormats
from tpimpi.system.disk import disk_full, storage_error
from tpimpi.system.files import check_folder, locked_file, try_lock
from tpimpi.weights.build import build_tiles, bytes_to_build, on_blocks
from tpimpi.weights.locations import elsewhere
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import slice_records, times
from tpimpi.weights.slices.local import LocalSlice, tidy_up
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import Partition, Span, attention_tiles
from tpimpi.weights.sources import FLOAT_FORMATS, Source
from tpimpi.weights.sources.gguf_types import type_of_name

_PARTS = (*LayerFormats._fields, "head", "embedding")  # in the order in which texts list them

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


def choose_formats(source: Source, wanted: str) -> ModelFormats:
    """The formats of a source's slices for `--format`. Raises InputError for a format that there is not.

    `auto` keeps each tensor's own; the types of GGUF that slices do not have become those that stand in for them.
    """
    config = source.config
    if wanted == "auto":
        layers = [_own_of_layer(source, layer) for layer in range(config.layers)]
        head, embedding = _own(source, head_name(config)), _own(source, EMBEDDING_NAME)
        return ModelFormats(tuple(layers), head, embedding, _own_router(source))
    return wanted_formats(wanted, config, _own_router(source))


def _own_of_layer(source: Source, layer: int) -> LayerFormats:
    specs, formats = layer_specs(source.config, layer), {}
    for part in LayerFormats._fields:
        expert = 0 if part in specs and specs[part].per_expert else -1
        formats[part] = _own(source, part_name(source.config, layer, part, expert=expert)) if part in specs else ""
    return LayerFormats(**formats)


def _own_router(source: Source) -> str:
    """bf16 where every router is bf16, else f32."""
    infos, config = source.tensors(), source.config
    routers = {infos[part_name(config, i, "router")].format for i in range(config.layers) if config.router(i)}
    return "bf16" if routers == {"bf16"} else "f32"


def wanted_formats(wanted: str, config: ModelConfig, router: str = "f32") -> ModelFormats:
    """The formats of a model for a `--format` other than auto. Raises InputError as choose_formats."""
    check_format(wanted)
    if wanted == EXPERTS_MIX and not config.experts:
        raise InputError(f"--format is {wanted}, which is for experts, and this model has none; give --format mxfp4")
    return ModelFormats.for_model(wanted, config, router)


def check_format(wanted: str) -> None:
    """Raises InputError for a `--format`, other than auto, that there is not."""
    if wanted not in FORMAT_CHOICES:
        raise InputError(
            f"--format is {shorten(wanted)!r}, must be auto, {', '.join(FORMAT_CHOICES[:-1])} or {FORMAT_CHOICES[-1]}"
        )


def _own(source: Source, tensor: str) -> str:
    return nearest_format(source.tensors()[tensor].format)


def requantized(source: Source, partition: Partition, formats: ModelFormats) -> str:
    """What slicing quantizes a second time, in one line; "" if nothing.

    "iq2_xs is re-quantized to q4_k (q, k, head; 2.31 to 4.50 bits a weight), iq3_s to q5_k (v; …)": from what, to what,
    which tensors, and what that costs.
    """
    parts: dict[tuple[str, str], dict[str, None]] = {}

    def note(tensor: str, fmt: str, part: str) -> None:
        parts.setdefault((source.tensors()[tensor].format, fmt), {})[part] = None

    divided: set[str] = set()
    seen: set[tuple[str, LayerFormats]] = set()
    for layer, here in enumerate(formats.layers):
        specs = layer_specs(source.config, layer)
        for part, fmt in here.present().items():
            for expert in range(source.config.experts) if specs[part].per_expert else (-1,):
                note(part_name(source.config, layer, part, expert=expert), fmt, part)
        stored = source.tensors()[part_name(source.config, layer, "o")].format
        if stored == here.o and is_quantized(stored) and (stored, here) not in seen:
            seen.add((stored, here))
            if not all(
                on_blocks(columns, source, part_name(source.config, layer, "o"))
                for columns in _o_columns(source, partition, here)
            ):
                divided.add(stored)
    note(head_name(source.config), formats.head, "head")
    note(EMBEDDING_NAME, formats.embedding, "embedding")
    changes = [
        f"{old} to {new} ({', '.join(sorted(names, key=_PARTS.index))}; {_bits(old):.2f} to {_bits(new):.2f} bits a weight)"
        for (old, new), names in parts.items()
        if old not in FLOAT_FORMATS and is_quantized(new) and old != new
    ]
    words = [changes[0].replace(" to ", " is re-quantized to ", 1), *changes[1:]] if changes else []
    for stored in sorted(divided):
        words.append(
            f"o_proj is re-quantized in its own {stored}, as heads of {source.config.head_dim} columns are cut "
            f"within its blocks of {BLOCK_WEIGHTS}"
        )
    return ", ".join(words)


def _bits(stored: str) -> float:
    """Bits a weight of a type of GGUF."""
    kind = type_of_name(stored)
    return 8 * kind.block_bytes / kind.block


def _o_columns(source: Source, partition: Partition, formats: LayerFormats) -> Iterator[Span]:
    for share in partition.shares:
        for tile in attention_tiles(source.config, share, formats):
            yield times(tile.heads, source.config.head_dim)


def make_header(source: Source, partition: Partition, rank: int, formats: ModelFormats) -> Header:
    """The header of one rank's slice: every tile with its parts, in the order of use."""
    config = source.config
    tokenizer = source.tokenizer_bytes() if rank == 0 else {}
    records = slice_records(config, partition.shares[rank], rank, formats, tokenizer)
    return Header(rank, formats, source.name, source.fingerprint(), config, partition, tuple(records))


def slice_model(
    source: Source,
    partition: Partition,
    formats: ModelFormats,
    folder: Path,
    progress: Progress = lambda done, total: None,
    quantizer: Quantizer = quantize,
    *,
    verify: bool = False,
    looking: Progress = lambda done, total: None,
) -> list[LocalSlice]:
    """Have `rank-R-of-N.h5` of every rank of `partition` in `folder`: what is there already stays, the rest is made.

    All files are written under temporary names and renamed once the last is whole; where this is broken off, the next call
    goes on. With `verify` every tile that is there is read, and made again if it is broken; `looking` is its progress, and
    that of looking at what an earlier call left. `quantizer` may be another implementation of `quantize`. Returns what was
    there of each rank's slice. Raises ModelError, StorageError, and InputError where another process slices into the folder.
    """
    headers = (make_header(source, partition, rank, formats) for rank in range(partition.ranks))
    slices = [
        LocalSlice(folder / slice_name(header.rank, partition.ranks), header, verify=verify) for header in headers
    ]
    with ExitStack() as stack:
        check_folder(folder, "--out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error, elsewhere(folder)) from error
        stack.callback(os.close, _lock(folder))
        for local in slices:
            local.look()
            stack.callback(local.close)
        needed = sum(local.needed for local in slices)
        if needed > slices[0].free:
            raise disk_full("the slices need", needed, f"{folder} has", slices[0].free, elsewhere(folder))
        looked, to_look = 0, sum(local.to_look for local in slices)
        for local in slices:
            for nbytes in local.prepare():
                looked += nbytes
                if to_look:
                    looking(min(looked, to_look), to_look)
        writers = [local.writer for local in slices if local.writer is not None]
        table = next((writer for writer in writers if writer.header.rank == 0), None)
        total = max(1, bytes_to_build(writers, table))
        try:
            build_tiles(source, writers, table, lambda done: progress(min(done, total - 1), total), quantizer)
        except ModelError:
            for local in slices:
                local.discard()  # of a model that is broken nothing is worth going on with
            raise
        for local in slices:
            local.finish()
        for local in slices:
            local.publish()
        progress(total, total)
        tidy_up(slices[0].path, slices[0].header.fingerprint)
    return slices


def _lock(folder: Path) -> int:
    """Keep other slicings, whose files would mix with ours, out of `folder`, until the descriptor it returns is closed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise storage_error(folder, error, elsewhere(folder)) from error
    try:
        try_lock(descriptor)  # where there are no locks we go on without
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"another tpimpi is slicing into {folder}; wait until it is done, or choose another --out"
        ) from error
    return descriptor


@contextlib.contextmanager
def only_slicing(folder: Path, *, quiet: bool) -> Iterator[None]:
    """Keep other processes of this host from making the slices in `folder`, one of the cache, and wait for one that does.

    Goes on where the file system has no locks, and says so. Raises StorageError.
    """

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = locked_file(
                folder.with_name(f"{folder.name}.lock"),
                lambda: say("another tpimpi is slicing this model; waiting for it"),
            )
            problem = stack.enter_context(lock)
        except OSError as error:
            raise StorageError(
                f"cannot write to {folder.parent}: {error.strerror}; set TPIMPI_CACHE to another place"
            ) from error
        if problem is not None:
            say(
                f"the file system of {folder.parent} has no locks ({problem.strerror}); going on without: "
                "start no other run of this model until its slices are made"
            )
        yield
