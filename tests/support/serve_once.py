"""Starts a server as a page says, and ends it once it is ready: python -m tests.support.serve_once COMMAND…

Its exit code is the server's: 0 where it ended as it was told to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

START_S = 120.0


def main() -> None:
    command = [*sys.argv[1:], "--port", "0"]
    # mpirun passes this one on, and leaves rank 0 time to end; for up it is the other.
    number = signal.SIGUSR1 if "mpirun" in command[0] else signal.SIGTERM
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url, until = "", time.monotonic() + START_S
    for line in process.stderr:
        sys.stderr.write(line)
        if line.startswith("tpimpi: http"):
            url = line.split()[1]
            break
    while process.poll() is None and time.monotonic() < until:
        try:
            if urllib.request.urlopen(f"{url}/health").status == 200:
                break
        except (urllib.error.URLError, ValueError):
            time.sleep(0.1)
    os.kill(process.pid, number)
    sys.stderr.write(process.communicate(timeout=START_S)[1])
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
