"""What front and rank 0 say to each other: messages come whole, whatever pieces they come in."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpimpi.serving.server import wire

ASK = wire.Ask(
    id=7,
    owner="anna",
    prompt=wire.Chat([{"role": "user", "content": "Grüße"}]),
    sampling=wire.Sampling(temperature=0.5, logit_bias={3: -1.5}),
    stops=["."],
    so_far=[1, 2],
)
QUESTIONS = [
    ASK,
    wire.Ask(1, "", wire.Text("a"), wire.Sampling()),
    wire.Ask(2, "", wire.Ids([5, 6]), wire.Sampling(), grammar=wire.Grammar("regex", "a+")),
    wire.Cancel(7),
    wire.Count(8, wire.Text("b")),
    wire.Spell(9, [1]),
    wire.End(),
]
REPLIES = [
    wire.Progress("loading", 0.5),
    wire.Processes({12: "r1 vm"}),
    wire.Ready("m", 64, 2, 100, ""),
    wire.Began(7, 12),
    wire.Part(7, "a", "", [1], [wire.TokenLogprob(b"\xff", -0.5, [(b"a", -1.0)])]),
    wire.Done(7, "end", 3, 0),
    wire.Refused(7, "no", "prompt", "context_length_exceeded"),
    wire.Counted(8, [1]),
    wire.Spelled(9, "x"),
    wire.Figures(1.0, 2, 3, 4, 1, 0, 5, 6, [wire.RankFigures(0, "vm", 1, None, 2, 0.1, 0.2, 0.3)]),
    wire.Ending(),
    wire.Failed("r1 vm: gone", 1),
]


@given(cuts=st.lists(st.integers(1, 40), min_size=1))
def test_messages_are_the_same_on_the_other_side(cuts: list[int]) -> None:
    for messages, decode in ((QUESTIONS, wire.decode_question), (REPLIES, wire.decode_reply)):
        stream, frames, found = b"".join(map(wire.frame, messages)), wire.Frames(), []
        while stream:
            cut = cuts[len(stream) % len(cuts)]
            found += map(decode, frames.feed(stream[:cut]))
            stream = stream[cut:]
        assert found == messages


def test_each_side_refuses_what_is_for_the_other() -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode_question(wire.frame(wire.Began(1, 2))[4:])
    with pytest.raises(msgspec.ValidationError):
        wire.decode_reply(wire.frame(wire.Cancel(1))[4:])


def test_a_length_that_no_message_has_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        wire.Frames().feed(b"\xff\xff\xff\xff")
