"""A real sshd of the tests' own, with keys of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest


@contextlib.contextmanager
def sshd(folder: Path, config: str, on: Callable[..., Sequence[str]] = lambda *command: command) -> Iterator[str]:
    """Runs until it is left; given is the program ssh. Its keys are `folder`/host and `folder`/user, the public keys that it
    lets in `folder`/authorized. `config` is what its configuration has beside; `on` makes a command one that runs elsewhere.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    program, keygen, client = (shutil.which(name, path=path) for name in ("sshd", "ssh-keygen", "ssh"))
    if program is None or keygen is None or client is None:
        pytest.skip("openssh-server is not installed")
    if os.geteuid():
        pytest.skip("sshd is to be started as root")
    made = not (needed := Path("/run/sshd")).exists()
    needed.mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True, timeout=30)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"PermitRootLogin prohibit-password\n{config}"
    )
    server = subprocess.Popen(
        on(program, "-D", "-e", "-f", str(folder / "sshd_config")),
        stderr=(folder / "sshd.log").open("w"),
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 30
        while "listening" not in (folder / "sshd.log").read_text():
            assert time.monotonic() < end, (folder / "sshd.log").read_text()
            if server.poll() is not None:
                pytest.skip(f"sshd does not start here: {(folder / 'sshd.log').read_text()}")
            time.sleep(0.05)
        yield client
    finally:
        server.kill()
        server.wait()
        if made:
            needed.rmdir()
