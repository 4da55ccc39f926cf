"""What the devices of an emulated home run besides programs: shell scripts that make, enter and stand for them; mpirun."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tpimpi.errors import InputError

NETWORK = "10.77.0.0/24"

# Becomes what holds the namespaces of a device: $1 name, $2 its folder, $3 the home's, $4 loop device or "".
HOLDER = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$3/hosts" /etc/hosts
if [ -e /etc/hostname ]; then echo "$1" > "$2/hostname"; mount --bind "$2/hostname" /etc/hostname; fi
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
if [ -d /sys/fs/cgroup ]; then # /sys shows the interfaces of the namespace it was mounted in
    mkdir "$2/sys"; mount --rbind /sys/fs/cgroup "$2/sys"; mount -t sysfs sysfs /sys
    mount --rbind "$2/sys" /sys/fs/cgroup; umount -l "$2/sys"; rmdir "$2/sys"
fi
for f in all default; do echo 1 > /proc/sys/net/ipv6/conf/$f/disable_ipv6 || :; done 2>/dev/null
if [ -n "$4" ]; then mount "$4" "$2/home"; fi
echo ready
exec sleep infinity
"""
# NAME PROGRAM…: runs the program on the device.
ENTER = """#!/bin/sh
here={home}; name=$1; shift
. "$here/where/$name" || exit 125
for f in $groups; do echo $$ > "$f" || exit 125; done
exec nsenter --target "$holder" --net --uts --ipc --mount -- "$here/there" "$name" "$PWD" "$@"
"""
# NAME FOLDER PROGRAM…: the second half of it, already on the device.
THERE = """#!/bin/sh
. {home}/env/"$1"; cd "$2" 2>/dev/null || cd /; shift 2
exec "$@"
"""
# PROGRAM…: each rank, since launchers give ranks the variables of rank 0's device.
RANK = """#!/bin/sh
. {home}/env/"$(uname -n)"
exec "$@"
"""
# What launchers take for ssh: [OPTIONS] NAME COMMAND…, which a shell on the device gets as one text.
AGENT = """#!/bin/sh
while :; do case $1 in -x|-X|-T|-q|-n|-f|-A|-a) shift;; -o|-l|-p) shift 2;; *) break;; esac; done
name=$1; shift
exec {home}/enter "$name" /bin/sh -c "$*"
"""


def write_scripts(home: Path, names: Sequence[str], addresses: Sequence[str]) -> None:
    """Put what all devices share into the home's folder: the scripts, and /etc/hosts."""
    for name in ("where", "env"):
        (home / name).mkdir()
    lines = [f"{address} {name}" for address, name in zip(addresses, names, strict=True)]
    (home / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    for name, text in {"enter": ENTER, "there": THERE, "rank": RANK, "agent": AGENT}.items():
        (home / name).write_text(text.replace("{home}", str(home)))
        (home / name).chmod(0o755)


def launcher(mpi: str, agent: Path) -> tuple[list[str], dict[str, str]]:
    """mpirun with what it needs for the devices, and variables for it and the ranks."""
    env = {"PRTE_MCA_hwloc_default_binding_policy": "none"}
    if mpi == "openmpi":
        env |= {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
        if (program := shutil.which("mpirun")) is None:
            raise InputError("no mpirun; source .venv/bin/activate")
        command = [program, "--prtemca", "plm_ssh_agent", str(agent), "--prtemca", "prte_if_include", NETWORK]
        return [
            *command,
            "--mca",
            "pml",
            "ob1",
            "--mca",
            "btl",
            "self,tcp",
            "--mca",
            "btl_tcp_if_include",
            NETWORK,
        ], env
    if mpi != "mpich":
        raise InputError(f"--mpi is {mpi!r}, must be openmpi or mpich")
    prefix = Path(sys.prefix) / "mpich"
    if not (program_path := prefix / "bin" / "mpirun").exists():
        raise InputError(f"no MPICH in {prefix}; set it up with: bash jobs/test.sh")
    env |= {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(prefix / "lib")}
    return [str(program_path), "-launcher", "ssh", "-launcher-exec", str(agent), "-iface", "eth0"], env
