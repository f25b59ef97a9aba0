"""A second machine, as far as its network goes: a namespace at the other end of a link that can be cut."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """`here` and `there` are the addresses of its two ends; `there` is alone in the namespace."""

    name: str
    here: str
    there: str

    @property
    def inside(self) -> list[str]:
        """What to put before a command that shall run at the other end."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        _ip("link", "set", self.name, "down")

    def mend(self) -> None:
        _ip("link", "set", self.name, "up")


def why_no_links() -> str:
    """Why this machine cannot play two, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root: run the tests as root"
    if shutil.which("ip") is None:
        return "there is no `ip`: apt-get install iproute2"
    probe = f"nabla-{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=30, check=False)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


@contextlib.contextmanager
def linked_namespace() -> Iterator[Link]:
    """A namespace with a link to this one; both are gone at the end, whatever happens."""
    tag = secrets.token_hex(3)
    net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
    link = Link(f"nabla-{tag}", f"{net}.1", f"{net}.2")
    try:
        _ip("netns", "add", link.name)
        _ip("link", "add", link.name, "type", "veth", "peer", "name", "eth0", "netns", link.name)
        _ip("addr", "add", f"{link.here}/30", "dev", link.name)
        _ip("link", "set", link.name, "up")
        _ip("-n", link.name, "addr", "add", f"{link.there}/30", "dev", "eth0")
        _ip("-n", link.name, "link", "set", "eth0", "up")
        _ip("-n", link.name, "link", "set", "lo", "up")
        yield link
    finally:
        for gone in (["link", "del", link.name], ["netns", "del", link.name]):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*gone)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, timeout=30, check=True)
