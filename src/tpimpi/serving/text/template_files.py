"""Which chat template a model brings, and where: the rules are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tpimpi.errors import ModelError

DEFAULT = "default"  # the name of the template that a chat without tools takes
NAMED_PREFIX = "additional_chat_template."  # of NAME.jinja, a file of the folder additional_chat_templates
LEGACY_FILE = "chat_template.json"  # of a model that also takes images


def chat_template_of_directory(assets: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """The template of a Hugging Face directory with this tokenizer_config.json.

    Files named .jinja take the place of all that the config has, even where none of them is the default.
    """
    files = {DEFAULT: "chat_template.jinja"} if "chat_template.jinja" in assets else {}
    for name in assets:
        if name.startswith(NAMED_PREFIX):
            files[name.removeprefix(NAMED_PREFIX).removesuffix(".jinja")] = name
    if files:
        return _text(files[DEFAULT], assets[files[DEFAULT]]) if DEFAULT in files else None
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get(DEFAULT)
    elif isinstance(template, dict):  # by name, as transformers keeps it in memory
        template = template.get(DEFAULT)
    if template is None and "chat_template" not in config and LEGACY_FILE in assets:
        return _legacy(assets[LEGACY_FILE])
    if not isinstance(template, str | None):
        raise ModelError(f"chat_template in tokenizer_config.json is a {type(template).__name__}, must be text")
    return template


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{name} is not UTF-8: {error}; download the model again") from error


def _legacy(data: bytes) -> str | None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{LEGACY_FILE} is not valid JSON: {error}; download the model again") from error
    template = content.get("chat_template") if isinstance(content, dict) else content
    if not isinstance(template, str | None):
        raise ModelError(f"chat_template in {LEGACY_FILE} is a {type(template).__name__}, must be text")
    return template
