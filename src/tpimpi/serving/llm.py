"""Rank 0 once every rank has its slice: checks prompts and answers them, one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from tpimpi.engine.engine import CONTEXT, Engine
from tpimpi.engine.rank_memory import MemoryAllotment, RankMemory
from tpimpi.engine.startup import allot_memory, finish
from tpimpi.engine.trace import RankTrace
from tpimpi.errors import InputError
from tpimpi.serving.generate import Sampler, generate, to_text, until_stop
from tpimpi.serving.report import Answer, Report
from tpimpi.serving.session import Session, Turn
from tpimpi.serving.text.tokenizer import TokenIds, Tokenizer, tokenizer_of_slices
from tpimpi.system.memory import resident_bytes
from tpimpi.weights.slices.file import SliceFile

_MOST_BYTES_A_TOKEN = 16  # of usual text; with more, a prompt is looked at twice


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


def load_tokenizer_of_slices(file: SliceFile) -> tuple[Tokenizer | TokenIds, int]:
    """The tokenizer that rank 0's slice carries, and the bytes of memory that it takes; nothing else may be loading now."""
    before = resident_bytes()
    tokenizer = tokenizer_of_slices(file.tokenizer_assets(), file.header.config.vocab)
    return tokenizer, max(0, resident_bytes() - before)


class LLM:
    """Rank 0 once every rank has its slice: checks prompts and answers them, one after the other."""

    memory: RankMemory | None = None

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | TokenIds,
        wishes: SamplingParams,
        report: Report,
        session: Session | None = None,
        *,
        tokenizer_bytes: int = 0,
    ) -> None:
        """`allot_memory` is to follow. With a session all prompts are turns of one conversation, else each is its own.

        Raises InputError for a context beyond the model's, for wishes that need a tokenizer where there is none, and for a
        session that was begun with another model."""
        self.engine, self.tokenizer, self.wishes, self.report = engine, tokenizer, wishes, report
        self.session, self._tokenizer_bytes = session, tokenizer_bytes
        if session is not None:
            session.check_model(engine.header.model, engine.header.fingerprint, engine.header.config.vocab)
        self._most = engine.header.config.context
        if wishes.context is not None and wishes.context > self._most:
            raise InputError(f"--context is {wishes.context}, this model has {self._most} positions; give at most that")
        self._limit = wishes.context or self._most
        if isinstance(tokenizer, TokenIds):
            tokenizer.check_wishes(raw=wishes.raw, stops=wishes.stops)

    def allot_memory(self, prompt: list[int] | None) -> list[MemoryAllotment]:
        """Have every rank take memory: for this prompt and its answer, or for what may come. What each has, in rank order.

        Raises InputError where a rank's promise is too small.
        """
        wishes = self.wishes
        context = wishes.context or min(self._limit, CONTEXT if prompt is None else len(prompt) + wishes.max_tokens)
        self.memory, allotments = allot_memory(self.engine.star, [self.engine], context, self._tokenizer_bytes)
        rooms = [rank.most_context for rank in allotments if rank.most_context is not None]
        self._limit = min([self._limit, *rooms])
        return allotments

    def check(self, prompt: str) -> Turn:
        """A prompt as the model gets it, with what was said before; or the turn that the session ends with, if that has the
        same prompt and was interrupted. Raises InputError where the prompt is empty or too long, or is not that turn's."""
        if not prompt.strip():
            raise InputError("the prompt is empty; give some text")
        if (turn := self.interrupted()) is not None:
            if turn.prompt != prompt:
                raise InputError(
                    "the session ends with an interrupted answer to another prompt; run without a prompt to go on with it "
                    "(with --max-tokens 1 it ends where it is), then give this one"
                )
            return turn
        encode = self._encoding()
        # Encoding takes 150 bytes of memory for each of the text, so what is far too long is not encoded whole to see that.
        beginning = prompt[: self._limit * _MOST_BYTES_A_TOKEN]
        if beginning != prompt and (found := len(encode(beginning))) > self._limit:
            raise self._too_long(f"over {found}")
        ids = encode(prompt)
        if not ids:
            raise InputError("the prompt has no tokens; give some text")
        if len(ids) >= self._limit:
            raise self._too_long(str(len(ids)))
        return Turn(
            prompt, ids, int.from_bytes(os.urandom(8), "little") >> 1 if self.wishes.seed is None else self.wishes.seed
        )

    def _encoding(self) -> Callable[[str], list[int]]:
        """How a prompt becomes ids, what was said before included."""
        said = [] if self.session is None else self.session.turns
        if not self.wishes.raw and self.tokenizer.has_chat_template:
            return partial(self.tokenizer.encode_chat, said=[(turn.prompt, turn.text) for turn in said])
        if not said:
            return self.tokenizer.encode
        before = [*said[-1].ids, *said[-1].tokens]
        return lambda prompt: [*before, *self.tokenizer.encode(prompt, special=False)]

    def interrupted(self) -> Turn | None:
        """The turn that the session ends with, if it was interrupted. Raises InputError where there is no room for it."""
        turn = None if self.session is None else self.session.unfinished
        if turn is not None and len(turn.ids) >= self._limit:
            raise self._too_long(str(len(turn.ids)))
        return turn

    def _too_long(self, tokens: str) -> InputError:
        remedy = "shorten it"
        if self.session is not None and self.session.turns:
            remedy = "begin another --session"
        if self.wishes.context is not None and self._limit < self._most:
            remedy += f", or raise --context (up to {self._most})"
        elif self._limit < self._most:
            remedy += ", or raise --memory"
        what = "the prompt" if self.session is None or not self.session.turns else "the conversation"
        return InputError(f"{what} has {tokens} tokens, the context is {self._limit} positions; {remedy}")

    def answer(self, turn: Turn) -> Iterator[str]:
        """Text of the answer, as it comes, first what there is of it; the report has its figures when it is done."""
        wishes, model, session = self.wishes, self.engine.model, self.session
        if session is not None:
            session.begin(turn)
        room = self._limit - len(turn.ids)
        max_tokens = min(wishes.max_tokens, room)
        made = list(turn.tokens)
        why = "stop"  # unless the tokens come to an end
        times: list[float] = []
        ready = time.monotonic()

        def noted() -> Iterator[int]:
            nonlocal why
            yield from turn.tokens[: len(made)]
            history = [*turn.ids, *made]
            tokens = generate(
                model,
                self.engine.star,
                self.engine.file.embedding_rows,
                history,
                wishes.sample(turn.seed, len(made)),
                max_tokens=max_tokens - len(made),
                context=wishes.context or len(turn.ids) + max_tokens,
                end_ids=() if wishes.ignore_eos else self.tokenizer.end_ids,
            )
            for token in tokens if len(made) < max_tokens else ():
                times.append(time.monotonic())
                made.append(token)
                if session is not None:
                    session.add(token)
                yield token
            why = "end" if len(made) < max_tokens else "max_tokens" if max_tokens < room else "context"

        text = ""
        for piece in until_stop(to_text(noted(), self.tokenizer.stream()), wishes.stops):
            text += piece
            yield piece
        if session is not None:
            session.end(why, text)
        self.report.add(Answer.timed(text, made, len(turn.ids), ready, times))

    def finish(self) -> list[RankTrace]:
        """End the run on every rank and gather the figures; the traces, if they were wanted, are returned."""
        assert self.memory is not None, "allot_memory before finish"
        figures, traces = finish(self.engine.star, self.memory)
        self.report.ranks += figures[0]
        return traces

    def close(self) -> None:
        """Stop reading, however the run ends."""
        if self.memory is not None:
            self.memory.close()
        self.engine.close()
