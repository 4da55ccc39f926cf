"""Two emulated hosts: network namespaces on one link."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


class Pair:
    """Two network namespaces, a and b: 10.99.0.1 and 10.99.0.2 on eth0, and docker0 with 172.17.0.1 on each, which is up
    without a carrier, as Docker's is as long as it has no containers."""

    def __init__(self) -> None:
        self.a, self.b = (f"tpd{os.getpid()}{end}" for end in "ab")

    def __enter__(self) -> Pair:
        ip = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if os.geteuid() != 0 or ip is None:
            pytest.skip("network namespaces need root and the program ip")
        self.ip = ip
        if self.do("netns", "add", self.a).returncode:
            pytest.skip("this machine does not let us make network namespaces")
        try:
            steps = [f"netns add {self.b}", f"link add eth0 netns {self.a} type veth peer name eth0 netns {self.b}"]
            for number, name in enumerate((self.a, self.b), start=1):
                steps += [
                    f"-n {name} link add docker0 type veth peer name docker1",
                    f"-n {name} addr add 10.99.0.{number}/24 dev eth0",
                    f"-n {name} addr add 172.17.0.1/16 dev docker0",
                    *(f"-n {name} link set {interface} up" for interface in ("lo", "eth0", "docker0")),
                ]
            for step in steps:
                done = self.do(*step.split())
                assert done.returncode == 0, f"ip {step}: {done.stderr}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def do(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.ip, *arguments], capture_output=True, text=True, timeout=30, check=False)

    def __exit__(self, *exception: object) -> None:
        for name in (self.a, self.b):
            self.do("netns", "del", name)

    def on(self, name: str, *command: str) -> list[str]:
        return [self.ip, "netns", "exec", name, *command]

    def unreachable(self) -> None:
        """From b nothing comes to 10.99.0.1, as behind a firewall."""
        assert self.do("-n", self.b, "route", "add", "blackhole", "10.99.0.1/32").returncode == 0
