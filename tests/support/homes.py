"""The emulated home: whether one can be made here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import TIMEOUT, Result

HOME = (sys.executable, "-m", "bench.home")  # run at ROOT


def lacking() -> str | None:
    """Why no home can be made here."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "an emulated home needs Linux and root"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    missing = [name for name in ("cc", "ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--mount", "true"], capture_output=True, check=False)
    return f"namespaces: {tried.stderr.decode().strip()}" if tried.returncode else None


LACKING = lacking()


needs_home = pytest.mark.skipif(LACKING is not None, reason=LACKING or "")


def output(process: subprocess.Popen[str]) -> Result:
    """What the finished process printed; killed where it takes too long."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"took over {TIMEOUT:.0f} s\nstdout: {out}\nstderr: {err}")
    return Result(process.returncode, out, err)
