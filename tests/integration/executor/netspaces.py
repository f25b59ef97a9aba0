"""Machines of one network, played by network namespaces: nodes, and a world with public, private and metadata servers.

All that a node's platform does to its host (forwarding, filters, routes) it does to the namespace, and this machine's
own network is left alone.
"""

import contextlib
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from services.executor.adapters.attempts import kernel, zygote
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.networks.network_host import find_tool
from services.executor.domain.network import installation_tag
from tests.integration.executor.attempts import JOB_UID, Node, why_no_bwrap

ROOT = Path(__file__).resolve().parents[3]
PUBLIC, PRIVATE, METADATA = "9.9.9.9", "10.99.0.5", "169.254.169.254"
ROUTER = "10.88.0.254"

T = TypeVar("T")


def why_no_network(as_root: bool = True) -> str:
    """What is missing for these tests, with the line that brings it, or ""."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces: sudo make test"
    packages = {"ip": "iproute2", "nft": "nftables"} | ({} if as_root else {"pasta": "passt", "setpriv": "util-linux"})
    missing = [package for tool, package in packages.items() if find_tool(tool) is None]
    return f"apt-get install {' '.join(missing)}" if missing else why_no_bwrap()


def ip(commands: str, namespace: str = "") -> None:
    at = ["-n", namespace] if namespace else []
    subprocess.run(["ip", *at, "-batch", "-"], input=commands, text=True, check=True, capture_output=True)


class Server:
    """Says who it is, and whom it sees, to everybody who connects."""

    def __init__(self, name: str, listener: socket.socket) -> None:
        self._name, self._listener = name, listener
        self.port: int = listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, peer = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(f"{self._name} sees {peer[0]}".encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Machine:
    """One namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"/run/netns/{name}"
        self._servers: list[Server] = []
        ip(f"netns add {name}\n")
        ip("link set lo up\n", name)

    def inside(self, work: Callable[[], T]) -> T:
        """Does the work in a thread that is in this namespace."""
        found: list[T] = []

        def run() -> None:
            namespace = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                kernel.enter_network(namespace)
                found.append(work())
            finally:
                os.close(namespace)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert found, "the work in the namespace failed"
        return found[0]

    def listen(self, name: str, address: str, port: int = 0) -> Server:
        server = Server(name, self.inside(lambda: socket.create_server((address, port))))
        self._servers.append(server)
        return server

    def run(self, *command: str) -> str:
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", *command], check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def python(self, code: str) -> str:
        path = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        return self.run(sys.executable, "-I", "-c", path + code)

    def interfaces(self) -> set[str]:
        lines = self.run("ip", "-o", "link").splitlines()
        return {line.split()[1].rstrip(":").partition("@")[0] for line in lines}

    def close(self) -> None:
        for server in self._servers:
            server.close()
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)


class World:
    """A router with servers behind it, and machines that are its neighbours: 10.88.0.1, .2, ..."""

    def __init__(self) -> None:
        self._tag = f"nbt{secrets.token_hex(3)}"
        self._numbers = itertools.count(1)
        self.machines: list[Machine] = []
        self.router = self._machine()
        ip(
            f"link add br0 type bridge\nlink set br0 up\naddress add {ROUTER}/24 dev br0\n"
            + "".join(f"address add {address}/32 dev lo\n" for address in (PUBLIC, PRIVATE, METADATA)),
            self.router.name,
        )
        self.public = self.router.listen("public", PUBLIC, 443)
        self.private = self.router.listen("private", PRIVATE, 5432)
        self.metadata = self.router.listen("metadata", METADATA, 80)

    def _machine(self) -> Machine:
        machine = Machine(f"{self._tag}-{len(self.machines)}")
        self.machines.append(machine)
        return machine

    def neighbour(self) -> tuple[Machine, str]:
        machine, number = self._machine(), next(self._numbers)
        address = f"10.88.0.{number}"
        ip(
            f"link add p{number} type veth peer name up0 netns {machine.name}\nlink set p{number} master br0 up\n",
            self.router.name,
        )
        ip(
            f"address add {address}/24 dev up0\nlink set up0 up\nroute add default via {ROUTER}\n",
            machine.name,
        )
        machine.inside(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("0"))  # whatever this machine has
        return machine, address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.close()


class NodeOn(Node):
    """A node whose shims live on a machine of the world, as root or as an ordinary user."""

    def __init__(self, machine: Machine, path: Path, resolver: str, uid: int | None) -> None:
        self.machine, self.uid = machine, uid
        self.installation = installation_tag(str(path))
        self._resolver = path / "resolv.conf"
        self._resolver.write_text(resolver)
        self._resolver.chmod(0o644)
        super().__init__(path, control_groups=True)

    def start_zygote(self) -> None:
        user = [] if self.uid is None else ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]
        prepare = f'mount --bind {self._resolver} "$(readlink -f /etc/resolv.conf)" && exec "$@"'
        command = ["nsenter", f"--net={self.machine.path}", "unshare", "--mount", "/bin/sh", "-c", prepare, "sh"]
        command += [*user, sys.executable, "-I", str(zygote.__file__), str(self.socket), str(os.getpid())]
        self.zygote = subprocess.Popen(command, env={}, cwd="/", start_new_session=True)

    def prepare(self, command: list[str] | str, **fields: Any) -> AttemptFolder:
        folder = super().prepare(command, **fields | {"run_as_uid": JOB_UID if self.uid is None else None})
        if self.uid is not None:
            for path in (folder.path.parent, folder.path, *folder.path.rglob("*")):
                os.chown(path, self.uid, self.uid)
        return folder

    def raise_wall(self, allowed: tuple[str, ...] = ()) -> None:
        self.machine.python(
            "from services.executor.adapters.networks.network_host import raise_wall; "
            f"raise_wall({self.installation!r}, '100.96.0.0/16', {list(allowed)!r})"
        )


@contextlib.contextmanager
def node_on(machine: Machine, resolver: str = "nameserver 127.0.0.53\n", uid: int | None = None) -> Iterator[NodeOn]:
    path = Path(tempfile.mkdtemp(prefix="nabla-node-"))
    path.chmod(0o711)
    if uid is not None:
        os.chown(path, uid, uid)
    node = NodeOn(machine, path, resolver, uid)
    try:
        if uid is None:
            node.raise_wall()
        yield node
    finally:
        node.close()
        shutil.rmtree(path)
