"""NATS on this machine: one user per service, each with only the subjects that its routes name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import MESSAGES
from libs.common.contracts.subjects import (
    DEAD_LETTERS,
    EVENTS,
    LOGS,
    dead_letter_subject,
    filter_for,
)
from libs.common.provision import consumers
from libs.common.routing import Routes, routes_of
from services import SERVICES

PROVISIONER = "provisioner"
AGENT = "agent"
# The manifest of a large folder is one message.
MAX_PAYLOAD_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Grant:
    """What one NATS user may publish and subscribe to."""

    user: str
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    answers: bool = False


@dataclass(slots=True)
class _Draft:
    publish: set[str] = field(default_factory=set)
    subscribe: set[str] = field(default_factory=set)


def all_grants() -> tuple[Grant, ...]:
    """Everybody who may sign in, from what each service's routes say."""
    from services.executor.routes import AGENT_SENDS

    services = [grant_for(routes_of(name)) for name in SERVICES]
    return merged([*services, storage_extra(), gateway_extra(), agent_grant(AGENT_SENDS), provisioner_grant()])


def grant_for(routes: Routes) -> Grant:
    """The rights of a service: its own events, what its routes say it sends, and its own consumers."""
    service = routes.service
    draft = _Draft(subscribe={f"_INBOX_{service}.>", f"nabla.dlv.{service}.>"})
    draft.subscribe |= {f"nabla.{kind}.{service}.>" for kind in ("req", "qry")}
    draft.publish |= {filter_for(message) for message in events_of(service)} | {dead_letter_subject(service)}
    draft.publish |= {filter_for(message) for message in routes.sends}
    draft.publish |= {f"$JS.API.STREAM.INFO.{DEAD_LETTERS}", "$JS.API.INFO"}
    for consumer in consumers(routes):
        draft.publish |= _consumer_rights(consumer.stream, service)
    return Grant(service, tuple(sorted(draft.publish)), tuple(sorted(draft.subscribe)), answers=True)


def _consumer_rights(stream: str, service: str) -> set[str]:
    return {
        f"$JS.API.CONSUMER.INFO.{stream}.{service}",
        f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{service}",
        f"$JS.API.CONSUMER.CREATE.{stream}.{service}",
        f"$JS.API.CONSUMER.CREATE.{stream}.{service}.>",
        f"$JS.ACK.{stream}.{service}.>",
        f"$JS.ACK.*.*.{stream}.{service}.>",
    }


def storage_extra() -> Grant:
    """Storage repeats log lines live, and asks which log frames the bus still holds for it."""
    return Grant("storage", publish=("nabla.tail.>", f"$JS.API.STREAM.INFO.{LOGS}"))


def gateway_extra() -> Grant:
    """The gateway follows logs and events for its clients and asks every service how it is.

    Its consumers have no name, so that it needs no right by which it could change or delete another's.
    """
    return Grant(
        "gateway",
        publish=(
            "nabla.qry.*.service.get.v1",
            f"$JS.API.CONSUMER.CREATE.{EVENTS}",
            f"$JS.API.CONSUMER.INFO.{EVENTS}.>",
            f"$JS.API.STREAM.INFO.{EVENTS}",
        ),
        subscribe=("nabla.tail.>", "nabla.evt.>"),
    )


def agent_grant(sends: Iterable[type[Message]]) -> Grant:
    """Node agents ship logs and reports, show live what is not in a log yet, and ask storage and registry on behalf
    of the attempt they run."""
    subjects = (*sorted(filter_for(message) for message in sends), "nabla.tail.>")
    return Grant(AGENT, publish=subjects, subscribe=(f"_INBOX_{AGENT}.>",))


def provisioner_grant() -> Grant:
    return Grant(PROVISIONER, publish=("$JS.API.>",), subscribe=(f"_INBOX_{PROVISIONER}.>", "_INBOX.>"))


def merged(grants: Iterable[Grant]) -> tuple[Grant, ...]:
    """One grant per user, its rights added up."""
    by_user: dict[str, Grant] = {}
    for grant in grants:
        known = by_user.get(grant.user, Grant(grant.user))
        by_user[grant.user] = Grant(
            grant.user,
            known.publish + grant.publish,
            known.subscribe + grant.subscribe,
            known.answers or grant.answers,
        )
    return tuple(by_user.values())


def events_of(service: str) -> tuple[type[Message], ...]:
    return tuple(
        message
        for message in MESSAGES
        if getattr(message, "ROUTE", None) and message.ROUTE.kind is Kind.EVENT and message.ROUTE.owner == service
    )


def config_text(
    *, host: str, port: int, store: Path, public_keys: dict[str, str], grants: Sequence[Grant], sync: str = ""
) -> str:
    """The server's configuration file (NATS reads JSON).

    Args:
        public_keys: user -> nkey; a user without one cannot sign in.
        sync: "always" makes every acknowledged message survive a power cut, at a twentieth of the throughput.
    """
    jetstream: dict[str, Any] = {"store_dir": str(store), "max_mem": 128 << 20, "max_file": 20 << 30}
    if sync:
        jetstream["sync_interval"] = sync
    return json.dumps(
        {
            "listen": f"{host}:{port}",
            "max_payload": MAX_PAYLOAD_BYTES,
            "max_connections": 512,
            "ping_interval": "20s",
            "write_deadline": "10s",
            "jetstream": jetstream,
            "authorization": {"users": [_user(grant, public_keys[grant.user]) for grant in grants]},
        },
        indent=2,
    )


def _user(grant: Grant, public_key: str) -> dict[str, Any]:
    permissions: dict[str, Any] = {
        "publish": {"allow": list(grant.publish)},
        "subscribe": {"allow": list(grant.subscribe)},
    }
    if grant.answers:
        permissions["allow_responses"] = {"max": 1, "expires": "30s"}
    return {"nkey": public_key, "permissions": permissions}
