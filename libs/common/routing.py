"""Routes: which handler a message goes to, and who may send it. A route without a rule cannot be written."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import Principal
from libs.common.errors import Forbidden

ROLES = ("viewer", "member", "admin", "owner")

# (message, unit of work, envelope) -> answer for requests and queries, None for events and commands.
Handler = Callable[[Any, Any, Envelope], Awaitable[Message | None]]
# (message, envelope) -> what the handler finds in `envelope.facts`.
Prepare = Callable[[Any, Envelope], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may send a request or query. What they may touch is checked by the owner on the loaded object.

    Args:
        role: the least role of a user, or None when no user may.
        scope: what a limited token must allow.
        attempts: whether a running job may, with its own token.
        services: other services that may act on a team's behalf.
        operator: only who runs the installation: it is about what belongs to no team.
    """

    role: str | None
    scope: str
    attempts: bool = False
    services: frozenset[str] = frozenset()
    operator: bool = False

    def check(self, principal: Principal, name: str) -> None:
        """Raises Forbidden, saying why, unless the rule allows it."""
        match principal.kind:
            case "user":
                self._check_user(principal, name)
            case "attempt" if self.attempts:
                return
            case "service" if principal.id in self.services:
                return
            case _:
                raise Forbidden("not_allowed", f"A {principal.kind} may not {name}.", "Use a person's token.")

    def _check_user(self, principal: Principal, name: str) -> None:
        if self.role is None:
            raise Forbidden("not_allowed", f"Only the platform itself may {name}.")
        if principal.role not in ROLES or ROLES.index(principal.role) < ROLES.index(self.role):
            detail = f"{name} needs the role {self.role} in the team; this token has {principal.role or 'none'}."
            raise Forbidden("role_too_low", detail, "Ask an owner or admin of the team.")
        if self.operator and not principal.operator:
            detail = f"{name} is for those who run this installation; it is not a matter of one team."
            raise Forbidden("not_operator", detail, "Ask an owner or admin of the installation's first team.")
        if principal.scopes and self.scope not in principal.scopes:
            detail = f"{name} needs the scope {self.scope}; this token has {', '.join(principal.scopes)}."
            raise Forbidden("scope_missing", detail, "Use a token with that scope.")


# For events and commands: only our own services can publish on their subjects, by their NATS permissions.
INTERNAL = Rule(role=None, scope="internal")
# For what must be asked before anybody is known, such as whose token this is.
GATEWAY_ONLY = Rule(role=None, scope="internal", services=frozenset({"gateway"}))


@dataclass(frozen=True, slots=True)
class Route:
    """One message and its handler.

    Args:
        prepare: for requests and queries: asks the outside world before the transaction opens. It runs after the
            rule and again with each repetition, so it changes nothing that a repetition would change again.
        database: which of the service's databases the handler works in; empty for its first.
        repeatable: the handler itself recognises a repeat, so that no inbox row need be kept, and of a request
            neither its hash nor its answer.
    """

    message: type[Message]
    handler: Handler
    rule: Rule
    prepare: Prepare | None = None
    database: str = ""
    repeatable: bool = False


@dataclass(frozen=True, slots=True)
class Routes:
    """Everything a service listens to, and what it may send beyond its own events.

    Args:
        sends: commands, requests, queries and frames of others; NATS permissions are made from them.
    """

    service: str
    routes: tuple[Route, ...]
    sends: tuple[type[Message], ...] = ()
    by_type: dict[str, Route] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for route in self.routes:
            self.by_type[f"{route.message.ROUTE.kind.value}:{route.message.ROUTE.type}"] = route

    def of_kind(self, *kinds: Kind) -> tuple[Route, ...]:
        return tuple(route for route in self.routes if route.message.ROUTE.kind in kinds)

    def find(self, kind: Kind, message_type: str) -> Route | None:
        return self.by_type.get(f"{kind.value}:{message_type}")


def routes_of(service: str) -> Routes:
    """The routes of a service without building it: what it listens to and sends, for permissions and checks.

    Handlers that need a built service are the unbound functions of their classes here.
    """
    module = importlib.import_module(f"services.{service}.routes")
    found: Routes = module.routes()
    return found
