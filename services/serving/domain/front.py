"""Traefik's whole dynamic configuration as a function of what is served: who is reached under which name.

The UI is on its own host name alone, and tenants' content never is: a deployment cannot run scripts with the
rights of somebody's session. Browsers reach a deployment on NAME.<apps_domain>; programs, which often cannot
resolve that, on /d/NAME/ of the front door's other names, where cookies are dropped in both directions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Config = dict[str, Any]

ENTRY_POINT = "web"
MAX_BODY_BYTES = 16 << 20
STAMP = "nabla-"
# The object store's own name beside the deployments', which no deployment may have.
OBJECTS_LABEL = "s3"


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


def front_config(base: Base, endpoints: Iterable[Endpoint]) -> Config:
    """The configuration of Traefik's file provider."""
    http: Config = {"routers": {}, "services": {}, "middlewares": _shared(base)}
    if base.gateway:
        _add_gateway(http, base)
    _add_objects(http, base)
    for endpoint in sorted(endpoints, key=lambda each: each.name):
        _add_endpoint(http, base, endpoint)
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


def _add_endpoint(http: Config, base: Base, endpoint: Endpoint) -> None:
    name, path = f"d-{endpoint.name}", endpoint_path(endpoint.name)
    by_host = f"Host(`{endpoint_host(endpoint.name, base.apps_domain)}`)"
    by_path = f"{_hosts(base.path_hosts)} && (Path(`{path}`) || PathPrefix(`{path}/`))"
    guards = ["endpoint-cors", "no-cookies", "body-limit"]
    http["services"][name] = _service(f"http://{endpoint.target}" if endpoint.target else "")
    http["middlewares"][f"{name}-strip"] = {"stripPrefix": {"prefixes": [path]}}
    http["routers"] |= {
        f"{name}-host": _router(by_host, name, priority=100, middlewares=guards),
        f"{name}-path": _router(by_path, name, priority=100, middlewares=[*guards, f"{name}-strip"]),
    }


def _hosts(hosts: Iterable[str]) -> str:
    rules = [f"Host(`{host}`)" for host in dict.fromkeys(hosts)]
    return rules[0] if len(rules) == 1 else f"({' || '.join(rules)})"


def _router(rule: str, service: str, *, priority: int, middlewares: list[str] | None = None) -> Config:
    router = {"rule": rule, "service": service, "priority": priority, "entryPoints": [ENTRY_POINT]}
    return router | ({"middlewares": middlewares} if middlewares else {})


def _service(url: str) -> Config:
    return {"loadBalancer": {"servers": [{"url": url}] if url else [], "passHostHeader": True}}
