from __future__ import annotations

import asyncio
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.contracts import messages as m
from libs.common.contracts.message import Message
from libs.common.errors import Conflict, Forbidden, Invalid, NotFound
from libs.common.ids import new_id
from services.registry.domain import projects as rules
from services.registry.loops import Upkeep
from services.registry.settings import RegistrySettings
from tests.unit.registry.harness import Catalogue, attempt_of, job_in, version_of

pytestmark = pytest.mark.unit

STATES = ("active", "archived", "deleted")
TRIGGERS = ("update", "move", "archive", "delete", "restore")
# From, trigger -> to; what is missing is refused.
EXPECTED = {
    ("active", "update"): "active",
    ("active", "move"): "active",
    ("active", "archive"): "archived",
    ("active", "delete"): "deleted",
    ("active", "restore"): "active",
    ("archived", "archive"): "archived",
    ("archived", "delete"): "deleted",
    ("archived", "restore"): "active",
    ("deleted", "delete"): "deleted",
    ("deleted", "restore"): "active",
}


def message_for(trigger: str, project_id: str, team_id: str) -> Message:
    return {
        "update": m.UpdateProject(project_id=project_id, description="changed"),
        "move": m.MoveProject(project_id=project_id, team_id=team_id),
        "archive": m.ArchiveProject(project_id=project_id),
        "delete": m.DeleteProject(project_id=project_id),
        "restore": m.RestoreProject(project_id=project_id),
    }[trigger]


async def brought_to(catalogue: Catalogue, owner: m.Principal, project: m.Project, state: str) -> m.Project:
    if state == "archived":
        return await catalogue.ask(m.ArchiveProject(project_id=project.id), owner, m.Project)
    if state == "deleted":
        return await catalogue.ask(m.DeleteProject(project_id=project.id), owner, m.Project)
    return project


@pytest.mark.parametrize(("state", "trigger"), list(product(STATES, TRIGGERS)))
async def test_every_state_meets_every_trigger(
    catalogue: Catalogue, owner: m.Principal, project: m.Project, state: str, trigger: str
) -> None:
    other = await catalogue.member("other", "admin", user_id=owner.id)
    project = await brought_to(catalogue, owner, project, state)
    message = message_for(trigger, project.id, other.team_id)
    target = EXPECTED.get((state, trigger))
    if target is None:
        with pytest.raises(Conflict) as refusal:
            await catalogue.ask(message, owner, m.Project)
        assert state in refusal.value.detail
        assert trigger in refusal.value.detail
        return
    before = len(await catalogue.emitted())
    changed = await catalogue.ask(message, owner, m.Project)
    assert changed.state == target
    no_op = target == state and trigger not in {"update", "move"}
    assert changed.revision == project.revision + (0 if no_op else 1)
    events = (await catalogue.emitted())[before:]
    assert len(events) == (0 if no_op else 1)
    if events:
        assert events[0][1]["project"]["revision"] == str(changed.revision)
        assert events[0][2]["ce-subject"] == project.id


async def test_created_project_is_found_by_id_and_name_and_told_whole(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    for text in (project.id, "digits"):
        assert await catalogue.ask(m.GetProject(project_id=text), owner, m.Project) == project
    [(kind, body, headers)] = await catalogue.emitted()
    assert kind == "project.created.v1"
    assert m.Project.model_validate(body["project"]) == project
    assert (headers["ce-team"], headers["ce-project"], headers["ce-revision"]) == (owner.team_id, project.id, "1")


async def test_taken_name_is_refused_with_the_id_of_its_holder(
    catalogue: Catalogue, owner: m.Principal, project: m.Project, stranger: m.Principal
) -> None:
    with pytest.raises(Conflict) as refusal:
        await catalogue.ask(m.CreateProject(name="digits"), owner, m.Project)
    assert (refusal.value.code, refusal.value.facts) == ("project_exists", {"project_id": project.id})
    other = await catalogue.ask(m.CreateProject(name="letters"), owner, m.Project)
    with pytest.raises(Conflict):
        await catalogue.ask(m.UpdateProject(project_id=other.id, name="digits"), owner, m.Project)
    await catalogue.ask(m.CreateProject(name="digits"), stranger, m.Project)


async def test_of_many_who_want_a_name_at_once_one_gets_it(catalogue: Catalogue, owner: m.Principal) -> None:
    wanted = [catalogue.send(m.CreateProject(name="wanted"), owner, "") for _ in range(10)]
    outcomes = await asyncio.gather(*wanted, return_exceptions=True)
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 9
    assert len((await catalogue.ask(m.ListProjects(), owner, m.ProjectPage)).items) == 1


async def test_deleted_project_gives_up_its_name_and_takes_it_back_only_when_free(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    await catalogue.ask(m.DeleteProject(project_id="digits"), owner, m.Project)
    with pytest.raises(NotFound):
        await catalogue.ask(m.GetProject(project_id="digits"), owner, m.Project)
    assert (await catalogue.ask(m.GetProject(project_id=project.id), owner, m.Project)).state == "deleted"
    newer = await catalogue.ask(m.CreateProject(name="digits"), owner, m.Project)
    with pytest.raises(Conflict):
        await catalogue.ask(m.RestoreProject(project_id=project.id), owner, m.Project)
    await catalogue.ask(m.UpdateProject(project_id=newer.id, name="digits 2"), owner, m.Project)
    restored = await catalogue.ask(m.RestoreProject(project_id="digits"), owner, m.Project)
    assert (restored.id, restored.state) == (project.id, "active")


async def test_member_archives_and_restores_but_does_not_undo_what_an_admin_deleted(
    catalogue: Catalogue, owner: m.Principal, member: m.Principal, project: m.Project
) -> None:
    await catalogue.ask(m.ArchiveProject(project_id=project.id), member, m.Project)
    await catalogue.ask(m.RestoreProject(project_id=project.id), member, m.Project)
    with pytest.raises(Forbidden):
        await catalogue.ask(m.DeleteProject(project_id=project.id), member, m.Project)
    await catalogue.ask(m.DeleteProject(project_id=project.id), owner, m.Project)
    with pytest.raises(Forbidden):
        await catalogue.ask(m.RestoreProject(project_id=project.id), member, m.Project)


@pytest.mark.parametrize(("role", "allowed"), [("viewer", False), ("member", False), ("admin", True), ("owner", True)])
async def test_move_needs_admin_in_the_other_team_too(
    catalogue: Catalogue, owner: m.Principal, project: m.Project, role: str, allowed: bool
) -> None:
    other = await catalogue.member("other", role, user_id=owner.id)
    message = m.MoveProject(project_id=project.id, team_id=other.team_id)
    if not allowed:
        with pytest.raises(Forbidden):
            await catalogue.ask(message, owner, m.Project)
        return
    assert (await catalogue.ask(message, owner, m.Project)).team_id == other.team_id


async def test_team_of_others_does_not_exist_for_a_move(
    catalogue: Catalogue, owner: m.Principal, project: m.Project, stranger: m.Principal
) -> None:
    for team_id in (stranger.team_id, new_id("team"), ""):
        with pytest.raises(NotFound):
            await catalogue.ask(m.MoveProject(project_id=project.id, team_id=team_id), owner, m.Project)


async def test_moved_project_takes_its_models_and_runs_along(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    other = await catalogue.member("other", "owner", user_id=owner.id)
    job = job_in(project)
    await catalogue.tell(m.JobQueued(job=job))
    await catalogue.ask(version_of(project), owner, m.ModelVersion)
    moved = await catalogue.ask(m.MoveProject(project_id=project.id, team_id=other.team_id), owner, m.Project)
    await catalogue.tell(m.ProjectMoved(project=moved, from_team_id=owner.team_id))
    assert (await catalogue.ask(m.GetModel(model_id="digits"), other, m.ModelDetail)).model.team_id == other.team_id
    assert (await catalogue.ask(m.GetRun(job_id=job.id), other, m.Run)).team_id == other.team_id
    for message, reply in ((m.GetModel(model_id="digits"), m.ModelDetail), (m.GetRun(job_id=job.id), m.Run)):
        with pytest.raises(NotFound):
            await catalogue.ask(message, owner, reply)
    [event] = [event for event in await catalogue.emitted() if event[0] == "project.moved.v1"]
    assert event[1]["from_team_id"] == owner.team_id
    assert event[2]["ce-team"] == other.team_id


async def test_name_taken_in_the_other_team_stops_a_move(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    other = await catalogue.member("other", "owner", user_id=owner.id)
    await catalogue.ask(m.CreateProject(name="digits"), other, m.Project)
    with pytest.raises(Conflict):
        await catalogue.ask(m.MoveProject(project_id=project.id, team_id=other.team_id), owner, m.Project)


async def test_list_shows_the_states_asked_for_in_pages_newest_first(catalogue: Catalogue, owner: m.Principal) -> None:
    made = [await catalogue.ask(m.CreateProject(name=f"p{n}"), owner, m.Project) for n in range(6)]
    await catalogue.ask(m.ArchiveProject(project_id=made[1].id), owner, m.Project)
    await catalogue.ask(m.DeleteProject(project_id=made[2].id), owner, m.Project)

    async def names(state: str) -> list[str]:
        seen: list[str] = []
        cursor = ""
        while True:
            asked = m.ListProjects(state=state, cursor=cursor, limit=2)
            page = await catalogue.ask(asked, owner, m.ProjectPage)
            assert len(page.items) <= 2
            seen += [project.name for project in page.items]
            cursor = page.next_cursor
            if not cursor:
                return seen

    assert await names("") == ["p5", "p4", "p3", "p0"]
    assert await names("active") == ["p5", "p4", "p3", "p0"]
    assert await names("archived") == ["p1"]
    assert await names("deleted") == ["p2"]
    assert await names("any") == ["p5", "p4", "p3", "p2", "p1", "p0"]
    with pytest.raises(Invalid):
        await names("gone")


async def test_update_changes_what_is_given_and_only_that(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    catalogue.time.pass_(seconds=1)
    renamed = await catalogue.ask(m.UpdateProject(project_id=project.id, name="numbers"), member, m.Project)
    described = await catalogue.ask(m.UpdateProject(project_id="numbers", description="0 to 9"), member, m.Project)
    assert (renamed.name, renamed.description, renamed.updated_at) == ("numbers", "", catalogue.time())
    assert (described.name, described.description) == ("numbers", "0 to 9")
    same = await catalogue.ask(m.UpdateProject(project_id=project.id, name="numbers"), member, m.Project)
    assert same.revision == described.revision == 3


async def test_attempt_sees_its_own_project_only(catalogue: Catalogue, owner: m.Principal, project: m.Project) -> None:
    other = await catalogue.ask(m.CreateProject(name="other"), owner, m.Project)
    attempt = attempt_of(job_in(project))
    assert await catalogue.ask(m.GetProject(project_id=project.id), attempt, m.Project) == project
    for text in (other.id, "other"):
        with pytest.raises(NotFound):
            await catalogue.ask(m.GetProject(project_id=text), attempt, m.Project)


async def test_deleted_project_is_purged_after_thirty_days_with_models_and_runs(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    await catalogue.tell(m.JobQueued(job=job))
    logged = m.LogRun(points=(m.Point(name="loss", value=1.0),), params={"a": "b"}, tags={"c": "d"})
    await catalogue.ask(logged, attempt_of(job), m.Run)
    await catalogue.ask(version_of(project), owner, m.ModelVersion)
    deleted = await catalogue.ask(m.DeleteProject(project_id=project.id), owner, m.Project)
    upkeep = Upkeep(catalogue.store, catalogue.runs, RegistrySettings())
    catalogue.time.pass_(days=30)
    await upkeep.forget()
    assert (await catalogue.ask(m.GetProject(project_id=project.id), owner, m.Project)).state == "deleted"
    catalogue.time.pass_(seconds=1)
    await upkeep.forget()
    await upkeep.forget()
    assert (await catalogue.emitted_types()).count("project.purged.v1") == 1
    await catalogue.tell(m.ProjectPurged(project=deleted))
    for message, reply in ((m.GetProject(project_id=project.id), m.Project), (m.GetRun(job_id=job.id), m.Run)):
        with pytest.raises(NotFound):
            await catalogue.ask(message, owner, reply)
    again = await catalogue.ask(m.CreateProject(name="digits"), owner, m.Project)
    assert not (await catalogue.ask(m.ListModels(project_id=again.id), owner, m.ModelPage)).items


GOOD_NAMES = ["digits", "a", "1", "my project", "v1.0_final-2", "x" * 100, "Größe", "手書き", ".dot", "_"]
BAD_NAMES = [
    "",
    " ",
    "...",
    "- -",
    "x" * 101,
    " x",
    "x ",
    "a/b",
    "a\nb",
    "a\tb",
    "a\0b",
    "a:b",
    "a*",
    "😀",
    "a>b",
    "x\n",
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_ordinary_names_are_taken(name: str) -> None:
    assert rules.checked_name(name) == name


@pytest.mark.parametrize("name", [*BAD_NAMES, "pr06h0i0d8hlrp73g5sts964h20k"])
def test_strange_names_are_refused(name: str) -> None:
    with pytest.raises(Invalid):
        rules.checked_name(name)


def test_one_name_has_one_spelling() -> None:
    assert rules.checked_name("Gro\u0308\u00dfe") == "Gr\u00f6\u00dfe"


@given(st.text(max_size=120))
def test_any_text_is_a_name_or_is_refused(text: str) -> None:
    try:
        name = rules.checked_name(text)
    except Invalid:
        return
    assert 1 <= len(name) <= 100
    assert name == name.strip()
    assert rules.checked_name(name) == name
    assert not set(name) & set("/\\\0\n\r\t*>:?#%\"'<")


def test_table_has_exactly_the_states_it_should() -> None:
    assert rules.LIFECYCLE.states == frozenset(STATES)
