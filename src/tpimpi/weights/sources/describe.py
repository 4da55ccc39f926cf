"""What a model's files say of themselves, whether tpimpi runs the model or not: read from headers and config.json alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpimpi.models.keys import show
from tpimpi.weights.sources.gguf_header import GgufTensor
from tpimpi.weights.sources.gguf_parts import read_parts
from tpimpi.weights.sources.safetensors import read_json, weight_headers
from tpimpi.weights.sources.weight_file import WeightFile, is_file, listed

_TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True)
class StoredFormat:
    """How much of a model is stored in a format: bytes and tensors."""

    nbytes: int
    tensors: int


@dataclass(frozen=True)
class ModelFacts:
    """What a model's files are. `formats` are by name (GGML's, or a safetensors dtype in small letters), the largest first.

    `context` is in positions, None where the files do not say; `chat_templates` are names, "default" among them.
    """

    kind: str
    family: str
    formats: dict[str, StoredFormat]
    context: int | None
    chat_templates: list[str]


def describe_gguf(path: Path) -> ModelFacts:
    """Of a GGUF file, or of all parts of a split one. ModelError where a header cannot be read, or a part is missing."""
    files: list[WeightFile] = []
    try:
        parts = read_parts(path, files)
    finally:
        for file in files:
            file.file.close()
    metadata = parts[0].metadata
    architecture = metadata.get("general.architecture")
    kind = f"GGUF version {parts[0].version}" + (f" in {len(parts)} parts" if len(parts) > 1 else "")
    if (what := metadata.get("general.type", "model")) != "model":
        kind += f", not a model: {show(what)}"
    context = metadata.get(f"{architecture}.context_length")
    names = [key.removeprefix(_TEMPLATE_KEY).removeprefix(".") for key in metadata if key.startswith(_TEMPLATE_KEY)]
    return ModelFacts(
        kind=kind,
        family=_text(architecture),
        formats=_formats(_gguf_format(tensor) for part in parts for tensor in part.tensors.values()),
        context=context if isinstance(context, int) else None,
        chat_templates=sorted({name or "default" for name in names if name != "s"}),
    )


def describe_hf(directory: Path) -> ModelFacts:
    """Of a Hugging Face directory. ModelError where config.json or a header cannot be read."""
    config = read_json(directory / "config.json")
    values = config if isinstance(config, dict) else {}
    inner = values["text_config"] if isinstance(values.get("text_config"), dict) else {}
    classes = values.get("architectures")
    family = _text(values.get("model_type"))
    if isinstance(classes, list) and classes:
        family += f" ({', '.join(map(_text, classes[:3]))})"
    context = values.get("max_position_embeddings", inner.get("max_position_embeddings"))
    headers = weight_headers(directory)
    found = [_entry(entry) for header in headers.values() for entry in header.values()]
    return ModelFacts(
        kind=f"Hugging Face directory, {len(headers)} safetensors file{'' if len(headers) == 1 else 's'}",
        family=family,
        formats=_formats(found),
        context=context if isinstance(context, int) else None,
        chat_templates=_hf_templates(directory),
    )


def _hf_templates(directory: Path) -> list[str]:
    files = ("chat_template.jinja", "chat_template.json")
    found = {"default"} if any(is_file(directory / name) for name in files) else set()
    more = directory / "additional_chat_templates"
    if more.is_dir():
        found |= {path.stem for path in listed(more, ".jinja")}
    path = directory / "tokenizer_config.json"
    config = read_json(path) if is_file(path) else {}
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, str) and template.strip():
        found.add("default")
    elif isinstance(template, dict):
        found |= set(map(_text, template))
    elif isinstance(template, list):
        found |= {_text(entry.get("name")) for entry in template if isinstance(entry, dict)}
    return sorted(found)


def _gguf_format(tensor: GgufTensor) -> tuple[str, int]:
    return (f"type {tensor.kind}" if tensor.type is None else tensor.type.name), tensor.nbytes


def _entry(entry: Mapping[str, Any]) -> tuple[str, int]:
    begin, end = entry["data_offsets"]
    return str(entry["dtype"]).lower(), end - begin


def _formats(tensors: Iterable[tuple[str, int]]) -> dict[str, StoredFormat]:
    found: dict[str, StoredFormat] = {}
    for name, nbytes in tensors:
        before = found.get(name, StoredFormat(0, 0))
        found[name] = StoredFormat(before.nbytes + nbytes, before.tensors + 1)
    return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))


def _text(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= 80 else show(value)
