"""What passes cost, by their rows."""

from __future__ import annotations

import pytest

from tpimpi.serving.pass_times import PassTimes


def test_times_are_medians_and_lie_on_a_line_between() -> None:
    times = PassTimes()
    times.add(100, 20.0)  # that of the first prompt, which waits for all that is to stay in memory
    assert times.max_rows == 0
    for seconds in (1.0, 50.0, 1.2):
        times.add(1, seconds)
    times.add(9, 5.2)
    assert [times.seconds(rows) for rows in (1, 3, 9, 16)] == pytest.approx([1.2, 2.2, 5.2, 5.2])
    assert [times.count(rows) for rows in (1, 2)] == [3, 0]
    times.add(5, 1.2)
    assert times.seconds(3) == pytest.approx(1.2)
    for seconds in (0.9, 70.0):  # of two the first may have been slow as well as the second
        times.add(12, seconds)
        assert times.seconds(12) == pytest.approx(0.9)
    times = PassTimes()
    for rows, seconds in ((1, 1.2), (5, 1.2), (9, 5.2)):
        times.add(rows, seconds)
    times.add(7, 30.0)  # with more rows it was faster: so something else took the time
    assert times.seconds(7) == pytest.approx(5.2)
    for _ in range(9):  # what was long ago does not count
        times.add(1, 0.1)
    assert times.seconds(1) == pytest.approx(0.1)


def test_so_many_rows_take_twice_as_long() -> None:
    times = PassTimes()
    assert times.rows_within(3, 2.0, 100) == 100  # nothing is known
    for rows in (1, 8, 40, 128):
        times.add(rows, 1 + rows / 10)
    assert times.rows_within(5, 2.0, 128) == 20  # 1.5 s, and 3 s
    assert times.rows_within(8, 2.0, 20) == 20 and times.rows_within(8, 1.0, 128) == 8
