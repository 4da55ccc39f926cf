"""What was said in a conversation, in memory. `Session` keeps it in a file as well."""

from __future__ import annotations

from dataclasses import dataclass, field

END_REASONS = ("end", "stop", "max_tokens", "context", "cancelled")


@dataclass
class Turn:
    """A prompt and its answer, as far as there is one. `ids` is all that the model gets before the answer."""

    prompt: str
    ids: list[int]
    seed: int  # of the random draws, of which there is one for each of `tokens`
    tokens: list[int] = field(default_factory=list)
    ended: str | None = None  # one of END_REASONS
    text: str = ""  # of an answer that has ended
    reasoning: str = ""  # before it; "" too where the session is of version 1
    tools: list[str] = field(default_factory=list)  # what it calls; not in the session


class Transcript:
    """The turns of a conversation, all but the last of which have ended.

    `system` is the system prompt of the turns to come, None for none. `left_out` is how many of the first turns the model
    no longer gets, since the context has no room for them.
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.system: str | None = None
        self.left_out = 0

    @property
    def unfinished(self) -> Turn | None:
        """The last turn, if its answer was interrupted."""
        return self.turns[-1] if self.turns and self.turns[-1].ended is None else None

    def begin(self, turn: Turn) -> None:
        """A turn begins; one that was interrupted goes on."""
        if turn is not self.unfinished:
            self.turns.append(turn)

    def add(self, token: int) -> None:
        """The last turn's answer has one more token."""
        self.turns[-1].tokens.append(token)

    def end(self, why: str, text: str, reasoning: str = "") -> None:
        """The last turn's answer is done, for one of END_REASONS."""
        self.turns[-1].ended, self.turns[-1].text, self.turns[-1].reasoning = why, text, reasoning

    def undo(self, turns: int = 1) -> None:
        """The last so many turns no longer count."""
        del self.turns[len(self.turns) - turns :]
        self.left_out = min(self.left_out, len(self.turns))

    @property
    def said(self) -> list[tuple[str, str]]:
        """Prompts and answers that the model gets before another prompt."""
        return [(turn.prompt, turn.text) for turn in self.turns[self.left_out :]]
