"""What a run says to somebody who sits at a terminal, and not to a pipe or a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.launch import Result, run_command
from tests.support.session_cases import cut
from tests.support.terminal import terminal

ALONE = [sys.executable, "-m", "tpimpi", "--max-tokens", "4", "--ignore-eos"]
EACH = "each line is answered for itself; --session FILE keeps a conversation (Ctrl-D ends)\n"
FOX = "the quick brown fox"


def test_lines_are_said_to_be_answered_each_for_itself(cache: dict[str, str], tiny: Path) -> None:
    with terminal(ALONE, {**cache, "TPIMPI_MODEL": str(tiny)}) as run:
        shown = run.until("> ")
        assert shown.startswith("loading tiny …\n") and shown.endswith(f"{EACH}> "), shown
        run.type(f"{FOX}\n")
        run.until("> ")
        run.type("the dog\n")
        run.until("> ")
        run.type("\x04")
        code, _ = run.end()
    assert (code, run.seen.count(EACH), run.seen.count("loading")) == (0, 1, 1), run.seen
    assert "last of 2 prompts: " in run.seen


def test_a_quiet_run_and_a_pipe_are_told_nothing(
    tpimpi: Callable[..., Result], cache: dict[str, str], tiny: Path
) -> None:
    with terminal([*ALONE, "--quiet"], {**cache, "TPIMPI_MODEL": str(tiny)}) as run:
        assert run.until("> ") == "> "
        run.type("\x04")
        run.end()
    piped = tpimpi(*ALONE[3:], env={"TPIMPI_MODEL": str(tiny)}, stdin=f"{FOX}\n")
    assert piped.code == 0 and EACH not in piped.err and "loading" not in piped.err, piped.err


def test_a_conversation_is_kept_at_ctrl_c_and_what_was_broken_off_goes_on(
    tpimpi: Callable[..., Result], cache: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    env, with_session = {**cache, "TPIMPI_MODEL": str(tiny)}, [*ALONE, "--session", str(path)]
    kept = f"the conversation is kept in {path}; the same --session goes on with it\n"
    with terminal(with_session, env) as run:
        assert EACH not in run.until("> ")
        run.type("\x03")
        assert run.end() == (130, "^C"), "nothing was said yet"
    with terminal(with_session, env) as run:
        run.until("> ")
        run.type(f"{FOX}\n")
        run.until("> ")
        run.type("\x03")
        assert run.end() == (130, f"^C\n{kept}")
    cut(path, 4)  # two of the answer's four tokens
    with terminal(with_session, env) as run:
        assert f"\ngoing on with the answer to '{FOX}'\n" in run.until("> ")
    cut(path, 4)
    piped = tpimpi(*with_session[3:], env=env, stdin="\n")
    assert piped.code == 0 and "going on with the answer that was broken off\n" in piped.err
    assert FOX not in piped.err, "others may read the log of a job"
    cut(path, 4)
    assert tpimpi(*with_session[3:], "--quiet", env=env, stdin="\n").err == ""
    again = tpimpi(*with_session[3:], env=env, stdin="the dog\n")
    assert again.code == 0 and "going on" not in again.err


def test_a_line_on_stderr_comes_after_the_text_before_it() -> None:
    program = "import sys; from tpimpi.cli.process import say; sys.stdout.write('text,'); say(' said')"
    result = run_command(["bash", "-c", f'{sys.executable} -c "{program}" 2>&1'], env={})
    assert result.out == "text, said\n"
