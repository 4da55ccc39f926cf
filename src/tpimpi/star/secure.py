"""How a run's links are sealed when it begins: every pair of ranks shakes hands (see noise), over rank 0.

Rank 0 asks who the ranks are, and says what it understood; on that each pair shakes hands. What two other ranks say to each
other in it is carried by rank 0, which may read it, as anybody may, and cannot change it unnoticed: so ranks that reach
rank 0 alone are sealed as well. Until all are done the messages are plain; nothing in them is secret.

What both sides of a handshake must have understood alike goes into its prologue: versions, the job (16 random bytes),
cipher, the hosts of all ranks, and which two ranks these are.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tpimpi import __version__
from tpimpi.errors import InputError, StarError, TpimpiError, shorten
from tpimpi.modules import without_module
from tpimpi.star.channel import HANDSHAKE, Channel
from tpimpi.star.ciphers import AES, CHACHA, native_cipher
from tpimpi.star.seal import LinkSecrets, Seal
from tpimpi.system.cpu import has_aes
from tpimpi.system.handshakes import HandshakeError, Handshakes, Known, open_handshakes
from tpimpi.system.launcher import launcher_kind
from tpimpi.system.link_keys import MAKE_KEYS, MAKE_OWN_KEYS, REPLACE_KEYS, LinkKeys, key_file, read_keys

with without_module("typing_extensions"):
    import msgspec

PROTOCOL_VERSION = 1
# Rank 0 waits so long for all ranks' next messages: no heartbeat would notice yet that one was lost. (This module
# is loaded before MPI first waits for all ranks.) Others wait for rank 0 a little longer, which has to say who is missing.
ANSWER_TIMEOUT_S, LONGER_S = 7.0, 2.0
MAX_PROBLEM_CHARACTERS = 400


class _Said(msgspec.Struct, frozen=True):
    """To rank 0: who this rank is, and messages of handshakes in hexadecimal digits, by the rank that they are for. Unknown
    fields are left out, so that versions can tell one another apart."""

    protocol: int = PROTOCOL_VERSION
    version: str = __version__
    host: str = ""  # as its keys have it
    machine: str = ""  # as the system has it
    aes: bool = False
    messages: dict[int, str] = {}
    problem: str = ""  # why this rank cannot go on


class _Told(msgspec.Struct, frozen=True):
    """From rank 0: what it understood, and messages of handshakes, by the rank that they are from."""

    job: str = ""
    cipher: str = ""
    hosts: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    messages: dict[int, str] = {}
    refused: int = 0  # the run ends, with this exit code


M = TypeVar("M", _Said, _Told)


def begin_handshakes() -> Handshakes:
    """For `seal_channel`; before MPI begins, so that no rank keeps the others waiting for its first word. To be closed."""
    return open_handshakes(own_process=None not in map(native_cipher, (AES, CHACHA)))


def seal_channel(channel: Channel, handshakes: Handshakes) -> Seal:
    """Every rank calls it, before anything else is sent: shake hands with all others, and seal the channel.

    Raises InputError where a host has no keys, keys of another home, or not the key of the host that it says it is: on rank
    0 with what to say; on the others too, which have nothing to say. Raises StarError where one does not answer.
    """
    channel.seal = (_seal_as_hub if channel.rank == 0 else _seal_as_other)(channel, handshakes)
    return channel.seal


@dataclass(frozen=True)
class _Run:
    """What a rank knows before it shakes hands: `hosts` are those of the ranks' keys, `names` see _names."""

    handshakes: Handshakes
    keys: LinkKeys
    job: str
    cipher: str
    hosts: tuple[str, ...]
    names: tuple[str, ...]
    rank: int

    def _known(self, other: int) -> Known:
        """Raises InputError."""
        first, second = sorted((self.rank, other))
        facts = (PROTOCOL_VERSION, __version__, self.job, self.cipher, self.hosts, self.names, first, second)
        public = self.keys.public_key(self.hosts[other])
        if public is None:
            raise InputError(
                f"{_named(other, self.hosts[other])} has link keys of another home than {self.keys.host}, whose keys are of "
                f"{self.keys.made}; make new ones for all hosts: {REPLACE_KEYS}"
            )
        return Known(self.keys.private_key(), public, msgspec.json.encode(facts))

    def begin(self, other: int) -> str:
        """The first message of this rank, which is the lower one, to another. Raises InputError."""
        return self.handshakes.begin(other, self._known(other)).hex()

    def finish(self, other: int, message: str) -> LinkSecrets:
        """What this rank, which began, shares with another, which answered so. Raises InputError."""
        try:
            return LinkSecrets.of(self.handshakes.finish(other, _from_hex(message)), initiator=True)
        except HandshakeError:
            raise InputError(self._not_its_key(other)) from None

    def answer(self, other: int, message: str) -> tuple[str, LinkSecrets]:
        """Our answer to another, which began so, and what we share with it then. Raises InputError."""
        known = self._known(other)
        try:
            ours, secrets = self.handshakes.answer(known, _from_hex(message))
        except HandshakeError:
            raise InputError(self._not_its_key(other)) from None
        return ours.hex(), LinkSecrets.of(secrets, initiator=False)

    def _not_its_key(self, other: int) -> str:
        host = shorten(self.hosts[other])
        return (
            f"{_named(other, self.hosts[other])} has not the key that {self.keys.host} knows {host} by: their keys are of "
            f"different homes, or somebody poses as {host}; to make new ones for all hosts: {REPLACE_KEYS}"
        )


def _named(rank: int, host: str) -> str:
    return f"r{rank} {shorten(host)}".rstrip()


def _own_keys() -> LinkKeys:
    """Raises InputError where there are none."""
    keys = read_keys()
    if keys is None:
        make = MAKE_OWN_KEYS if launcher_kind() == "Slurm" else MAKE_KEYS
        raise InputError(
            f"links to other machines are sealed, and this host has no keys for that ({key_file()}); make them, once: {make}"
            " (or, where you trust network and machines: --seal off)"
        )
    return keys


def _seal_as_hub(channel: Channel, handshakes: Handshakes) -> Seal:
    others = range(1, channel.size)
    try:
        run = _open(channel, handshakes)
        heard = _hear_all(channel, run.hosts)
        secrets = {rank: run.finish(rank, heard[rank].messages.get(0, "")) for rank in others}
        for _ in range(2):  # the first messages of the other pairs, then their answers
            for rank in others:
                theirs = {by: said.messages[rank] for by, said in heard.items() if rank in said.messages}
                _tell(channel, rank, _Told(messages=theirs))
            heard = _hear_all(channel, run.hosts)
        for rank in others:
            _tell(channel, rank, _Told())
    except TpimpiError as error:
        for rank in others:
            _tell(channel, rank, _Told(refused=error.exit_code))
        raise
    return Seal(run.cipher, secrets, hosts=run.names)


def _open(channel: Channel, handshakes: Handshakes) -> _Run:
    """Rank 0: who all are; its handshakes with them are begun."""
    keys, others = _own_keys(), range(1, channel.size)
    heard = _hear_all(channel, [""] * channel.size)
    for rank, said in heard.items():
        if (said.protocol, said.version) != (PROTOCOL_VERSION, __version__):
            raise InputError(
                f"{_named(rank, said.host)} runs tpimpi {shorten(said.version)}, rank 0 runs {__version__}; "
                "install the same version on every host"
            )
    cipher = AES if has_aes() and all(said.aes for said in heard.values()) else CHACHA
    hosts = (keys.host, *(heard[rank].host for rank in others))
    names = _names(hosts, (platform.node(), *(heard[rank].machine for rank in others)))
    run = _Run(handshakes, keys, os.urandom(16).hex(), cipher, hosts, names, 0)
    firsts = {rank: run.begin(rank) for rank in others}
    for rank, first in firsts.items():
        _tell(channel, rank, _Told(run.job, cipher, hosts, names, {0: first}))
    return run


def _names(hosts: Sequence[str], machines: Sequence[str]) -> tuple[str, ...]:
    """What the ranks are called, on all ranks: by the host that each proves to be. Where machines have the same keys,
    as those of a cluster that share a home folder, by what each says that it is called: they are not taken for one."""
    of_host: dict[str, set[str]] = {}
    for host, machine in zip(hosts, machines, strict=True):
        of_host.setdefault(host, set()).add(machine)
    found = zip(hosts, machines, strict=True)
    return tuple(host if len(of_host[host]) == 1 else shorten(machine) for host, machine in found)


def _hear_all(channel: Channel, hosts: tuple[str, ...] | list[str]) -> dict[int, _Said]:
    """Rank 0: what every other rank says next. Raises what one says went wrong there, which nobody has proved yet.

    `hosts` are those that they have said before."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    heard = {rank: _hear(channel, rank, _Said, deadline) for rank in range(1, channel.size)}
    for rank, said in heard.items():
        if said.problem:
            error = InputError(shorten(said.problem, MAX_PROBLEM_CHARACTERS))
            error.where = _named(rank, hosts[rank] or said.host)
            raise error
    return heard


def _seal_as_other(channel: Channel, handshakes: Handshakes) -> Seal:
    ours = channel.rank
    try:
        keys = _own_keys()
        _tell(channel, 0, _Said(host=keys.host, machine=platform.node(), aes=has_aes()))
        told = _heed(channel)
        whole = len(told.hosts) == len(told.names) == channel.size
        names = (keys.host, shorten(platform.node()))
        if not whole or told.hosts[ours] != keys.host or told.names[ours] not in names:
            raise StarError("rank 0 took this host for another one: something on the network changes messages")
        run = _Run(handshakes, keys, told.job, told.cipher, told.hosts, told.names, ours)
        answer, found = run.answer(0, told.messages.get(0, ""))
        secrets = {0: found}
        firsts = {rank: run.begin(rank) for rank in range(ours + 1, channel.size)}
        _tell(channel, 0, _Said(messages={0: answer} | firsts))
        theirs = _heed(channel).messages
        answers = {}
        for rank in range(1, ours):
            answers[rank], secrets[rank] = run.answer(rank, theirs.get(rank, ""))
        _tell(channel, 0, _Said(messages=answers))
        seconds = _heed(channel).messages
        secrets |= {rank: run.finish(rank, seconds.get(rank, "")) for rank in firsts}
        _tell(channel, 0, _Said())
    except (InputError, StarError) as error:
        if not isinstance(error, _RefusedError):
            _tell(channel, 0, _Said(host=platform.node(), problem=str(error)))
            _heed(channel)
        raise
    _heed(channel)
    return Seal(run.cipher, secrets, hosts=run.names)


class _RefusedError(InputError):
    """Rank 0 ended the run, and says why."""


def _heed(channel: Channel) -> _Told:
    """What rank 0 says next. Raises _RefusedError."""
    told = _hear(channel, 0, _Told, time.monotonic() + ANSWER_TIMEOUT_S + LONGER_S)
    if told.refused:
        error = _RefusedError("rank 0 ended the run")
        error.exit_code = InputError.exit_code if told.refused == InputError.exit_code else StarError.exit_code
        raise error
    return told


def _tell(channel: Channel, rank: int, what: _Said | _Told) -> None:
    data = np.frombuffer(msgspec.json.encode(what), np.uint8)
    channel.wait(channel.send(data, rank, HANDSHAKE), time.monotonic() + ANSWER_TIMEOUT_S)


def _hear(channel: Channel, rank: int, kind: type[M], deadline: float) -> M:
    data = channel.take(rank, HANDSHAKE, deadline)
    try:
        return msgspec.json.decode(data.tobytes(), type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise StarError(f"{channel.name(rank)} sent a handshake that makes no sense ({error})") from error


def _from_hex(message: str) -> bytes:
    try:
        return bytes.fromhex(message)
    except ValueError:
        return b""
