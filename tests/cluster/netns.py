"""Two "nodes" of this machine: network namespaces with an address each, joined by a veth pair; needs root and iproute2.

``python -m tests.cluster.netns COMMAND...`` runs a command on both, with torchrun.sh's NODE_RANK and MASTER_ADDR set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.pool import free_ports


def missing() -> str | None:
    """Return why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "not installed: ip (apt-get install iproute2)"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Node:
    """One namespace; ``rank`` 0 is where the nodes meet."""

    def __init__(self, rank: int, name: str, port: int):
        self.name = name
        self.address = f"10.213.77.{rank + 1}"
        self.environment = {
            **os.environ,
            "NNODES": "2",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": "10.213.77.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "veth",  # gloo would take the address of the host's name
            "OMP_NUM_THREADS": "1",
        }

    def start(self, command: list[str], **options: object) -> subprocess.Popen:
        """``command`` on this node, in a process group of its own."""
        run = ["ip", "netns", "exec", self.name, *command]
        return subprocess.Popen(run, env=self.environment, start_new_session=True, **options)  # type: ignore[call-overload]

    def link(self, state: str) -> None:
        """Set its cable ``up`` or ``down``."""
        ip("-n", self.name, "link", "set", "veth", state)


@contextmanager
def nodes() -> Iterator[list[Node]]:
    """Two nodes that see each other and nothing else. Raises OSError if the kernel refuses."""
    (port,) = free_ports(1)
    pair = [Node(rank, f"megaopus-{os.getpid()}-{rank}", port) for rank in range(2)]
    made: list[Node] = []
    try:
        for node in pair:
            ip("netns", "add", node.name)
            made.append(node)
        ip("-n", pair[0].name, "link", "add", "veth", "type", "veth", "peer", "name", "veth", "netns", pair[1].name)
        for node in pair:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "veth")
            ip("-n", node.name, "link", "set", "lo", "up")
            node.link("up")
        yield pair
    finally:
        for node in made:
            ip("netns", "del", node.name)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


if __name__ == "__main__":
    with nodes() as pair:
        started = [node.start(sys.argv[1:]) for node in pair]
        sys.exit(max(process.wait() for process in started))
