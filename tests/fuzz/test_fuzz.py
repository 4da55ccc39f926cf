"""Every target with inputs of which the structure is changed, and with all that once broke something."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.engines import FINDS, changed
from tests.fuzz.targets import TARGETS
from tests.support.drawn import examples

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("name", TARGETS)
@examples(60)
@given(which=st.integers(0, 100), random=st.randoms(use_true_random=False))
def test_changed_inputs_are_used_or_refused(name: str, which: int, random: Random) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    target(changed(seeds[which % len(seeds)], target.mutate, random))


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_to_begin_with_are_used(name: str) -> None:
    """Or nothing behind the first check would ever be tried."""
    seeds = TARGETS[name].seeds()
    assert seeds
    refused = 0
    for data in seeds:
        try:
            TARGETS[name].run(data)
        except TARGETS[name].expected:
            refused += 1
    assert refused <= len(seeds) / 2


@pytest.mark.parametrize(
    "find", sorted(path for path in FINDS.glob("*/*") if path.is_file()), ids=lambda path: path.name
)
def test_what_once_broke_something_does_no_more(find) -> None:
    TARGETS[find.parent.name](find.read_bytes())
