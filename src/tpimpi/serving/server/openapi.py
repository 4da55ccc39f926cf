"""The description of the API, made of the table of endpoints and of the types of their bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from tpimpi import __version__
from tpimpi.serving.server.anthropic import MESSAGES

if TYPE_CHECKING:
    from tpimpi.serving.server.routes import Endpoint

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
MESSAGES_ERROR = {  # Anthropic's
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
STATUSES = {"400": "what is asked cannot be done", "401": "no key, or one that is not known", "403": "another site"}
STATUSES |= {
    "404": "no such thing",
    "408": "the body was slow",
    "413": "the body is too large",
    "422": "the Idempotency-Key was given with another request",
    "429": "the queue is full",
}
STATUSES |= {"503": "loading, ending or failed", "504": "the answer took too long"}


IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "the same request again with the same key gets the answer that there is",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}


def describe(endpoints: Sequence[Endpoint], *, has_keys: bool) -> dict[str, Any]:
    """An OpenAPI document."""
    bodies = [one.body for one in endpoints if one.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, Any] = {}
    for one in endpoints:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", one.path)
        operation: dict[str, Any] = {"summary": one.summary, "operationId": f"{one.method.lower()}{_words(path)}"}
        names = re.findall(r"\{(\w+)\}", path)
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
        if one.kept:
            operation["parameters"].append(IDEMPOTENCY_KEY)
        if one.body is not None:
            content = {"application/json": {"schema": by_type[one.body]}}
            operation["requestBody"] = {"required": True, "content": content}
        kind = "MessagesError" if path.startswith(MESSAGES) else "Error"
        error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}
        operation["responses"] = {"200": {"description": "done"}} | {
            status: {"description": why, "content": error} for status, why in STATUSES.items()
        }
        paths.setdefault(path, {})[one.method.lower()] = operation
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tpimpi", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**components, "Error": ERROR, "MessagesError": MESSAGES_ERROR}},
    }
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _words(path: str) -> str:
    return "".join(f"_{word}" for word in re.findall(r"\w+", path))
