"""Content is to a template what it stands for, and each of its characters stays marked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpimpi.errors import InputError
from tpimpi.serving.text.added_tokens import AddedToken, TokenFinder
from tpimpi.serving.text.chat_template import ChatTemplate
from tpimpi.serving.text.content import Alphabet, Content
from tpimpi.serving.text.control_tokens import ControlTokens, ends_of_generation

LETTERS = "<|>abẞ \n"
TEXT = st.text(LETTERS, max_size=12)
ALPHABET = Alphabet("<|>ab", [])
TOKENS = [
    AddedToken("<|a|>", 0, special=True),
    AddedToken("<|b|>", 1, special=True),
    AddedToken("<b>", 2, special=False),
]
CONTROL = ControlTokens(TOKENS)


def content(text: str) -> Content:
    return Content(ALPHABET.mark(text), ALPHABET)


def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return ALPHABET.original(value) if isinstance(value, str) else value


ASKED: dict[str, tuple[tuple[Any, ...], ...]] = {
    "__getitem__": ((slice(1, None),), (slice(None, -1),), (slice(None, None, -1),)),
    **dict.fromkeys(["strip", "lstrip", "rstrip"], ((), ("<a ",), ("b\n",))),
    **dict.fromkeys(["split", "rsplit"], ((), (None, 1), ("a",), ("<|", 1), ("ab",))),
    "splitlines": ((), (True,)),
    **dict.fromkeys(["partition", "rpartition"], (("a",), ("|>",))),
    "replace": (("a", "x"), ("<|", ""), ("a", "<b>", 1), ("", "-")),
    **dict.fromkeys(["upper", "lower", "title", "capitalize", "casefold", "swapcase"], ((),)),
    **dict.fromkeys(["startswith", "endswith", "find", "rfind", "count"], (("a",), ("<|",))),
    **dict.fromkeys(["removeprefix", "removesuffix"], (("a",), ("<|",))),
    **dict.fromkeys(["__contains__", "__eq__", "__lt__", "__ge__", "__add__", "__radd__"], (("<|a",), ("",))),
    **dict.fromkeys(["isalpha", "isspace", "isupper", "__len__", "__str__", "__hash__"], ((),)),
    "__mul__": ((2,),),
    "join": ((("a", "<", "b"),),),
    "__format__": (("",),),
}


@given(text=TEXT)
def test_methods_answer_as_those_of_the_text(text: str) -> None:
    for name, cases in ASKED.items():
        for arguments in cases:
            expected = arguments[0] + text if name == "__radd__" else getattr(text, name)(*arguments)
            assert plain(getattr(content(text), name)(*arguments)) == expected, (name, arguments)
    assert [plain(char) for char in content(text)] == list(text)
    assert text == content(text) and content(text) in {text} and {text: 1}[content(text)] == 1
    assert plain(f"{content(text)}") == plain("%s" % content(text)) == plain("".join([content(text)])) == text  # noqa: UP031


@given(text=TEXT)
def test_what_comes_of_content_is_marked(text: str) -> None:
    for name in ("strip", "split", "splitlines", "upper", "lower", "title", "__str__"):
        made = getattr(content(text), name)()
        for piece in made if isinstance(made, list) else [made]:
            assert not set(str.__str__(piece)) & set("<|>ab")
    assert not set("".join(content(text).split("a"))) & set("<|>ab")


TEMPLATES = [
    "<|a|>{{ messages[0].content }}<|b|>",
    "<|a|>{{ messages[0].content | trim }}",
    "<|a|>{{ messages[0]['content'].strip() + '<|b|>' }}",
    "<|a|>{{ '<|b|>' ~ messages[0].content ~ '|>' }}",
    "{{ '<|' + 'a' + '|>' }}{{ messages[0].content | upper }}",
    "{{ messages[0].content | tojson }}<|a|>",
    "{{ messages | tojson }}<|a|>",
    "<|{{ messages[0].content }}|><|b|>",
    "<|a{{ messages[0].content }}<|b|>",
    "{{ messages[0].content.split('<b>')[-1] }}<b><|b|>",
    "{% if '<|a|>' in messages[0].content %}<|b|>{% endif %}{{ messages[0].content | replace('<|', '[') }}",
    "{% set x = messages[0].content %}{% for c in x %}{{ c }}{% endfor %}<|a|>",
    "{{ [messages[0].content, '<|a|>'] | join('|>') }}",
    "{{ '%s<|a|>' % messages[0].content }}{{ '{}'.format(messages[0].content) }}",
    "{{ messages[0].content | list | reverse | join }}<|a|>",
    "{{ messages[0].content | title | wordwrap(3) }}<|a|>",
    "{{ messages[0].content | int }}{{ messages[0].content | length }}<|a|>",
    "{{ (messages[0].content | urlencode) ~ (messages[0].content | escape) }}<|a|>",
]
BRINGING = st.lists(st.one_of(st.sampled_from([token.content for token in TOKENS]), TEXT), max_size=4).map("".join)


@given(text=BRINGING, source=st.sampled_from(TEMPLATES))
def test_only_the_templates_own_tokens_are_tokens(text: str, source: str) -> None:
    template = ChatTemplate(source, {})
    messages = [{"role": "user", "content": text}]
    parts = template.parts(messages, CONTROL)
    own = [part.content for part in parts if isinstance(part, AddedToken)]
    written = source.replace("'<|' + 'a' + '|>'", "<|a|>").split("{% if '<|a|>' in")
    allowed = [token.content for token in TOKENS for _ in range(written[0].count(token.content))] + ["<|b|>"]
    assert all(own.count(token) <= allowed.count(token) for token in own)
    if "urlencode" not in source and "title" not in source:  # which take strings apart by regexes of their own
        assert "".join(part if isinstance(part, str) else part.content for part in parts) == template.render(messages)


def test_a_template_may_look_at_tokens_in_content() -> None:
    """As Qwen's does, which leaves thoughts of earlier answers out."""
    template = ChatTemplate("{{ messages[0].content.split('<b>')[-1].lstrip() }}<|a|>", {})
    parts = template.parts([{"role": "assistant", "content": "<|a|> thought<b> \n said <|b|>"}], CONTROL)
    assert parts == ["said <|b|>", TOKENS[0]]


def test_an_alphabet_needs_characters_that_no_text_has() -> None:
    all_of_them = "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    assert Alphabet("<|", [all_of_them[:-2]]).original(Alphabet("<|", [all_of_them[:-2]]).mark("<|")) == "<|"
    with pytest.raises(InputError, match="all private-use characters"):
        Alphabet("<|", [all_of_them[:-1]])


def test_finding_tokens_takes_time_in_proportion_to_the_text() -> None:
    """Steps are counted: at most one a character of the text for each character of the longest token."""
    steps = 0

    class Node(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            nonlocal steps
            steps += 1
            return super().get(key, default)

        def setdefault(self, key: str, default: Any = None) -> Any:
            return super().setdefault(key, Node())

    names = [f"<unused{number}>" for number in range(6242)] + ["\n" * n for n in range(1, 32)] + ["<a>"]
    finder = TokenFinder(AddedToken(name, number, special=False) for number, name in enumerate(names))
    finder.root = Node()
    for number, name in enumerate(names):
        node = finder.root
        for char in name:
            node = node.setdefault(char)
        node[""] = AddedToken(name, number, special=False)
    for text in ("a" * 10_000, "<" * 10_000, "<unused62" * 1_000, "\n" * 10_000, "<unused4711>" * 800):
        steps = 0
        finder.cut(text)
        assert steps <= 2 * 32 * len(text)
    assert steps and [part for part in finder.cut("a<unused12>b\n\n<unused") if not isinstance(part, str)] == [
        AddedToken("<unused12>", 12, special=False),
        AddedToken("\n\n", 6243, special=False),
    ]


def test_which_tokens_end_an_answer() -> None:
    """llama.cpp's rule, from its llama-vocab.cpp."""
    smollm = {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        "<repo_name>": 3,
        "<reponame>": 4,
        "<file_sep>": 5,
    }
    assert ends_of_generation(smollm, [2, None]) == {0, 2, 4}
    harmony = {"<|end|>": 7, "<|return|>": 2, "<|call|>": 12, "<|endoftext|>": 9}
    assert ends_of_generation(harmony, [7]) == {2, 9, 12}  # "<|end|>" ends a message of several
    assert ends_of_generation({"<|end|>": 7, "<|user|>": 1}, [3]) == {3, 7}
    assert ends_of_generation({"<|fim_pad|>": 1, "<PAD>": 2, "<|file_sep|>": 3}, []) == {1, 3}
