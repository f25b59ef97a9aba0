"""Traefik's whole dynamic configuration as a function of what is served: who is reached under which name.

The UI is on its own host name alone, and tenants' content never is: a deployment cannot run scripts with the
rights of somebody's session. Browsers reach a deployment on NAME.<apps_domain>; programs, which often cannot
resolve that, on /d/NAME/ of the front door's other names, where cookies are dropped in both directions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

Config = dict[str, Any]

ENTRY_POINT = "web"
MAX_BODY_BYTES = 16 << 20
STAMP = "nabla-"
# The object store's own name beside the deployments', which no deployment may have.
OBJECTS_LABEL = "s3"
# Nodes are asked by TLS for names below their own: "door.<node id>.nodes.nabla".
BELOW_NODES = ".nodes.nabla"


@dataclass(frozen=True, slots=True)
class Base:
    """The platform's own addresses.

    Args:
        front_door: as people and jobs reach it, "http://127.0.0.1:8080".
        gateway: "http://host:port", or empty while it is not up.
        objects: "http://host:port" of the object store.
        node_address: as nodes on other machines reach the front door; empty: as it says itself.
    """

    front_door: str
    apps_domain: str
    gateway: str
    objects: str
    bucket: str
    node_address: str = ""

    @property
    def ui_host(self) -> str:
        """`localhost` when tenants are on `apps.localhost`; else the parent of their domain."""
        return self.apps_domain.removeprefix("apps.")

    @property
    def path_hosts(self) -> tuple[str, ...]:
        """Hosts of what programs reach by path; never the UI's."""
        given = urlsplit(self.front_door).hostname or ""
        return tuple(
            dict.fromkeys(host for host in ("127.0.0.1", given, self.node_address) if host and host != self.ui_host)
        )

    @property
    def ui_origins(self) -> tuple[str, ...]:
        """Pages that may call endpoints from a browser."""
        door = urlsplit(self.front_door)
        port = f":{door.port}" if door.port else ""
        return tuple(dict.fromkeys((f"{door.scheme}://{self.ui_host}{port}", self.front_door.rstrip("/"))))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A deployment as the front door knows it; without a target it answers 503."""

    name: str
    target: str


@dataclass(frozen=True, slots=True)
class NodeDoor:
    """Where a node lets the front door in, "host:port": for people who enter its jobs, and to ports that jobs opened.

    On loopback it is the door alone, without TLS; anywhere else there is TLS, and both ends show certificates.
    """

    node_id: str
    address: str

    @property
    def is_far(self) -> bool:
        try:
            return not ip_address(self.address.rpartition(":")[0].strip("[]")).is_loopback
        except ValueError:
            return True


@dataclass(frozen=True, slots=True)
class Pass:
    """What the front door shows to nodes, and by what it believes them; all in PEM."""

    certificate: str
    key: str = field(repr=False)
    authority: str


@dataclass(frozen=True, slots=True)
class Backend:
    """Where requests are sent.

    Args:
        name: by which the node is asked for it, by TLS; empty for a server on this machine.
    """

    url: str
    name: str = ""


NOWHERE = Backend("")


@dataclass(frozen=True, slots=True)
class Nodes:
    """How the front door reaches nodes. Without a pass it reaches none on other machines."""

    doors: tuple[NodeDoor, ...] = ()
    shown: Pass | None = None

    def backend_of(self, address: str) -> Backend:
        """What is behind a job's address: "127.0.0.1:port", or a name below a node's own; NOWHERE while it is away."""
        label, _, rest = address.partition(".")
        if ":" in address or not rest.endswith(BELOW_NODES):
            return Backend(f"http://{address}") if address else NOWHERE
        node_id = rest.removesuffix(BELOW_NODES)
        door = next((each for each in self.doors if each.node_id.lower() == node_id and each.is_far), None)
        return self._by_tls(door, label) if door else NOWHERE

    def door_of(self, door: NodeDoor) -> Backend:
        return self._by_tls(door, "door") if door.is_far else Backend(f"http://{door.address}")

    def _by_tls(self, door: NodeDoor, label: str) -> Backend:
        name = f"{label}.{door.node_id.lower()}{BELOW_NODES}"
        return Backend(f"https://{door.address}", name) if self.shown else NOWHERE


NO_NODES = Nodes()


def front_config(base: Base, endpoints: Iterable[Endpoint], nodes: Nodes = NO_NODES) -> Config:
    """The configuration of Traefik's file provider."""
    http: Config = {"routers": {}, "services": {}, "middlewares": _shared(base)}
    if base.gateway:
        _add_gateway(http, base)
    _add_objects(http, base)
    for endpoint in sorted(endpoints, key=lambda each: each.name):
        _add_endpoint(http, base, endpoint, nodes)
    for door in sorted(nodes.doors, key=lambda each: each.node_id):
        _add_door(http, base, door, nodes)
    return {"http": http}


def stamped(config: Config) -> tuple[str, str]:
    """The file's text, and the name of a middleware in it that changes with its content.

    Traefik applies a file as a whole, so that when its API shows the stamp, all of the file is live.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    stamp = STAMP + digest[:16]
    mark = {stamp: {"headers": {"customResponseHeaders": {"X-Nabla-Configuration": digest[:16]}}}}
    http = config["http"] | {"middlewares": config["http"]["middlewares"] | mark}
    return json.dumps({"http": http}, indent=1, sort_keys=True), stamp


def endpoint_path(name: str) -> str:
    return f"/d/{name}"


def endpoint_host(name: str, apps_domain: str) -> str:
    return f"{name}.{apps_domain}"


def _shared(base: Base) -> Config:
    return {
        "endpoint-cors": _cors(base, ["GET", "POST", "OPTIONS"], ["Authorization", "Content-Type"]),
        "objects-cors": _cors(base, ["GET", "HEAD", "PUT", "OPTIONS"], ["Content-Type", "Content-MD5", "Range"]),
        "body-limit": {"buffering": {"maxRequestBodyBytes": MAX_BODY_BYTES}},
        "no-cookies": {
            "headers": {"customRequestHeaders": {"Cookie": ""}, "customResponseHeaders": {"Set-Cookie": ""}}
        },
    }


def _cors(base: Base, methods: list[str], headers: list[str]) -> Config:
    return {
        "headers": {
            "accessControlAllowOriginList": list(base.ui_origins),
            "accessControlAllowMethods": methods,
            "accessControlAllowHeaders": headers,
            "accessControlMaxAge": 600,
            "addVaryHeader": True,
        }
    }


def _add_gateway(http: Config, base: Base) -> None:
    every_host = _hosts((base.ui_host, "localhost", *base.path_hosts))
    http["services"]["gateway"] = _service(base.gateway)
    http["routers"] |= {
        "ui": _router(_hosts((base.ui_host,)), "gateway", priority=10),
        "api": _router(f"{every_host} && PathPrefix(`/api/`)", "gateway", priority=50),
        "home": _router(f"{_hosts(base.path_hosts)} && Path(`/`)", "gateway", priority=20, middlewares=["to-ui"]),
    }
    # Whoever types the programs' address into a browser means the UI.
    to_ui = {"regex": "^.*$", "replacement": f"{base.ui_origins[0]}/"}
    http["middlewares"]["to-ui"] = {"redirectRegex": to_ui}


def _add_objects(http: Config, base: Base) -> None:
    """By path, with the host kept: the signature of a presigned URL covers it.

    On a domain the UI's host is the front door's, so links to stored files name a host beside the tenants'.
    """
    hosts = (*base.path_hosts, endpoint_host(OBJECTS_LABEL, base.apps_domain))
    rule = f"{_hosts(hosts)} && PathPrefix(`/{base.bucket}/`)"
    http["services"]["objects"] = _service(base.objects)
    http["routers"]["objects"] = _router(rule, "objects", priority=90, middlewares=["objects-cors"])


def _add_endpoint(http: Config, base: Base, endpoint: Endpoint, nodes: Nodes) -> None:
    name, path = f"d-{endpoint.name}", endpoint_path(endpoint.name)
    by_host = f"Host(`{endpoint_host(endpoint.name, base.apps_domain)}`)"
    by_path = f"{_hosts(base.path_hosts)} && (Path(`{path}`) || PathPrefix(`{path}/`))"
    guards = ["endpoint-cors", "no-cookies", "body-limit"]
    _add_backend(http, name, nodes.backend_of(endpoint.target), nodes.shown)
    http["middlewares"][f"{name}-strip"] = {"stripPrefix": {"prefixes": [path]}}
    http["routers"] |= {
        f"{name}-host": _router(by_host, name, priority=100, middlewares=guards),
        f"{name}-path": _router(by_path, name, priority=100, middlewares=[*guards, f"{name}-strip"]),
    }


def _add_door(http: Config, base: Base, door: NodeDoor, nodes: Nodes) -> None:
    """On every name that programs use: what is behind it answers tickets alone, and never with a page."""
    name = f"n-{door.node_id}"
    every_host = _hosts((base.ui_host, "localhost", *base.path_hosts))
    _add_backend(http, name, nodes.door_of(door), nodes.shown)
    rule = f"{every_host} && Path(`/n/{door.node_id}/enter`)"
    http["routers"][name] = _router(rule, name, priority=100, middlewares=["no-cookies"])


def _add_backend(http: Config, name: str, backend: Backend, shown: Pass | None) -> None:
    """Each with connections of its own: by their name the node knows where they lead."""
    http["services"][name] = _service(backend.url)
    if backend.name and shown:
        http["services"][name]["loadBalancer"]["serversTransport"] = name
        http.setdefault("serversTransports", {})[name] = {
            "serverName": backend.name,
            "rootCAs": [shown.authority],
            "certificates": [{"certFile": shown.certificate, "keyFile": shown.key}],
        }


def _hosts(hosts: Iterable[str]) -> str:
    rules = [f"Host(`{host}`)" for host in dict.fromkeys(hosts)]
    return rules[0] if len(rules) == 1 else f"({' || '.join(rules)})"


def _router(rule: str, service: str, *, priority: int, middlewares: list[str] | None = None) -> Config:
    router = {"rule": rule, "service": service, "priority": priority, "entryPoints": [ENTRY_POINT]}
    return router | ({"middlewares": middlewares} if middlewares else {})


def _service(url: str) -> Config:
    return {"loadBalancer": {"servers": [{"url": url}] if url else [], "passHostHeader": True}}
