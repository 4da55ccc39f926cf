"""Keys of sealed links on the hosts of a hostfile: `doctor --make-keys` puts them there, and `doctor` looks whether they are
of one home."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import signal
import subprocess
from collections.abc import Sequence

import msgspec

from tpimpi.diagnostics.doctor.host_findings import NOTE, OK, WRONG, HostChecks
from tpimpi.diagnostics.doctor.ssh import PROBE_S, LocalFacts, ssh_command
from tpimpi.errors import InputError, TpimpiError, shorten
from tpimpi.system.link_keys import (
    MAKE_KEYS,
    NEW,
    REPLACE,
    REPLACE_KEYS,
    SAID,
    KeysFound,
    encode_keys,
    find_keys,
    make_keys,
    put_keys,
)

OLD_KEYS_DAYS = 365  # after which new ones are advised
_ROTATE = "--make-keys --rotate-keys"


def check_keys(found: Sequence[HostChecks], today: datetime.date | None = None) -> None:
    """What is wrong with the keys of each host that could be asked, where there are several; of hosts of which nothing was
    said about keys yet."""
    if len(found) < 2:
        return
    today = today or datetime.datetime.now(datetime.UTC).date()
    keys = [(one, _keys_of(one)) for one in found]
    tables = {one.host.name: have.table for one, have in keys if have is not None and have.table}
    here = next((one.host.name for one in found if one.here and one.host.name in tables), next(iter(tables), ""))
    for one, have in keys:
        if have is None or any(check.what == "keys" for check in one.checks):
            continue
        if have.problem:
            one.add("keys", WRONG, have.problem)
        elif not have.there:
            one.add("keys", WRONG, f"none, which a run over several hosts needs; type: {MAKE_KEYS}")
        elif have.table != tables[here]:
            one.add(
                "keys",
                WRONG,
                f"of {have.made}, and of another home than those of {here}, so that they cannot meet; "
                f"type: {REPLACE_KEYS}",
            )
        elif (made := _day(have.made)) is None:
            one.add("keys", WRONG, f"made on no day: {shorten(have.made)!r}; type: {REPLACE_KEYS}")
        elif (age := (today - made).days) > OLD_KEYS_DAYS:
            one.add("keys", NOTE, f"of {have.made}, {age} days old; for new ones type: {REPLACE_KEYS}")
        else:
            one.add("keys", OK, f"of {have.made}, in {have.file}{_shared(one, have)}")


def _keys_of(one: HostChecks) -> KeysFound | None:
    """What a host told of its keys; None where it did not."""
    try:
        return msgspec.convert(one.facts.get("keys"), KeysFound)
    except msgspec.ValidationError:
        return None


def _day(made: str) -> datetime.date | None:
    """The day that a host says; None where it is none."""
    try:
        return datetime.date.fromisoformat(made)
    except ValueError:
        return None


def _shared(one: HostChecks, have: KeysFound) -> str:
    return "" if have.host == one.host.name else f", those of the host {have.host}"


# Making


def make_home(found: Sequence[HostChecks], ours: LocalFacts, ssh: str, *, rotate: bool) -> None:
    """Make keys for these hosts, which were looked at, and put each host's file there: where all of them can be asked, or
    nowhere. What became of it is among their checks. Raises InputError where there are keys and they are not to `rotate`."""
    silent = [one for one in found if _keys_of(one) is None]
    for one in silent:
        why = one.facts.get("keys_error", "it could not be asked; mend what is said above")
        one.add("keys", WRONG, f"no keys were made, for no host, because of this one: {why}; then try again")
    if silent:
        return
    have = [one for one in found if (keys := _keys_of(one)) is not None and keys.there]
    if have and not rotate:
        raise InputError(
            f"there are keys already on {_names(have)}, so none were made; look at them without --make-keys, or replace "
            f"those of all hosts: {_ROTATE}"
        )
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    files = make_keys([one.host.name for one in found], today)
    # This machine last: where another host fails, its own keys are as they were.
    order = sorted(found, key=lambda one: one.here)
    for number, one in enumerate(order):
        data = encode_keys(files[one.host.name])
        try:
            now = put_keys(data, replace=rotate) if one.here else _put_over_ssh(one, ours, ssh, data, replace=rotate)
            if now.problem:
                raise TpimpiError(now.problem)
        except TpimpiError as error:
            _say_failed(order[:number], one, order[number + 1 :], str(error))
            return
        one.facts["keys"] = msgspec.to_builtins(now)


def _say_failed(done: Sequence[HostChecks], failed: HostChecks, left: Sequence[HostChecks], why: str) -> None:
    where = f"the new ones are on {_names(done)} alone" if done else "no host has new ones"
    failed.add("keys", WRONG, f"not written: {why}; {where}; mend that, and type again, with {_ROTATE}")
    for one in done:
        one.add("keys", NOTE, f"new ones, without {failed.host.name}, where they could not be written")
    for one in left:
        one.add("keys", NOTE, f"as before, since they could not be written on {failed.host.name}")


def _names(hosts: Sequence[HostChecks]) -> str:
    return ", ".join(one.host.name for one in hosts)


def _put_over_ssh(one: HostChecks, ours: LocalFacts, ssh: str, data: bytes, *, replace: bool) -> KeysFound:
    """Have a host take its file from the standard input of a program there. Raises TpimpiError."""
    program = f"{shlex.quote(ours.python)} -m tpimpi.system.link_keys {REPLACE if replace else NEW}"
    try:
        process = subprocess.Popen(
            [*ssh_command(ssh, one.host), program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that no ssh asks the terminal
        )
    except OSError as error:
        raise TpimpiError(f"{ssh}: {error.strerror}") from error
    try:
        out, err = process.communicate(data, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        raise TpimpiError(f"it did not say in {PROBE_S:.0f} s whether it has them") from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(SAID):
            with contextlib.suppress(msgspec.MsgspecError, RecursionError):
                return msgspec.json.decode(line.removeprefix(SAID), type=KeysFound)
    said = " ".join(err.decode(errors="replace").split())[-300:]
    raise TpimpiError(f"it did not say that it has them ({said or 'nothing was said'})")


def make_own_keys(*, rotate: bool) -> None:
    """Keys of a home of one host, which this machine is with all that share its home folder; says where. Raises InputError
    where there are some and they are not to `rotate`, and StorageError."""
    there = find_keys()
    if there.there and not rotate:
        state = f"cannot be used: {there.problem}" if there.problem else f"is of {there.made}"
        raise InputError(f"{there.file} is there already, and {state}; to replace it, give {_ROTATE}")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = platform.node()
    now = put_keys(encode_keys(make_keys([name], today)[name]), replace=rotate)
    print(
        f"keys of {now.made} are in {now.file}, for all hosts that share this folder; for others than those: {MAKE_KEYS}"
        if now.host == name
        else f"keys in {now.file} are those of {now.host}"
    )
