"""The chat template that comes with a model, run in Jinja's sandbox as transformers runs it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from tpimpi.errors import ModelError
from tpimpi.serving.text.checks import needing


def render_chat(template: str, messages: list[dict[str, str]], named: dict[str, str]) -> str:
    """The chat template around the messages of a conversation, in the environment that transformers gives templates.

    A template is a program that came with the model, so it runs in Jinja's sandbox. Raises ModelError if it fails.
    """
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

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **named,
        )
    except Exception as error:  # whatever a program can raise
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ModelError(f"the model's chat template fails: {reason}; use --raw to do without it") from error
