"""What the front process and rank 0 say to each other, over a Unix socket that only their user may open.

The front owns HTTP, keys and queues; rank 0 owns tokenizer, scheduler and model. Nothing of this reaches another rank. A
message is its length in bytes (uint32, little-endian) and a MessagePack array that begins with the name of its kind.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec

MAX_BYTES = 1 << 28  # of one message
_LENGTH = struct.Struct("<I")


class _Said(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """One message, of either side."""


# What the front asks


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen; see `make_sampler`. Penalties and bias as in OpenAI's API."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}  # by token id


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an answer has to be: `text` is a JSON schema, a regular expression or a grammar in llguidance's Lark."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    whole: bool = False  # it is of all that the model writes, not of what comes after reasoning


class Chat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A conversation, which the model's chat template turns into a prompt. `messages` and `tools` are OpenAI's objects;
    `options` are variables of the template, such as enable_thinking."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    options: dict[str, Any] = {}
    begun: str = ""  # what the answer begins with


class Text(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A text to be continued."""

    text: str


class Ids(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Token ids to be continued."""

    ids: list[int]


class Ask(_Said, frozen=True):
    """One answer is wanted. `so_far` are the tokens it already has, from a run that ended before it did."""

    id: int
    owner: str  # prefixes are shared within one owner only
    prompt: Chat | Text | Ids
    sampling: Sampling
    max_tokens: int | None = None  # None: as many as the context has room for
    stops: list[str] = []
    logprobs: int | None = None  # how many of the likeliest tokens are told with each
    echo: bool = False  # whether logprobs of the prompt are wanted too
    ignore_eos: bool = False
    grammar: Grammar | None = None
    so_far: list[int] = []


class Cancel(_Said, frozen=True):
    """Nobody wants this answer any more."""

    id: int


class Count(_Said, frozen=True):
    """The token ids of a prompt are wanted: `Counted` or `Refused` answers."""

    id: int
    prompt: Chat | Text


class Spell(_Said, frozen=True):
    """The text of token ids is wanted: `Spelled` or `Refused` answers."""

    id: int
    ids: list[int]


class End(_Said, frozen=True):
    """The run is to end. What is open is finished within rank 0's grace, or given up if this is said again."""


# What rank 0 answers


class Progress(_Said, frozen=True):
    """What rank 0 does before it is ready, in a line; `done` of 1 where that is known."""

    text: str
    done: float | None = None


class Ready(_Said, frozen=True):
    """Questions are answered from now on."""

    model: str
    context: int
    together: int  # answers that can be made at the same time
    vocab: int
    family: str  # of the template's way to write calls of tools; "" where it is not known
    fingerprint: str = ""  # of the model


class Processes(_Said, frozen=True):
    """The processes of ranks on this machine, and how these are named: where the launcher ends all of them, the front sees
    which ended first."""

    pids: dict[int, str]


class Began(_Said, frozen=True):
    """A prompt was taken."""

    id: int
    prompt_tokens: int


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token, its log-probability in nats, and the likeliest ones with theirs."""

    token: bytes
    logprob: float
    likeliest: list[tuple[bytes, float]] = []


class Part(_Said, frozen=True):
    """More of an answer: its reasoning and its text, as far as both are certain, and the tokens since the last part. Before
    them stands what marks a call of a tool, if `mark` is not "" (see tool_forms)."""

    id: int
    text: str
    reasoning: str
    tokens: list[int]
    logprobs: list[TokenLogprob] = []
    mark: str = ""


class Done(_Said, frozen=True):
    """An answer has ended. `why` is one of END_REASONS (see transcript)."""

    id: int
    why: str
    completion_tokens: int
    cached_tokens: int
    tools: list[str] = []  # names of tools that a harmony answer calls
    stop: str = ""  # the stop string that ended it, if one did


class Refused(_Said, frozen=True):
    """What was asked cannot be answered. `what` is the field that is wrong, or "", `code` OpenAI's word for why, or "" """

    id: int
    problem: str
    what: str = ""
    code: str = ""


class Counted(_Said, frozen=True):
    id: int
    ids: list[int]


class Spelled(_Said, frozen=True):
    id: int
    text: str


class RankFigures(msgspec.Struct, frozen=True, array_like=True):
    """One rank since the last of these: bytes are totals now, times are seconds of the interval."""

    rank: int
    host: str
    memory_bytes: int
    promised_bytes: int | None
    disk_bytes: int
    disk_s: float
    star_s: float
    compute_s: float


class Figures(_Said, frozen=True):
    """The run as it is, about once a second while there is something to answer."""

    interval_s: float
    tokens: int  # of answers, in the interval
    prompt_tokens: int  # rows of prompts computed in the interval
    cached_tokens: int  # rows of prompts that were kept from others, in the interval
    running: int
    waiting: int
    pages_used: int
    pages: int
    ranks: list[RankFigures]
    drafted_tokens: int = 0  # that were checked in the interval
    accepted_tokens: int = 0  # of those, right
    audits: int = 0  # sums that were audited in the interval, and had no fault


class Ending(_Said, frozen=True):
    """The run is about to end: nothing more is to be asked, what is open goes on for a while."""


class Failed(_Said, frozen=True):
    """The run ends with this line; what is open has no answer. The exit code is 0 where it was told to end."""

    line: str
    exit_code: int


Question = Ask | Cancel | Count | Spell | End
Reply = Progress | Processes | Ready | Began | Part | Done | Refused | Counted | Spelled | Figures | Ending | Failed

_encoder = msgspec.msgpack.Encoder()
decode_question = msgspec.msgpack.Decoder(Question).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def frame(message: Question | Reply) -> bytes:
    """The bytes of a message on the socket."""
    data = _encoder.encode(message)
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Takes bytes as they come from the socket, and gives whole messages, still packed."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Those that are whole now. Raises ValueError for a length that no message has."""
        self._bytes += data
        found = []
        while len(self._bytes) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._bytes)
            if size > MAX_BYTES:
                raise ValueError(f"a message of {size} bytes, at most {MAX_BYTES} are taken")
            if len(self._bytes) < _LENGTH.size + size:
                break
            found.append(bytes(self._bytes[_LENGTH.size : _LENGTH.size + size]))
            del self._bytes[: _LENGTH.size + size]
        return found
