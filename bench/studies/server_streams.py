"""What streaming to many clients costs: as many answers at once by `serve`, each to a client, and by --batch-file, in turn.

    python -m bench.studies.server_streams --model FILE.gguf --rounds 5

The same prompts, answered greedily, all at the same time. Of each answer it is the mean time between two tokens, from the
first to the last: as a client sees it, and as the run's report has it. The ratio is of their medians over the answers.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from bench.studies.server_load import PROMPTS, ROOT, Server


def stream(server: Server, prompt: str, tokens: int, found: list[float], start: threading.Barrier) -> None:
    """One client: add the seconds between two tokens of its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start.wait()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    times, made = [], 0
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            made = event["usage"]["completion_tokens"]
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            times.append(time.monotonic())
    found.append((times[-1] - times[0]) / (made - 1))


def served(options: argparse.Namespace) -> list[float]:
    """Seconds a token of every answer, as the clients see them."""
    server, found = Server(options, "tpimpi"), list[float]()
    try:
        server.ask(PROMPTS[0], 4)  # the first asks for memory
        start = threading.Barrier(options.clients)
        clients = [
            threading.Thread(target=stream, args=(server, prompt, options.tokens, found, start))
            for prompt in PROMPTS[: options.clients]
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    finally:
        server.close()
    assert len(found) == options.clients, "an answer did not come"
    return found


def batched(options: argparse.Namespace) -> list[float]:
    """Seconds a token of every answer, as the report has them."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, report = Path(folder, "in.jsonl"), Path(folder, "report.json")
        asked = enumerate(PROMPTS[: options.clients])
        prompts.write_text("".join(json.dumps({"custom_id": str(n), "prompt": text}) + "\n" for n, text in asked))
        command = [sys.executable, "-m", "tpimpi", "--model", options.model, "--batch-file", str(prompts)]
        command += ["--out", f"{folder}/out.jsonl", "--parallel", str(options.slots), "--threads", str(options.threads)]
        command += ["--context", str(options.context), "--max-tokens", str(options.tokens), "--report", str(report)]
        if options.ranks > 1:
            mpirun = shutil.which("mpirun")
            assert mpirun, "no mpirun: source .venv/bin/activate"
            command = [mpirun, "-np", str(options.ranks), "--hostfile", str(ROOT / "hostfiles" / "local.txt"), *command]
        subprocess.run([*command, "--quiet"], check=True, stdin=subprocess.DEVNULL)
        return [answer["s_per_token_mean"] for answer in json.loads(report.read_text())["answers"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file with a chat template")
    parser.add_argument("--clients", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each rank")
    parser.add_argument("--log", default="/tmp/server-streams")
    options = parser.parse_args()
    options.slots = options.clients
    ratios = []
    for number in range(options.rounds):
        ways = {served: 0.0, batched: 0.0}
        for way in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            ways[way] = float(np.median(way(options)))
        ratios.append(ways[served] / ways[batched])
        print(
            f"served {ways[served] * 1e3:.1f} ms a token, batch {ways[batched] * 1e3:.1f}: {ratios[-1]:.3f}", flush=True
        )
    print(f"a token to {options.clients} streaming clients: {np.median(ratios):.3f} times a batch's ", end="")
    print(f"({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
