"""What `up` does after its options: mpirun on the hosts that answer, and again when it ends unasked."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tpimpi.cli.options import ServeOptions, UpOptions
from tpimpi.cli.process import call_aside_on_signals, say
from tpimpi.diagnostics.doctor.host_findings import WRONG, HostChecks, check_local
from tpimpi.diagnostics.doctor.hosts import mpirun_options, probe_hosts
from tpimpi.diagnostics.doctor.keys import check_keys
from tpimpi.diagnostics.doctor.ssh import LocalFacts, local_facts
from tpimpi.errors import InputError, TpimpiError
from tpimpi.serving.server.front_process import FrontProcess
from tpimpi.star.start import OFF, ON, seal_given
from tpimpi.system.hostfile import Host
from tpimpi.system.mpirun import mpirun_command, mpirun_environment, write_hostfile
from tpimpi.system.wake import macs_of, wake

END_S = 10.0  # mpirun may take so long to end, once its rank 0 has
LOOK_S = 0.2  # between looks at mpirun
BLAMED_AGAIN_S = 120.0  # a host that a run ends for twice within it is left out
LEFT_OUT_S = 600.0  # for so long
WRONG_AGAIN_S = 86400.0  # audits that find this machine's own ranks twice within it end up: they cannot be left out
# One after another, none of them with fewer hosts than the one before, before the first that is well.
MAX_FAILED_STARTS = 5
SHORT_LIFE_S = 10.0  # a run that could answer for so short a time has failed too
LONGEST_PAUSE_S = 30.0  # between starts
WAKE_S = 90.0  # a machine may take so long to wake
WAKE_LOOK_S = 5.0

# A line with which a rank ends a run: of itself, or rank 0's of another; and Open MPI's of a process that is gone.
_ENDING = re.compile(r"^r(?P<by>\d+) [^:]+: (?:(?P<audit>audit: .*?)?\br(?P<of>\d+) )?|process rank (?P<gone>\d+) ")

_UNREACHED = re.compile(r"^\s*Remote host:\s+(\S+)")  # Open MPI's, of one on which its daemon did not come up
_MAYBE_OTHERS = "sent it something else"  # in an audit's line: another rank may be the one that is wrong
_GOES_ON = ("goes on", "slow, not gone")  # of a rank that was waited for


@dataclass
class RunUnderMpirun:
    """One start: mpirun, the hosts of its ranks, and what is known of it. `blamed` is the rank that its last line names."""

    process: subprocess.Popen[str]
    hosts: Sequence[Host]
    came_at: float | None = None  # time.monotonic() when rank 0 was ready
    gone_at: float | None = None  # time.monotonic() when rank 0 was gone
    blamed: int | None = None
    computes_wrongly: bool = False  # that rank, as an audit has found
    maybe_another: bool = False  # or another one
    unreached: set[str] = field(default_factory=set)  # hosts on which the launcher could start nothing
    relay: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.relay = threading.Thread(target=self._relay, daemon=True)
        self.relay.start()

    def _relay(self) -> None:
        """Its lines, on our standard error."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(OSError):
                sys.stderr.write(line)
                sys.stderr.flush()
            if (match := _UNREACHED.search(line)) is not None:
                self.unreached.add(match[1])
            elif (match := _ENDING.search(line)) is not None and not line.rstrip().endswith(_GOES_ON):
                self.blamed = int(match["of"] or match["by"] or match["gone"])
                self.computes_wrongly = match["audit"] is not None
                self.maybe_another = _MAYBE_OTHERS in line

    @property
    def came(self) -> bool:
        return self.came_at is not None

    @property
    def lived_s(self) -> float:
        """How long it could answer, once it has ended."""
        return 0.0 if self.came_at is None else (self.gone_at or time.monotonic()) - self.came_at

    @property
    def unreached_hosts(self) -> list[Host]:
        return [host for host in self.hosts[1:] if {host.name, host.address} & self.unreached]

    @property
    def blamed_host(self) -> Host | None:
        """The host that the run ended for, where one was named; never rank 0's, without which there is no run."""
        hosts = [host for host in self.hosts for _ in range(host.ranks)]
        if self.blamed is None or self.blamed >= len(hosts) or hosts[self.blamed] is hosts[0]:
            return None
        return hosts[self.blamed]

    @property
    def is_wrong_here(self) -> bool:
        """Whether an audit has found a rank on rank 0's machine, and no other can be the reason."""
        return self.computes_wrongly and not self.maybe_another and self.blamed_host is None

    def stop(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Supervisor:
    """Keeps a server up. The front is there; `arguments` are those of serve."""

    def __init__(
        self, options: UpOptions, serving: ServeOptions, arguments: Sequence[str], front: FrontProcess
    ) -> None:
        self._options, self._serving, self._front = options, serving, front
        self._arguments = [*arguments, "--front", front.socket]
        self._run: RunUnderMpirun | None = None
        self._told_to_end = threading.Event()
        self._left_out: dict[str, float] = {}  # hosts, and until when
        self._blamed: dict[str, float] = {}  # hosts, and when last
        self._wrong_here: float | None = None  # when an audit last found a rank of this machine
        self._here: Host | None = None  # this machine, once it was looked at
        self._front_ended = False  # though nobody told it to

    def run(self) -> int:
        """Until we are told to end. Returns the exit code."""
        call_aside_on_signals(self._end)  # an Event has a lock
        threading.Thread(target=self._follow_front, daemon=True).start()
        failed, has_come = 0, False
        while not self._told_to_end.is_set():
            try:
                ours, found = self._look(first=not has_come)
            except TpimpiError as error:
                if not has_come:
                    raise
                say(f"tpimpi: {error}")  # a network that is away for a while, say
                failed += 1
                self._told_to_end.wait(_pause(failed))
                continue
            if self._told_to_end.is_set():
                break
            if self._front_ended:
                return _front_has_ended()
            before = len(self._left_out)
            with tempfile.TemporaryDirectory(dir=self._front.folder, ignore_cleanup_errors=True) as folder:
                run = self._start(Path(folder), ours, found)
                code = self._until_end(run)
            if self._front_ended:
                return _front_has_ended()
            if self._told_to_end.is_set() or code == 0:
                return 0
            has_come |= run.came
            self._blame(run)
            if run.is_wrong_here and self._note_wrong_here():
                say(
                    "tpimpi: audits have found this machine wrong twice in a day, and it cannot be left out; see what the "
                    "line above says to look at; up ends here"
                )
                return InputError.exit_code  # a service manager would begin again after others
            shrunk = len(self._left_out) > before
            if code == InputError.exit_code and not has_come and not shrunk:
                return code  # rank 0 has said what is wrong
            failed = 0 if run.lived_s > SHORT_LIFE_S or shrunk else failed + 1
            if failed == MAX_FAILED_STARTS and not has_come:
                say(
                    f"tpimpi: {failed} starts failed one after another, the last one as the lines above say; up ends here"
                )
                return code if code > 0 else 1
            self._told_to_end.wait(_pause(failed - run.came))  # the first time at once
        return 0

    def _end(self) -> None:
        """A signal: rank 0 finishes what it can, within --grace; a launcher that gets one would leave it no time."""
        self._told_to_end.set()
        self._front.end_run()
        if self._run is not None and not self._run.came:
            self._run.stop(signal.SIGTERM)

    def _follow_front(self) -> None:
        self._follow_states()
        self._front_ended = not self._told_to_end.is_set()
        if self._front_ended and self._run is not None:
            self._run.stop(signal.SIGTERM)

    def _follow_states(self) -> None:
        for state in self._front.states():
            if (run := self._run) is None:
                continue
            if state.ready:
                run.came_at = time.monotonic()
                hosts = ", ".join(host.name for host in run.hosts)
                say(f"tpimpi: ready on {hosts}")
            elif run.gone_at is None:
                run.gone_at = time.monotonic()

    # Hosts

    def _look(self, *, first: bool) -> tuple[LocalFacts, list[HostChecks]]:
        """This machine, and the hosts that ranks can be started on, this one first; those that sleep are waited for at the
        `first` start alone. Raises InputError where it cannot, StarError."""
        if self._options.hostfile is None:
            ours, here = local_facts(), HostChecks(Host("localhost", "localhost", self._options.ranks), here=True)
            check_local(here, ours)
            found = [here]
        else:
            ours, found = probe_hosts(self._options.hostfile, self._options.ssh)
            if self._options.wake and (asleep := self._asleep(found)):
                found = self._wake(asleep, found, wait=first)
        seal, able = seal_given(self._arguments), [one for one in found if not one.wrong]
        # Where all are names of this machine there are no links to others.
        if seal == ON or (seal != OFF and not all(one.here for one in able)):
            check_keys(able)
        if self._here == found[0].host and not found[0].here:  # its own network is gone, and its address with it
            found[0] = HostChecks(found[0].host, here=True)
            check_local(found[0], ours)
        if not found[0].here:
            raise InputError(
                f"--hostfile {self._options.hostfile}: {found[0].host.name}, its first host, is another machine; up is "
                "to be started on that of rank 0, which is the first: write this machine's line first"
            )
        if found[0].wrong:
            raise InputError(f"{found[0].host.name} (this machine): {_first_wrong(found[0])}")
        self._here = found[0].host
        now = time.monotonic()
        self._left_out = {name: until for name, until in self._left_out.items() if until > now}
        usable = []
        for one in found:
            if one.wrong:
                say(f"tpimpi: {one.host.name} is left out: {_first_wrong(one)}")
            elif one.host.name not in self._left_out:
                usable.append(one)
        return ours, usable

    def _asleep(self, found: Sequence[HostChecks]) -> list[str]:
        """Network cards of hosts that are not to be used as they are. Raises InputError: see macs_of."""
        assert self._options.hostfile is not None
        macs = macs_of(self._options.hostfile)
        return [macs[one.host.name] for one in found if one.wrong and one.host.name in macs]

    def _wake(self, macs: list[str], found: list[HostChecks], *, wait: bool) -> list[HostChecks]:
        """The hosts, looked at until these are awake too, or for WAKE_S, if we `wait`."""
        assert self._options.hostfile is not None
        if not wait:
            wake(macs)
            return found
        say(f"tpimpi: waking {len(macs)} of the machines, up to {WAKE_S:.0f} s")
        end = time.monotonic() + WAKE_S
        while True:
            wake(macs)
            self._told_to_end.wait(WAKE_LOOK_S)
            _, found = probe_hosts(self._options.hostfile, self._options.ssh)
            if not self._asleep(found) or time.monotonic() > end or self._told_to_end.is_set():
                return found

    def _blame(self, run: RunUnderMpirun) -> None:
        """Leave out the host that a run ended for, if it ended before it began, or not for the first time, or computes
        wrongly."""
        now, left_out = time.monotonic(), run.unreached_hosts
        if (host := run.blamed_host) is not None:
            again = now - self._blamed.get(host.name, -BLAMED_AGAIN_S) < BLAMED_AGAIN_S
            self._blamed[host.name] = now
            if again or not run.came or run.computes_wrongly:
                left_out.append(host)
        for host in left_out:
            self._left_out[host.name] = now + LEFT_OUT_S
            say(f"tpimpi: {host.name} is left out for {LEFT_OUT_S / 60:.0f} minutes, for what the lines above say")

    def _note_wrong_here(self) -> bool:
        """An audit has found a rank of this machine now; whether one had before, not long ago."""
        last, self._wrong_here = self._wrong_here, time.monotonic()
        return last is not None and self._wrong_here - last < WRONG_AGAIN_S

    # Runs

    def _start(self, folder: Path, ours: LocalFacts, found: Sequence[HostChecks]) -> RunUnderMpirun:
        hosts = [one.host for one in found]
        hostfile = folder / "hosts"
        write_hostfile(hostfile, ours.mpirun_kind, hosts)
        ranks = sum(host.ranks for host in hosts)
        options = shlex.split(mpirun_options(ours, found))
        command = mpirun_command(ours.mpirun, ours.mpirun_kind, hostfile, ranks, self._options.ssh, options)
        if self._options.run_under is not None:
            command.append(self._options.run_under)
        # -P: nothing is imported from the folder that we were started in.
        command += [sys.executable, "-P", "-m", "tpimpi", "serve", *self._arguments]
        self._run = RunUnderMpirun(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,  # launchers tell of trouble on either
                text=True,
                errors="replace",
                env={**os.environ, **mpirun_environment(ours.mpirun_kind)},
                start_new_session=True,  # a Ctrl-C is for us
            ),
            hosts,
        )
        return self._run

    def _until_end(self, run: RunUnderMpirun) -> int:
        """The exit code of mpirun, which is ended where it stays though its rank 0 has gone, or we were told to end."""
        deadline = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = run.process.wait(LOOK_S)
                run.relay.join(END_S)
                run.stop(signal.SIGKILL)  # what it left behind on this machine
                return code
            now = time.monotonic()
            if deadline is None and self._told_to_end.is_set():
                deadline = now + (self._serving.grace if run.came else 0.0) + END_S
            elif deadline is None and run.gone_at is not None:
                deadline = run.gone_at + END_S
            if deadline is not None and now > deadline:
                run.stop(signal.SIGKILL)
                deadline = now + END_S


def _front_has_ended() -> int:
    say("tpimpi: the HTTP front has ended; up ends here")
    return 1


def _pause(failed: int) -> float:
    """Seconds until the next start, after so many that failed."""
    return min(2.0 ** (failed - 1), LONGEST_PAUSE_S) if failed > 0 else 0.0


def _first_wrong(one: HostChecks) -> str:
    wrong = next(check for check in one.checks if check.state == WRONG)
    return f"{wrong.what}: {' '.join(wrong.text.split())}"
