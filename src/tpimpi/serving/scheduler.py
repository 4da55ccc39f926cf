"""The scheduler, on rank 0: which rows of which requests the next step has.

A request is admitted when there are pages for all of its prompt, first come first served; a short one may go before others
that wait for room, but not before the same one again and again. A step has a row of every answer, and beside them chunks of
prompts: most of these rows for the prompt that came first, a share for the shortest. Of prompts that go on alike one is
read, and the others take its pages as they are full: what they have in common is computed once. Where an answer finds no
page, what is kept of earlier prefixes goes (see models/kv/prefix_tree.py), then the request that was admitted last gives its
pages back: it waits, and is computed again from its prompt and what there is of its answer. None is lost. As vLLM does
(arXiv 2309.06180), in steps of mixed rows (Sarathi-Serve, arXiv 2403.02310).

Nothing here computes or sends: it can be tested by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from tpimpi.models.kv.cache import PAGE, pages_of
from tpimpi.models.kv.pages import PageAllocator, SequencePages
from tpimpi.models.kv.prefix_tree import PrefixTree

SHORT_SHARE = 4  # one of so many rows of prompts is for the shortest, where it is not the first
MAX_OVERTAKEN = 8  # times that a request which waits for room is overtaken
MAX_READING = 3  # prompts that are read at the same time, though the first has rows for all steps to come
MAX_LOOKED_AT = 16  # requests that wait, to find one that has room


@dataclass(eq=False)
class Request:
    """A prompt that is to be answered. `ids` are its tokens, then those of the answer; `most` how many they can become.

    `cached` is how many of the prompt's positions others had computed, `rows` how many were computed for it in all. What it
    has computed is kept for requests of the same `owner`. `waits` says that in the last step another one computed what it
    needs.
    """

    ids: list[int]
    most: int
    owner: str = ""
    pages: SequencePages | None = None
    cached: int | None = None
    rows: int = 0
    overtaken: int = 0
    waits: bool = False
    draft: list[int] = field(default_factory=list)  # what may follow `ids`, to be checked in the next step
    prompt: int = -1  # how many of the ids are not of the answer; all of them where nothing is said

    def __post_init__(self) -> None:
        self.prompt = len(self.ids) if self.prompt < 0 else self.prompt

    @property
    def computed(self) -> int:
        """Positions whose keys and values are there."""
        return 0 if self.pages is None else self.pages.length

    @property
    def missing(self) -> int:
        """Rows until the next token can be chosen."""
        return len(self.ids) - self.computed


@dataclass(frozen=True)
class Run:
    """Rows of one request in a step: `n` positions from `start` on, of which the last are of a `draft`. Where `ends`, the
    next token is chosen with the logits of the last row, and of those of the draft."""

    request: Request
    start: int
    n: int
    ends: bool
    draft: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """Those of the rows."""
        return [*self.request.ids[self.start : self.start + self.n - len(self.draft)], *self.draft]


class Scheduler:
    """Requests that wait, and those that run, whose pages are of `allocator`; at most `max_running` of these."""

    def __init__(self, allocator: PageAllocator, *, window: int, max_running: int, max_rows: int) -> None:
        """`window` is the longest of the windowed layers (0: none), `max_rows` how many rows a step has at most."""
        assert max_rows > max_running > 0
        self.prefixes = PrefixTree(allocator, window)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order in which they were admitted
        self.preempted = 0  # times that a request gave its pages back
        self._allocator, self._window = allocator, window
        self._max_running, self._max_rows = max_running, max_rows

    def fits(self, positions: int) -> bool:
        """Whether a request of so many positions can be answered, if it is alone."""
        return self._allocator.has(self._pages_for(positions))

    def add(self, request: Request) -> None:
        """A request comes. It must fit."""
        assert self.fits(request.most) and request.ids
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """A request is done, or nobody wants it any more, at any time between two steps."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._give_back(request)

    @property
    def answering(self) -> list[Request]:
        """Requests that the next step gives a token each, or more with a draft; the drafts of all, and a row for each, are
        at most what a step may have."""
        return [request for request in self.running if request.missing == 1]

    def next_step(self, prompt_rows: int) -> list[Run]:
        """The rows of the next step, with their pages, in which prompts have at most `prompt_rows`; none where nothing waits
        or runs. What is computed is then to be said of each (`computed`)."""
        while True:
            runs = self._rows_of_answers()
            room = max(1, min(prompt_rows, self._max_rows - sum(run.n for run in runs)))
            runs += self._rows_of_prompts(room, {run.request for run in runs})
            if runs or not self.running:
                return runs
            self._preempt(self.running[-1])

    def computed(self, run: Run) -> None:
        """A run was computed, and its tokens chosen: what it wrote is kept as a prefix, rows of a draft that was wrong are
        taken back, and what no later row sees is given back."""
        request, pages = run.request, run.request.pages
        request.rows += run.n
        assert pages is not None
        length = min(run.start + run.n, len(request.ids) - 1) if run.ends else run.start + run.n
        pages.truncate(length)
        if length // PAGE > run.start // PAGE:
            self.prefixes.add(request.ids, pages, length, request.owner)
        pages.trim()

    def _rows_of_answers(self) -> list[Run]:
        """A row of each request that needs only that, and those of its draft, the first first; the last give way where pages
        are short."""
        runs: list[Run] = []
        for request in list(self.running):
            if request not in self.running or request.missing != 1:  # it gave way meanwhile
                continue
            draft, request.draft = tuple(request.draft), []
            while not self._grow(request, 1 + len(draft)):
                if draft:
                    draft = ()
                    continue
                last = self.running[-1]
                self._preempt(last)
                if last is request:
                    break
            else:
                runs.append(Run(request, len(request.ids) - 1, 1 + len(draft), True, draft))
        return [run for run in runs if run.request in self.running]

    def _rows_of_prompts(self, room: int, answered: set[Request]) -> list[Run]:
        """Chunks of prompts, of `room` rows in all: of those that run, and of those that are admitted now."""
        reading = [request for request in self.running if request not in answered]
        for request in reading:
            if request.waits:
                self._take_over(request)
        while len(self.running) < self._max_running and (len(reading) < MAX_READING or _rows(reading) < room):
            admitted = self._admit()
            if admitted is None:
                break
            reading.append(admitted)
        runs = []
        for request, n in self._shares(reading, room):
            start = request.computed
            if self._grow(request, n):
                runs.append(Run(request, start, n, start + n == len(request.ids)))
        return runs

    def _shares(self, reading: list[Request], room: int) -> Iterator[tuple[Request, int]]:
        """How many rows of `room` each prompt gets: the shortest its share, the others in order all that they can use. One
        that waits for another gets none, and counts for that one's place and shortness."""
        leaders = _leaders(reading)
        given = dict.fromkeys(leaders, 0)
        if len(leaders) > 1:
            shortest = min(leaders, key=lambda request: leaders[request])
            given[shortest] = min(shortest.missing, room // SHORT_SHARE)
            room -= given[shortest]
        for request in leaders:
            more = min(request.missing - given[request], room)
            given[request] += more
            room -= more
        return ((request, n) for request, n in given.items() if n)

    def _take_over(self, request: Request) -> None:
        """It has the pages that another one computed meanwhile, if they are kept."""
        assert request.pages is not None and request.cached is not None
        request.waits = False
        found = self.prefixes.begin(request.ids, request.owner)
        gained = found.length - request.computed
        if gained <= 0:
            found.close()
            return
        request.pages.close()
        request.pages = found
        request.cached = max(request.cached, min(request.cached + gained, request.prompt - request.rows))

    def _admit(self) -> Request | None:
        """The next request that waits and has room now; it runs from now on. Others may not take the room of those that were
        admitted before and have yet to read their prompts."""
        for place, request in enumerate(islice(self.waiting, MAX_LOOKED_AT)):
            if place and self.waiting[0].overtaken >= MAX_OVERTAKEN:
                break
            if place and len(request.ids) > self._max_rows:
                continue
            pages = self.prefixes.begin(request.ids, request.owner)
            wanted = self._still_missing(pages, len(request.ids) + 1)
            if not self._make_free([a + b for a, b in zip(wanted, self._promised(), strict=True)]):
                pages.close()
                assert self.running or place, "a request that fits has no room, though nothing runs"
                continue
            if place:
                self.waiting[0].overtaken += 1
            del self.waiting[place]
            request.pages = pages
            request.cached = min(pages.length, request.prompt) if request.cached is None else request.cached
            self.running.append(request)
            return request
        return None

    def _promised(self) -> list[int]:
        """Pages of each kind that those that run have yet to take for what is known of them."""
        promised = [0] * len(self._allocator.sizes)
        for request in self.running:
            assert request.pages is not None
            for kind, count in enumerate(self._still_missing(request.pages, len(request.ids))):
                promised[kind] += count
        return promised

    def _pages_for(self, positions: int) -> list[int]:
        """Pages of each kind that a sequence of so many positions holds at once, at most: of windowed layers the window's, a
        step's, and two more that these begin and end in."""
        windowed = min(pages_of(positions), pages_of(self._window) + pages_of(self._max_rows) + 2)
        return [pages_of(positions), windowed if self._window else 0]

    def _still_missing(self, pages: SequencePages, length: int) -> list[int]:
        return [min(a, b) for a, b in zip(pages.missing(length), self._pages_for(length), strict=True)]

    def _grow(self, request: Request, n: int) -> bool:
        """Have pages for `n` rows more; what is kept of prefixes gives way."""
        assert request.pages is not None
        length = request.computed + n
        return self._make_free(request.pages.missing(length)) and request.pages.grow(length)

    def _make_free(self, counts: list[int]) -> bool:
        """Whether so many pages of each kind are free, once prefixes that nobody uses have given way."""
        while not self._allocator.can_take(counts):
            if not self.prefixes.give_up():
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """It gives its pages back, and is the first to be admitted again."""
        self.running.remove(request)
        self._give_back(request)
        request.draft = []
        self.waiting.appendleft(request)
        self.preempted += 1

    def _give_back(self, request: Request) -> None:
        request.waits = False
        if request.pages is not None:
            request.pages.close()
            request.pages = None


def _rows(reading: list[Request]) -> int:
    return sum(request.missing for request in reading)


def _leaders(reading: list[Request]) -> dict[Request, int]:
    """Of prompts that go on alike the one that is to be read: who is furthest, or misses least.

    In the order in which they, or those that wait for them, came; and the fewest rows that one of these misses."""
    found: dict[Request, list[Request]] = {}
    for request in sorted(reading, key=lambda request: (-request.computed, request.missing)):
        leader = next((other for other in found if _reads_for(other, request)), None)
        request.waits = leader is not None
        found.setdefault(leader or request, []).append(request)
    place = {request: number for number, request in enumerate(reading)}
    ordered = sorted(found, key=lambda leader: min(place[request] for request in found[leader]))
    return {leader: min(request.missing for request in found[leader]) for leader in ordered}


def _reads_for(other: Request, request: Request) -> bool:
    """Whether the other one is about to compute the page that this one needs next, all of it and a position behind it."""
    page = request.computed // PAGE
    end = (page + 1) * PAGE
    return (
        (other.owner, other.computed // PAGE) == (request.owner, page)
        and end < len(request.ids)
        and other.ids[:end] == request.ids[:end]
    )
