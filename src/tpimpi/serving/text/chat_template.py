"""The chat template that comes with a model, run in Jinja's sandbox as transformers runs it.

What messages hold is rendered so that a token found in it is known to be the template's own (see content.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from tpimpi.errors import ModelError
from tpimpi.serving.text.added_tokens import AddedToken, Part
from tpimpi.serving.text.checks import is_unicode, needing
from tpimpi.serving.text.content import Alphabet, Content
from tpimpi.serving.text.control_tokens import ControlTokens

Messages = Sequence[Mapping[str, str]]
_ANSWER = "answer"  # any text, to see what a template writes behind one


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

    def literals(self) -> str:
        """Its literal text and strings, none beside another. Empty where it cannot be parsed, which `render` says."""
        with needing("jinja2"):
            import jinja2
        try:
            parsed = _environment(datetime.now, "".join).parse(self.source)
        except jinja2.TemplateError:
            return ""
        texts = [node.data for node in parsed.find_all(jinja2.nodes.TemplateData)]
        texts += [node.value for node in parsed.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        return "\0".join(texts)

    def has_system(self) -> bool:
        """Whether a system prompt becomes part of the text: some templates leave it out, some refuse it."""
        user = {"role": "user", "content": _ANSWER}
        try:
            texts = {self.render([{"role": "system", "content": text}, user]) for text in ("one", "another")}
        except ModelError:
            return False
        return len(texts) == 2

    def render(self, messages: Messages, *, answer: bool = True) -> str:
        """The text of messages, up to where an `answer` begins if there is to be one. Raises ModelError if it fails."""
        try:
            if self._template is None:
                self._template = _environment(lambda: self._now, self._join).from_string(self.source)
                # What the operator ~ calls, by a name that Jinja's compiler has imported for it.
                self._template.root_render_func.__globals__["str_join"] = self._join
            text: str = self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=answer, **self._named
            )
        except ModelError:
            raise
        except Exception as error:  # whatever a program can raise
            reason = f"{type(error).__name__}: {error}"[:200].replace("\n", " ")
            raise ModelError(f"the model's chat template fails: {reason}; use --raw to do without it") from error
        if not is_unicode(text):
            raise ModelError("the model's chat template writes text that is not Unicode; use --raw to do without it")
        return text

    def _join(self, parts: Iterable[object]) -> str:
        """What a macro, a block or ~ makes of its parts, which is content where they are."""
        text = "".join(map(str, parts))
        return text if self._alphabet is None else Content(text, self._alphabet)

    def _render_content(self, messages: Messages, alphabet: Alphabet, *, answer: bool = True) -> str:
        """The text of messages, all that comes of their content marked; ModelError also where content is to blame."""
        self._alphabet = alphabet
        try:
            marked = _with_content(messages, lambda text: Content(alphabet.mark(text), alphabet))
            return str.__str__(self.render(marked, answer=answer))
        finally:
            self._alphabet = None

    def parts(self, messages: Messages, control: ControlTokens) -> list[Part]:
        """The text of messages, cut at those tokens of `control` that the template itself writes.

        The text is what `render` gives for the same messages. Where it fails over names of tokens that an answer spells, as
        gpt-oss's does, the template gets them in other characters. Raises as `render` where it fails all the same.
        """
        self._now = datetime.now()
        texts = [self.source, *(message["content"] for message in messages)]
        try:
            plain = self.render(messages)
        except ModelError:
            few = Alphabet(control.telling_characters, texts)
            return _original(control.cut(self.render(_with_content(messages, few.mark))), few)
        texts.append(plain)
        alphabet = Alphabet(control.characters, texts)
        parts: list[Part] | None = None
        with contextlib.suppress(ModelError):  # which a template might raise over what is no true string
            marked = self._render_content(messages, alphabet)
            parts = control.cut(marked)
            if alphabet.original(marked) == plain:
                return _original(parts, alphabet)
        # The template does with content what only true strings can. One character of each token is enough against
        # content that holds whole ones, and what holds none is then rendered as it is.
        few = Alphabet(control.telling_characters, texts)
        others = control.cut(self.render(_with_content(messages, few.mark)))
        if parts is not None and _tokens(parts) != _tokens(others):
            return _original(parts, alphabet)  # content became part of a token: better another text than that
        return _original(others, few)

    def closing(self, control: ControlTokens) -> int | None:
        """The id of the token of `control` that the template writes right behind an answer, if it does."""
        alphabet = Alphabet({*control.characters, *_ANSWER}, [self.source])
        messages = [{"role": "user", "content": _ANSWER}, {"role": "assistant", "content": _ANSWER}]
        with contextlib.suppress(ModelError):
            marked = self._render_content(messages, alphabet, answer=False)
            behind = control.cut(marked.rpartition(alphabet.mark(_ANSWER))[2].lstrip())
            if behind and isinstance(behind[0], AddedToken) and alphabet.mark(_ANSWER) in marked:
                return behind[0].token_id
        return None


def _with_content(messages: Messages, marking: Callable[[str], str]) -> Messages:
    return [{**message, "content": marking(message["content"])} for message in messages]


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
