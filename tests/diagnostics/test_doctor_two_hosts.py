"""doctor --hostfile on two emulated hosts, by ssh in earnest."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.launch import Result, run_command
from tests.support.pairs import Pair
from tests.support.sshd import sshd
from tpimpi import __version__
from tpimpi.diagnostics.doctor import ssh
from tpimpi.system.link_keys import read_keys

pytestmark = pytest.mark.alone


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as made:
        yield made


def look(pair: Pair, tmp_path: Path, lines: list[str], ssh: str, *options: str) -> Result:
    """doctor on host a."""
    (tmp_path / "home.txt").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "tpimpi", "doctor", "--hostfile", str(tmp_path / "home.txt"), "--ssh", ssh]
    env = {"TPIMPI_CACHE": str(tmp_path), "TPIMPI_LINK_KEYS": str(tmp_path / "keys-a")}
    return run_command(pair.on(pair.a, *command, *options), env=env, timeout=120)


@pytest.mark.slow
def test_two_hosts_with_a_docker_bridge_each(pair: Pair, program: Callable[..., str], tmp_path: Path) -> None:
    agent = program(f'shift; export TPIMPI_LINK_KEYS=$0.keys; exec {pair.ip} netns exec {pair.b} sh -c "$*"')
    result = look(pair, tmp_path, ["10.99.0.1", "10.99.0.2"], agent, "--make-keys")
    assert result.code == 0, result.out + result.err
    assert "ok     from it   reaches 10.99.0.1 here, any port" in result.out
    assert "ok     to it     any port" in result.out
    options = "--mca btl_tcp_if_include 10.99.0.0/24 --prtemca prte_if_include 10.99.0.0/24"
    assert f"interfaces that lead nowhere (docker0) could be taken; give mpirun: {options}" in result.out
    words = f"-np 2 --map-by node --hostfile {tmp_path / 'home.txt'} {options}"
    assert f"next: mpirun {words} {sys.executable} -m tpimpi doctor" in result.out


def test_a_firewall_between_them(pair: Pair, program: Callable[..., str], tmp_path: Path) -> None:
    pair.unreachable()
    agent = program(f'shift; exec {pair.ip} netns exec {pair.b} sh -c "$*"')
    result = look(pair, tmp_path, ["10.99.0.1", "10.99.0.2"], agent)
    assert result.code == 1
    assert "wrong  from it   cannot reach 10.99.0.1:" in result.out
    assert "sudo ufw allow from 10.99.0.0/24" in result.out
    assert "wrong  to it     its port" in result.out


@pytest.mark.slow
def test_a_host_that_is_off_and_one_without_ssh(pair: Pair, tmp_path: Path) -> None:
    """By the real ssh, which does not get far."""
    if shutil.which("ssh") is None:
        pytest.skip("ssh is not installed")
    result = look(pair, tmp_path, ["10.99.0.1", "10.99.0.2", "10.99.0.77"], "ssh")
    assert result.code == 1
    assert "wrong  ssh       10.99.0.2 is up but has nothing at port 22" in result.out
    assert "wrong  ssh       10.99.0.77" in result.out
    assert "is it switched on" in result.out


@contextlib.contextmanager
def sshd_on_host_b(pair: Pair, folder: Path) -> Iterator[str]:
    """Given is a program named ssh that keeps its files in `folder`."""
    config = f"PasswordAuthentication yes\nSetEnv TPIMPI_LINK_KEYS={folder}/keys-b\n"
    with sshd(folder, config, lambda *command: pair.on(pair.b, *command)) as client:
        (folder / "ssh_config").write_text(f"Host *\n IdentityFile {folder}/user\n UserKnownHostsFile {folder}/known\n")
        (folder / "ssh").write_text(f'#!/bin/sh\nexec {client} -F {folder}/ssh_config "$@"\n')
        (folder / "ssh").chmod(0o755)
        yield str(folder / "ssh")


@pytest.mark.slow
def test_a_real_sshd(pair: Pair, tmp_path: Path) -> None:
    lines = ["10.99.0.1", "10.99.0.2"]
    with sshd_on_host_b(pair, tmp_path) as ssh:
        result = look(pair, tmp_path, lines, ssh)
        assert "wrong  ssh       ssh does not know its host key yet; type: ssh 10.99.0.2" in result.out
        kind, key = (tmp_path / "host.pub").read_text().split()[:2]
        (tmp_path / "known").write_text(f"10.99.0.2 {kind} {key}\n")
        result = look(pair, tmp_path, lines, ssh)
        assert "type: ssh-copy-id 10.99.0.2" in result.out
        shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
        result = look(pair, tmp_path, lines, ssh)
        assert "ok     ssh       without a password" in result.out
        assert f"ok     tpimpi    {__version__}" in result.out
        assert "ok     to it     any port" in result.out
        assert result.out.count("wrong  keys      none") == 2
        result = look(pair, tmp_path, lines, ssh, "--make-keys")
        assert result.code == 0, result.out + result.err
        files = [read_keys(tmp_path / f"keys-{end}") for end in "ab"]  # which are refused where others can read them
        assert [file.host for file in files if file is not None] == lines
        assert len({json.dumps(file.public) for file in files if file is not None}) == 1
        log = (tmp_path / "sshd.log").read_text()
        assert not [file for file in files if file is None or file.private in log + result.out + result.err]
        other = (tmp_path / "user.pub").read_text().split()[1]
        (tmp_path / "known").write_text(f"10.99.0.2 {kind} {other}\n")
        result = look(pair, tmp_path, lines, ssh)
        assert "type: ssh" not in result.out
        assert "ssh-keygen -R 10.99.0.2, then: ssh 10.99.0.2" in result.out


def test_waits_have_an_end() -> None:
    """A host that is down: a name, a connection, or ssh itself; each by itself is within what was promised."""
    assert ssh.CONNECT_S + ssh.CONNECT_S <= ssh.DEAD_HOST_S
    assert ssh.SSH_S <= ssh.DEAD_HOST_S
