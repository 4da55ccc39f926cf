"""What each attack gets of ten conversations: by wire, MPI, and whether links are sealed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

from bench.attack.answer import next_tokens
from bench.attack.frames import streams
from bench.attack.messages import Message, hidden_vectors, read_messages, residual, steps_of
from bench.attack.public import PublicModel
from bench.attack.rows import RowIndex, nearest_rows
from bench.attack.runs import Recording
from bench.attack.vocabulary import Vocabulary
from tpimpi.compute.arrays import F32

CONVERSATIONS = Path(__file__).with_name("conversations.txt")
NEAREST, WINDOWS, SUMS, LAYERS, FRAMES, OPENED = (
    "messages of a rank: hidden vectors, nearest row",
    "messages of a rank: bytes of rows",
    "messages of a rank: next token from the last sum",
    "messages of a rank: residual after layer {}",
    "frames on the network: bytes of rows",
    "what the rank's process opened: hidden vectors, nearest row",
)


@dataclass(frozen=True)
class Outcome:
    """What an attack got: `right` of `total` tokens, of `found` that it took for some."""

    attack: str
    wire: str
    mpi: str
    sealed: bool
    right: int
    total: int
    found: int


def in_common(found: Sequence[int], true: Sequence[int]) -> int:
    """How many tokens were found, in their order."""
    return sum(block.size for block in SequenceMatcher(None, found, true, autojunk=False).get_matching_blocks())


def tokens_of_vectors(messages: Sequence[Message], wire: str, model: PublicModel) -> list[int]:
    """By the hidden vectors of each step, and the nearest row of the embedding table."""
    steps = hidden_vectors(steps_of(messages), wire, model)
    return [token for token in nearest_rows(np.concatenate(steps), model.table) if token >= 0] if steps else []


def tokens_of_bytes(recorded: Sequence[bytes], index: RowIndex) -> list[int]:
    """By rows that stand in recorded bytes."""
    return [row.token for data in recorded for row in index.find(data)]


def tokens_of_sums(messages: Sequence[Message], wire: str, model: PublicModel) -> list[int]:
    """The answers, by the sums of each step."""
    return [token for token in next_tokens(steps_of(messages), wire, model) if token >= 0]


def tokens_after_layer(
    messages: Sequence[Message], wire: str, model: PublicModel, vocabulary: Vocabulary, layers: int
) -> list[int]:
    """Of the first conversation, by its residuals after so many layers. A step of several rows begins one."""
    rows: list[F32] = []
    for number, step in enumerate(steps_of(messages)):
        if len(some := residual(step, wire, model, layers)) > 1 and number:
            break
        rows.extend(some)
    return vocabulary.tokens(np.array(rows, np.float32)) if rows else []


class Table:
    """The attacks, ready; `layers` is after how many the fourth looks, 0 for not at all."""

    def __init__(self, model: PublicModel, prompts: Sequence[str], layers: int) -> None:
        self._model, self._layers = model, layers
        self._prompts = [model.tokenizer.encode_chat(prompt) for prompt in prompts]
        self._vocabulary = Vocabulary(model, layers) if layers else None
        self._indexes: dict[str, RowIndex] = {}

    def attack(self, recording: Recording, mpi: str, wire: str, *, sealed: bool) -> list[Outcome]:
        """All of them on one run."""
        model, made = self._model, recording.answers
        if wire not in self._indexes:
            self._indexes[wire] = RowIndex(model.table_on_the_wire(wire))
        index = self._indexes[wire]
        messages = list(read_messages(recording.messages))
        conversations = [[*prompt, *ids[:-1]] for prompt, ids in zip(self._prompts, made, strict=True)]
        sent, answers = (list(itertools.chain.from_iterable(some)) for some in (conversations, made))
        carried = [part for parts in streams(recording.frames).values() for part in parts]
        tries = [
            (NEAREST, tokens_of_vectors(messages, wire, model), sent),
            (WINDOWS, tokens_of_bytes([message.data for message in messages], index), sent),
            (SUMS, tokens_of_sums(messages, wire, model), answers),
            (FRAMES, tokens_of_bytes(carried, index), sent),
        ]
        if self._vocabulary is not None:
            tokens = tokens_after_layer(messages, wire, model, self._vocabulary, self._layers)
            tries.append((LAYERS.format(self._layers), tokens, conversations[0]))
        if recording.opened.exists():
            tries.append((OPENED, tokens_of_vectors(list(read_messages(recording.opened)), wire, model), sent))
        return [
            Outcome(name, wire, mpi, sealed, in_common(found, true), len(true), len(found))
            for name, found, true in tries
        ]


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """A row for each attack and wire, a column for each MPI, plain and sealed."""
    columns = list(dict.fromkeys((outcome.mpi, outcome.sealed) for outcome in outcomes))
    cells = {(one.attack, one.wire, one.mpi, one.sealed): f"{one.right} of {one.total}" for one in outcomes}
    heads = [f"{mpi}, {'sealed' if sealed else 'plain'}" for mpi, sealed in columns]
    lines = [f"| Attack | Wire | {' | '.join(heads)} |", f"|---|---|{'---|' * len(columns)}"]
    for attack, wire in dict.fromkeys((outcome.attack, outcome.wire) for outcome in outcomes):
        row = [cells.get((attack, wire, *column), "-") for column in columns]
        lines.append(f"| {attack} | {wire} | {' | '.join(row)} |")
    return "\n".join(lines)


def as_objects(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """For JSON."""
    return [asdict(outcome) for outcome in outcomes]
