"""What a run says to somebody who sits at a terminal, and not to a pipe or a file."""

from __future__ import annotations

import json
import os
import signal
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import TIMEOUT, Launcher, Result, run_command
from tests.support.session_cases import cut
from tests.support.terminal import Screen, terminal
from tpimpi.serving.session import Session

ALONE = [sys.executable, "-m", "tpimpi", "--max-tokens", "4", "--ignore-eos"]
FOX = "the quick brown fox"
LEAVE = "/help lists commands, Ctrl-C stops an answer, Ctrl-D or /bye leaves\n"
EDITED, LINES = {"TERM": "xterm"}, {"TERM": "dumb"}  # with an editor, and by the terminal's own lines


def prompts(path: Path) -> list[str]:
    session = Session(str(path))
    session.close()
    return [turn.prompt for turn in session.turns]


def test_a_conversation_and_its_commands(cache: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with terminal([*ALONE, "--format", "f32"], {**cache, **EDITED, "TPIMPI_MODEL": str(tiny)}) as run:
        before = termios.tcgetattr(run.ours)
        screen = Screen(run)
        assert screen.until("\n>").endswith(f"tiny f32\n{LEAVE}>")
        for line, said in [
            ("/undo", "tpimpi: there is no turn to take back"),
            ("/retry", "there is no prompt to answer anew"),
            ("/save", "there is nothing to save yet"),
            ("/bogus 1", "/bogus is no command; /help lists them, and a prompt that begins with / is written //"),
            ("/help", "/retry            answer the last prompt anew"),
        ]:
            assert said in screen.ask(line, what=said)
        screen.ask("the fox")
        assert "a new conversation" in screen.ask("/new", what="a new conversation")
        screen.ask(FOX)
        screen.ask("the dog")
        assert "2 turns; " in screen.ask("/stats", what=" rows computed")
        assert "taken back: 'the dog'; 1 turn left" in screen.ask("/undo", what="1 turn left")
        screen.ask("//usr jumps")
        screen.ask("/retry")
        screen.ask("/system over", what="system prompt: over")
        # Pasted lines are one prompt, by a terminal that marks what is pasted, and by one that does not.
        run.type("\x1b[200~the lazy\rdog\x1b[201~")
        screen.until("\n  dog")
        screen.ask("")
        screen.ask("the quick\rfox")
        run.type("\x1b[A")  # the last prompt once more, and one more word
        screen.until("\n> the quick\n  fox")
        screen.ask(" jumps")
        assert screen.ask("\x03").count("Ctrl-D or /bye leaves") == 1
        run.type("gone\x03")  # what is typed, and not the run
        assert "5 turns saved" in screen.ask(f"/save {saved}", what="5 turns saved")
        run.type("\x04")
        assert screen.end() == 0, screen.text
        assert termios.tcgetattr(run.ours) == before, "the terminal is not as it was"
    assert prompts(saved) == [FOX, "/usr jumps", "the lazy\ndog", "the quick\nfox", "the quick\nfox jumps"]
    assert json.loads(saved.read_text().splitlines()[1]) == {"system": "over"}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.slow_but("2")
def test_ctrl_c_stops_the_answer_and_not_the_run(
    mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path: Path, ranks: int
) -> None:
    path = tmp_path / "chat"
    words = ["-m", "tpimpi", "--max-tokens", "3000", "--ignore-eos", "--session", str(path)]
    command = mpirun.command(ranks, words) if ranks > 1 else [sys.executable, *words]
    env = {**mpirun.env, **cache, **EDITED, "TPIMPI_MODEL": str(smollm2)}
    with terminal(command, env) as run:
        screen = Screen(run)
        screen.until(f"{LEAVE}>")
        for number in range(2):
            begun = len(screen.text)
            run.type("Tell a story.\r")
            while len(screen.until("")) < begun + 60:
                time.sleep(0.05)
            run.type("\x03")
            screen.until("\nstopped; what was said is kept, /undo takes it back, /retry answers anew\n>")
            assert screen.text.count("stopped;") == number + 1
        for _ in range(5):  # a terminal's own lines are cut at 4,095
            run.type("7" * 1000)
            screen.until("7")
        run.type("\r")
        while "reading the prompt: " not in screen.until(""):
            time.sleep(0.05)
        run.type("\x03")
        screen.until("\nstopped; nothing was said, so the turn is not kept, /retry answers anew\n>")
        screen.ask("/stats", what="2 turns; ")
        screen.ask("/bye", end="")
        assert screen.end() == 0, screen.text
    session = Session(str(path))
    session.close()
    assert [(turn.prompt, turn.ended) for turn in session.turns] == [("Tell a story.", "cancelled")] * 2
    assert all(0 < len(turn.tokens) < 3000 and turn.text for turn in session.turns)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1] == {"undo": 1} and lines[-2]["prompt"] == "7" * 5000


def test_lines_of_a_terminal_that_cannot_be_edited(cache: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat"
    with terminal([*ALONE, "--session", str(path)], {**cache, **LINES, "TPIMPI_MODEL": str(tiny)}) as run:
        shown = run.until("> ")
        assert shown.startswith("loading tiny …\n") and shown.endswith(f"{LEAVE}> "), shown
        run.type(f"{FOX}\n")
        run.until("> ")
        run.type("\x03")
        assert run.until("leaves\r\n") == "^C\nCtrl-D or /bye leaves\n"
        run.type("the lazy\ndog\n")
        run.until("> ")
        run.type("\x04")
        code, _ = run.end()
    assert (code, run.seen.count("loading")) == (0, 1), run.seen
    assert "last of 2 prompts: " in run.seen
    assert prompts(path) == [FOX, "the lazy\ndog"]
    with terminal([*ALONE, "--session", str(path)], {**cache, **LINES, "TPIMPI_MODEL": str(tiny)}) as run:
        assert "; 2 turns so far, the last 'the lazy\\ndog'\n" in run.until("> ")


def test_a_quiet_run_and_a_pipe_are_told_nothing(
    tpimpi: Callable[..., Result], cache: dict[str, str], tiny: Path
) -> None:
    with terminal([*ALONE, "--quiet"], {**cache, **LINES, "TPIMPI_MODEL": str(tiny)}) as run:
        assert run.until("> ") == "> "
        run.type("\x04")
        assert run.end()[0] == 0
    piped = tpimpi(*ALONE[3:], env={"TPIMPI_MODEL": str(tiny)}, stdin=f"{FOX}\n{FOX}\n")
    assert piped.code == 0 and LEAVE not in piped.err and "loading" not in piped.err, piped.err
    assert len(set(piped.out.splitlines())) == 1, "each line is answered for itself"


def test_a_conversation_is_kept_at_a_signal_and_what_was_broken_off_goes_on(
    tpimpi: Callable[..., Result], cache: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    env, with_session = {**cache, **EDITED, "TPIMPI_MODEL": str(tiny)}, [*ALONE, "--session", str(path)]
    kept = f"the conversation is kept in {path}; the same --session goes on with it"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        with terminal(with_session, env) as run:
            before = termios.tcgetattr(run.ours)
            screen = Screen(run)
            screen.until(f"{LEAVE}>")
            assert termios.tcgetattr(run.ours) != before
            screen.ask(FOX)
            os.kill(run.process.pid, number)
            assert screen.end() == code
            assert (kept in screen.text) == (number == signal.SIGTERM), screen.text
            deadline = time.monotonic() + TIMEOUT
            while termios.tcgetattr(run.ours) != before:  # set back by what waits for its end
                assert time.monotonic() < deadline, "the terminal is not set back"
                time.sleep(0.05)
        if number == signal.SIGTERM:
            path.unlink()
    cut(path, 4)  # two of the answer's four tokens
    with terminal(with_session, {**env, **LINES}) as run:
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
