"""Many clients of a server at once: whether every answer is right, nothing leaks, and how long tokens take.

    python -m bench.studies.server_load --model FILE.gguf --seconds 600
    bash bench/studies/llama_cpp.sh build
    python -m bench.studies.server_load --model FILE.gguf --seconds 60 --rounds 3 \
        --llama-server build/llama.cpp/bin/llama-server

Clients ask for streamed greedy answers of random lengths to prompts that chance picks, break some off, and send bad
requests between. Before, each prompt is answered alone: what an answer says has to be the beginning of that. Memory,
descriptors and pages are shown over the time: they have to be level. With --llama-server that is asked in turn, with as
many threads and slots; its answers are not compared.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0
LONGEST = 96  # tokens of an answer
BROKEN_OFF, BAD = 0.1, 0.05  # of the requests
SUBJECTS = ("the sea", "a castle", "bread", "the moon", "an old clock", "rain", "a river", "winter")
FORMS = ("Tell me of {}.", "Write a poem about {}.", "Why is {} of use to people?", "Describe {} to a child, slowly.")
PROMPTS = [form.format(subject) for subject in SUBJECTS for form in FORMS]
BAD_BODIES = (
    b"{",
    b'{"messages": 3}',
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": -1}',
)


@dataclass
class Seen:
    """What all clients of a round saw; times in seconds."""

    tokens: int = 0
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Server:
    """A server that runs, ours or llama.cpp's."""

    def __init__(self, options: argparse.Namespace, program: str) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.own = program == "tpimpi"
        slots, context = options.slots, options.context
        if self.own:
            command = [sys.executable, "-m", "tpimpi", "serve", "--model", options.model, "--port", str(self.port)]
            command += ["--parallel", str(slots), "--context", str(context), "--threads", str(options.threads)]
            command += ["--queue", str(options.clients), "--quiet"]
            if options.ranks > 1:
                mpirun = shutil.which("mpirun")
                assert mpirun, "no mpirun: source .venv/bin/activate"
                hostfile = str(ROOT / "hostfiles" / "local.txt")
                command = [mpirun, "-np", str(options.ranks), "--hostfile", hostfile, *command]
        else:
            command = [
                program,
                "-m",
                options.model,
                "--port",
                str(self.port),
                "-t",
                str(options.threads * options.ranks),
            ]
            command += ["-np", str(slots), "-c", str(slots * context)]
        path = Path(f"{options.log}-{'tpimpi' if self.own else 'llama'}.log")
        with path.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + START_S
        while True:
            try:
                if self.request("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server does not come up; see {path}")
            time.sleep(0.1)

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def ask(self, prompt: str, tokens: int, until: int = 1 << 30) -> tuple[str, list[float]]:
        """The answer's text, and when each piece of it came, after at most `until` of which the client goes away; the first
        time is that of asking. Raises ValueError where it is refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        message = {"role": "user", "content": prompt}
        body = {"messages": [message], "max_tokens": tokens, "temperature": 0, "stream": True}
        times, text = [time.monotonic()], ""
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {answer.read()[:200]!r}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(str(event["error"]))
            choices = event["choices"]
            if choices and (said := choices[0]["delta"].get("content")):
                text += said
                times.append(time.monotonic())
                if len(times) > until:
                    break
        connection.close()
        return text, times

    def used(self) -> dict[str, int]:
        """What its processes hold."""
        mine = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for one in psutil.process_iter(["cmdline"]):
            if "tpimpi.serving.server.front" in (one.info["cmdline"] or ()):
                mine.append(one)
        found = {"memory": sum(one.memory_info().rss for one in mine), "files": sum(one.num_fds() for one in mine)}
        if self.own:
            found["pages"] = json.loads(self.request("GET", "/cluster")[1])["pages_used"]
        return found

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def client(server: Server, seed: int, end: float, whole: dict[str, str], seen: Seen) -> None:
    dice = random.Random(seed)
    while time.monotonic() < end:
        if dice.random() < BAD:
            try:
                status, body = server.request("POST", "/v1/chat/completions", dice.choice(BAD_BODIES))
            except (OSError, http.client.HTTPException) as error:
                status, body = 0, repr(error).encode()
            if server.own and (status != 400 or b'"error"' not in body):
                with seen.lock:
                    seen.wrong.append(f"a bad request had {status} {body[:80]!r}")
        prompt, tokens = dice.choice(PROMPTS), dice.randint(4, LONGEST)
        until = dice.randint(1, tokens) if dice.random() < BROKEN_OFF else 1 << 30
        try:
            text, times = server.ask(prompt, tokens, until)
        except (OSError, ValueError, http.client.HTTPException) as error:
            with seen.lock:
                seen.wrong.append(repr(error))
            continue
        with seen.lock:
            seen.answers += 1
            seen.tokens += len(times) - 1
            if len(times) > 1:
                seen.first.append(times[1] - times[0])
                seen.gaps += [b - a for a, b in itertools.pairwise(times[1:])]
            if whole and not whole[prompt].startswith(text):
                seen.wrong.append(f"{prompt!r}: {text!r} is no beginning of {whole[prompt]!r}")


def load(server: Server, options: argparse.Namespace, whole: dict[str, str], number: int) -> tuple[Seen, float]:
    """All clients, for so long; returns what they saw, and tokens a second."""
    seen, began = Seen(), time.monotonic()
    threads = [
        threading.Thread(target=client, args=(server, 1000 * number + one, began + options.seconds, whole, seen))
        for one in range(options.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen, seen.tokens / (time.monotonic() - began)


def watch(server: Server, seconds: float, used: list[dict[str, int]]) -> None:
    """What the server holds, after each tenth of the time."""
    for _ in range(10):
        time.sleep(seconds / 10)
        used.append(server.used())


def shown(seen: Seen, rate: float) -> str:
    first, gaps = (np.percentile(times, [50, 99]) for times in (seen.first, seen.gaps))
    return (
        f"{rate:6.1f} tokens/s · first token p50 {first[0]:.2f} s, p99 {first[1]:.2f} s · a token p50 "
        f"{gaps[0] * 1e3:.0f} ms, p99 {gaps[1] * 1e3:.0f} ms · {seen.answers} answers, {len(seen.wrong)} wrong"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file with a chat template")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each rank")
    parser.add_argument("--llama-server", help="the program llama-server")
    parser.add_argument("--log", default="/tmp/server-load")
    options = parser.parse_args()
    programs = ["tpimpi", *([options.llama_server] if options.llama_server else [])]
    rates: dict[str, list[float]] = {program: [] for program in programs}
    failed: list[str] = []
    for number in range(options.rounds):
        for program in programs if number % 2 == 0 else programs[::-1]:
            server = Server(options, program)
            try:
                whole = {prompt: server.ask(prompt, LONGEST)[0] for prompt in PROMPTS} if server.own else {}
                used: list[dict[str, int]] = []
                watcher = threading.Thread(target=watch, args=(server, options.seconds, used))
                watcher.start()
                seen, rate = load(server, options, whole, number)
                watcher.join()
                rates[program].append(rate)
                print(f"{'tpimpi' if server.own else 'llama.cpp':9} {shown(seen, rate)}", flush=True)
                for name in used[0] if server.own else ():
                    print(f"          {name} after each tenth of the time: {', '.join(str(one[name]) for one in used)}")
                failed += seen.wrong if server.own else []
            finally:
                server.close()
    for one in failed[:10]:
        print(f"WRONG {one}")
    if options.llama_server:
        ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
        print(f"tokens a second beside llama.cpp: {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
