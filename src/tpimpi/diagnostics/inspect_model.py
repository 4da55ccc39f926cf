"""`inspect` of a model: what its files are, and whether tpimpi runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tpimpi.errors import ModelError, printable
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import unused_parameters
from tpimpi.system.terminal import print_table
from tpimpi.system.units import show_size
from tpimpi.weights.sources import ModelFacts, Source, describe_model, locate_model, open_source

WIDTH = 140  # columns of a table at a terminal

# Raises ModelError where there is no tokenizer in these assets that a run could use, for a model of so many token ids.
CheckTokenizer = Callable[[dict[str, bytes], int], object]


def inspect_model(path: Path, report: dict[str, Any], *, verify: bool, check_tokenizer: CheckTokenizer) -> None:
    """Print what the model at `path` is and put the same into `report`; with `verify` read every tensor.

    Raises ModelError (after the table, where there is one) for a model that tpimpi does not compute, or that is broken; one
    that only has no tokenizer, as those of `synth`, is shown with that.
    """
    facts = describe_model(path)
    report |= _as_json(path, facts)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("kind", printable(facts.kind))
    without: ModelError | None = None
    try:
        with open_source(path) as source:
            problem = _source(source, report, table, facts, verify=verify)
            without = _tokenizer_problem(source, check_tokenizer)
    except ModelError as error:
        problem = error
        _unknown(path, facts, table)
    why_not = problem or without
    report |= {"runs": why_not is None, "why_not": None if why_not is None else str(why_not)}
    table.add_row(
        "runs", "yes" if why_not is None else "no, see below" if problem else f"no: {printable(str(without))}"
    )
    print_table(table, WIDTH)
    if problem is not None:
        raise problem


def _as_json(path: Path, facts: ModelFacts) -> dict[str, Any]:
    return {
        "path": str(path),
        "kind": facts.kind,
        "family": facts.family,
        "context": facts.context,
        "chat_templates": facts.chat_templates,
        "stored": {name: asdict(stored) for name, stored in facts.formats.items()},
    }


def _tokenizer_problem(source: Source, check: CheckTokenizer) -> ModelError | None:
    try:
        check(source.tokenizer_assets(), source.config.vocab)
    except ModelError as error:
        return error
    return None


def _unknown(path: Path, facts: ModelFacts, table: Table) -> None:
    """Rows for a model of which only its own words are known."""
    table.add_row("family", printable(facts.family))
    table.add_row("path", printable(str(locate_model(path))))
    table.add_row("formats", _formats(facts))
    table.add_row("context", "not said" if facts.context is None else f"{facts.context} positions")
    table.add_row("chat template", _templates(facts))


def _source(
    source: Source, report: dict[str, Any], table: Table, facts: ModelFacts, *, verify: bool
) -> ModelError | None:
    """Rows for a model that could be opened; returns what is wrong with its numbers."""
    tensors = source.tensors()
    formats = Counter(info.format for info in tensors.values())
    parameters = sum(int(np.prod(info.shape)) for info in tensors.values())
    active = parameters - unused_parameters(source.config)
    problem: ModelError | None = None
    if verify:
        for name in tensors:
            if not np.isfinite(source.read(name)).all():
                problem = ModelError(
                    f"{source.path}: tensor {name} holds numbers that are not finite; download it again"
                )
                break
    report |= {
        "path": str(source.path),
        "name": source.name,
        "config": source.config.to_dict(),
        "parameters": parameters,
        "active_parameters": active,
        "tensors": len(tensors),
        "formats": dict(formats),
        "fingerprint": source.fingerprint(),
        "whole": problem is None,
    }
    for name, value in _rows(source.config).items():
        table.add_row(name, printable(value))
    table.add_row("chat template", _templates(facts))
    table.add_row("path", printable(str(source.path)))
    used = f", {active / 1e6:.1f} million of them for a token" if active < parameters else ""
    table.add_row("parameters", f"{parameters / 1e6:.1f} million in {len(tensors)} tensors{used}")
    table.add_row("formats", _formats(facts))
    table.add_row("fingerprint", source.fingerprint())
    if source.left_out:
        table.add_row("left out", source.left_out)
    table.add_row(
        "state", ("broken" if problem else "whole, every tensor read") if verify else "whole (names and shapes)"
    )
    return problem


def _formats(facts: ModelFacts) -> str:
    """ "q4_0 77.9 MB in 210 tensors, f32 0.1 MB in 61": what is stored, the largest first."""
    words = [
        f"{printable(name)} {_size(stored.nbytes)} in {stored.tensors}{'' if number else ' tensors'}"
        for number, (name, stored) in enumerate(facts.formats.items())
    ]
    return ", ".join(words) or "no weights"


def _size(nbytes: int) -> str:
    return show_size(nbytes) if nbytes >= 1e7 else f"{nbytes / 1e6:.2g} MB"


def _templates(facts: ModelFacts) -> str:
    if not facts.chat_templates:
        return "none"
    return "yes" if facts.chat_templates == ["default"] else printable(", ".join(facts.chat_templates))


def _rows(config: ModelConfig) -> dict[str, str]:
    windows = sorted({window for window in config.attention_windows if window})
    scaling = config.rope_scaling.kind if config.rope_scaling else "none"
    return {
        "architecture": config.architecture,
        "layers": f"{config.layers}",
        "hidden": f"{config.hidden}",
        "heads": f"{config.heads} query, {config.kv_heads} KV, of {config.head_dim}",
        **_mlp_rows(config),
        "vocabulary": f"{config.vocab}, head {'tied to the embedding' if config.tied_head else 'of its own'}",
        "context": f"{config.context} positions, rope scaling {scaling}"
        + (f", attention window {windows}" if windows else ""),
    }


def _mlp_rows(config: ModelConfig) -> dict[str, str]:
    dense = sum(config.router(layer) is None for layer in range(config.layers))
    rows = {"MLP columns": f"{config.intermediate}{_in_layers(dense) if config.experts else ''}"} if dense else {}
    if config.experts:
        shared = f", and shared ones of {config.shared_intermediate} columns" if config.shared_intermediate else ""
        rows["experts"] = (
            f"{config.experts} of {config.expert_intermediate} columns{_in_layers(config.layers - dense)}, "
            f"{config.experts_per_token} for a token{shared}"
        )
    return rows


def _in_layers(count: int) -> str:
    return f" in {count} layer{'' if count == 1 else 's'}"
