"""What was said so far and what a prompt becomes after it: token ids that are known to have room in the context."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tpimpi.errors import InputError
from tpimpi.serving.sampling import Sampler
from tpimpi.serving.session import Session
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.serving.transcript import Transcript, Turn
from tpimpi.weights.slices.header import Header

MIN_ANSWER_PART = 4  # of the context: so much room an answer is to have, if --max-tokens wants it
FREED_PART = 8  # of the context: so much becomes free beyond that when turns are dropped
MAX_BYTES_A_TOKEN = 16  # of usual text; with more, a prompt is looked at twice


@dataclass(frozen=True)
class SamplingParams:
    """How prompts are to be answered. `context` None: as much as prompt and answer need."""

    sample: Callable[[int, int], Sampler]  # for each answer a fresh one: a seed, and how many draws were made before
    seed: int | None  # the same for each answer; None: each has its own
    max_tokens: int
    context: int | None
    raw: bool
    stops: list[str]
    ignore_eos: bool
    system: str | None = None  # a new conversation's system prompt
    drop: bool = False  # the oldest turns, where the context has no room for all of them
    speculate: int | None = 0  # how many tokens are drafted; 0: none, None: as many as pay

    def seed_of(self, number: int) -> int:
        """The seed of one of several answers: each has random draws of its own."""
        return int.from_bytes(os.urandom(8), "little") >> 1 if self.seed is None else self.seed + number


@dataclass(frozen=True)
class Conversation:
    """Prompts become turns here. With a transcript, which a session is, all are turns of one conversation, else each stands
    for itself.

    `model_limit` is how many positions the model has, `limit` how many a prompt and its answer may take in this run.
    """

    tokenizer: Tokenizer | TokenIds
    params: SamplingParams
    session: Transcript | None
    model_limit: int
    limit: int

    @classmethod
    def begin(
        cls, header: Header, tokenizer: Tokenizer | TokenIds, params: SamplingParams, session: Transcript | None = None
    ) -> Conversation:
        """For the model of `header`. Raises InputError for a context beyond the model's, for params that need a tokenizer or
        a chat template where there is none, and for a session that was begun with another model."""
        if isinstance(session, Session):
            session.check_model(header.model, header.fingerprint, header.config.vocab)
            session.keep_reasoning(tokenizer.has_reasoning and not params.raw)
        most = header.config.context
        if params.context is not None and params.context > most:
            raise InputError(f"--context is {params.context}, this model has {most} positions; give at most that")
        tokenizer.check_params(raw=params.raw, stops=params.stops)
        if params.system is not None:
            tokenizer.check_system(params.system)
            if session is not None:
                session.system = params.system
        return cls(tokenizer, params, session, most, params.context or most)

    def limited(self, positions: int) -> Conversation:
        """The same, with room for at most so many positions."""
        return replace(self, limit=min(self.limit, positions))

    def next_turn(self, prompt: str | None) -> Turn | None:
        """The turn of `prompt`; where there is none, the interrupted one that the session ends with, if there is one.

        Raises InputError where there is no room for it."""
        return self.interrupted() if prompt is None else self.turn(prompt)

    def turn(self, prompt: str, attempt: int = 0) -> Turn:
        """A prompt as the model gets it, with what was said before; or the turn that the session ends with, if that has the
        same prompt and was interrupted. Each `attempt` at the same prompt has random draws of its own.

        Raises InputError where the prompt is empty or too long, or is not that turn's."""
        if not prompt.strip():
            raise InputError("the prompt is empty; give some text")
        if (turn := self.interrupted()) is not None:
            if turn.prompt != prompt:
                raise InputError(
                    "the session ends with an interrupted answer to another prompt; run without a prompt to go on with it "
                    "(with --max-tokens 1 it ends where it is), then give this one"
                )
            return turn
        ids, whole = self._fitting(prompt)
        if not ids:
            raise InputError("the prompt has no tokens; give some text")
        if len(ids) >= self.limit:
            raise self._too_long(str(len(ids)) if whole else f"over {len(ids)}")
        return Turn(prompt, ids, self.params.seed_of(attempt))

    def _fitting(self, prompt: str) -> tuple[list[int], bool]:
        """The ids of a prompt, with what was said before: with `drop` as many of the last turns as leave room for an answer,
        and some more, since what was computed for the others is of no use then. See `_encode`."""
        ids, whole = self._encode(prompt)
        session, answer = self.session, min(self.params.max_tokens, self.limit // MIN_ANSWER_PART)
        if session is None or not self.params.drop or len(ids) + answer <= self.limit:
            return ids, whole
        before = session.left_out
        while len(ids) + answer + self.limit // FREED_PART > self.limit and session.left_out < len(session.turns):
            session.left_out += 1
            ids, whole = self._encode(prompt)
        if len(ids) >= self.limit:  # which is no fault of the turns
            session.left_out = before
        return ids, whole

    def _encode(self, prompt: str) -> tuple[list[int], bool]:
        """The ids of a prompt, with what was said before; of one that is far too long those of its beginning, and False."""
        encode = self._encoding()
        # Encoding takes 150 bytes of memory for each of the text, so what is far too long is not encoded whole to see that.
        beginning = prompt[: self.limit * MAX_BYTES_A_TOKEN]
        if beginning != prompt and len(ids := encode(beginning)) > self.limit:
            return ids, False
        return encode(prompt), True

    def ids_of(self, prompt: str | None, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a prompt that stands for itself, or of the messages of a chat; where it is a chat that is not --raw, of
        the messages in any case. Raises InputError where there is no room for them and a token."""
        if not self.params.raw:
            ids = self.tokenizer.encode_messages(messages)
        elif prompt is None:
            raise InputError(
                "--raw does without a chat template, which messages need; give a prompt, or leave out --raw"
            )
        else:
            ids = self.tokenizer.encode(prompt)
        if not ids:
            raise InputError("the prompt has no tokens; give some text")
        if len(ids) >= self.limit:
            raise self._too_long(str(len(ids)))
        return ids

    @property
    def system(self) -> str | None:
        """The system prompt of the turns to come."""
        return self.params.system if self.session is None else self.session.system

    def change_system(self, system: str | None) -> None:
        """Another system prompt for the turns to come. Raises InputError for one that cannot be used."""
        if self.params.raw:
            raise InputError("--raw does without a chat template, which a system prompt needs")
        if system is not None:
            self.tokenizer.check_system(system)
        if self.session is not None:
            self.session.system = system

    @property
    def left_out(self) -> int:
        """How many of the first turns the model no longer gets."""
        return 0 if self.session is None else self.session.left_out

    def _encoding(self) -> Callable[[str], list[int]]:
        """How a prompt becomes ids, what was said before included."""
        if not self.params.raw:
            said = [] if self.session is None else self.session.said
            return partial(self.tokenizer.encode_chat, said=said, system=self.system)
        if self.session is None or not self.session.turns:
            return self.tokenizer.encode
        last = self.session.turns[-1]
        before = [*last.ids, *last.tokens]
        return lambda prompt: [*before, *self.tokenizer.encode(prompt, special=False)]

    def interrupted(self) -> Turn | None:
        """The turn that the session ends with, if it was interrupted. Raises InputError where there is no room for it."""
        turn = None if self.session is None else self.session.unfinished
        if turn is not None and len(turn.ids) >= self.limit:
            raise self._too_long(str(len(turn.ids)))
        return turn

    def _too_long(self, tokens: str) -> InputError:
        remedy = "shorten it"
        if self.session is not None and self.session.turns:
            remedy = "begin another --session" if isinstance(self.session, Session) else "begin another, with /new"
            remedy += "" if self.params.raw or self.params.drop else ", or give --overflow drop"
        if self.params.context is not None and self.limit < self.model_limit:
            remedy += f", or raise --context (up to {self.model_limit})"
        elif self.limit < self.model_limit:
            remedy += ", or raise --memory"
        what = "the prompt" if self.session is None or not self.session.turns else "the conversation"
        return InputError(f"{what} has {tokens} tokens, the context is {self.limit} positions; {remedy}")
