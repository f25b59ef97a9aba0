"""Who may send what: every kind of principal against every kind of rule, denied unless the rule says so."""

from __future__ import annotations

import itertools

import pytest

from libs.common.contracts.message import Kind
from libs.common.contracts.messages import CreateProject, GetProject, JobQueued, Principal, Project
from libs.common.errors import Forbidden
from libs.common.routing import GATEWAY_ONLY, INTERNAL, ROLES, Route, Routes, Rule

pytestmark = pytest.mark.unit

RULES = {
    "read": Rule("viewer", "read", attempts=True, services=frozenset({"executor"})),
    "write": Rule("member", "write"),
    "lead": Rule("admin", "write"),
    "own": Rule("owner", "admin"),
    "internal": INTERNAL,
    "gateway": GATEWAY_ONLY,
}


def test_what_is_the_installations_needs_who_runs_it() -> None:
    rule = Rule("admin", "write", operator=True)
    owner = Principal(kind="user", id="u", team_id="t", role="owner")
    with pytest.raises(Forbidden, match="not a matter of one team") as refusal:
        rule.check(owner, "node.drain")
    assert "first team" in refusal.value.remedy
    rule.check(owner.model_copy(update={"operator": True}), "node.drain")
    for update in ({"role": "member"}, {"scopes": ("read",)}, {"kind": "attempt"}):
        with pytest.raises(Forbidden):
            rule.check(owner.model_copy(update={"operator": True} | update), "node.drain")


SCOPES: tuple[tuple[str, ...], ...] = ((), ("read",), ("write",), ("admin",), ("read", "write"), ("internal",))


def allowed(rule: Rule, principal: Principal) -> bool:
    try:
        rule.check(principal, "project.create")
    except Forbidden as refusal:
        told = refusal
    else:
        return True
    assert told.code in {"not_allowed", "role_too_low", "scope_missing"}
    assert "project.create" in told.detail
    return False


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("role", "scopes"), [*itertools.product(("", "guest", "OWNER", *ROLES), SCOPES)])
def test_a_user_needs_the_role_and_a_limited_token_the_scope(name: str, role: str, scopes: tuple[str, ...]) -> None:
    rule = RULES[name]
    has_role = rule.role is not None and role in ROLES and ROLES.index(role) >= ROLES.index(rule.role)
    has_scope = not scopes or rule.scope in scopes
    principal = Principal(kind="user", id="u1", team_id="t1", role=role, scopes=scopes)
    assert allowed(rule, principal) == (has_role and has_scope)


@pytest.mark.parametrize(
    ("name", "principal", "may"),
    [
        (name, principal, (name, principal.kind, principal.id) in granted)
        for granted in [
            {("read", "attempt", "at1"), ("read", "service", "executor"), ("gateway", "service", "gateway")}
        ]
        for name in RULES
        for principal in (
            Principal(kind="attempt", id="at1", team_id="t1", role="owner"),
            Principal(kind="service", id="executor", team_id="t1"),
            Principal(kind="service", id="gateway", team_id="t1"),
            Principal(kind="service", id="", team_id="t1"),
            Principal(kind="", id="executor", role="owner"),
            Principal(kind="root", id="executor", role="owner"),
            Principal(),
        )
    ],
)
def test_jobs_and_services_may_what_is_written_and_nothing_else(name: str, principal: Principal, may: bool) -> None:
    assert allowed(RULES[name], principal) is may


async def _handler(*_: object) -> None: ...


def test_a_route_is_found_by_kind_and_type_only() -> None:
    create, told = Route(CreateProject, _handler, RULES["write"]), Route(JobQueued, _handler, INTERNAL)
    routes = Routes("registry", (create, told))
    assert routes.find(Kind.REQUEST, "project.create.v1") is create
    assert routes.find(Kind.EVENT, "job.queued.v1") is told
    assert routes.find(Kind.QUERY, "project.create.v1") is None
    assert routes.find(Kind.REQUEST, GetProject.ROUTE.type) is None
    assert routes.of_kind(Kind.REQUEST, Kind.EVENT) == (create, told)
    assert not hasattr(Project, "ROUTE")
