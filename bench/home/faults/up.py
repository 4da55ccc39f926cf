"""`tpimpi up` over the emulated home: machines are lost while an answer is under way, and it has to go on; Linux, as root.

    python -m bench.home.faults.up [--rounds 5] [--kinds kill-decode,cut] [--mpi openmpi] [--json FILE]

Every round starts a server on four devices with one command, asks it, and breaks one thing on a device that chance
picks (`kill-rank-0`: rank 0's process). It is well if the answer goes on within 60 s of that on the devices that are
left, with the very words of the undisturbed one, and if no process of ours is left after the end. With --json, rounds
that stand in the file are not done again: so hours of them can be done in parts.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from bench.home.faults.cases import BROKEN_BEFORE, KINDS, LONG_PROMPT, NAMES, NOT_RANK_0, PROMPT, RANKS
from bench.home.faults.rounds import home_with_slices
from bench.home.faults.screen import START_TIMEOUT_S, tpimpi_processes
from bench.home.home import Home

KILL_RANK_0 = "kill-rank-0"
ALLOWED_S = 60.0  # from the breaking until the answer goes on
LEAVE_TIMEOUT_S = 30.0
PORT = 8080
TOKENS = {PROMPT: 64, LONG_PROMPT: 40}


@dataclass
class Outcome:
    """What one round showed; times in seconds."""

    kind: str
    mpi: str
    rank: int
    went_on_s: float | None = None  # from the breaking to the next words
    end_s: float | None = None  # to the end of the answer
    left: list[str] = field(default_factory=list)
    wrong: str = ""


class Answer:
    """An answer that streams, from a client on device 0."""

    def __init__(self, home: Home, prompt: str) -> None:
        self.text, self.why, self.moments = "", "", list[float]()
        self._home, self._prompt = home, prompt
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORT)
        connection.sock = self._home.socket(0)
        connection.sock.settimeout(START_TIMEOUT_S + 2 * ALLOWED_S)
        try:
            connection.sock.connect(("127.0.0.1", PORT))
            message = {"role": "user", "content": self._prompt}
            body = {"messages": [message], "max_tokens": TOKENS[self._prompt], "temperature": 0, "stream": True}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.why = f"error: {event['error']['message']}"
                    return
                choice = event["choices"][0]
                if said := choice["delta"].get("content"):
                    self.text += said
                    self.moments.append(time.monotonic())
                self.why = choice["finish_reason"] or self.why
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.why = f"error: {error!r}"

    def until(self, characters: int, seconds: float) -> None:
        """Wait for so many. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while len(self.text) < characters and not self.why:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(self.text)} characters after {seconds:.0f} s")
            time.sleep(0.01)

    def finish(self, seconds: float) -> None:
        """Wait for the end."""
        self._thread.join(seconds)
        if not self.why:
            self.why = "error: it did not end"


class Server:
    """`up` on device 0."""

    def __init__(self, home: Home, mpi: str, log: Path) -> None:
        self._home, self.log = home, log
        hostfile = home.folder / "up-hosts"
        hostfile.write_text("".join(f"{name}\n" for name in NAMES[:RANKS]))
        where = [
            "--hostfile",
            str(hostfile),
            "--ssh",
            str(home.folder / "agent"),
            "--run-under",
            str(home.folder / "rank"),
        ]
        options = ["--port", str(PORT), "--format", "f32", "--allreduce", "star", "--speculate", "off", "--quiet"]
        variables = {}
        if mpi == "mpich":
            prefix = Path(sys.prefix) / "mpich"
            variables = {
                "MPI4PY_MPIABI": "mpich",
                "LD_LIBRARY_PATH": str(prefix / "lib"),
                "PATH": f"{prefix / 'bin'}:{os.environ['PATH']}",
            }
        with log.open("w") as file:
            self._process = home.start(
                0, [sys.executable, "-m", "tpimpi", "up", *where, *options], env=variables, stdout=file, stderr=file
            )

    def until_listening(self) -> None:
        """Wait for the front, which listens before there is a model."""
        end = time.monotonic() + START_TIMEOUT_S
        while "tpimpi: http" not in self.log.read_text():
            if self._process.poll() is not None or time.monotonic() > end:
                raise TimeoutError(f"up did not come: {self.said()}")
            time.sleep(0.05)

    def said(self) -> str:
        return " / ".join(self.log.read_text().splitlines()[-12:])

    def end(self) -> list[str]:
        """End it, and say what is left of it on the devices."""
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_TIMEOUT_S)
        end = time.monotonic() + LEAVE_TIMEOUT_S
        while left := self._left():
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        for device in range(RANKS):
            for pid in tpimpi_processes(self._home, device):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        return left

    def _left(self) -> list[str]:
        return [
            f"r{rank} {command}" for rank in range(RANKS) for command in tpimpi_processes(self._home, rank).values()
        ]


def try_once(kind: str, home: Home, mpi: str, rank: int, whole: dict[str, str], log: Path) -> Outcome:
    """One round. `whole` are the undisturbed answers, by prompt."""
    case = KINDS["kill-decode" if kind == KILL_RANK_0 else kind](home, mpi, 8.0)
    outcome, prompt = Outcome(kind, mpi, rank), LONG_PROMPT if kind == "kill-prefill" else PROMPT
    case.prepare(rank)
    server = Server(home, mpi, log)
    try:
        server.until_listening()
        answer = _reach(kind, home, prompt)
        broken = time.monotonic()
        if kind not in BROKEN_BEFORE:
            case.break_it(rank)
        if answer is None:
            answer = Answer(home, prompt)
        answer.finish(START_TIMEOUT_S + 2 * ALLOWED_S)
        outcome.end_s = time.monotonic() - broken
        later = [moment - broken for moment in answer.moments if moment > broken]
        pauses = [b - a for a, b in zip([0.0, *later], later, strict=False)]
        outcome.went_on_s = max(pauses, default=None)
        if answer.why.startswith("error"):
            outcome.wrong = answer.why
        elif answer.text != whole[prompt]:
            pairs = enumerate(zip(answer.text, whole[prompt], strict=False))
            same = next((place for place, (a, b) in pairs if a != b), 0)
            outcome.wrong = f"other words after {same} characters: {answer.text[same - 20 : same + 20]!r}"
        elif outcome.went_on_s is None or outcome.went_on_s > ALLOWED_S:
            outcome.wrong = f"went on after {outcome.went_on_s} s"
    except TimeoutError as error:
        outcome.wrong = str(error)
    finally:
        case.mend(rank)
        outcome.left = server.end()
        if outcome.left and not outcome.wrong:
            outcome.wrong = f"{len(outcome.left)} processes left"
        if outcome.wrong:
            outcome.wrong += f" | {server.said()}"
    return outcome


def _reach(kind: str, home: Home, prompt: str) -> Answer | None:
    """Wait until the run is where it is to be broken; the answer that is under way then, if one is."""
    if kind in BROKEN_BEFORE:
        return None
    if kind == "kill-slicing":
        answer, end = Answer(home, prompt), time.monotonic() + START_TIMEOUT_S
        while not any(path.stat().st_size > 0 for path in home.cache(1).glob("*-f32-*/.*partial*")):
            if time.monotonic() > end:
                raise TimeoutError("no slicing began")
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        return answer
    if kind in ("kill-idle", "stop-idle", "kill-prefill"):
        first = Answer(home, PROMPT)
        first.finish(START_TIMEOUT_S)
        if first.why.startswith("error"):
            raise TimeoutError(f"the first answer: {first.why}")
        if kind != "kill-prefill":
            time.sleep(random.uniform(0.5, 1.5))
            return None
        answer = Answer(home, prompt)
        time.sleep(random.uniform(0.1, 0.4))
        return answer
    answer = Answer(home, prompt)
    answer.until(60, START_TIMEOUT_S)
    time.sleep(random.uniform(0, 0.3))
    return answer


def undisturbed(home: Home, mpi: str, log: Path) -> dict[str, str]:
    """The answers without a fault, by prompt."""
    server, found = Server(home, mpi, log), {}
    try:
        server.until_listening()
        for prompt in TOKENS:
            answer = Answer(home, prompt)
            answer.finish(START_TIMEOUT_S + ALLOWED_S)
            if answer.why.startswith("error") or not answer.text:
                raise SystemExit(f"the undisturbed answer: {answer.why}; {server.said()}")
            found[prompt] = answer.text
    finally:
        server.end()
    return found


def main() -> None:
    kinds = (*KINDS, KILL_RANK_0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind, with those that stand in the file")
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    parser.add_argument("--kinds", default=",".join(kinds))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    if options.json is not None and options.json.exists():
        outcomes = [Outcome(**one) for one in json.loads(options.json.read_text())]
    with home_with_slices(options.mpi) as (home, _):
        log = home.folder / "up.log"
        whole = undisturbed(home, options.mpi, log)
        for kind in options.kinds.split(","):
            done = sum((one.kind, one.mpi) == (kind, options.mpi) for one in outcomes)
            for _ in range(done, options.rounds):
                rank = 0 if kind == KILL_RANK_0 else random.randrange(1 if kind in NOT_RANK_0 else 0, RANKS)
                outcome = try_once(kind, home, options.mpi, rank, whole, log)
                outcomes.append(outcome)
                if options.json is not None:
                    options.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
                seconds = "-" if outcome.went_on_s is None else f"{outcome.went_on_s:.1f} s"
                verdict = f"NOT WELL: {outcome.wrong}" if outcome.wrong else ""
                print(f"{kind:14} r{rank} longest pause {seconds}  {verdict}", flush=True)
    _print_table(options.mpi, [one for one in outcomes if one.mpi == options.mpi])
    sys.exit(any(one.wrong for one in outcomes))


def _print_table(mpi: str, outcomes: Sequence[Outcome]) -> None:
    print(f"\n{mpi}\n{'kind':14} {'well':>7} {'longest pause':>16}")
    for kind in dict.fromkeys(one.kind for one in outcomes):
        mine = [one for one in outcomes if one.kind == kind]
        pauses = [one.went_on_s for one in mine if one.went_on_s is not None] or [float("nan")]
        print(
            f"{kind:14} {sum(not one.wrong for one in mine):3}/{len(mine):<3} {median(pauses):7.1f}/{max(pauses):5.1f} s"
        )


if __name__ == "__main__":
    main()
