"""Which host names are ours, and when a browser's cookie may stand for a person.

The gateway listens behind a proxy that other names reach too: the host name tells a page of the interface from
content of a tenant, and from a foreign page whose DNS name was pointed at us.
"""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True, slots=True)
class Origins:
    """The names of one installation, in lower case and without ports.

    Args:
        allowed: hosts that are answered at all.
        interface: the one host of the web interface; only there the session cookie counts.
        content: where browsers fetch stored files: never the interface's own host, as a file may be a page.
    """

    allowed: frozenset[str]
    interface: str
    content: str

    def admits(self, host_header: str) -> bool:
        return host_name(host_header) in self.allowed

    def is_interface(self, host_header: str) -> bool:
        return host_name(host_header) == self.interface

    def cookie_counts(self, host_header: str, fetch_site: str) -> bool:
        """Whether an API call may use the session cookie: only the interface's own scripts may."""
        return self.is_interface(host_header) and fetch_site == "same-origin"

    def interface_address(self, host_header: str) -> str:
        """`host:port` at which the browser that came by this host reaches the interface."""
        return self.interface + port_suffix(host_header)

    def program_address(self, host_header: str) -> str:
        """`host:port` at which programs reach endpoints by path: plain Python does not resolve every local name."""
        host = "127.0.0.1" if self.interface == "localhost" else self.interface
        return host + port_suffix(host_header)

    def content_address(self, host_header: str) -> str:
        """`host:port` for which links to stored files are signed."""
        if self.is_interface(host_header):
            return self.content + port_suffix(host_header)
        return host_header


def origins_of(front_door_host: str, extra_hosts: tuple[str, ...], content_host: str, apps_domain: str) -> Origins:
    """The origins of an installation whose front door has this host name.

    Embedded, the interface is on `localhost` and programs use 127.0.0.1, which browsers hold to be another origin.
    """
    door = front_door_host.lower()
    interface = "localhost" if door in LOOPBACK else door
    content = content_host or ("127.0.0.1" if interface == "localhost" else f"s3.{apps_domain}")
    hosts = {host.lower() for host in extra_hosts} | {door, interface}
    return Origins(LOOPBACK | hosts, interface, content.lower())


def is_own_machine(host_header: str) -> bool:
    """Whether by this name only the machine itself is reached."""
    return host_name(host_header) in LOOPBACK


def host_name(host_header: str) -> str:
    """The name in a Host header, in lower case, without its port."""
    text = host_header.strip().lower()
    if text.startswith("["):
        return text[: text.find("]") + 1]
    return text.partition(":")[0]


def port_suffix(host_header: str) -> str:
    """`:8080`, or nothing when the header names no port."""
    port = host_header.strip()[len(host_name(host_header)) :].removeprefix(":")
    return f":{port}" if port.isdigit() else ""
