"""What is looked for in the messages of a run, to see that they give nothing away."""

from __future__ import annotations

import json

import numpy as np

from tests.support.messages import patterns_in
from tpimpi.engine.protocol import Operation
from tpimpi.star import BULK, CLOCK, CONTROL, HIDDEN, NOTE, PARTIAL, SUM
from tpimpi.star.channel import ECHO
from tpimpi.star.pieces import LARGE_PIECE_NUMBERS

BETWEEN_MESSAGES = b"\xa5" * 16  # in no pattern: what is found is within one message
VOCAB, PROMPT_LIMIT = 49152, 256
RUN = 4  # ids one after another, which give a text away

Message = tuple[int, int, bytes]


def patterns_of(words: set[str], ids: list[int]) -> list[tuple[str, bytes]]:
    """What would give words and runs of ids away, and its name."""
    patterns: list[tuple[str, bytes]] = []
    for word in words:
        patterns += [(f"the word {word} in {code}", word.encode(code)) for code in ("utf-8", "utf-16-le", "utf-32-le")]
    # A run of four: two small ids, 198 and 1, stand by chance in a list of figures, or among so many bytes of sums.
    for run in (ids[start : start + RUN] for start in range(len(ids) - RUN + 1)):
        for dtype in ("<u2", "<i4", "<i8", "<f4", "<f8"):
            patterns.append((f"ids {run} as {dtype}", np.array(run, dtype).tobytes()))
        for between in (", ", ","):  # json's way and msgspec's
            patterns.append((f"ids {run} as text", between.join(map(str, run)).encode()))
    return patterns


def words_of_steps(messages: list[Message]) -> tuple[list[Message], list[tuple[int, bytes]]]:
    """The words behind headers, (operation, data), and all messages without them."""
    rest: list[Message] = []
    words: list[tuple[int, bytes]] = []
    for destination, tag, data in messages:
        if tag == CONTROL and len(data) > 40:
            words.append((int(np.frombuffer(data[:40], "<i8")[1]), data[40:]))
            data = data[:40]  # noqa: PLW2901
        rest.append((destination, tag, data))
    return rest, words


def leaks(messages: list[Message], words: set[str], ids: list[int]) -> list[str]:
    """What `messages` give away: words in any usual encoding, runs of ids as any usual number, or odd shapes.

    For BULK see `odd_parcels`.
    """
    found = []
    for destination, tag, data in messages:
        if tag == CONTROL:
            if len(data) != 40:
                found.append(f"a control header of {len(data)} bytes to rank {destination}")
            numbers = np.frombuffer(data[:40], "<i8")[1:]
            # Operation, number of positions, first position: nothing that depends on what the ids are. Of experts, 0.
            short = all(0 <= number <= PROMPT_LIMIT for number in numbers[1:3])
            if not (short and numbers[0] in set(Operation) and not numbers[3:].any()):
                found.append(f"the control header {numbers.tolist()}")
        elif tag in (HIDDEN, PARTIAL, SUM):
            if len(data) % 4 or len(data) > LARGE_PIECE_NUMBERS * 4:
                found.append(f"{len(data)} bytes with tag {tag}, which is no piece of [positions, hidden]")
            if len(data) == VOCAB * 4:
                found.append("logits")
        elif tag == NOTE:
            json.loads(data)
        elif tag == CLOCK:
            if len(data) != 8:
                found.append(f"a clock of {len(data)} bytes to rank {destination}")
        elif tag == ECHO:
            if len(data) not in (8, 32):
                found.append(f"a ping of {len(data)} bytes to rank {destination}")
        elif tag != BULK:
            found.append(f"an unknown tag {tag}")
    searched = BETWEEN_MESSAGES.join(data for _, tag, data in messages if tag != BULK)
    return found + patterns_in(searched, patterns_of(words, ids))
