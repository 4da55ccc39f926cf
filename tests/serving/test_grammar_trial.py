"""Grammars that are compiled in a process of their own first: what explodes ends its own answer, in one line."""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.hostile_requests import SCHEMAS
from tests.support.tokenizer_cases import CHATML
from tpimpi.serving import grammar_trial
from tpimpi.serving.grammar import GrammarError, Grammars
from tpimpi.serving.grammar_process import _small_vocabulary, compile_lark
from tpimpi.serving.grammar_trial import GrammarTrial
from tpimpi.serving.sampling import make_sampler
from tpimpi.serving.server.lark import json_rule
from tpimpi.serving.server.wire import Grammar
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

PATTERN = {"type": "string", "pattern": "^[A-Z]{3}$"}  # as ordinary as it is not plain
# A process that begins, and at its first request does what stands there.
STAND_IN = """#!{python}
import os, struct, sys
os.write(1, struct.pack("<Q", 0))
(nbytes,) = struct.unpack("<Q", sys.stdin.buffer.read(8))
sys.stdin.buffer.read(nbytes)
{what}
"""


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json: bytes) -> Tokenizer:
    config = json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}).encode()
    found = load_tokenizer({"tokenizer.json": tokenizer_json, "tokenizer_config.json": config}, 600)
    assert isinstance(found, Tokenizer)
    return found


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    """Whose process has a second for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_trial, "MAX_CPU_S", 1)
        yield Grammars(tokenizer)


def compile_one(grammars: Grammars, schema: Any, owner: str = "") -> Any:
    tokenizer = grammars._tokenizer
    kind = "regex" if isinstance(schema, str) else "json_schema"
    text = schema if isinstance(schema, str) else json.dumps(schema)
    stream = tokenizer.answer_stream([], raw=False)
    return grammars.constrain(Grammar(kind, text), make_sampler(temperature=1.0, seed=1), stream, 0, owner)


def takes(grammars: Grammars, schema: Any, text: str) -> bool:
    """Whether this may be the whole answer."""
    tokenizer = grammars._tokenizer
    assert isinstance(tokenizer, Tokenizer)
    sample, ends = compile_one(grammars, schema), sorted(tokenizer.end_ids)
    logits = np.zeros(tokenizer.sampled_ids, np.float32)
    logits[ends] = 1000
    try:
        return sample(logits, tokenizer.encode(text, special=False)) in ends
    except GrammarError as error:
        assert "does not follow its grammar" in str(error)
        return False


EXPLODING: dict[str, Any] = {
    **{name: SCHEMAS[name] for name in ("two steps", "objects in objects", "patterns at once", "names by patterns")},
    "fields of alternatives": SCHEMAS["fields of alternatives"],
    "optional letters": "a?" * 30000,
}


@pytest.mark.parametrize("name", EXPLODING)
def test_what_explodes_ends_its_own_answer(grammars: Grammars, name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        GrammarError, match=r"took more than (1 s|400 MiB); it may take 1 s of a .* use shorter"
    ) as raised:
        compile_one(grammars, EXPLODING[name])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 350
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (100 << 10), "in KiB"
    assert takes(grammars, PATTERN, '"ABC"'), "the next one has another process"


@pytest.mark.parametrize("multiple", [1_000_000, 3_600_000])
def test_multiples_of_round_numbers_are_taken(grammars: Grammars, multiple: int) -> None:
    schema = {"type": "integer", "multipleOf": multiple}
    for number in (0, multiple, 17 * multiple, multiple + 1, 7 * multiple - 10, multiple // 2):
        assert takes(grammars, schema, str(number)) == (number % multiple == 0), number


def test_several_multiples_are_taken_beside_references(grammars: Grammars) -> None:
    properties = {
        "days": {"anyOf": [{"type": "integer", "multipleOf": 86400}, {"type": "null"}]},
        "hours": {"type": "integer", "multipleOf": 997},
        "more": {"$ref": "#/$defs/more"},
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
        "$defs": {"more": {"type": "integer", "multipleOf": 1009}},
    }
    for days, hours, more in ((86400 * 7, 997 * 3, 1009), (None, 0, 1009 * 5), (86401, 997, 1009), (0, 997, 1008)):
        right = (days or 0) % 86400 == hours % 997 == more % 1009 == 0
        assert takes(grammars, schema, json.dumps({"days": days, "hours": hours, "more": more})) == right


def test_words_that_look_like_keywords_are_no_keywords(grammars: Grammars) -> None:
    value = {"multipleOf": 999983, "pattern": "a?" * 5000, "patternProperties": {f"a{n}$": {} for n in range(400)}}
    compile_one(grammars, {"const": value})
    compile_one(grammars, {"enum": [value, 1]})
    schema = {"type": "object", "properties": {"pattern": {"type": "boolean"}}, "required": ["pattern"]}
    assert takes(grammars, {**schema, "default": value, "examples": [value]}, '{"pattern": true}')


def test_a_number_that_goes_on_has_an_end() -> None:
    """Each digit of a large multiple is many states more, where a token can be several."""
    schema = {"type": "integer", "multipleOf": 3_600_000}
    vocabulary, rng = _small_vocabulary(()), np.random.default_rng(1)
    matcher = compile_lark(vocabulary, f"start: {json_rule(schema)}")
    for _ in range(200):
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            break
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: vocabulary.eos_token])
        assert matcher.consume_token(int(rng.choice(allowed)))
    assert "too many states" in matcher.get_error()


def test_plain_ones_need_no_process(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer)
    assert takes(grammars, {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"const": None}]}, "7")
    assert grammars._trial._process is None
    compile_one(grammars, PATTERN)
    process = grammars._trial._process
    assert process is not None
    compile_one(grammars, {**PATTERN, "minLength": 1})
    assert grammars._trial._process is process, "one process is for many"
    del grammars
    assert process.wait(60) == -signal.SIGKILL, "it ends with whom it is for"


def test_a_verdict_is_remembered_for_its_owner(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []
    say = GrammarTrial.say
    monkeypatch.setattr(GrammarTrial, "say", lambda *args: tried.append(args[1]) or say(*args))
    monkeypatch.setattr(grammar_trial, "MAX_REMEMBERED", 2)
    grammars, wrong = Grammars(tokenizer), {"type": "string", "pattern": "("}
    for _ in range(3):
        compile_one(grammars, PATTERN, "anna")
        with pytest.raises(GrammarError, match="unclosed group"):
            compile_one(grammars, wrong, "anna")
    assert len(tried) == 2
    compile_one(grammars, PATTERN, "bert")
    assert len(tried) == 3, "who does not learn from the time what others ask for"
    compile_one(grammars, PATTERN, "anna")
    assert len(tried) == 4, "there is an end to what is remembered"


def stand_in(folder: Path, what: str) -> str:
    path = folder / "python"
    path.write_text(STAND_IN.format(python=sys.executable, what=what))
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("os.kill(os.getpid(), 9)", "was ended by SIGKILL, perhaps for what else this machine does; ask again later"),
        ("os.read(0, 1)", "took more than 1 s, perhaps for what else this machine does; ask again later"),
        ("os.abort()", r"was ended by SIGABRT; it may take \d s of a processor and 400 MiB: use shorter patterns"),
    ],
)
def test_how_a_process_ended_is_told(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, expected: str
) -> None:
    grammars = Grammars(tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(grammar_trial, "MAX_WAIT_S", 1.0)
        patch.setattr(sys, "executable", stand_in(tmp_path, what))
        with pytest.raises(GrammarError, match=f"is too costly: a process that compiled it {expected}"):
            compile_one(grammars, PATTERN)
    if "again later" in expected:
        compile_one(grammars, PATTERN)


def test_without_room_for_a_process_the_shape_tells(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = Grammars(tokenizer)
    for program in (str(tmp_path / "none"), "/bin/false"):
        monkeypatch.setattr(sys, "executable", program)
        assert takes(grammars, PATTERN, '"ABC"') and not takes(grammars, PATTERN, '"AB"')
        with pytest.raises(GrammarError, match="is too costly: its multipleOf, or their least common multiple"):
            compile_one(grammars, EXPLODING["two steps"])
        assert grammars._trial._process is None
