"""Prefixes that are kept: a tree of KV pages by token ids, on rank 0.

A node is a page of PAGE ids after those of its parents. It counts as a user of its pages (PageAllocator), so that a sequence
whose ids begin as another's did takes them as they are and computes the rest. Where too few pages are free, nodes go, those
that nobody used for longest first, leaves before what they rest on. Of windowed layers a sequence needs the last window
before the position where it goes on: what lies before that in every sequence that ended here goes first.

Each owner has a tree of its own: how soon a first token comes would tell one what others asked.

As in vLLM's automatic prefix caching and SGLang's RadixAttention (arXiv 2312.07104), by whole pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tpimpi.models.kv.cache import KINDS, PAGE, WINDOWED
from tpimpi.models.kv.pages import NO_PAGE, PageAllocator, SequencePages, first_seen


@dataclass(eq=False)
class _Node:
    """A page of ids. `pages` are those of each kind; NO_PAGE of windowed layers where that was given up."""

    ids: tuple[int, ...]
    parent: _Node | None
    pages: list[int]
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)

    @property
    def held(self) -> list[tuple[int, int]]:
        """The pages that are there, (kind, page)."""
        return [(kind, page) for kind, page in enumerate(self.pages) if page != NO_PAGE]


class PrefixTree:
    """The prefixes whose pages are kept. `window` is the longest of the windowed layers, 0 where there are none."""

    def __init__(self, allocator: PageAllocator, window: int = 0) -> None:
        self._allocator, self._window = allocator, window
        self._roots: dict[str, _Node] = {}  # by owner, those that have nodes
        self._nodes: dict[_Node, None] = {}  # in the order of their last use

    def pages(self) -> Iterator[list[tuple[int, int]]]:
        """The pages of each node, (kind, page)."""
        for node in self._nodes:
            yield node.held

    def begin(self, ids: Sequence[int], owner: str = "") -> SequencePages:
        """A sequence that has as much of `ids` as is kept for `owner`, but for the last id, whose logits are wanted; perhaps
        nothing."""
        path = list(self._path(ids[: max(0, len(ids) - 1)], owner))
        while path and not self._can_go_on_after(path):
            path.pop()
        self._use(path)
        pages = [[node.pages[kind] for node in path] for kind in KINDS]
        return SequencePages.beginning_with(self._allocator, pages, self._window)

    def add(self, ids: Sequence[int], pages: SequencePages, computed: int, owner: str = "") -> None:
        """Keep for `owner` the full pages of a sequence, of whose `ids` the first `computed` have keys and values."""
        if computed < PAGE:
            return
        node, path = self._roots.setdefault(owner, _Node((), None, [])), []
        for place in range(computed // PAGE):
            part = tuple(ids[place * PAGE : (place + 1) * PAGE])
            found = node.children.get(part)
            own = [table[place] for table in pages.tables]
            own[WINDOWED] = own[WINDOWED] if self._window else NO_PAGE
            if found is None:
                found = _Node(part, node, own)
                for kind, page in found.held:
                    self._allocator.share(kind, page)
                node.children[part] = found
                self._nodes[found] = None
            elif found.pages[WINDOWED] == NO_PAGE and own[WINDOWED] != NO_PAGE:  # it was given up, and computed again
                found.pages[WINDOWED] = own[WINDOWED]
                self._allocator.share(WINDOWED, own[WINDOWED])
            path.append(found)
            node = found
        self._use(path)

    def give_up(self) -> bool:
        """Give up a page that nobody else uses, the one of least use; False where there is none."""
        for node in self._nodes:
            page = node.pages[WINDOWED]
            if page != NO_PAGE and node.children and self._is_alone(WINDOWED, page) and not self._ends_within(node):
                self._allocator.give_back(WINDOWED, page)
                node.pages[WINDOWED] = NO_PAGE
                return True
        for node in self._nodes:
            if node.children:
                continue
            if any(self._is_alone(kind, page) for kind, page in node.held):
                self._remove(node)
                return True
        return False

    def clear(self) -> None:
        """Keep nothing."""
        for node in list(self._nodes):
            self._remove(node)

    def _path(self, ids: Sequence[int], owner: str) -> Iterator[_Node]:
        """The nodes of an owner that `ids` begin with."""
        node = self._roots.get(owner)
        for place in range(len(ids) // PAGE):
            found = node and node.children.get(tuple(ids[place * PAGE : (place + 1) * PAGE]))
            if found is None:
                return
            yield found
            node = found

    def _can_go_on_after(self, path: Sequence[_Node]) -> bool:
        """Whether the windowed pages that the next row sees are all held."""
        return all(node.pages[WINDOWED] != NO_PAGE for node in path[first_seen(len(path) * PAGE, self._window) :])

    def _ends_within(self, node: _Node) -> bool:
        """Whether the row after a leaf sees this node's windowed page."""
        below = [node]
        for _ in range(-(-(self._window - 1) // PAGE) - 1):
            below = [child for parent in below for child in parent.children.values()]
            if any(not child.children for child in below):
                return True
        return False

    def _is_alone(self, kind: int, page: int) -> bool:
        return self._allocator.users(kind, page) == 1

    def _remove(self, node: _Node) -> None:
        for kind, page in node.held:
            self._allocator.give_back(kind, page)
        assert node.parent is not None
        del node.parent.children[node.ids]
        del self._nodes[node]
        if node.parent.parent is None and not node.parent.children:
            self._roots = {owner: root for owner, root in self._roots.items() if root is not node.parent}

    def _use(self, path: Sequence[_Node]) -> None:
        """These were used now; what rests on others goes before them."""
        for node in reversed(path):
            self._nodes[node] = self._nodes.pop(node)
