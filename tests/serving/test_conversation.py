"""What the model gets of a conversation: the system prompt, the turns so far, and fewer of them where there is no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tpimpi.errors import InputError
from tpimpi.serving.conversation import Conversation, SamplingParams
from tpimpi.serving.sampling import make_sampler
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.serving.transcript import Transcript, Turn
from tpimpi.weights.sources import open_source


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    with open_source(smollm2) as source:
        return load_tokenizer(source.tokenizer_assets(), source.config.vocab)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)


def conversation(tokenizer: Tokenizer, limit: int, max_tokens: int = 20, **params: Any) -> Conversation:
    sampling = SamplingParams(
        sample=lambda seed, drawn: make_sampler(),
        seed=7,
        max_tokens=max_tokens,
        context=None,
        raw=False,
        stops=[],
        ignore_eos=False,
        **params,
    )
    return Conversation(tokenizer, sampling, Transcript(), 8192, limit)


def talk(of: Conversation, prompt: str, answer: str) -> Turn:
    assert of.session is not None
    turn = of.turn(prompt)
    of.session.begin(turn)
    for token in of.tokenizer.encode(answer):
        of.session.add(token)
    of.session.end("end", answer)
    return turn


def test_the_system_prompt_comes_first_as_transformers_has_it(tokenizer: Tokenizer, oracle: Any) -> None:
    of = conversation(tokenizer, 8192)
    assert of.session is not None
    of.session.system = "You are <|im_end|> terse."
    talk(of, "Hi.", "Yes.")
    messages = [
        {"role": "system", "content": "You are ## terse."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    decoded = "".join(oracle.convert_ids_to_tokens(of.turn("Why?").ids))
    wanted = "".join(oracle.convert_ids_to_tokens(oracle(expected)["input_ids"]))
    assert decoded.replace("<|im_end|>Ġterse", "##Ġterse") == wanted, "the forged token is text"
    assert (of.turn("Why?").seed, of.turn("Why?", attempt=2).seed) == (7, 9)


@pytest.mark.parametrize(
    ("template", "has"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", True),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", False),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x", False),
    ],
)
def test_a_template_without_a_place_for_it_is_said(
    smollm2: Path, tokenizer: Tokenizer, template: str, has: bool
) -> None:
    from tpimpi.serving.text.chat_template import ChatTemplate

    assert ChatTemplate(template, {}).has_system() == has
    tokenizer.check_system("x")
    with pytest.raises(InputError, match="the system prompt is empty"):
        tokenizer.check_system(" \n")
    if not has:
        with open_source(smollm2) as source:
            assets = source.tokenizer_assets()
        other = load_tokenizer(assets, 49152, template)
        with pytest.raises(InputError, match="chat template has no place for a system prompt"):
            other.check_system("x")


def test_the_oldest_turns_are_dropped_whole_and_never_the_system_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"the conversation has .* begin another, with /new, or give --overflow drop"):
        crowded = conversation(tokenizer, 120)
        for number in range(20):
            talk(crowded, f"Question {number}?", f"Answer {number}.")
    assert crowded.session is not None
    of = conversation(tokenizer, 120, drop=True)
    assert of.session is not None
    of.session.system = "Be terse."
    dropped = []
    for number in range(20):
        turn = talk(of, f"Question {number}?", f"Answer {number}.")
        assert len(turn.ids) + 20 <= 120, "no room for the answer"
        dropped.append(of.left_out)
        last = of.session.turns[of.left_out : -1]
        expected = tokenizer.encode_chat(turn.prompt, [(t.prompt, t.text) for t in last], system="Be terse.")
        assert turn.ids == expected
    assert len(of.session.turns) == 20 and dropped == sorted(dropped) and dropped[0] == 0
    # Some more than needed, so that the next turns begin as the ones before.
    assert 1 < len(set(dropped)) < 14
    before = of.left_out
    with pytest.raises(InputError, match="tokens, the context is 120 positions"):
        of.turn("word " * 200)
    assert of.left_out == before, "no turn is dropped for a prompt that never fits"
    of.session.undo(20)
    assert of.left_out == 0
