"""The scheduler and the kept prefixes over thousands of steps, against a cache that is a dictionary.

What a row sees is what its own request wrote, or another whose ids begin alike; nothing leaks, none is lost, every answer
is the one that it has alone."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tpimpi.models.kv.cache import KINDS, PAGE, WINDOWED
from tpimpi.models.kv.pages import NO_PAGE, PageAllocator, SequencePages, rows_of
from tpimpi.models.kv.prefix_tree import PrefixTree
from tpimpi.serving.scheduler import Request, Run, Scheduler


def next_id(ids: list[int]) -> int:
    """The model of these tests: what follows is a function of all that came before."""
    return hash(tuple(ids)) % 5


def page_read(run: Run) -> list[tuple[object, ...]]:
    """The page of a prompt with which this goes on, if others may begin with it: its owner, and all ids up to its end."""
    request, end = run.request, (run.start // PAGE + 1) * PAGE
    read = run.n > 1 and not run.draft and end < len(request.ids)
    return [(request.owner, *request.ids[:end])] if read else []


class PlainCache:
    """Pages as dictionaries: what was written at each place is the text up to there."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.written: dict[tuple[int, int, int], int] = {}

    def compute(self, runs: list[Run], allocator: PageAllocator) -> None:
        """A step, each row of which must find all that it sees; as rows are written before any is read."""
        all_pages = [run.request.pages for run in runs]
        assert all(pages is not None for pages in all_pages)
        rows = rows_of([pages for pages in all_pages if pages is not None], [(run.start, run.n) for run in runs])
        texts = [[*run.request.ids, *run.draft] for run in runs]
        places = list(zip(rows.sequence.tolist(), rows.position.tolist(), strict=True))
        for number, position in places:
            for kind in KINDS:
                page = int(rows.tables[kind][number, position // PAGE])
                assert page != NO_PAGE and allocator.users(kind, page) == 1, "written where others read"
                self.written[kind, page, position % PAGE] = hash(tuple(texts[number][: position + 1]))
        for number, position in places:
            ids = texts[number]
            for kind in KINDS[: 1 + (self.window > 0)]:
                first = max(0, position - self.window + 1) if kind == WINDOWED else 0
                for at in {first, (first + position) // 2, position, max(first, position // PAGE * PAGE - 1)}:
                    page = int(rows.tables[kind][number, at // PAGE])
                    assert self.written[kind, page, at % PAGE] == hash(tuple(ids[: at + 1]))


class Requests(RuleBasedStateMachine):
    """Requests come, are answered, are cancelled."""

    @initialize(
        places=st.integers(6, 40),
        sizes=st.sampled_from([(4, 0), (1, 5), (3, 3)]),
        window=st.integers(2, 200),
        running=st.integers(1, 5),
        rows=st.integers(8, 150),
    )
    def begin(self, places: int, sizes: tuple[int, int], window: int, running: int, rows: int) -> None:
        self.allocator = PageAllocator([places, places], sizes, places * max(sizes))
        self.window = window if sizes[WINDOWED] else 0
        self.scheduler = Scheduler(self.allocator, window=self.window, max_running=running, max_rows=rows)
        self.running, self.rows = running, rows
        self.cache = PlainCache(self.window)
        self.texts: list[list[int]] = [[]]  # that others may begin with
        self.open: dict[Request, list[int]] = {}  # and the prompt of each
        self.done = 0

    @rule(data=st.data(), n=st.integers(1, 250), answer=st.integers(1, 40), owner=st.sampled_from(["", "a"]))
    def come(self, data: st.DataObject, n: int, answer: int, owner: str) -> None:
        text = data.draw(st.sampled_from(self.texts))
        prompt = text[: data.draw(st.integers(0, len(text)))] + data.draw(
            st.lists(st.integers(0, 4), min_size=1, max_size=9)
        )
        prompt = (prompt * n)[: max(n, 1)] if data.draw(st.booleans()) else prompt
        request = Request(list(prompt), len(prompt) + answer, owner)
        if not self.scheduler.fits(request.most):
            return
        self.scheduler.add(request)
        self.open[request] = prompt

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.open)))
        self.scheduler.remove(request)
        del self.open[request]

    @precondition(lambda self: self.open)
    @rule(prompt_rows=st.integers(1, 150), times=st.integers(1, 20), drafted=st.integers(0, 9))
    def steps(self, prompt_rows: int, times: int, drafted: int) -> None:
        for _ in range(times):
            if self.open:
                self._step(prompt_rows, min(drafted, self.rows // self.running - 1))

    def _step(self, prompt_rows: int, drafted: int = 0) -> None:
        for request in self.scheduler.answering:  # right, or wrong after some tokens
            ids, most = list(request.ids), min(drafted, request.most - len(request.ids) - 1)
            for _ in range(most):
                ids.append(next_id(ids) if ids[-1] != 4 else 0)
            request.draft = ids[len(request.ids) :]
        runs = self.scheduler.next_step(prompt_rows)
        assert runs, "requests are open, and nothing is done"
        assert sum(run.n for run in runs) <= self.rows and len(self.scheduler.running) <= self.running
        assert len({run.request for run in runs}) == len(runs)
        prompts = [run.n for run in runs if run.n > 1 + len(run.draft)]
        assert sum(prompts) <= max(prompt_rows, 1)
        pages = [page for run in runs for page in page_read(run)]
        assert len(pages) == len(set(pages)), "a page is computed twice"
        self.cache.compute(runs, self.allocator)
        for run in runs:
            ids = run.request.ids
            for place in range(1 + len(run.draft) if run.ends else 0):
                ids.append(next_id(ids))
                if len(ids) == run.request.most or run.draft[place : place + 1] != (ids[-1],):
                    break
            self.scheduler.computed(run)
            if len(ids) == run.request.most:
                self._check_answer(run.request)
                self.scheduler.remove(run.request)

    def _check_answer(self, request: Request) -> None:
        """As it is alone."""
        alone = list(self.open.pop(request))
        while len(alone) < request.most:
            alone.append(next_id(alone))
        assert request.ids == alone
        self.texts.append(alone)
        self.done += 1

    @invariant()
    def nothing_leaks(self) -> None:
        """What is used is what requests and kept prefixes have."""
        if not hasattr(self, "scheduler"):
            return
        assert set(self.scheduler.running) | set(self.scheduler.waiting) == set(self.open)
        used: set[tuple[int, int]] = set()
        for request in self.scheduler.running:
            assert request.pages is not None
            used |= {(k, page) for k, table in enumerate(request.pages.tables) for page in table if page != NO_PAGE}
        used |= {(kind, page) for node in self.scheduler.prefixes.pages() for kind, page in node}
        assert self.allocator.used == sum(self.allocator.sizes[kind] for kind, _ in used)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.open:
            self._step(150)
        self.scheduler.prefixes.clear()
        assert self.allocator.used == 0
        assert all(len(self.allocator.free_pages(kind)) == self.allocator.places[kind] for kind in KINDS)


TestRequests = Requests.TestCase
TestRequests.settings = settings(deadline=None, suppress_health_check=list(HealthCheck))


# The parts


def test_a_prompt_that_was_read_is_not_read_again() -> None:
    allocator = PageAllocator.of_layers([0] * 4, 4 * 20)
    scheduler = Scheduler(allocator, window=0, max_running=4, max_rows=128)
    first, second = Request([7] * 200, 201), Request([7] * 200 + [1, 2], 205)
    scheduler.add(first)
    while first.missing:
        for run in scheduler.next_step(100):
            first.ids += [9] * run.ends
            scheduler.computed(run)
            first.ids = first.ids[:200]
    scheduler.remove(first)
    scheduler.add(second)
    (run,) = scheduler.next_step(100)
    assert (first.cached, first.rows) == (0, 200)
    assert (second.cached, run.start, run.n) == (192, 192, 10)  # three pages of 64


def answered(scheduler: Scheduler, requests: list[Request], rows: int = 100) -> list[int]:
    """Steps until all are answered; returns their numbers in the order in which they were."""
    ended = []
    while len(ended) < len(requests):
        for run in scheduler.next_step(rows):
            if run.ends:
                run.request.ids.append(9)
            scheduler.computed(run)
            if len(run.request.ids) == run.request.most:
                scheduler.remove(run.request)
                ended.append(requests.index(run.request))
    return ended


@pytest.mark.parametrize(("sizes", "window"), [((4, 0), 0), ((2, 2), 100)])
def test_what_prompts_have_in_common_is_computed_once_though_they_come_together(
    sizes: tuple[int, int], window: int
) -> None:
    """As a system prompt that several users share. 1000 positions are 15 pages of 64 and 40 more, which each computes."""
    allocator = PageAllocator([200, 200], sizes, 800)
    scheduler = Scheduler(allocator, window=window, max_running=6, max_rows=128)
    common = list(range(1000))
    same = [Request([*common, 5000 + i, 1], 1010, "a") for i in range(5)]
    other = Request([*common, 6000, 1], 1010, "b")  # who may not know what others asked
    for request in (*same, other):
        scheduler.add(request)
    answered(scheduler, [*same, other])
    assert sorted(request.rows - 7 for request in same) == [42] * 4 + [1002]
    assert sorted(request.cached or 0 for request in same) == [0] + [960] * 4
    assert other.cached == 0 and other.rows - 7 == 1002


def test_one_of_those_that_wait_goes_on_when_the_first_is_cancelled() -> None:
    allocator = PageAllocator.of_layers([0] * 4, 4 * 200)
    scheduler = Scheduler(allocator, window=0, max_running=4, max_rows=128)
    common = list(range(1000))
    requests = [Request([*common, 5000 + i], 1002) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    for _ in range(3):
        (run,) = scheduler.next_step(100)
        scheduler.computed(run)
    first = run.request
    assert (first.computed, sum(request.rows for request in requests)) == (300, 300)
    scheduler.remove(first)
    left = [request for request in requests if request is not first]
    answered(scheduler, left)
    assert sorted(request.cached or 0 for request in left) == [256, 960]
    scheduler.prefixes.clear()
    assert allocator.used == 0


def test_a_short_prompt_does_not_wait_for_a_long_one_to_have_its_turn() -> None:
    """It begins as a long one does that waits behind others: then the short one reads for both."""
    allocator = PageAllocator.of_layers([0], 1000)
    scheduler = Scheduler(allocator, window=0, max_running=8, max_rows=128)
    common = list(range(70))
    first = Request([1] * 5000, 5001)
    long, short = Request([*common, *[3] * 4000], 4100), Request([*common, 4], 80)
    for request in (first, long, short):
        scheduler.add(request)
    assert {run.request: run.n for run in scheduler.next_step(128)} == {first: 128 - 32, short: 32}
    steps = 0
    while short.missing > 1:
        for run in scheduler.next_step(128):
            run.request.ids += [9] * run.ends
            scheduler.computed(run)
        steps += 1
    assert steps <= 6, "a share of the rows was for it"


def test_a_prefix_counts_only_where_its_last_window_is_held() -> None:
    allocator = PageAllocator([40, 40], [2, 2], 160)
    tree = PrefixTree(allocator, window=100)
    ids = list(range(64 * 6))
    pages = SequencePages(allocator, 100)
    assert pages.grow(len(ids))
    tree.add(ids, pages, len(ids))
    pages.close()
    found = tree.begin([*ids, 1])
    assert found.length == 64 * 6
    found.close()
    while any(page for node in tree.pages() for page in node if page[0] == WINDOWED):
        assert tree.give_up()
    assert tree.begin([*ids, 1]).length == 0


def test_a_prefix_is_found_by_its_owner_alone() -> None:
    allocator = PageAllocator.of_layers([0], 40)
    tree = PrefixTree(allocator)
    ids = list(range(PAGE * 3))

    def keep(owner: str) -> None:
        pages = SequencePages(allocator)
        assert pages.grow(len(ids))
        tree.add(ids, pages, len(ids), owner)
        pages.close()

    keep("anna")
    for owner, length in (("anna", PAGE * 3), ("bert", 0), ("", 0)):
        found = tree.begin([*ids, 1], owner)
        assert found.length == length, owner
        found.close()
    keep("bert")
    assert allocator.used == 6, "each has its own"
    assert all(tree.give_up() for _ in range(3))
    lengths = {owner: tree.begin([*ids, 1], owner).length for owner in ("anna", "bert")}
    assert lengths == {"anna": 0, "bert": PAGE * 3}, "what was used longest ago goes first, whoever's it is"


def test_the_shortest_prompt_has_a_share_and_answers_go_on() -> None:
    allocator = PageAllocator.of_layers([0], 1000)
    scheduler = Scheduler(allocator, window=0, max_running=8, max_rows=128)
    answering = Request([1, 2, 3], 100)
    scheduler.add(answering)
    (run,) = scheduler.next_step(128)
    answering.ids.append(4)
    scheduler.computed(run)
    long, middle, short = Request([1] * 5000, 5001), Request([2] * 600, 700), Request([3] * 20, 40)
    for request in (long, middle, short):
        scheduler.add(request)
    found = {run.request: run.n for run in scheduler.next_step(64)}
    assert found == {answering: 1, long: 64 - 16, short: 16}
