"""A program between the devices of the emulated home does harm to messages, and runs have to notice; Linux, as root.

    python -m bench.home.faults.between [--rounds 50] [--mpi openmpi] [--kinds flip,drop] [--seal on] [--json FILE]

Every round is a run of three ranks on three devices, with all their TCP connections ended by a program between them
(middle.py). At a moment that chance picks (the start, the prompt, the answer) it does one thing to one message (harm.py) of
a pair of ranks. `key`: instead, a device's file of link keys has the name of a host, but not its key. It is well if a rank
of the pair is named within 10 s, the exit code is not 0, what was printed is the beginning of the undisturbed answer, and no
process is left. `headers`, damage to MPI's own headers, is well if the run ends within 150 s, with the undisturbed answer or
the beginning of it. With --seal off, `forge` is believed: a checksum finds damage, not forgery. With --json, rounds that
stand in the file are not done again: so they can be done in parts. MPICH's UCX is told to send messages whole
(ucx_frames.py), as Open MPI is by tpimpi.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import msgspec

from bench.home import Home, Link
from bench.home.faults.cases import MESSAGE_TIMEOUT_S, NAMES, PROMPT
from bench.home.faults.harm import KINDS, Harm
from bench.home.faults.middle import Middle
from bench.home.faults.rounds import answer_of, end_what_is_left, left_after_all
from bench.home.faults.screen import START_TIMEOUT_S, Screen
from bench.home.faults.ucx_frames import VARIABLES
from tpimpi.system.link_keys import make_keys, read_keys, write_keys

RANKS = 3
KEY = "key"
PIECES = PROMPT + " The harbour is old, and the wind comes from the west." * 30  # its sums go in several messages each
MOMENTS = {"start": PROMPT, "prompt": PIECES, "answer": PROMPT}
ROW_BYTES = 4 * 576  # of a hidden vector of SmolLM2
TOKENS = {PROMPT: 100, PIECES: 10}  # most of it is left when harm is done
OUR_LINE = re.compile(r"[\s\0]*(?:(?P<of>r\d+ .*: no sign of life.*)|(?:r\d+ \S+|tpimpi): (?P<line>.*))")
SAME_BITS = ("star", "mesh", "exchange")  # allreduces with the same answers
HEADERS_TIMEOUT_S = 150.0  # MPI itself has 120 s to start
TRIES = 10  # of a round in which nothing could be done


@dataclass
class Outcome:
    """What one round showed; times in seconds from the harm."""

    kind: str
    seal: str
    moment: str
    allreduce: str
    flow: tuple[int, int]
    done: str = ""  # what was done
    code: int = 0
    named_s: float | None = None
    end_s: float = 0.0
    line: str = ""  # the first that names a rank of the two
    lines: int = 0  # of ours
    left: list[str] = field(default_factory=list)
    wrong: str = ""
    mpi: str = "openmpi"


def undisturbed(home: Home, seal: str, mpi: str = "openmpi") -> dict[str, str]:
    """The answers without harm, by prompt."""
    answers = {}
    for prompt in TOKENS:
        screen = start(home, prompt, seal, "star", mpi)
        if not screen.ended(START_TIMEOUT_S) or screen.process.returncode:
            raise SystemExit(f"the undisturbed run did not end well: {[line for _, line in screen.lines[-5:]]}")
        screen.join()
        answers[prompt] = answer_of(screen)
    return answers


def try_once(kind: str, middle: Middle, seal: str, answers: dict[str, str], chance: random.Random) -> Outcome:
    """One round; another where nothing could be done, as no fitting message came. Raises TimeoutError after TRIES."""
    for _ in range(TRIES):
        outcome = _try_key(middle, seal, answers, chance) if kind == KEY else _try(kind, middle, seal, answers, chance)
        if outcome.done:
            return outcome
    raise TimeoutError(f"{kind} was never done; the last run said: {outcome.line}")


def _try(kind: str, middle: Middle, seal: str, answers: dict[str, str], chance: random.Random) -> Outcome:
    # Two messages that can change places are under way at once only in the pieces of a prompt.
    moment = "prompt" if kind == "reorder" else chance.choice(list(MOMENTS))
    allreduce = "star" if moment == "start" else chance.choice(SAME_BITS)
    sender, receiver = chance.sample(range(RANKS), 2) if allreduce != "star" else (0, chance.randrange(1, RANKS))
    flow = (sender, receiver) if chance.random() < 0.5 else (receiver, sender)
    outcome = Outcome(kind, seal, moment, allreduce, flow, mpi=middle.mpi)
    harm = middle.harm = chance.choice(KINDS[kind])(flow, chance)
    harm.due = moment == "start"
    prompt = MOMENTS[moment]
    screen = start(middle.home, prompt, seal, allreduce, middle.mpi)
    process = screen.process
    try:
        reach(moment, screen, harm, chance)
        harm.due = True
        begun = time.monotonic()
        while harm.done_at is None and process.poll() is None and time.monotonic() < begun + 20:
            time.sleep(0.01)
        outcome.done = harm.done
        if harm.done_at is not None:
            _judge(outcome, screen, harm.done_at, answers[prompt], middle.home)
        else:
            outcome.line = " / ".join(line for _, line in screen.lines[-4:])
    except TimeoutError as error:
        outcome.done, outcome.wrong = harm.done, str(error)
        if harm.done_at is not None:  # at the start
            outcome.wrong = ""
            _judge(outcome, screen, harm.done_at, answers[prompt], middle.home)
    finally:
        process.kill()
        screen.join()
        end_what_is_left(middle.home, RANKS)
    return outcome


def start(home: Home, prompt: str, seal: str, allreduce: str, mpi: str = "openmpi") -> Screen:
    """Begin a run with that prompt, one of TOKENS."""
    path = home.folder / "prompt.txt"
    path.write_text(prompt)
    command = [
        *(sys.executable, "-m", "tpimpi", "--prompt-file", str(path), "--raw", "--max-tokens", str(TOKENS[prompt])),
        *("--ignore-eos", "--speculate", "off", "--format", "f32", "--allreduce", allreduce, "--seal", seal),
    ]
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    env = VARIABLES if mpi == "mpich" else {}
    process = home.mpirun(command, mpi=mpi, env=env, stdin=null, stdout=pipe, stderr=pipe, text=True, errors="replace")
    return Screen(process)


def reach(moment: str, screen: Screen, harm: Harm, chance: random.Random) -> None:
    """Wait until the run is where harm is due. Raises TimeoutError."""
    if moment == "prompt":
        screen.until(lambda: harm.largest > 4 * ROW_BYTES, "a sum of many rows")
        time.sleep(chance.uniform(0, 0.3))
    if moment == "answer":
        screen.until(lambda: len(screen.text) > 20, "an answer")
        time.sleep(chance.uniform(0, 1.0))


def _judge(outcome: Outcome, screen: Screen, done_at: float, whole: str, home: Home) -> None:
    """Wait for the end, and say what was seen."""
    allowed = HEADERS_TIMEOUT_S if outcome.kind == "headers" else MESSAGE_TIMEOUT_S + 20
    if not screen.ended(max(0.0, allowed + done_at - time.monotonic())):
        outcome.wrong = f"still running after {allowed:.0f} s"
    outcome.end_s = time.monotonic() - done_at
    screen.process.kill()
    screen.join()
    outcome.code = screen.process.wait()
    outcome.lines = sum(OUR_LINE.match(line) is not None for moment, line in screen.lines if moment >= done_at)
    named = re.compile("|".join(rf"\b(r|rank ){rank}\b|\b{NAMES[rank]}\b" for rank in outcome.flow))
    for moment, line in screen.lines:
        # Who says it does not count, but of whom it is said.
        if (
            (said := OUR_LINE.match(line))
            and moment >= done_at
            and named.search(line if outcome.kind == KEY else said["of"] or said["line"])
        ):
            outcome.named_s, outcome.line = moment - done_at, said[0]
            break
    hosts = "|".join(re.escape(NAMES[rank]) for rank in outcome.flow)
    if outcome.named_s is None and (banner := re.search(rf".*RUNNING AT (?:{hosts})\b", screen.text)):
        outcome.named_s, outcome.line = outcome.end_s, banner[0]  # MPICH's launcher, on standard output
    outcome.left = left_after_all(home, RANKS)
    outcome.wrong = outcome.wrong or _wrong(outcome, screen, whole)
    if outcome.wrong:
        outcome.line += " | " + " / ".join(line for _, line in screen.lines[-30:] if OUR_LINE.match(line))


def _wrong(outcome: Outcome, screen: Screen, whole: str) -> str:
    text = answer_of(screen)
    if not whole.startswith(text):
        return f"WRONG ANSWER: printed {text[-60:]!r}, which is not in the undisturbed answer"
    if outcome.kind == "headers":
        return "" if outcome.code or text == whole else "exit code 0, and half an answer"
    if outcome.code == 0:
        return "exit code 0"
    if outcome.named_s is None:
        return "nobody was named"
    if outcome.named_s > MESSAGE_TIMEOUT_S:
        return f"named after {outcome.named_s:.1f} s"
    if outcome.kind == KEY and outcome.lines != 1:
        return f"{outcome.lines} lines"
    return f"{len(outcome.left)} processes left" if outcome.left else ""


def _try_key(middle: Middle, seal: str, answers: dict[str, str], chance: random.Random) -> Outcome:
    """A device says that it is a host of this home, itself or another, and has not the key of that one."""
    home, rank, middle.harm = middle.home, chance.randrange(RANKS), Harm()
    path = home.keys(rank)
    keys = read_keys(path)
    assert keys is not None
    others = [name for name in home.names if name != keys.host]
    stranger = make_keys([keys.host], keys.made)[keys.host]
    if chance.random() < 0.5:
        false = msgspec.structs.replace(keys, private=stranger.private)
        done = f"the file of {keys.host} has a key of no host"
    else:
        name = chance.choice(others)
        false, done = msgspec.structs.replace(keys, host=name), f"{keys.host} says that it is {name}"
    outcome = Outcome(KEY, seal, "start", "star", (rank, rank), done, mpi=middle.mpi)
    write_keys(false, path)
    begun = time.monotonic()
    screen = start(home, PROMPT, seal, "star", middle.mpi)
    try:
        _judge(outcome, screen, begun, answers[PROMPT], home)
    finally:
        screen.process.kill()
        screen.join()
        end_what_is_left(home, RANKS)
        write_keys(keys, path)
    return outcome


def main() -> None:
    kinds = (*KINDS, KEY)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind, with those that stand in the file")
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    parser.add_argument("--kinds", default=",".join(kinds))
    parser.add_argument("--seal", choices=("on", "off"), default="on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    if options.json is not None and options.json.exists():
        outcomes = [Outcome(**one) for one in json.loads(options.json.read_text())]
    with Home(RANKS, Link(latency_s=0.0005)) as home:
        answers = undisturbed(home, options.seal, options.mpi)
        with Middle(home, options.mpi) as middle:
            for kind in options.kinds.split(","):
                done = sum((one.kind, one.seal, one.mpi) == (kind, options.seal, options.mpi) for one in outcomes)
                for number in range(done, options.rounds):
                    chance = random.Random(f"{options.seed} {kind} {number}")
                    outcome = try_once(kind, middle, options.seal, answers, chance)
                    outcomes.append(outcome)
                    if options.json is not None:
                        options.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
                    _print(number, outcome)
    mine = [one for one in outcomes if (one.seal, one.mpi) == (options.seal, options.mpi)]
    _print_table(options.seal, mine)
    sys.exit(any(one.wrong for one in mine))


def _print(number: int, outcome: Outcome) -> None:
    seconds = "-" if outcome.named_s is None else f"{outcome.named_s:.1f} s"
    verdict = f"NOT WELL: {outcome.wrong} [{outcome.line}]" if outcome.wrong else outcome.line[:110]
    print(
        f"{number + 1:2} {outcome.kind:8} {outcome.moment:6} {outcome.allreduce:8} r{outcome.flow[0]} to r{outcome.flow[1]} "
        f"{outcome.done[:70]} | named after {seconds}, exit code {outcome.code} | {verdict}",
        flush=True,
    )


def _print_table(seal: str, outcomes: Sequence[Outcome]) -> None:
    print(f"\n--seal {seal}\n{'kind':8} {'well':>7} {'named':>14} {'ended':>14}  wrong answers, exit codes")
    for kind in dict.fromkeys(one.kind for one in outcomes):
        mine = [one for one in outcomes if one.kind == kind]
        named = [one.named_s for one in mine if one.named_s is not None] or [float("nan")]
        ended = [one.end_s for one in mine]
        answers = sum("WRONG ANSWER" in one.wrong for one in mine)
        codes = ", ".join(str(code) for code in sorted({one.code for one in mine}))
        print(
            f"{kind:8} {sum(not one.wrong for one in mine):3}/{len(mine):<3} {median(named):5.1f}/{max(named):5.1f} s "
            f"{median(ended):6.1f}/{max(ended):5.1f} s  {answers}, {codes}"
        )


if __name__ == "__main__":
    main()
