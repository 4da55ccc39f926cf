"""What the study of speculation calls a loop, and its prompts."""

from __future__ import annotations

from bench.studies.speculation import LOOP, loops, quoting_prompts


def test_an_answer_loops_if_it_repeats_more_than_the_text_does() -> None:
    run, rest = list(range(LOOP)), list(range(100, 120))
    assert loops([*run, *rest, *run], [*run, *rest])
    assert not loops([*run, *rest, *run], [*run, 1, *run]), "as often as in the text"
    assert loops([*run, 2, *run, 3, *run], [*run, 1, *run])
    assert not loops([*run, *rest, *run[:-1]], [])


def test_ten_prompts_for_each_kind_of_model() -> None:
    for raw in (False, True):
        prompts = quoting_prompts(raw=raw)
        assert len({each.prompt for each in prompts}) == 10
        assert all(each.text in each.prompt and (each.stop is not None) == raw for each in prompts)
    assert all(60 <= len(each.text.split()) <= 150 for each in quoting_prompts(raw=True))
