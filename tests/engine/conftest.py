"""What the tests of this room share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.memory_guard_cases import Case


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Case]]:
    made: list[Case] = []

    def make(*tiles: int) -> Case:
        made.append(Case(monkeypatch, *tiles))
        return made[-1]

    yield make
    for one in made:
        one.guard.close()
