"""`doctor --hostfile`, before there is a run: can this machine start ranks on each host, and can they reach one another?

All hosts are looked at together, each by a thread that goes from the simple to the particular and stops where the rest
cannot work: its name, a connection to its ssh, ssh itself without a password, and then one shell script over ssh, which
looks for the programs that mpirun will want and becomes `host_probe` with the Python that stands at the path of ours.
Every wait has an end: a host that is down takes DEAD_HOST_S seconds at most, and no host delays another.
"""

from __future__ import annotations

import platform
import queue
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tpimpi import __version__
from tpimpi.diagnostics.doctor import host_probe
from tpimpi.diagnostics.doctor.host_findings import (
    NOTE,
    OK,
    WRONG,
    CannotContinue,
    HostChecks,
    check_disk,
    check_file,
    check_local,
    check_programs,
    check_swap,
    check_versions,
    interface_of,
    interfaces_of,
    network_of,
    ssh_problem,
)
from tpimpi.diagnostics.doctor.keys import check_keys, make_home
from tpimpi.diagnostics.doctor.ssh import (
    CONNECT_S,
    DEAD_HOST_S,
    PROBE_S,
    LocalFacts,
    Probe,
    is_ssh,
    local_facts,
    ssh_command,
)
from tpimpi.diagnostics.options import DoctorOptions
from tpimpi.errors import one_line
from tpimpi.star import MPICH
from tpimpi.system.files import write_json
from tpimpi.system.hostfile import Host, read_hostfile, refused_lines
from tpimpi.system.network import INNER, choosing_mpich, choosing_openmpi, common_network
from tpimpi.system.placement import by_node


def probe_hosts(hostfile: str, ssh: str) -> tuple[LocalFacts, list[HostChecks]]:
    """What is found about each host of the hostfile. Raises InputError where the hostfile cannot be used."""
    hosts = read_hostfile(hostfile)
    ours = local_facts()
    found = [HostChecks(host) for host in hosts]
    threads = [
        threading.Thread(target=_guarded, args=(one, ours, ssh), name=f"tpimpi-{one.host.address}", daemon=True)
        for one in found
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + PROBE_S + DEAD_HOST_S
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    for thread, one in zip(threads, found, strict=True):
        if thread.is_alive():
            one.add(
                "time", WRONG, f"not done after {PROBE_S + DEAD_HOST_S:.0f} s; see what keeps it busy, and try again"
            )
    check_file(found, ours, refused_lines(hostfile, ours.mpirun_kind))
    return ours, found


# One host


def _guarded(found: HostChecks, ours: LocalFacts, ssh: str) -> None:
    try:
        _probe_host(found, ours, ssh)
    except CannotContinue:
        pass
    except Exception as error:  # of a thread nobody else would hear it
        found.add("doctor", WRONG, f"internal error: {type(error).__name__}: {error}; please report it")


def _probe_host(found: HostChecks, ours: LocalFacts, ssh: str) -> None:
    host = found.host
    real = is_ssh(ssh)
    target = _ssh_target(ssh, host) if real else _Target(host.address, 22, direct=False)
    addresses = _resolve(target.address)
    found.here = (
        host.is_loopback or bool(ours.addresses & set(addresses)) or any(a.startswith("127.") for a in addresses)
    )
    if found.here:
        check_local(found, ours)
        return
    if addresses:
        found.add("name", OK, ", ".join(dict.fromkeys([target.address, *addresses[:3]])))
    elif target.direct:
        found.add(
            "name",
            WRONG,
            f"{target.address} is not known here; write its address into the hostfile, or add a line to /etc/hosts: "
            f"192.168.x.y {target.address}",
        )
        raise CannotContinue
    if target.direct:
        _check_port(found, addresses, target.port)
    with Probe([*ssh_command(ssh, host), "sh -s"], ours, _route(addresses)) as probe:
        if not probe.hello():
            found.add("ssh", WRONG, ssh_problem(probe.stderr(), host, target.port))
            raise CannotContinue
        found.add("ssh", OK, "without a password" if real else f"{ssh} works")
        shell_facts, found.facts = probe.facts()
        check_programs(found, ours, shell_facts)
        check_versions(found, ours)
        check_disk(found)
        check_swap(found)
        _check_network(found, ours, probe, addresses)


@dataclass(frozen=True)
class _Target:
    """Where ssh goes to; not `direct` where that is for it to know: through another host, or in a way of its own."""

    address: str
    port: int
    direct: bool


def _ssh_target(ssh: str, host: Host) -> _Target:
    """Where ssh will go to, as its configuration says."""
    try:
        done = subprocess.run([ssh, "-G", host.name], capture_output=True, text=True, timeout=CONNECT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return _Target(host.address, 22, direct=True)
    said = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    direct = {said.get(name, "none") for name in ("proxyjump", "proxycommand")} == {"none"}
    port = said.get("port", "")
    return _Target(said.get("hostname", host.address), int(port) if port.isdecimal() else 22, direct)


def _within(seconds: float, work: Callable[[], Any], otherwise: Any) -> Any:
    """What `work` returns; `otherwise` where it takes longer (it is left to itself) or raises OSError."""
    answers: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            answers.put(work())
        except (OSError, UnicodeError):
            answers.put(otherwise)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return otherwise


def _resolve(name: str) -> list[str]:
    """Addresses of a name, IPv4 first; none where it is not known."""

    def look() -> list[str]:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        ordered = sorted(entries, key=lambda entry: entry[0] != socket.AF_INET)
        return list(dict.fromkeys(str(entry[4][0]) for entry in ordered))

    found: list[str] = _within(CONNECT_S, look, [])
    return found


def _route(addresses: Sequence[str]) -> str:
    """Our own address on the way to the first of them; nothing is sent. "" where there is no way."""
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as line:
                line.connect((address, 9))
                return str(line.getsockname()[0])
        except OSError:
            continue
    return ""


def _check_port(found: HostChecks, addresses: Sequence[str], port: int) -> None:
    problem = ""
    for address in addresses[:2]:
        try:
            socket.create_connection((address, port), CONNECT_S / min(2, len(addresses))).close()
        except TimeoutError:
            problem = problem or f"{address} does not answer; is it switched on, awake, and in this network?"
        except ConnectionRefusedError:
            problem = f"{address} is up but has nothing at port {port}; there: sudo apt install openssh-server"
        except OSError as error:
            problem = problem or f"{address}: {error.strerror or error}; is it switched on, and in this network?"
        else:
            return
    if problem:
        found.add("ssh", WRONG, problem)
        raise CannotContinue


def _check_network(found: HostChecks, ours: LocalFacts, probe: Probe, addresses: Sequence[str]) -> None:
    theirs = interfaces_of(found.facts.get("interfaces", []))
    found.inner = [one.name for one in theirs if one.kind == INNER]
    found.way = common_network(ours.interfaces, theirs)
    if not probe.back:
        text = (
            "not checked whether the two can connect: there is no IPv4 way from here to it; the next step will show it"
        )
        found.add("network", NOTE, text)
        return
    resolved = probe.receive("resolved", 2 * CONNECT_S)
    problem = probe.receive("back", 2 * CONNECT_S)
    port = probe.receive("listening", CONNECT_S)
    if problem:
        timed_out = "imed out" in problem
        remedy = f"a firewall on this machine? type: sudo ufw allow from {network_of(probe.own, ours)}"
        found.add(
            "from it",
            WRONG,
            f"cannot reach {probe.back} here ({problem}); {remedy}"
            + ("" if timed_out else ", or another way between them"),
        )
    elif problem == "":
        found.add("from it", OK, f"reaches {probe.own} here, any port")
    else:
        found.add("from it", NOTE, f"not checked: it did not say in time whether it reaches {probe.back}; try again")
    if ours.mpirun_kind == MPICH and resolved is not None and not set(resolved) & ours.addresses:
        knows = f"takes it for {', '.join(resolved)}" if resolved else "does not know it"
        interface = interface_of(probe.own, ours)
        found.add(
            "our name",
            NOTE,
            f"MPICH tells it to connect to {platform.node()}, and it {knows}; give mpirun -iface {interface}, or add to its "
            f"/etc/hosts: {probe.own} {platform.node()}",
        )
    if port is None:
        found.add("to it", NOTE, "not checked: it did not say in time on which port it listens; try again")
        return
    answers = [
        host_probe.call(f"{address}:{port}", probe.token, CONNECT_S) for address in addresses[:1] if ":" not in address
    ]
    server = str(found.facts.get("ssh", "")).split()[2:3]
    if not answers and server and ":" not in server[0]:
        answers = [host_probe.call(f"{server[0]}:{port}", probe.token, CONNECT_S)]
    if answers and answers[0]:
        found.add(
            "to it",
            WRONG,
            f"its port {port} cannot be reached ({answers[0]}); a firewall there? type on it: sudo ufw allow from "
            f"{network_of(probe.own, ours)}",
        )
    elif answers:
        found.add("to it", OK, "any port")
    else:
        found.add("to it", NOTE, "not checked: no IPv4 address of it is known; the next step will show it")


# Telling


def mpirun_options(ours: LocalFacts, found: Sequence[HostChecks]) -> str:
    """Options with which mpirun keeps to the networks between the hosts; "" where it cannot choose a wrong one."""
    ways = [one.way for one in found if one.way is not None]
    inner = [name for one in found for name in one.inner]
    if not ways or not inner:
        return ""
    if ours.mpirun_kind == MPICH:
        return choosing_mpich([name for way in ways for name in way[1:]])
    return choosing_openmpi(list(dict.fromkeys(way[0] for way in ways)))


def as_json(ours: LocalFacts, found: Sequence[HostChecks]) -> dict[str, Any]:
    """What --json writes."""
    return {
        "tpimpi": __version__,
        "python": ours.python,
        "mpi": f"{ours.mpi} {ours.mpi_version}",
        "mpirun": ours.mpirun,
        "options": mpirun_options(ours, found),
        "hosts": [
            {
                "name": one.host.name,
                "ranks": one.host.ranks,
                "here": one.here,
                "keys": one.facts.get("keys"),  # of which nothing is secret
                "checks": [asdict(c) for c in one.checks],
            }
            for one in found
        ],
        "wrong": sum(one.wrong for one in found),
    }


def print_report(hostfile: str, ours: LocalFacts, found: Sequence[HostChecks]) -> int:
    """Print it all; returns how many things are wrong."""
    for one in found:
        ranks = f"{one.host.ranks} rank{'s' if one.host.ranks > 1 else ''}"
        print(f"{one.host.name} ({ranks})")
        for check in one.checks:
            print(f"  {check.state:5}  {check.what:8}  {one_line(check.text)}")
    wrong = sum(one.wrong for one in found)
    options = mpirun_options(ours, found)
    if options:
        inner = ", ".join(dict.fromkeys(name for one in found for name in one.inner))
        print(f"interfaces that lead nowhere ({inner}) could be taken; give mpirun: {options}")
    if wrong:
        print(f"{wrong} thing{'s' if wrong > 1 else ''} wrong; mend the first of each host, and try again")
    else:
        total = sum(one.host.ranks for one in found)
        round_the_hosts = by_node(ours.mpirun_kind, [one.host for one in found])
        quoted, python = shlex.quote(hostfile), shlex.quote(ours.python)
        launch = ["mpirun", "-np", str(total), round_the_hosts, "--hostfile", quoted, options, python]
        print(f"nothing wrong; next: {' '.join(filter(None, launch))} -m tpimpi doctor")
    return wrong


def doctor(hostfile: str, options: DoctorOptions) -> int:
    """The command with that hostfile; its exit code. Raises InputError."""
    ours, found = probe_hosts(hostfile, options.ssh)
    if options.make_keys:
        make_home(found, ours, options.ssh, rotate=options.rotate_keys)
    check_keys(found)
    wrong = print_report(hostfile, ours, found)
    if options.json is not None:
        write_json(options.json, as_json(ours, found), "--json")
    return int(wrong > 0)
