"""A model that is loaded on every rank, as rank 0 uses it: it answers turns of a conversation, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tpimpi.engine.allotment import MemoryAllotment
from tpimpi.engine.engine import DEFAULT_CONTEXT, OpenedEngine
from tpimpi.engine.rank_memory import RankMemory
from tpimpi.engine.startup import allot_memory, finish
from tpimpi.engine.trace import RankTrace
from tpimpi.serving.conversation import Conversation
from tpimpi.serving.generate import GenerationFigures, HeldIds, generate, to_pieces
from tpimpi.serving.report import Answer, Report
from tpimpi.serving.speculation import Speculation
from tpimpi.serving.stops import until_stop
from tpimpi.serving.text.answer import Piece
from tpimpi.serving.text.load import tokenizer_of_slices
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.serving.tokenizer_trial import try_tokenizer
from tpimpi.serving.transcript import Turn
from tpimpi.system.memory import release_freed_memory, resident_bytes
from tpimpi.weights.slices.file import SliceFile

if TYPE_CHECKING:  # for the memory that its hash takes
    from tpimpi.serving.kept_cache import KeptCache

GoingOn = Callable[[int, int], bool]
ROOM_POSITIONS = 256  # a conversation's cache grows by so many


def load_tokenizer_of_slices(file: SliceFile, chat_template: str | None = None) -> tuple[Tokenizer | TokenIds, int]:
    """The tokenizer that rank 0's slice carries, with another `chat_template` if one is given, and the bytes of memory that
    it takes; nothing else may be loading now."""
    before = resident_bytes()
    assets, vocab = file.tokenizer_assets(), file.header.config.vocab
    try_tokenizer(assets, vocab, file.path)
    tokenizer = tokenizer_of_slices(assets, vocab, chat_template)
    del assets
    release_freed_memory()
    return tokenizer, max(0, resident_bytes() - before)


def load_llm(
    engine: OpenedEngine,
    conversation: Conversation,
    report: Report,
    first: Turn | None,
    tokenizer_bytes: int = 0,
    kept: KeptCache | None = None,
    draft: OpenedEngine | None = None,
) -> tuple[LLM, list[MemoryAllotment]]:
    """Have every rank take memory: for the `first` turn and its answer, or where there is none for what may come.

    Returns what answers, and what each rank has, in rank order. `tokenizer_bytes` is for the figures, `kept` what was kept
    of the conversation (--keep-cache), `draft` a model that drafts (--draft). Raises InputError where a rank's promise is
    too small.
    """
    params = conversation.params
    wanted = DEFAULT_CONTEXT if first is None else len(first.ids) + params.max_tokens
    context = params.context or min(conversation.limit, wanted)
    memory, allotments = allot_memory(engine.star, [engine], context, tokenizer_bytes, draft)
    rooms = [rank.max_context for rank in allotments if rank.max_context is not None]
    limited = conversation.limited(min([conversation.limit, *rooms]))
    llm = LLM(memory, limited, report, context, kept)
    if draft is not None:
        llm.use_draft(draft)
    return llm, allotments


class LLM:
    """Rank 0's use of a model for which every rank has its memory (see load_llm)."""

    def __init__(
        self,
        memory: RankMemory,
        conversation: Conversation,
        report: Report,
        context: int,
        kept: KeptCache | None = None,
    ) -> None:
        """`context` is how many positions memory was taken for."""
        self.memory, self.conversation, self.report = memory, conversation, report
        self.engine = memory.engines[0]
        self._held, self._context, self._kept = HeldIds(), context, kept
        self._speculation = Speculation(memory.draft, always=conversation.params.speculate is not None)

    def use_draft(self, draft: OpenedEngine) -> None:
        """Have a small model draft."""
        from tpimpi.serving.draft_choice import ModelDrafts  # which most runs do without
        from tpimpi.serving.draft_model import DraftModel

        sampled_ids, context = self.conversation.tokenizer.sampled_ids, min(self._context, draft.header.config.context)
        model = DraftModel(draft, sampled_ids, context, self.memory if self.memory.draft_waits else None)
        self._speculation.model = ModelDrafts(model, self._speculation.times)

    def take_kept(self) -> str | None:
        """Have every rank go on with the keys and values that the last run of the conversation kept, if any are there.

        Returns why not, where some were kept."""
        if self._kept is None or (files := self.engine.opened.page_files) is None:
            return None
        limit = self.conversation.limit
        self._held.ids, problem = self._kept.take(self.engine.model, files, min(self._context, limit), limit)
        return problem

    def keep(self) -> str | None:
        """Have every rank keep its keys and values for the next run of the conversation, if they are to be kept.

        Returns why not, where they could not."""
        if self._kept is None or (files := self.engine.opened.page_files) is None:
            return None
        return self._kept.keep(self.engine.model, files, self._held.ids)

    def answer(self, turn: Turn, going_on: GoingOn = lambda done, prompt: True) -> Iterator[Piece]:
        """The answer, as it comes, first what there is of it; the report has its figures when it is done.

        `going_on` is asked before each step, with the number of positions that are done of the prompt, and how many it has;
        where it says no, the answer ends there, "cancelled". A turn without a token of an answer is not kept then.
        """
        conversation = self.conversation
        params, session = conversation.params, conversation.session
        if session is not None:
            session.begin(turn)
        room = conversation.limit - len(turn.ids)
        max_tokens = min(params.max_tokens, room)
        made = list(turn.tokens)
        generated, cancelled = len(made) < max_tokens, False
        why = "stop"  # unless the tokens come to an end
        figures = GenerationFigures()
        times: list[tuple[int, float]] = []
        ready = time.monotonic()

        def asked(done: int) -> bool:
            nonlocal cancelled
            cancelled = not going_on(done, len(turn.ids) + len(turn.tokens))
            return not cancelled

        def noted() -> Iterator[int]:
            nonlocal why
            yield from turn.tokens[: len(made)]
            for token in self._tokens(turn, max_tokens, asked, figures) if generated else ():
                times.append((figures.passes, time.monotonic()))
                made.append(token)
                if session is not None:
                    session.add(token)
                yield token
            why = "end" if len(made) < max_tokens else "max_tokens" if max_tokens < room else "context"
            why = "cancelled" if cancelled else why

        stream = conversation.tokenizer.answer_stream(turn.ids, raw=params.raw)
        said = {False: "", True: ""}  # the answer, and its reasoning
        for piece in until_stop(to_pieces(noted(), stream), params.stops):
            said[piece.reasoning] += piece.text
            yield piece
        if session is not None and why == "cancelled" and not made:
            session.undo()
        elif session is not None:
            session.end(why, said[False], said[True])
        turn.ended, turn.text, turn.reasoning, turn.tools = why, said[False], said[True], list(stream.tools)
        tokens = (made, len(turn.ids), ready, times, self._held.kept if generated else 0)
        self.report.add(Answer.timed(turn.text, *tokens, figures, ended=why, reasoning=turn.reasoning))

    def _tokens(
        self, turn: Turn, max_tokens: int, going_on: Callable[[int], bool], figures: GenerationFigures
    ) -> Iterator[int]:
        """Those that follow what there is of the answer, so that it has at most `max_tokens`."""
        conversation, model, made = self.conversation, self.engine.model, list(turn.tokens)
        params = conversation.params
        return generate(
            model,
            model.star,
            self.engine.embed,
            [*turn.ids, *made],
            params.sample(turn.seed, len(made)),
            max_tokens=max_tokens - len(made),
            context=params.context or self._positions(len(turn.ids) + max_tokens),
            end_ids=() if params.ignore_eos else conversation.tokenizer.end_ids,
            sampled_ids=conversation.tokenizer.sampled_ids,
            held=self._held,
            going_on=going_on,
            speculation=self._speculation,
            figures=figures,
        )

    def _positions(self, needed: int) -> int:
        """How many positions to keep room for, where so many are needed: in a conversation some more, so that the next turn
        finds the same cache."""
        if self.conversation.session is None:
            return needed
        model, limit = self.engine.model, self.conversation.limit
        wanted = min(limit, -(-needed // ROOM_POSITIONS) * ROOM_POSITIONS)
        there = model.context if model.max_kept(wanted) else 0
        return there if wanted <= there <= limit else wanted

    def finish(self) -> list[RankTrace]:
        """End the run on every rank and gather the figures; the traces, if they were wanted, are returned."""
        figures, traces = finish(self.memory.star, self.memory)
        self.report.ranks += figures[0]
        if (auditor := self.engine.model.auditor) is not None:
            self.report.audit = auditor.figures
        return traces

    def close(self) -> None:
        """Stop reading, however the run ends."""
        self.memory.close()
        if self._speculation.model is not None:
            self._speculation.model.close()
