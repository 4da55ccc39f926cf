"""Stop strings: an answer ends before one of them, wherever its pieces were cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tpimpi.serving.text.answer import Piece, pieces


class StopFilter:
    """The pieces of one answer up to the string of `stops` that is complete first, which is left out; what may begin one is
    held back. Reasoning goes through: a stop string is looked for in the answer alone."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.stopped = False  # a stop string was complete: nothing follows
        self.found: str | None = None  # that one

    def push(self, part: Piece) -> list[Piece]:
        """What is certain with this piece."""
        if part.reasoning:
            return [part]
        if part.mark:  # no stop string goes on behind it
            held, self._held = self._held, ""
            return [*pieces(held), part]
        self._held += part.text
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first, so that it does not matter how the text came in pieces
            _, place, self.found = min(found)
            self.stopped = True
            return pieces(self._held[:place])
        held = self._held
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        self._held = held[len(held) - keep :]
        return pieces(held[: len(held) - keep])

    def flush(self) -> list[Piece]:
        """What is left at the end."""
        return [] if self.stopped else pieces(self._held)


def until_stop(parts: Iterable[Piece], stops: Sequence[str]) -> Iterator[Piece]:
    """`parts` as a StopFilter lets them through."""
    stop = StopFilter(stops)
    for part in parts:
        yield from stop.push(part)
        if stop.stopped:
            return
    yield from stop.flush()
