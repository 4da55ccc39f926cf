"""The objects of OpenAI's responses: items of an answer, and the events of a stream, numbered in their order."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from tpimpi.serving.server.answering import Usage
from tpimpi.serving.server.exchange import CallBegan, CallMore, Ended, Event, ReasoningMore, TextMore
from tpimpi.serving.server.problems import ApiError
from tpimpi.serving.server.responses import ResponsesRequest
from tpimpi.serving.server.wire import Ready

_MESSAGE, _REASONING, _CALL = "message", "reasoning", "function_call"
_NAMES = {_MESSAGE: "output_text", _REASONING: "reasoning_text"}  # of the text within, and of its events


class ResponsesForm:
    """The objects of one answer: a list of items, each whole before the next begins."""

    def __init__(self, request: ResponsesRequest) -> None:
        self.streams = bool(request.stream)
        self._request, self._model = request, request.model or ""
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self._items: list[dict[str, Any]] = []
        self._is_open = False
        self._number = 0
        self._why = "end"

    def use_model(self, ready: Ready) -> None:
        self._model = ready.model

    def begin(self, usage: Usage) -> Iterator[bytes]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))

    def event(self, index: int, event: Event) -> Iterator[bytes]:
        match event:
            case TextMore(text=text) if text:
                yield from self._more(_MESSAGE, text)
            case ReasoningMore(text=text) if text:
                yield from self._more(_REASONING, text)
            case CallBegan():
                yield from self._close()
                item = {"type": _CALL, "id": f"fc_{secrets.token_hex(12)}", "call_id": event.id, "name": event.name}
                yield from self._open({**item, "arguments": "", "status": "in_progress"})
            case CallMore():
                self._items[-1]["arguments"] += event.arguments
                yield self._of_item("response.function_call_arguments.delta", delta=event.arguments)
            case Ended():
                self._why = event.why
                yield from self._close()

    def end(self, usage: Usage) -> Iterator[bytes]:
        response = self.whole(usage)
        yield self._event(f"response.{response['status']}", response=response)

    def error(self, error: ApiError) -> Iterator[bytes]:
        told = {"code": error.code or error.kind, "message": error.message}
        yield self._event("error", **told, param=error.param)
        failed = {**self._response("failed"), "error": {"code": "server_error", "message": error.message}}
        yield self._event("response.failed", response=failed)

    def whole(self, usage: Usage) -> Any:
        response = self._response("incomplete" if self._why == "length" else "completed")
        if self._why == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        return response

    def _response(self, status: str) -> dict[str, Any]:
        request = self._request
        given = {"temperature": 1.0, "top_p": 1.0, "tool_choice": "auto", "parallel_tool_calls": True, "tools": []}
        given |= {"metadata": {}, "text": {"format": {"type": "text"}}, "truncation": "disabled"}
        given |= {name: value for name in given if (value := getattr(request, name)) is not None}
        given |= {name: getattr(request, name) for name in ("instructions", "max_output_tokens", "reasoning", "user")}
        about = {"id": self._id, "object": "response", "created_at": self._created, "status": status}
        about |= {"model": self._model, "error": None, "incomplete_details": None, "previous_response_id": None}
        return {**about, **given, "output": list(self._items), "usage": None}

    # Items

    def _more(self, kind: str, text: str) -> Iterator[bytes]:
        """More text of an item, which begins unless one of its kind is open."""
        name = _NAMES[kind]
        if not self._is_open or self._items[-1]["type"] != kind:
            yield from self._close()
            about = {"id": f"{'msg' if kind == _MESSAGE else 'rs'}_{secrets.token_hex(12)}", "type": kind}
            side: dict[str, Any] = {"role": "assistant"} if kind == _MESSAGE else {"summary": []}
            yield from self._open({**about, **side, "status": "in_progress", "content": []})
            part = _part(name, "")
            yield self._of_item("response.content_part.added", content_index=0, part=part)
            self._items[-1]["content"] = [part]
        self._items[-1]["content"] = [_part(name, self._items[-1]["content"][0]["text"] + text)]
        more: dict[str, Any] = {"logprobs": []} if kind == _MESSAGE else {}
        yield self._of_item(f"response.{name}.delta", content_index=0, delta=text, **more)

    def _open(self, item: dict[str, Any]) -> Iterator[bytes]:
        self._items.append(item)
        self._is_open = True
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _close(self) -> Iterator[bytes]:
        if not self._is_open:
            return
        self._is_open = False
        item = self._items[-1]
        if item["type"] == _CALL:
            yield self._of_item("response.function_call_arguments.done", arguments=item["arguments"])
        else:
            (part,) = item["content"]
            name = _NAMES[item["type"]]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == _MESSAGE else {}
            yield self._of_item(f"response.{name}.done", content_index=0, text=part["text"], **more)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        item["status"] = "incomplete" if self._why == "length" else "completed"
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, **fields, "sequence_number": self._number})
        self._number += 1
        return f"event: {kind}\ndata: ".encode() + data + b"\n\n"


def _part(name: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if name == "output_text" else {}
    return {"type": name, "text": text, **more}
