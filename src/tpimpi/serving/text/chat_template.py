"""The chat template that comes with a model, run in Jinja's sandbox as transformers runs it.

What messages hold is rendered so that a token found in it is known to be the template's own (see content.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from tpimpi.errors import InputError, ModelError
from tpimpi.serving.text.added_tokens import AddedToken, Part
from tpimpi.serving.text.checks import is_unicode, needing
from tpimpi.serving.text.content import Alphabet, Content
from tpimpi.serving.text.control_tokens import ControlTokens
from tpimpi.serving.text.messages import (
    PROBE,
    PROBED,
    PROBED_KEY,
    PROBED_TOOL,
    Messages,
    messages_with_content,
    texts_of,
    variants,
    with_content,
    with_descriptions,
)
from tpimpi.serving.text.template_limits import (
    COMPILE_TIME_S,
    RENDER_TIME_A_CHARACTER_S,
    RENDER_TIME_S,
    TemplateTimeError,
    bounded,
)
from tpimpi.serving.text.tool_forms import told_as_text

_NONE = "None"  # what some templates write where a message has no content
_ANSWER = "answer"  # any text, to see what a template writes behind one
# Variables that templates have, and no request may give.
_OWN_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
Tools = Sequence[Mapping[str, Any]]
NO_OPTIONS: Mapping[str, Any] = {}


class ChatTemplate:
    """A template and the names that it may use beside the messages: special tokens, by name.

    A template is a program that came with the model, so it runs in Jinja's sandbox.
    """

    def __init__(self, source: str, named: Mapping[str, Any]) -> None:
        self.source = source
        self._named = named
        self._template: Any = None
        self._now = datetime.now()
        self._alphabet: Alphabet | None = None  # of the content that is being rendered
        self._endless: ModelError | None = None  # once it took too long, or too much: it is not tried again

    def literals(self) -> str:
        """Its literal text and strings, none beside another. Empty where it cannot be parsed, which `render` says."""
        with needing("jinja2"):
            import jinja2
        try:
            parsed = _environment(datetime.now, "".join).parse(self.source)
            texts = [node.data for node in parsed.find_all(jinja2.nodes.TemplateData)]
            texts += [node.value for node in parsed.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        except Exception:  # also Python's own, over what is too deep or too long
            return ""
        return "\0".join(texts)

    def has_system(self) -> bool:
        """Whether a system prompt becomes part of the text: some templates leave it out, some refuse it."""
        user = {"role": "user", "content": _ANSWER}
        try:
            texts = {self.render([{"role": "system", "content": text}, user]) for text in ("one", "another")}
        except ModelError:
            return False
        return len(texts) == 2

    @cached_property
    def shows_tools(self) -> bool:
        """Whether tools become part of the text."""
        with contextlib.suppress(ModelError):
            return PROBED_TOOL in self.render(PROBE[:1], tools=[PROBED])
        return False

    @cached_property
    def _takes_arguments_as_text(self) -> bool:
        """Whether arguments of calls have to be JSON, where most templates write JSON of an object by themselves."""
        for as_text in (False, True):
            for messages in variants(PROBE, as_text=as_text, developer=False):
                with contextlib.suppress(ModelError):
                    text = self.render(messages, tools=[PROBED])
                    if PROBED_KEY in text.partition(PROBED_KEY)[2] and f"'{PROBED_KEY}'" not in text:
                        return as_text
        return False

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = (),
        options: Mapping[str, Any] = NO_OPTIONS,
        answer: bool = True,
    ) -> str:
        """The text of messages and tools, up to where an `answer` begins if there is to be one; `options` are more variables
        that the template may use. Raises ModelError if it fails."""
        if self._endless is not None:
            raise self._endless
        try:
            text = self._text(messages, tools, options, answer=answer)
        except ModelError:
            raise
        except Exception as error:  # whatever a program can raise
            reason = f"{type(error).__name__}: {error}"[:200].replace("\n", " ")
            failed = ModelError(f"the model's chat template fails: {reason}; use --raw to do without it")
            self._endless = failed if isinstance(error, TemplateTimeError | MemoryError) else None
            raise failed from error
        if not is_unicode(text):
            raise ModelError("the model's chat template writes text that is not Unicode; use --raw to do without it")
        return text

    def _text(self, messages: Messages, tools: Tools, options: Mapping[str, Any], *, answer: bool) -> str:
        """What the template, which is made the first time, writes. Raises whatever it raises."""
        if self._template is None:
            with bounded(COMPILE_TIME_S):
                self._template = _environment(lambda: self._now, self._join).from_string(self.source)
            # What the operator ~ calls, by a name that Jinja's compiler has imported for it.
            self._template.root_render_func.__globals__["str_join"] = self._join
        variables = {**options, **self._named, "messages": messages, "tools": list(tools) or None}
        length = sum(map(len, texts_of([messages, tools, options])))
        with bounded(RENDER_TIME_S + length * RENDER_TIME_A_CHARACTER_S):
            text: str = self._template.render(**variables, documents=None, add_generation_prompt=answer)
        return text

    def _join(self, parts: Iterable[object]) -> str:
        """What a macro, a block or ~ makes of its parts, which is content where they are."""
        text = "".join(map(str, parts))
        return text if self._alphabet is None else Content(text, self._alphabet)

    def _render_content(self, chat: _Chat, alphabet: Alphabet, *, answer: bool = True) -> str:
        """The text of a chat, all that comes of its content marked; ModelError also where content is to blame."""
        self._alphabet = alphabet
        try:
            marked = chat.marked(lambda text: Content(alphabet.mark(text), alphabet), names=True)
            return str.__str__(self._render(marked, answer=answer))
        finally:
            self._alphabet = None

    def _render(self, chat: _Chat, *, answer: bool = True) -> str:
        return self.render(chat.messages, tools=chat.tools, options=chat.options, answer=answer)

    def parts(
        self,
        messages: Messages,
        control: ControlTokens,
        *,
        tools: Tools = (),
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[Part]:
        """The text of messages, cut at those tokens of `control` that the template itself writes.

        The text is what `render` gives for the same messages, in the form that the template takes (see `variants`). Where it
        fails over names of tokens that an answer spells, as gpt-oss's does, the template gets them in other characters.
        Raises as `render` where it fails all the same, InputError for `options` that no request may give.
        """
        if taken := sorted(name for name in options if name in _OWN_NAMES or name in self._named):
            raise InputError(f"{taken[0]!r} is a variable of the chat template's own; leave it out")
        self._now = datetime.now()
        texts = [self.source, *texts_of([messages, tools, options])]
        chat, plain = self._first_that_renders(messages, tools, options)
        if plain is None:
            few = Alphabet(control.telling_characters, texts)
            return _original(control.cut(self._render(chat.marked(few.mark, names=False))), few)
        texts.append(plain)
        alphabet = Alphabet(control.characters, texts)
        parts: list[Part] | None = None
        with contextlib.suppress(ModelError):  # which a template might raise over what is no true string
            marked = self._render_content(chat, alphabet)
            parts = control.cut(marked)
            if alphabet.original(marked) == plain:
                return _original(parts, alphabet)
        # The template does with content what only true strings can. One character of each token is enough against
        # content that holds whole ones, and what holds none is then rendered as it is.
        few = Alphabet(control.telling_characters, texts)
        others = control.cut(self._render(chat.marked(few.mark, names=False)))
        if parts is not None and _tokens(parts) != _tokens(others):
            return _original(parts, alphabet)  # content became part of a token: better another text than that
        return _original(others, few)

    def _first_that_renders(
        self, messages: Messages, tools: Tools, options: Mapping[str, Any]
    ) -> tuple[_Chat, str | None]:
        """The chat in the first form that the template takes, and its text; None where it takes none."""
        using = bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if using and not self.shows_tools:
            messages, tools = told_as_text(messages, tools, system=self.has_system()), ()
        as_text = using and self._takes_arguments_as_text
        first: _Chat | None = None
        found: tuple[_Chat, str] | None = None
        forms = list(variants(messages, as_text=as_text, developer="developer" in self.source))
        ways = [(form, tools) for form in forms]
        ways += [(form, with_descriptions(tools)) for form in forms if tools]
        for form, of_tools in ways:
            chat = _Chat(form, of_tools, options)
            first = first or chat
            with contextlib.suppress(ModelError):
                text = self._render(chat)
                if found is not None and text.count(_NONE) >= found[1].count(_NONE):
                    break
                found = chat, text
                if _NONE not in text:
                    break
        if found is not None:
            return found
        assert first is not None
        return first, None

    def closing(self, control: ControlTokens) -> int | None:
        """The id of the token of `control` that the template writes right behind an answer, if it does."""
        alphabet = Alphabet({*control.characters, *_ANSWER}, [self.source])
        messages = [{"role": "user", "content": _ANSWER}, {"role": "assistant", "content": _ANSWER}]
        with contextlib.suppress(ModelError):
            marked = self._render_content(_Chat(messages), alphabet, answer=False)
            behind = control.cut(marked.rpartition(alphabet.mark(_ANSWER))[2].lstrip())
            if behind and isinstance(behind[0], AddedToken) and alphabet.mark(_ANSWER) in marked:
                return behind[0].token_id
        return None


@dataclass(frozen=True)
class _Chat:
    """What a template makes its text of."""

    messages: Messages
    tools: Tools = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def marked(self, marking: Callable[[str], str], *, names: bool) -> _Chat:
        """The same, with `marking` applied to all that is content."""
        return _Chat(
            messages_with_content(self.messages, marking, names=names),
            with_content(self.tools, marking, names=names),
            {name: with_content(value, marking, names=names) for name, value in self.options.items()},
        )


def _original(parts: Iterable[Part], alphabet: Alphabet) -> list[Part]:
    return [alphabet.original(part) if isinstance(part, str) else part for part in parts]


def _tokens(parts: Iterable[Part]) -> list[Part]:
    return [part for part in parts if not isinstance(part, str)]


def _environment(now: Callable[[], datetime], join: Callable[[Iterable[Any]], str]) -> Any:
    """The environment that transformers gives templates; `join` puts what they write together."""
    with needing("jinja2"):
        import jinja2
        import jinja2.ext
        from jinja2.exceptions import SecurityError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks the answer for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:  # raised at once, not printed as nothing
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

    Sandbox.concat = staticmethod(join)
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment
