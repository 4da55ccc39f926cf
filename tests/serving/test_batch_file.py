"""Prompts in a file: what a line may be, and what is kept of the answers when a run ends early."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.launch import Launcher, Result
from tests.support.traces import passes_of
from tpimpi.errors import InputError
from tpimpi.serving.batch_file import BatchAnswers, Item, read_items
from tpimpi.serving.report import Answer

PROMPTS, KILLS = 80, 4  # of a batch that is killed
USER, ASSISTANT, SYSTEM = ({"role": role, "content": "text"} for role in ("user", "assistant", "system"))


def written(folder: Path, *lines: object) -> str:
    path = folder / "in.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_what_a_line_may_be(tmp_path: Path) -> None:
    """Ours, and OpenAI's: platform.openai.com/docs/guides/batch, the requests of its example."""
    body = {"model": "gpt-3.5-turbo-0125", "messages": [SYSTEM, USER], "max_tokens": 1000}
    openai = {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    ours = {"custom_id": "b", "prompt": "text", "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x"}
    items, _ = read_items(written(tmp_path, openai, "", ours, {"custom_id": "c", "messages": [USER, ASSISTANT, USER]}))
    assert [item.custom_id for item in items] == ["request-1", "b", "c"]
    assert (items[0].max_tokens, items[0].messages("other")) == (1000, [SYSTEM, USER])
    assert (items[1].max_tokens, items[1].stops, items[1].body.temperature) == (None, ["x"], 0.5)
    assert items[1].messages("other") == [{"role": "system", "content": "other"}, USER]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "Expected `object`, got `array`"),
        ({"prompt": "text"}, "missing required field `custom_id`"),
        ({"custom_id": "b"}, "no prompt, and no messages"),
        ({"custom_id": "b", "prompt": "x", "messages": [USER]}, "prompt and messages are both there"),
        ({"custom_id": "b", "prompt": " "}, "the prompt is empty"),
        ({"custom_id": "b", "promt": "x"}, "unknown field `promt`"),
        ({"custom_id": 3, "prompt": "x"}, "Expected `str`, got `int`"),
        ({"custom_id": "a", "prompt": "x"}, "custom_id 'a' is that of line 1 too"),
        ({"custom_id": "b", "messages": []}, "messages are of nobody"),
        ({"custom_id": "b", "messages": [USER, USER]}, "messages are of user, user"),
        ({"custom_id": "b", "messages": [USER, ASSISTANT]}, "the user last"),
        ({"custom_id": "b", "messages": [USER, SYSTEM, USER]}, "before them system"),
        ({"custom_id": "b", "messages": [{"role": "tool", "content": "x"}]}, "Invalid enum value 'tool'"),
        ({"custom_id": "b", "prompt": "x", "max_tokens": 0}, "max_tokens is 0, must be 1 or more"),
        ({"custom_id": "b", "prompt": "x", "max_tokens": "9"}, "Expected `int | null`, got `str`"),
        ({"custom_id": "b", "prompt": "x", "stop": [""]}, "stop is empty"),
        ({"custom_id": "b", "prompt": "x", "body": {"prompt": "y"}}, "prompt beside body"),
        ('{"custom_id": "b", "prompt": "\\ud800"}', "no JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    given = written(tmp_path, {"custom_id": "a", "prompt": "text"}, line)
    with pytest.raises(InputError) as refused:
        read_items(given)
    text = str(refused.value)
    assert "in.jsonl, line 2: " in text and said in text and text.endswith("; mend that line") and "\n" not in text


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    for given, said in (
        (written(tmp_path, ""), "has no prompts"),
        (str(tmp_path), "Is a directory"),
        ("no", "No such"),
    ):
        with pytest.raises(InputError, match=said):
            read_items(given)


def answer(text: str) -> Answer:
    return Answer(text, "", [1, 2], 5, 0.1, None, None, "stop")


def test_a_run_goes_on_where_another_ended(tmp_path: Path) -> None:
    """In the order of the prompts, whatever the order of the answers; a line that is not whole counts for nothing."""
    items = [Item(name, None) for name in "abcd"]  # type: ignore[arg-type]
    about, out = {"prompts": "1", "options": {"seed": None}}, str(tmp_path / "out.jsonl")
    first = BatchAnswers(out, items, about)
    first.use_model("m")
    first.add("c", answer("C"))
    first.add("a", "why not")
    assert first.failed == 1
    with pytest.raises(InputError, match="in use by another run"):
        BatchAnswers(out, items, about)
    first.close()
    part = Path(out + ".part")
    part.write_bytes(part.read_bytes() + b'{"custom_id": "b", "te')
    assert part.stat().st_mode & 0o777 == 0o600
    for other, said in (
        ({**about, "prompts": "2"}, "with other prompts"),
        ({**about, "options": {}}, "with other options"),
    ):
        with pytest.raises(InputError, match=said):
            BatchAnswers(out, items, other)
    second = BatchAnswers(out, items, about)
    assert [item.custom_id for item in second.left] == ["a", "b", "d"]  # what had no answer is tried again
    with pytest.raises(InputError, match="with other weights"):
        second.use_model("n")
    second.use_model("m")
    second.add("d", answer("D"))
    second.add("a", "why not now")
    second.add("b", answer("B"))
    second.finish()
    found = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [line["custom_id"] for line in found] == list("abcd")
    assert found[0] == {"custom_id": "a", "error": "why not now"}
    assert found[1] == {
        "custom_id": "b",
        "text": "B",
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "completion_tokens": 2,
    }
    assert not part.exists() and Path(out).stat().st_mode & 0o777 == 0o600
    for other in (items, items[:3]):  # OUT does not say of what prompts and options it is
        with pytest.raises(InputError, match=r"out\.jsonl is there already; remove it"):
            BatchAnswers(out, other, about)
    assert not part.exists()


def test_a_run_that_ended_between_its_last_two_steps_has_ended(tmp_path: Path) -> None:
    """OUT has its name, and the part is still there."""
    items, out = [Item(name, None) for name in "ab"], str(tmp_path / "o")  # type: ignore[arg-type]
    first = BatchAnswers(out, items, {"prompts": "1"})
    first.add("b", answer("B"))
    first.add("a", answer("A"))
    kept = Path(out + ".part").read_bytes()
    first.finish()
    Path(out + ".part").write_bytes(kept)
    whole = Path(out).read_bytes()
    second = BatchAnswers(out, items, {"prompts": "1"})
    assert second.left == [] and second.failed == 0
    second.finish()
    assert Path(out).read_bytes() == whole and not Path(out + ".part").exists()
    Path(out + ".part").write_bytes(kept)
    Path(out).write_bytes(whole[:-1] + b" \n")  # what somebody else has changed is not written over
    with pytest.raises(InputError, match="is there already"):
        BatchAnswers(out, items, {"prompts": "1"})


def test_a_broken_part_is_named(tmp_path: Path) -> None:
    out, part = str(tmp_path / "o"), tmp_path / "o.part"
    items = [Item("a", None)]  # type: ignore[arg-type]
    deep = "[" * 5000 + "]" * 5000 + "\n"
    for content in (
        deep,
        '{"tpimpi batch": 1}\n',
        "x\n",
        '{"tpimpi batch": 1, "prompts": "1", "weights": "m"}\n{"custom_id": "z"}\n',
    ):
        part.write_text(content)
        with pytest.raises(InputError, match=r"o.part is broken in line [12]"):
            BatchAnswers(out, items, {"prompts": "1"})
    part.write_text('{"tpimpi batch": 2}\n')
    with pytest.raises(InputError, match="is of format version 2, this tpimpi knows 1"):
        BatchAnswers(out, items, {"prompts": "1"})


# Runs


def arithmetic(count: int) -> list[dict[str, Any]]:
    return [{"custom_id": f"q{n}", "prompt": f"What is {n} plus {n}?", "max_tokens": 4 + n % 7} for n in range(count)]


def test_a_batch_has_the_answers_of_single_runs(tpimpi: Callable[..., Result], tmp_path: Path) -> None:
    lines = [*arithmetic(5), {"custom_id": "long", "prompt": "x " * 300}]
    given = written(tmp_path, "\ufeff" + json.dumps(lines[0]), *lines[1:])  # as an editor of Windows writes it
    common = ("--context", "160", "--quiet", "--memory", "400M", "--report", str(tmp_path / "r.json"))
    common += ("--trace", str(tmp_path / "t.json"))
    found = tpimpi("--batch-file", given, "--out", str(tmp_path / "out.jsonl"), *common)
    assert (found.code, found.out) == (2, "")
    assert "custom_id 'long': the prompt has" in found.err and "raise --context" in found.err
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["custom_id"] for one in answers] == [line["custom_id"] for line in lines]
    assert "the context is 160 positions" in answers[-1]["error"]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["batch"]["tokens"] == sum(one["completion_tokens"] for one in answers[:-1]) + sum(
        one["finish_reason"] == "stop" for one in answers[:-1]
    )
    assert report["batch"]["steps"] < report["batch"]["tokens"]
    passes = passes_of(tmp_path / "t.json")
    assert len(passes) == report["batch"]["steps"] and max(one["sequences"] for one in passes) > 1
    for name in ("rows", "sequences", "tokens"):
        assert sum(one[name] for one in passes) == report["batch"][name]
    for line, one in zip(lines[:2], answers, strict=False):
        alone = tpimpi("--prompt", line["prompt"], "--max-tokens", str(line["max_tokens"]), "--quiet")
        assert alone.out.rstrip("\n") == one["text"].rstrip("\n")
    again = tpimpi("--batch-file", given, "--out", str(tmp_path / "out.jsonl"), "--context", "160")
    assert (again.code, again.out) == (2, "") and "out.jsonl is there already" in again.err


def test_what_all_prompts_begin_with_is_computed_once(tpimpi: Callable[..., Result], tmp_path: Path) -> None:
    """A system prompt of 180 words, so of two pages at least, before six questions that are there from the start."""
    system = {"role": "system", "content": "Answer briefly. " * 90}
    questions = [{"role": "user", "content": f"What is {n} plus {n}?"} for n in range(6)]
    lines = [{"custom_id": f"q{n}", "messages": [system, question]} for n, question in enumerate(questions)]
    options = ("--max-tokens", "3", "--speculate", "off", "--context", "512", "--quiet")
    more = ("--report", str(tmp_path / "r.json"), "--out", str(tmp_path / "out.jsonl"))
    found = tpimpi("--batch-file", written(tmp_path, *lines), *options, *more)
    assert found.code == 0, found.err
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "r.json").read_text())
    each_alone = sum(one["prompt_tokens"] for one in answers) + report["batch"]["tokens"] - len(answers)
    assert 0 < report["batch"]["rows"] <= each_alone - 5 * 2 * 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch-file", "in.jsonl"), "--batch-file is given, and no --out"),
        (("--out", "o"), "--out is for --batch-file, which is not given"),
        (("--batch-file", "in.jsonl", "--out", "o", "--prompt", "x"), "--batch-file and --prompt are both given"),
        (("--batch-file", "in.jsonl", "--out", "no/o"), "--out no/o: No such file or directory"),
        (("--batch-file", "in.jsonl", "--out", "o", "--report", "o"), "--out and --report are both o"),
        (("--batch-file", "in.jsonl", "--out", "."), "--out . is a folder"),
        (("--batch-file", "in.jsonl", "--out", "/dev/null"), "--out /dev/null is no file that can be kept"),
        (("--batch-file", "in.jsonl", "--out", "in.jsonl"), "--out, in.jsonl, is a file that this run reads"),
        (("--batch-file", "o.part", "--out", "o"), "until it is whole, o.part, is a file that this run reads"),
        (("--batch-file", "in.jsonl", "--out", "o", "--report", "o.part"), "are both o.part"),
        (("--parallel", "3"), "--parallel is for --batch-file"),
        (
            ("--batch-file", "in.jsonl", "--out", "o", "--overflow", "drop"),
            "--batch-file and --overflow are both given",
        ),
        (("--speculate", "3", "--record-routing", "r.npy"), "without --speculate; leave one of them out"),
        (("--batch-file", "hot.jsonl", "--out", "o"), "custom_id 'a': --temperature is -1.0, must be 0 or more"),
    ],
)
def test_bad_input_of_a_batch_is_one_line(
    tpimpi: Callable[..., Result], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    written(tmp_path, *arithmetic(2))
    (tmp_path / "o.part").write_text("")
    (tmp_path / "hot.jsonl").write_text('{"custom_id": "a", "prompt": "x", "temperature": -1}\n')
    before = sorted(tmp_path.iterdir())
    found = tpimpi(*arguments, cwd=tmp_path)
    assert (found.code, found.out) == (2, "") and said in found.err and found.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.alone
def test_a_batch_that_is_killed_ends_whole(mpirun: Launcher, cache: dict[str, str], tmp_path: Path) -> None:
    """On two ranks, killed at random: each prompt is answered once, as if it had not been. (PROMPTS 200 and KILLS 10 take
    twice as long.)"""
    given, out = written(tmp_path, *arithmetic(PROMPTS)), tmp_path / "out.jsonl"
    part, environment = tmp_path / "out.jsonl.part", {**os.environ, **mpirun.env, **cache}
    command = ["-m", "tpimpi", "--batch-file", given, "--quiet", "--memory", "400M", "--out"]
    dice = random.Random(7)
    for kill in range(KILLS):
        size = part.stat().st_size if part.exists() else 0
        process = subprocess.Popen(mpirun.command(2, [*command, str(out)]), env=environment, start_new_session=True)
        # At SIGTERM the launcher ends the ranks. Killed, it would leave them to notice that, and a quick processor has
        # answered all by then: they are killed too, as when the power goes.
        more, deadline = dice.randrange(1, 80 * PROMPTS // KILLS), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if part.exists() and part.stat().st_size > size + more:
                break
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it was killed"
        ranks = psutil.Process(process.pid).children(recursive=True) if kill % 2 else []
        os.killpg(process.pid, signal.SIGKILL if kill % 2 else signal.SIGTERM)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        process.wait(30)
        wait_for_lock(part)
    assert not out.exists()
    found = mpirun(2, *command, str(out), env=cache)
    assert found.code == 0, found.err
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["custom_id"] for one in answers] == [f"q{n}" for n in range(PROMPTS)]
    assert all(one["completion_tokens"] for one in answers) and not part.exists()
    whole = mpirun(2, *command, str(tmp_path / "whole.jsonl"), env=cache)
    assert whole.code == 0 and (tmp_path / "whole.jsonl").read_text() == out.read_text()


def wait_for_lock(path: Path) -> None:
    """Until no rank that is ending has the file any more."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with path.open("rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)
    pytest.fail(f"{path} is still in use")
