"""`inspect`: what a model, a slice file or a folder of slice files holds, and whether it is whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from tpimpi.diagnostics.cache_table import print_cache
from tpimpi.diagnostics.inspect_model import WIDTH, CheckTokenizer, inspect_model
from tpimpi.errors import InputError, SliceError, StorageError, TpimpiError, printable
from tpimpi.models.blocks import LAYER_KINDS
from tpimpi.models.keys import show
from tpimpi.system.files import write_json
from tpimpi.system.terminal import print_table
from tpimpi.weights.cache import list_cache
from tpimpi.weights.locations import cache_folder
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import Span
from tpimpi.weights.sources.hub import resolve_folder

_MAX_NAMES = 8  # in one message


def inspect(
    path: Path, *, verify: bool, json: Path | None = None, check_tokenizer: CheckTokenizer = lambda assets, vocab: None
) -> None:
    """Print a table of what is at `path`; with `verify`, read and check all of it. The same as JSON goes to the file `json`.

    Raises InputError (after the table) where something is broken, missing, or not of one set, and for a model that tpimpi
    does not run.
    """
    found: dict[str, Any] = {"path": str(path), "verified": verify, "model": None, "slices": [], "problem": None}
    try:
        _inspect(path, found, verify=verify, check_tokenizer=check_tokenizer)
    except TpimpiError as error:
        found["problem"] = str(error)
        raise
    finally:
        if json is not None:
            write_json(json, found, "--json")


def _inspect(path: Path, found: dict[str, Any], *, verify: bool, check_tokenizer: CheckTokenizer) -> None:
    """Print the table, and put what it says into `found`."""
    names = _names(path)
    files = [path / name for name in names or () if name.startswith("rank-") and name.endswith(".h5")]
    if names is None and path.suffix == ".h5":
        _slices([path], found["slices"], verify=verify)
    elif files:
        _whole_set(path, _slices(files, found["slices"], verify=verify))
    elif names is not None and path.resolve() == cache_folder().resolve():
        print("this is where runs keep the slices they make; see also: python -m tpimpi cache --help")
        cached = list_cache(path)
        found["cache"] = [asdict(slices) for slices in cached]
        print_cache(path, cached)
    elif names is not None and not _has_model(path, names):
        raise InputError(f"{path} holds no model and no slices (rank-R-of-N.h5); give a folder or file that does")
    else:
        report: dict[str, Any] = {}
        try:
            inspect_model(path, report, verify=verify, check_tokenizer=check_tokenizer)
        finally:
            found["model"] = report or None


def _has_model(path: Path, names: list[str]) -> bool:
    """Whether a folder that holds these names holds a model, or is one of a Hugging Face cache."""
    known = any(name == "config.json" or name.lower().endswith((".gguf", ".safetensors")) for name in names)
    return known or resolve_folder(path) != path


def _names(path: Path) -> list[str] | None:
    """What a folder holds, in order; None where `path` is no folder. Raises InputError where it cannot be read."""
    try:
        return sorted(found.name for found in path.iterdir()) if path.is_dir() else None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; give a folder or file that this user may read"
        ) from error


def _slices(files: list[Path], report: list[dict[str, Any]], *, verify: bool) -> dict[Path, Header]:
    """Print a table of slice files. Returns their headers; raises the first of what is wrong with one of them."""
    headers: dict[Path, Header] = {}
    table = Table(box=None, pad_edge=False, header_style="none")
    for name in ("file", "model", "format", "shares"):
        table.add_column(name)
    for name in ("heads", "KV heads", "columns", "tiles", "largest tile", "size"):
        table.add_column(name, justify="right")
    table.add_column("state")
    problems: list[TpimpiError] = []
    for path in files:
        try:
            file = SliceFile(path)
        except SliceError as error:
            problems.append(error)
            table.add_row(printable(path.name), *[""] * 9, "broken")
            report.append({"file": path.name, "state": "broken", "problem": str(error)})
            continue
        header, share = file.header, file.header.share
        state, problem = _state(path, file, verify=verify)
        if problem is not None:
            problems.append(problem)
        headers[path] = header
        tiles = [record.nbytes for record in header.records if record.block.kind in (*LAYER_KINDS, "experts", "head")]
        report.append(
            {
                "file": path.name,
                "state": state,
                "rank": header.rank,
                "ranks": header.partition.ranks,
                "model": header.model,
                "fingerprint": header.fingerprint,
                "format": header.format,
                "shares": header.partition.describe(),
                "tiles": len(tiles),
                "largest_tile_bytes": max(tiles, default=0),
                "bytes": file.size,
            }
        )
        table.add_row(
            printable(path.name),
            f"{printable(header.model)} ({printable(header.fingerprint[:12])})",
            header.format,
            header.partition.describe(),
            _span(share.heads),
            _span(share.kv_heads),
            _span(share.usual_columns),
            str(len(tiles)),
            f"{max(tiles, default=0) / 2**20:.1f} MiB",
            f"{file.size / 1e6:.0f} MB",
            state,
        )
    print_table(table, WIDTH)
    if problems:
        raise problems[0]
    return headers


def _state(path: Path, file: SliceFile, *, verify: bool) -> tuple[str, TpimpiError | None]:
    """Look at a slice file, and close it: its state in words, and what is wrong with it."""
    state, problem = "whole (header)", None
    try:
        _check_name(path, file.header)
        if verify:
            for _ in file.verify():
                pass
            state = "whole, every byte checked"
    except (SliceError, StorageError) as error:
        state, problem = "misnamed" if isinstance(error, _MisnamedError) else "broken", error
    finally:
        file.close()
    if file.header.rank == 0 and not file.header.records[-1].parts:
        state += ", no tokenizer"
    return state, problem


class _MisnamedError(SliceError):
    """A slice file under another's name."""


def _check_name(path: Path, header: Header) -> None:
    """A file may be called anything, but not as another rank's slice is, nor as none can be."""
    if path.name != slice_name(header.rank, header.partition.ranks) and path.name.startswith("rank-"):
        raise _MisnamedError(
            f"slice file {path} is of rank {header.rank} of {header.partition.ranks}, its name says otherwise; "
            f"name it {slice_name(header.rank, header.partition.ranks)}, or make the slices again"
        )


def _whole_set(folder: Path, headers: dict[Path, Header]) -> None:
    """Raise SliceError where a folder lacks some ranks of a set, or its members are of different sets."""
    sets: dict[int, dict[Path, Header]] = {}
    for path, header in headers.items():
        sets.setdefault(header.partition.ranks, {})[path] = header
    for ranks, members in sets.items():
        first, *others = members
        for path in others:
            _check_alike(first, members[first], path, members[path])
        missing = sorted(set(range(ranks)) - {header.rank for header in members.values()})
        if missing:
            names = ", ".join(slice_name(rank, ranks) for rank in missing[:_MAX_NAMES])
            more = f" and {len(missing) - _MAX_NAMES} more" if len(missing) > _MAX_NAMES else ""
            raise SliceError(
                f"{folder} lacks {names}{more}; make the slices again, or copy them there if they are needed here"
            )


def _check_alike(first: Path, header: Header, path: Path, other: Header) -> None:
    pairs = {
        "shares": (other.partition.describe(), header.partition.describe()),
        "fingerprint": (show(other.fingerprint), show(header.fingerprint)),
        "format": (other.formats.key(), header.formats.key()),
        "config": (other.config, header.config),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            what = "another config than" if name == "config" else f"{name} {found}, not {wanted} as"
            raise SliceError(f"slice file {path} has {what} {first.name}; use slices that were made together")


def _span(span: Span) -> str:
    return f"{span.start}-{span.stop - 1}" if span.size else "none"
