"""Who may ask what, over all routes: roles, scopes, attempts, services, teams; and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from libs.common.contracts import messages as m
from libs.common.contracts.message import Kind, Message
from libs.common.errors import Forbidden, NotFound
from libs.common.ids import new_id, secret_hash
from services.registry.routes import routes
from tests.unit.registry.harness import Catalogue, attempt_of, gateway, job_in, service, version_of

ROUTES = routes()

pytestmark = pytest.mark.unit

Access = tuple[str | None, str, bool, set[str]]

ALL = {"gateway", "scheduler", "executor", "storage", "serving"}
# Route -> the least role, the scope, whether attempts may, which services may. Written beside the code, not from it.
ACCESS: dict[str, Access] = {
    "token.authenticate": (None, "", False, {"gateway"}),
    "token.create": ("viewer", "admin", False, set()),
    "token.revoke": ("viewer", "admin", False, set()),
    "token.list": ("viewer", "read", False, set()),
    "sign_in.create": ("member", "write", False, set()),
    "sign_in.redeem": (None, "", False, {"gateway"}),
    "sign_in.end": (None, "", False, {"gateway"}),
    "project.create": ("member", "write", False, set()),
    "project.update": ("member", "write", False, set()),
    "project.archive": ("member", "write", False, set()),
    "project.delete": ("admin", "write", False, set()),
    "project.restore": ("member", "write", False, set()),
    "project.move": ("admin", "write", False, set()),
    "project.get": ("viewer", "read", True, ALL),
    "project.list": ("viewer", "read", False, ALL),
    "secret.set": ("member", "write", False, set()),
    "secret.delete": ("member", "write", False, set()),
    "secret.list": ("viewer", "read", False, set()),
    "secret.check": ("viewer", "read", False, set()),
    "secret.reveal": (None, "", False, {"executor"}),
    "model.register": ("member", "write", True, {"executor", "serving"}),
    "model.get": ("viewer", "read", True, ALL),
    "model_version.get": ("viewer", "read", True, ALL),
    "model.list": ("viewer", "read", True, ALL),
    "run.log": ("member", "write", True, set()),
    "run.record_usage": (None, "", False, {"executor"}),
    "run.get": ("viewer", "read", True, ALL),
    "run.list_metrics": ("viewer", "read", True, ALL),
}
ROLES = ("viewer", "member", "admin", "owner")
SCOPES = ((), ("read",), ("write",), ("admin",), ("read", "write"))
ASKED = [route for route in ROUTES.routes if route.message.ROUTE.kind in {Kind.REQUEST, Kind.QUERY}]
WRITES = {route.message.ROUTE.name for route in ROUTES.of_kind(Kind.REQUEST)} - {"run.record_usage"}
NAMES = [route.message.ROUTE.name for route in ASKED]


def principals() -> list[tuple[str, m.Principal, Callable[[Access], bool]]]:
    found: list[tuple[str, m.Principal, Callable[[Access], bool]]] = []
    for role, scopes in product((*ROLES, "", "root"), SCOPES):
        principal = m.Principal(kind="user", id="u", team_id="t", role=role, scopes=scopes)

        def may(rule: Access, role: str = role, scopes: tuple[str, ...] = scopes) -> bool:
            least = rule[0]
            high_enough = least is not None and role in ROLES and ROLES.index(role) >= ROLES.index(least)
            return high_enough and (not scopes or rule[1] in scopes)

        found.append((f"{role or 'nobody'} {scopes}", principal, may))
    found.append(("attempt", m.Principal(kind="attempt", id="a", team_id="t"), lambda rule: rule[2]))
    for name in (*sorted(ALL), "registry", ""):
        principal = m.Principal(kind="service", id=name, team_id="t")
        found.append((f"service {name}", principal, _among(name)))
    found += [(kind, m.Principal(kind=kind, id="gateway", role="owner"), lambda _: False) for kind in ("", "root")]
    return found


def _among(name: str) -> Callable[[Access], bool]:
    return lambda rule: name in rule[3]


def test_table_speaks_of_every_route() -> None:
    assert sorted(NAMES) == sorted(ACCESS)


@pytest.mark.parametrize("route", ASKED, ids=NAMES)
def test_route_lets_in_exactly_whom_the_table_says(route: object) -> None:
    rule, name = route.rule, route.message.ROUTE.name  # type: ignore[attr-defined]
    for who, principal, may in principals():
        try:
            rule.check(principal, name)
            let_in = True
        except Forbidden:
            let_in = False
        assert let_in == may(ACCESS[name]), (who, name)


def test_events_are_for_no_person_to_send() -> None:
    for route in ROUTES.of_kind(Kind.EVENT, Kind.COMMAND):
        for _, principal, _ in principals():
            with pytest.raises(Forbidden):
                route.rule.check(principal, route.message.ROUTE.name)


def messages_about(project: m.Project, model: m.ModelVersion, job: m.Job, token: m.Token) -> list[Message]:
    """One message for each route that names an object, about these objects."""
    return [
        m.RevokeToken(token_id=token.id),
        m.UpdateProject(project_id=project.id, description="x"),
        m.ArchiveProject(project_id=project.id),
        m.RestoreProject(project_id=project.id),
        m.MoveProject(project_id=project.id, team_id=project.team_id),
        m.GetProject(project_id=project.id),
        m.GetProject(project_id=project.name),
        version_of(project, name="mine"),
        m.GetModel(model_id=model.model_id),
        m.GetModel(model_id=model.model_name),
        m.GetModel(model_id=model.model_id, project_id=project.id),
        m.GetModelVersion(model_id=model.model_id, version=1),
        m.ListModels(project_id=project.id),
        m.LogRun(job_id=job.id, tags={"a": "b"}),
        m.GetRun(job_id=job.id),
        m.GetMetrics(job_id=job.id),
        m.SetSecret(project_id=project.id, name="A", value="pass phrase t"),
        m.ListSecrets(project_id=project.id),
        m.CheckSecrets(project_id=project.id, names=("A",)),
        m.DeleteSecret(project_id=project.id, name="A"),
        m.DeleteProject(project_id=project.id),
    ]


# They name no object of a team.
NAMELESS = {"token.authenticate", "token.create", "token.list", "sign_in.create", "sign_in.redeem", "sign_in.end"} | {
    "project.create",
    "project.list",
    # Whose they are is what the attempt's token says: see test_secrets.
    "secret.reveal",
    # Of what it names it keeps nothing where that is another team's: see test_runs.
    "run.record_usage",
}


async def test_objects_of_another_team_are_not_found_on_any_route(
    catalogue: Catalogue, owner: m.Principal, stranger: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    await catalogue.tell(m.JobQueued(job=job))
    model = await catalogue.ask(version_of(project), owner, m.ModelVersion)
    token = await catalogue.ask(m.CreateToken(token_hash=secret_hash("x")), owner, m.Token)
    about = messages_about(project, model, job, token)
    assert {message.ROUTE.name for message in about} | NAMELESS == set(ACCESS)
    for message in about:
        if isinstance(message, m.RegisterModel):
            catalogue.outside.upload(message, owner)
    foreign_job = job_in(project.model_copy(update={"id": new_id("project"), "team_id": stranger.team_id}))
    for message in about:
        name = message.ROUTE.name
        foreigners = [stranger]
        if ACCESS[name][2]:
            foreigners.append(attempt_of(foreign_job))
            same_team = job_in(project.model_copy(update={"id": new_id("project")}))
            foreigners.append(attempt_of(same_team))
        foreigners += [service(each, stranger.team_id) for each in sorted(ACCESS[name][3])]
        foreigners += [service(each, "") for each in sorted(ACCESS[name][3])]
        for foreigner in foreigners:
            before = len(await catalogue.emitted())
            with pytest.raises(NotFound):
                await catalogue.ask(message, foreigner, m.Project)
            assert len(await catalogue.emitted()) == before
    for message in about:
        await catalogue.ask(message, owner, reply_of(message))


def reply_of(message: Message) -> type[Message]:
    kind: type[Message] = getattr(m, message.ROUTE.reply)
    return kind


async def test_missing_and_foreign_objects_are_told_apart_by_nothing(
    catalogue: Catalogue, stranger: m.Principal, project: m.Project
) -> None:
    refusals = []
    for project_id in (project.id, new_id("project")):
        with pytest.raises(NotFound) as refusal:
            await catalogue.ask(m.GetProject(project_id=project_id), stranger, m.Project)
        text = f"{refusal.value.code} {refusal.value.detail} {refusal.value.remedy} {refusal.value.facts}"
        refusals.append(text.replace(project_id, "ID"))
    assert refusals[0] == refusals[1]


async def test_lists_show_nothing_of_other_teams(
    catalogue: Catalogue, owner: m.Principal, stranger: m.Principal, project: m.Project
) -> None:
    await catalogue.ask(version_of(project), owner, m.ModelVersion)
    await catalogue.ask(m.CreateToken(token_hash=secret_hash("x")), owner, m.Token)
    for message in (m.ListProjects(state="any"), m.ListModels(), m.ListTokens()):
        page = await catalogue.ask(message, stranger, reply_of(message))
        assert page.items == ()  # type: ignore[attr-defined]


async def test_every_granted_write_leaves_one_audit_row_without_secrets(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    await catalogue.tell(m.JobQueued(job=job))
    token = await catalogue.ask(m.CreateToken(name="laptop", token_hash=secret_hash("t")), owner, m.Token)
    await catalogue.ask(m.CreateSignIn(code_hash=secret_hash("c")), owner, m.SignIn)
    redeem = m.RedeemSignIn(code_hash=secret_hash("c"), token_hash=secret_hash("s"))
    await catalogue.ask(redeem, gateway(), m.Token)
    await catalogue.ask(m.SignOut(token_hash=secret_hash("s")), gateway(), m.Token)
    model = await catalogue.ask(version_of(project), owner, m.ModelVersion)
    for message in messages_about(project, model, job, token):
        await catalogue.ask(message, owner, reply_of(message))
    rows = await catalogue.audit()
    # What nodes say every few seconds is its own record; what they reveal, they do as attempts: see test_secrets.
    requests = sorted(WRITES - {"secret.reveal"})
    assert {row.action for row in rows} == set(requests)
    counts = {name: sum(row.action == name for row in rows) for name in requests}
    assert counts.pop("model.register") == 2
    assert counts.pop("secret.set") == 2, "a repeat is not recognised by its key, so it is one more"
    assert set(counts.values()) == {1}
    for row in rows:
        assert row.team_id == owner.team_id
        by_gateway = row.action in {"sign_in.redeem", "sign_in.end"}
        assert row.actor == ("service:gateway" if by_gateway else f"user:{owner.id}")
        assert row.object_id
        assert len(row.detail) <= 500
        assert not any(secret_hash(secret) in row.detail for secret in "tcs")
        assert "pass phrase" not in row.detail
    assert any("laptop" in row.detail for row in rows)


async def test_refused_write_leaves_no_audit_row(
    catalogue: Catalogue, stranger: m.Principal, project: m.Project
) -> None:
    before = await catalogue.audit()
    with pytest.raises(NotFound):
        await catalogue.ask(m.ArchiveProject(project_id=project.id), stranger, m.Project)
    assert await catalogue.audit() == before


async def test_audit_detail_is_cut_and_blanks_tokens_that_somebody_pasted(
    catalogue: Catalogue, owner: m.Principal
) -> None:
    text = "nbl_" + "s3cret" * 8 + " " + "x" * 2000
    await catalogue.ask(m.CreateProject(name="p", description=text), owner, m.Project)
    [row] = await catalogue.audit()
    assert len(row.detail) == 500
    assert "s3cret" not in row.detail
