"""What the front does for each request: the endpoints, over rank 0's link."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tpimpi.serving.server.answering import Answers, check_model
from tpimpi.serving.server.anthropic import MessagesForm, MessagesRequest
from tpimpi.serving.server.bodies import BODY_DIGEST, Bodies
from tpimpi.serving.server.chat_completions import ChatForm, ChatRequest, messages_of
from tpimpi.serving.server.completions import CompletionForm, CompletionRequest
from tpimpi.serving.server.front_options import FrontOptions
from tpimpi.serving.server.guard import OWNER
from tpimpi.serving.server.kept import Kept, key_of
from tpimpi.serving.server.link import RankLink
from tpimpi.serving.server.metrics import Metrics, share
from tpimpi.serving.server.problems import bad_field, json_response
from tpimpi.serving.server.replies import Replies
from tpimpi.serving.server.response_objects import ResponsesForm
from tpimpi.serving.server.responses import ResponsesRequest
from tpimpi.serving.server.wire import Chat, Text

PLAIN_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """A text (`prompt`, or `content` as llama.cpp says), or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[dict[str, Any]] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


class Service:
    """The endpoints; each gets a request, and returns what answers it."""

    def __init__(self, options: FrontOptions, link: RankLink, kept: Kept, metrics: Metrics) -> None:
        self._options, self._link, self._kept, self._metrics = options, link, kept, metrics
        self._bodies = Bodies()
        self._began = int(time.time())

    # Answers

    async def chat_completions(self, request: Request) -> ASGIApp:
        body = await self._bodies.json(request, ChatRequest)
        wanted = body.wanted()
        return self._answers(request, [wanted], ChatForm(body, wanted), body.model)

    async def completions(self, request: Request) -> ASGIApp:
        body = await self._bodies.json(request, CompletionRequest)
        wanted = body.wanted()
        echoed = [""] * len(wanted)
        if body.echo:
            prompts = [one.prompt for one in wanted]
            echoed = [
                prompt.text if isinstance(prompt, Text) else await self._link.spell(prompt.ids)
                for prompt in prompts
                if not isinstance(prompt, Chat)
            ]
        return self._answers(request, wanted, CompletionForm(body, wanted, echoed), body.model)

    async def responses(self, request: Request) -> ASGIApp:
        body = await self._bodies.json(request, ResponsesRequest)
        return self._answers(request, [body.wanted()], ResponsesForm(body), body.model)

    async def messages(self, request: Request) -> ASGIApp:
        body = await self._bodies.json(request, MessagesRequest)
        return self._answers(request, [body.wanted()], MessagesForm(body), body.model)

    async def count_tokens(self, request: Request) -> Response:
        """Of a request for messages."""
        body = await self._bodies.json(request, MessagesRequest)
        prompt = body.chat()
        with self._link.place(1):
            check_model(body.model, await self._link.until_ready(), self._options.names)
            ids = await self._link.count(prompt)
        return json_response({"input_tokens": len(ids)})

    def _answers(self, request: Request, wanted: list[Any], form: Any, model: str | None) -> Answers:
        options, owner = self._options, request.scope[OWNER]
        replies, key = Replies(self._link), key_of(request.headers)
        if key is not None:
            replies = self._kept.replies(owner, key, f"{request.url.path} {request.scope[BODY_DIGEST]}")
        return Answers(
            *(self._link, replies, self._metrics, wanted, form),
            owner=owner,
            model=model,
            time_limit=options.time_limit,
            names=options.names,
        )

    # Tokens

    async def tokenize(self, request: Request) -> Response:
        body = await self._bodies.json(request, TokenizeRequest)
        text = body.prompt if body.prompt is not None else body.content
        if (text is None) == (body.messages is None):
            raise bad_field("prompt", "give a text, or messages")
        with self._link.place(1):
            ready = await self._link.until_ready()
            check_model(body.model, ready, self._options.names)
            prompt = Chat(messages_of(body.messages)) if body.messages is not None else Text(text or "")
            ids = await self._link.count(prompt)
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": ready.context})

    async def detokenize(self, request: Request) -> Response:
        body = await self._bodies.json(request, DetokenizeRequest)
        with self._link.place(1):
            check_model(body.model, await self._link.until_ready(), self._options.names)
            text = await self._link.spell(body.tokens)
        return json_response({"prompt": text, "content": text})

    # How it is

    async def models(self, request: Request) -> Response:
        ready = await self._link.until_ready()
        about = {"object": "model", "created": self._began, "owned_by": "tpimpi", "max_model_len": ready.context}
        names = dict.fromkeys((ready.model, *self._options.names))
        if (name := request.path_params.get("name")) is not None:
            check_model(name, ready, self._options.names)
            return json_response({"id": name, **about})
        return json_response({"object": "list", "data": [{"id": one, **about} for one in names]})

    async def health(self, request: Request) -> Response:
        """Ready or not, at once."""
        link = self._link
        if link.is_ending:
            return json_response({"status": "ending"}, 503)
        if link.ready is not None:
            return json_response({"status": "ready", "model": link.ready.model, "context": link.ready.context})
        progress = link.progress
        return json_response({"status": "loading", "text": progress.text, "progress": progress.done}, 503)

    async def cluster(self, request: Request) -> Response:
        """What the page shows of the ranks."""
        link = self._link
        ready, figures = link.ready, link.figures
        state = "ending" if link.is_ending else "loading" if ready is None else "ready"
        found: dict[str, Any] = {"model": None, "context": None, "together": None, "state": state}
        found |= {"text": link.progress.text if ready is None else "", "progress": link.progress.done}
        if ready is not None:
            found |= {"model": ready.model, "context": ready.context, "together": ready.together, "progress": 1.0}
        found |= {"tokens_per_s": 0.0, "running": 0, "waiting": 0, "pages_used": 0, "pages": 0, "ranks": []}
        if figures is not None:
            seconds = figures.interval_s
            names = ("running", "waiting", "pages_used", "pages")
            found |= {"tokens_per_s": figures.tokens / seconds, **{name: getattr(figures, name) for name in names}}
            found["ranks"] = [
                {
                    "rank": rank.rank,
                    "host": rank.host,
                    "memory_bytes": rank.memory_bytes,
                    "promised_bytes": rank.promised_bytes,
                    "disk_bytes_per_s": link.disk_rates.get(rank.rank, 0.0),
                    "disk_share": share(rank.disk_s, seconds),
                    "star_share": share(rank.star_s, seconds),
                    "compute_share": share(rank.compute_s, seconds),
                }
                for rank in figures.ranks
            ]
        return json_response(found, headers={"Cache-Control": "no-store"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=PLAIN_TEXT)
