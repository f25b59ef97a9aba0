"""The gateway's settings."""

from __future__ import annotations

from functools import cached_property
from urllib.parse import urlsplit

from libs.common.settings import Settings
from services.gateway.domain.origins import Origins, origins_of


class GatewaySettings(Settings):
    # Where the API and the web interface listen; the front door forwards here. Port 0 picks a free one.
    http_host: str = "127.0.0.1"
    http_port: int = 0
    # Random, made once by the launcher; tells a client whether this installation is one on its own machine.
    installation_id: str = ""
    # Host names that are answered, besides loopback and the front door's own.
    allowed_hosts: tuple[str, ...] = ()
    # Host on which browsers fetch stored files. Empty: 127.0.0.1 for an interface on localhost, else s3.<apps_domain>.
    content_host: str = ""
    # Proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, separated by commas.
    trusted_proxies: str = "127.0.0.1"
    body_limit_bytes: int = 2_000_000
    fileset_body_limit_bytes: int = 8_000_000
    body_timeout_s: float = 30.0
    # Seconds between looks at the stored log while a client follows it: the net beneath the live lines.
    follow_poll_s: float = 2.0

    @cached_property
    def origins(self) -> Origins:
        door = urlsplit(self.front_door).hostname or "localhost"
        door = f"[{door}]" if ":" in door else door
        nodes = (self.node_address,) if self.node_address else ()
        return origins_of(door, (*self.allowed_hosts, *nodes), self.content_host, self.apps_domain)

    @property
    def door_port(self) -> int:
        url = urlsplit(self.front_door)
        return url.port or (443 if url.scheme == "https" else 80)
