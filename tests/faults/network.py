"""Two hosts on this machine: network namespaces that a cable joins, which can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

SUBNET = "10.213.77"


class Hosts:
    """Two namespaces, 0 and 1, each with one end of a veth pair."""

    def __init__(self, name: str) -> None:
        self.names = [f"{name}-0", f"{name}-1"]
        self.devices = [f"{name}v0", f"{name}v1"]

    def address(self, host: int) -> str:
        return f"{SUBNET}.{host + 1}"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run on that host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def cut(self) -> None:
        """Nothing gets through any more, and neither side is told."""
        # Both ends, since one that is up would still see that the other one is not.
        for host, device in enumerate(self.devices):
            _ip("-n", self.names[host], "link", "set", device, "down")

    def kill(self) -> None:
        """Everything that runs on them."""
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def missing() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if shutil.which("ip") is None:
        return "there is no `ip`: apt-get install iproute2"
    name = f"eplb{os.getpid()}p"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces need root: {made.stderr.strip()}"
    entered = subprocess.run(
        ["ip", "netns", "exec", name, "true"], capture_output=True, text=True, check=False
    )
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return f"network namespaces cannot be entered: {entered.stderr.strip()}" if entered.returncode else ""


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    # Short, since the name of a device has 15 characters at most.
    hosts = Hosts(f"eplb{os.getpid() % 10**6}")
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
        first, second = hosts.devices
        _ip(
            "link",
            "add",
            first,
            "netns",
            hosts.names[0],
            "type",
            "veth",
            "peer",
            second,
            "netns",
            hosts.names[1],
        )
        for host, device in enumerate(hosts.devices):
            _ip("-n", hosts.names[host], "address", "add", f"{hosts.address(host)}/24", "dev", device)
            _ip("-n", hosts.names[host], "link", "set", device, "up")
            _ip("-n", hosts.names[host], "link", "set", "lo", "up")
        yield hosts
    finally:
        hosts.kill()
        # With a namespace go the devices in it.
        for name in hosts.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
