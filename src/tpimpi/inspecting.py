"""`inspect`: what a model, a slice file or a folder of slice files holds, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tpimpi.config import ModelConfig
from tpimpi.errors import InputError, ModelError, SliceError
from tpimpi.plan import Span
from tpimpi.slicefile import SliceFile, parse_slice_name, slice_name
from tpimpi.sources import Source, open_source


def inspect(path: Path, *, verify: bool) -> None:
    """Print a table of what is at `path`; with `verify`, read and check all of it.

    Raises InputError (after the table) where something is broken or missing.
    """
    if path.suffix == ".h5":
        _slices([path], verify=verify)
    elif path.is_dir() and (files := sorted(p for p in path.glob("*.h5") if parse_slice_name(p.name))):
        _slices(files, verify=verify)
        _whole_set(path, files)
    elif path.is_dir() and not (path / "config.json").exists() and not list(path.glob("*.gguf")):
        raise InputError(f"{path} holds no model and no slices (rank-R-of-N.h5); give a folder or file that does")
    else:
        with open_source(path) as source:
            _model(source, verify=verify)


def _print(table: Table) -> None:
    Console(width=140, highlight=False, color_system=None).print(table)


def _model(source: Source, *, verify: bool) -> None:
    tensors = source.tensors()
    formats = Counter(info.format for info in tensors.values())
    parameters = sum(int(np.prod(info.shape)) for info in tensors.values())
    problem: ModelError | None = None
    if verify:
        for name in tensors:
            if not np.isfinite(source.read(name)).all():
                problem = ModelError(
                    f"{source.path}: tensor {name} holds numbers that are not finite; download it again"
                )
                break
    table = _table_of(source.config)
    table.add_row("path", str(source.path))
    table.add_row("parameters", f"{parameters / 1e6:.1f} million in {len(tensors)} tensors")
    table.add_row("formats", ", ".join(f"{count} {name}" for name, count in formats.most_common()))
    table.add_row("fingerprint", source.fingerprint())
    table.add_row(
        "state", ("broken" if problem else "whole, every tensor read") if verify else "whole (names and shapes)"
    )
    _print(table)
    if problem:
        raise problem


def _table_of(config: ModelConfig) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    windows = sorted({window for window in config.attention_windows if window})
    scaling = config.rope_scaling.kind if config.rope_scaling else "none"
    rows = {
        "architecture": config.architecture,
        "layers": f"{config.layers}",
        "hidden": f"{config.hidden}",
        "heads": f"{config.heads} query, {config.kv_heads} KV, of {config.head_dim}",
        "MLP columns": f"{config.intermediate}",
        "vocabulary": f"{config.vocab}, head {'tied to the embedding' if config.tied_head else 'of its own'}",
        "context": f"{config.context} positions, rope scaling {scaling}"
        + (f", attention window {windows}" if windows else ""),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _slices(files: list[Path], *, verify: bool) -> None:
    table = Table(box=None, pad_edge=False, header_style="none")
    for name in ("file", "model", "format", "shares"):
        table.add_column(name)
    for name in ("heads", "KV heads", "columns", "tiles", "largest tile", "size"):
        table.add_column(name, justify="right")
    table.add_column("state")
    problems: list[SliceError] = []
    for path in files:
        try:
            file = SliceFile(path)
        except SliceError as error:
            problems.append(error)
            table.add_row(path.name, *[""] * 9, "broken")
            continue
        state = "whole (header)"
        try:
            if verify:
                for _ in file.verify():
                    pass
                state = "whole, every byte checked"
        except SliceError as error:
            problems.append(error)
            state = "broken"
        finally:
            file.close()
        header, share = file.header, file.header.share
        tiles = [record.nbytes for record in header.records if record.block.kind in ("attn", "mlp", "head")]
        table.add_row(
            path.name,
            f"{header.model} ({header.fingerprint[:12]})",
            header.format,
            header.plan.describe(),
            _span(share.heads),
            _span(share.kv_heads),
            _span(share.columns),
            str(len(tiles)),
            f"{max(tiles, default=0) / 2**20:.1f} MiB",
            f"{path.stat().st_size / 1e6:.0f} MB",
            state,
        )
    _print(table)
    if problems:
        raise problems[0]


def _whole_set(folder: Path, files: list[Path]) -> None:
    """Raise SliceError where a folder lacks some ranks of a set."""
    found = [parsed for path in files if (parsed := parse_slice_name(path.name))]
    for ranks in {ranks for _, ranks in found}:
        missing = sorted(set(range(ranks)) - {rank for rank, of in found if of == ranks})
        if missing:
            names = ", ".join(slice_name(rank, ranks) for rank in missing)
            raise SliceError(
                f"{folder} lacks {names}; make the slices again, or copy them there if they are needed here"
            )


def _span(span: Span) -> str:
    return f"{span.start}-{span.stop - 1}" if span.size else "none"
