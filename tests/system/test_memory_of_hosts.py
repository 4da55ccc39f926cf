"""Several hosts, and cgroups that some ranks share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tests.support.memory_cases import GB, MB
from tpimpi.engine.budget import Needs, allowances
from tpimpi.system.memory import JOB, Place

pytestmark = pytest.mark.usefixtures("host")


def _plain(base: int, tiles: int) -> Needs:
    return Needs(base, 0, 0, 0, 0, tiles)


def test_hosts_are_divided_each_for_itself() -> None:
    needs = dict.fromkeys(range(3), _plain(100 * MB, 50 * GB))
    host = {0: Place("", 16 * GB, 9 * GB), 1: Place("", 8 * GB, 6 * GB), 2: Place("", 8 * GB, 6 * GB - 64)}
    found = allowances({r: [host[r]] for r in range(3)}, {0: "laptop", 1: "desktop", 2: "desktop"}, needs)
    # 1/16 is left to others; what the ranks have already is theirs; the lesser of what two on one host saw counts.
    assert found == {0: 8 * GB + 100 * MB, 1: (5500 * MB - 64) // 2 + 100 * MB, 2: (5500 * MB - 64) // 2 + 100 * MB}


def test_a_cgroup_that_only_some_ranks_are_in() -> None:
    needs = dict.fromkeys(range(3), _plain(100 * MB, 50 * GB))
    host, group = Place("", 32 * GB, 20 * GB), Place("/sys/fs/cgroup/a", 4 * GB, 3056 * MB)
    found = allowances({0: [host], 1: [host, group], 2: [host, group]}, dict.fromkeys(range(3), "laptop"), needs)
    assert found == {0: 6 * GB + 100 * MB, 1: 1500 * MB, 2: 1500 * MB}
    # A cgroup of the same name on another host is another one.
    found = allowances({0: [host], 1: [host, group], 2: [host, group]}, {0: "a", 1: "b", 2: "c"}, needs)
    assert found == {0: 18 * GB + 100 * MB, 1: 2900 * MB, 2: 2900 * MB}


def test_a_job_is_what_its_ranks_may_have_in_all() -> None:
    needs = dict.fromkeys(range(2), _plain(100 * MB, 50 * GB))
    host, job = Place("", 32 * GB, 20 * GB), Place(JOB, 4 * GB, 4 * GB)
    found = allowances({0: [host, job], 1: [host, job]}, {0: "c1", 1: "c1"}, needs)
    assert found == {0: 1872 * MB, 1: 1872 * MB}, "what they have already is part of it"


def test_where_nothing_is_free_a_rank_gets_no_more_than_it_has() -> None:
    needs = dict.fromkeys(range(2), _plain(100 * MB, 50 * GB))
    found = allowances({r: [Place("", 32 * GB, 0)] for r in range(2)}, {0: "a", 1: "a"}, needs)
    assert found == {0: 0, 1: 0}


@examples(200)
@given(st.data())
def test_no_place_is_ever_promised_twice(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 6))
    hosts = {rank: data.draw(st.sampled_from(["a", "b"])) for rank in range(ranks)}
    amounts = st.integers(0, 40 * GB)
    groups = {
        (host, name): Place(name, total := data.draw(st.integers(GB, 40 * GB)), min(total, data.draw(amounts)))
        for host in "ab"
        for name in ("", "/x", "/x/y", JOB)
    }
    mine = {rank: data.draw(st.sets(st.sampled_from(["/x", "/x/y", JOB]))) for rank in range(ranks)}
    places_of = {r: [groups[hosts[r], name] for name in ["", *sorted(mine[r])]] for r in range(ranks)}
    needs = {r: _plain(data.draw(st.integers(50 * MB, GB)), data.draw(st.integers(0, 20 * GB))) for r in range(ranks)}
    found = allowances(places_of, hosts, needs)
    for (host, name), place in groups.items():
        inside = [rank for rank in range(ranks) if hosts[rank] == host and place in places_of[rank]]
        already = 0 if name == JOB else sum(needs[rank].base for rank in inside)
        assert sum(found[rank] for rank in inside) <= max(0, place.free - place.reserve + already) or not inside
