"""Pieces of llguidance's Lark, in which grammars of answers are written, by the front process and by rank 0."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

JSON_OPTIONS = {
    # Bounded, since small models go on with blanks for ever: two of them, or a line's end and an indentation.
    "whitespace_pattern": r"( {0,2}|\r?\n[ \t]{0,32})",
    "whitespace_flexible": True,
    "coerce_one_of": True,  # oneOf is taken as anyOf
    "lenient": False,
}


def json_rule(schema: Mapping[str, Any]) -> str:
    """The part of a rule that a JSON schema is."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"


def special_name(token: str) -> str:
    """How a rule names a control token: `<|python_tag|>`, `<|[TOOL_CALLS]|>`."""
    if re.fullmatch(r"<[^<>\[\s][^<>\s]*>", token):
        return token
    return "<|" + re.sub(r"[<>\s]", "_", token) + "|>"


def literal(text: str) -> str:
    """The part of a rule that a text is."""
    return json.dumps(text, ensure_ascii=False)
