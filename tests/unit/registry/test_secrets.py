"""Secrets by their handlers: who may, which goes first, and that no value comes out where it must not."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from libs.common.contracts import messages as m
from libs.common.errors import Conflict, Forbidden, Invalid, NotFound, TooLarge, Unauthenticated
from libs.common.ids import new_id, secret_hash
from libs.common.secret_transfer import NotForUs, Reader
from services.registry.adapters.vault import add_key
from services.registry.loops import KeyTurn, Upkeep
from services.registry.ports import BrokenSeal
from services.registry.settings import RegistrySettings
from services.registry.store.secrets import SECRETS
from tests.unit.registry.harness import Catalogue, attempt_of, job_in, service

pytestmark = pytest.mark.unit
VALUE = "correct horse battery staple"


async def put(
    catalogue: Catalogue, who: m.Principal, name: str, value: str, project: m.Project | None = None
) -> m.Secret:
    asked = m.SetSecret(project_id=project.id if project else "", name=name, value=value)
    return await catalogue.ask(asked, who, m.Secret)


def attempt_with(catalogue: Catalogue, project: m.Project, token: str, *names: str) -> m.Execution:
    """A living attempt whose job names these secrets."""
    env = {f"V{index}": f"secret:{name}" for index, name in enumerate(names)}
    job = job_in(project, template=m.JobTemplate(env=env))
    execution = m.Execution(
        attempt_id=new_id("attempt"), job_id=job.id, team_id=project.team_id, project_id=project.id, state="starting"
    )
    catalogue.outside.jobs.known[job.id] = job
    catalogue.outside.attempts.living[secret_hash(token)] = execution
    return execution


async def reveal(catalogue: Catalogue, token: str, *names: str) -> dict[str, str]:
    """As a node agent asks, under a team that it made up."""
    reader = Reader()
    asked = m.RevealSecrets(token_hash=secret_hash(token), names=names, public_key=reader.public_key)
    answer = await catalogue.ask(asked, service("executor", "t0whatever"), m.RevealedSecrets)
    return {item.name: reader.open(item.name, item.sealed) for item in answer.items}


async def stored(catalogue: Catalogue) -> list[Any]:
    async with catalogue.store.view() as view:
        return list(await view.execute(select(SECRETS)))


async def test_a_job_gets_the_value_and_people_only_the_name(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    made = await put(catalogue, member, "HF_TOKEN", VALUE)
    assert (made.name, made.version, made.project_id, made.created_by) == ("HF_TOKEN", 1, "", member.id)
    attempt_with(catalogue, project, "nbla_1", "HF_TOKEN")
    assert await reveal(catalogue, "nbla_1", "HF_TOKEN") == {"HF_TOKEN": VALUE}
    page = await catalogue.ask(m.ListSecrets(), member, m.SecretPage)
    assert [secret.name for secret in page.items] == ["HF_TOKEN"]
    assert VALUE not in page.to_wire().decode()


async def test_the_value_is_nowhere_in_the_database(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    """Neither as it is nor as a hash, by which a short one could be guessed."""
    message = m.SetSecret(name="A", value=VALUE)
    await catalogue.ask(message, member, m.Secret)
    attempt_with(catalogue, project, "nbla_1", "A")
    await reveal(catalogue, "nbla_1", "A")
    async with catalogue.store.view() as view:
        answers = list(await view.execute(select(catalogue.store.skeleton.idempotency)))
    assert {row.operation for row in answers} <= {"project.create"}
    [row] = await stored(catalogue)
    assert VALUE.encode() not in row.sealed
    assert VALUE not in repr(message)
    assert VALUE not in str(await catalogue.audit())
    assert {row.action: row.detail for row in await catalogue.audit()}["secret.set"] == '{"name": "A"}'


async def test_setting_again_makes_a_version_and_the_same_value_changes_nothing(
    catalogue: Catalogue, member: m.Principal
) -> None:
    await put(catalogue, member, "A", "first value")
    catalogue.time.pass_(minutes=1)
    again = await put(catalogue, member, "A", "first value")
    assert (again.version, again.updated_at) == (1, again.created_at)
    newer = await put(catalogue, member, "A", "second value")
    assert (newer.version, newer.id) == (2, again.id)
    assert newer.updated_at
    assert newer.created_at
    assert newer.updated_at > newer.created_at


async def test_a_projects_own_goes_before_the_teams(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    other = await catalogue.ask(m.CreateProject(name="other"), owner, m.Project)
    await put(catalogue, owner, "A", "the project's own", project)
    await put(catalogue, owner, "A", "the whole team's")
    attempt_with(catalogue, project, "nbla_1", "A")
    attempt_with(catalogue, other, "nbla_2", "A")
    assert await reveal(catalogue, "nbla_1", "A") == {"A": "the project's own"}
    assert await reveal(catalogue, "nbla_2", "A") == {"A": "the whole team's"}
    page = await catalogue.ask(m.ListSecrets(project_id="digits"), owner, m.SecretPage)
    assert [secret.project_id for secret in page.items] == ["", project.id]
    assert [s.project_id for s in (await catalogue.ask(m.ListSecrets(), owner, m.SecretPage)).items] == [""]
    [found] = (await catalogue.ask(m.CheckSecrets(project_id=project.id, names=("A",)), owner, m.SecretPage)).items
    assert found.project_id == project.id


async def test_an_attempt_gets_what_its_job_names_and_nothing_else(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    await put(catalogue, owner, "A", VALUE)
    await put(catalogue, owner, "B", VALUE)
    attempt_with(catalogue, project, "nbla_1", "A")
    with pytest.raises(Forbidden, match="does not name the secret B"):
        await reveal(catalogue, "nbla_1", "A", "B")
    with pytest.raises(Unauthenticated):
        await reveal(catalogue, "nbla_unknown", "A")
    asked = m.RevealSecrets(token_hash="nbla_1", names=("A",), public_key=Reader().public_key)
    with pytest.raises(Invalid, match="SHA-256"):
        await catalogue.ask(asked, service("executor", project.team_id), m.RevealedSecrets)


async def test_the_team_is_the_attempts_whatever_the_asking_node_says(
    catalogue: Catalogue, owner: m.Principal, stranger: m.Principal, project: m.Project
) -> None:
    await put(catalogue, stranger, "A", VALUE)
    attempt_with(catalogue, project, "nbla_1", "A")
    reader = Reader()
    asked = m.RevealSecrets(token_hash=secret_hash("nbla_1"), names=("A",), public_key=reader.public_key)
    with pytest.raises(NotFound, match="no secret A in this project or team"):
        await catalogue.ask(asked, service("executor", stranger.team_id), m.RevealedSecrets)


async def test_a_reveal_is_audited_as_the_attempts(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    await put(catalogue, owner, "A", VALUE)
    execution = attempt_with(catalogue, project, "nbla_1", "A")
    await reveal(catalogue, "nbla_1", "A")
    row = [row for row in await catalogue.audit() if row.action == "secret.reveal"][-1]
    assert (row.actor, row.team_id, row.object_id) == (
        f"attempt:{execution.attempt_id}",
        project.team_id,
        execution.job_id,
    )
    assert secret_hash("nbla_1") not in row.detail


async def test_only_who_asked_can_read_the_answer(catalogue: Catalogue, owner: m.Principal, project: m.Project) -> None:
    await put(catalogue, owner, "A", VALUE)
    attempt_with(catalogue, project, "nbla_1", "A")
    asked = m.RevealSecrets(token_hash=secret_hash("nbla_1"), names=("A",), public_key=Reader().public_key)
    answer = await catalogue.ask(asked, service("executor", project.team_id), m.RevealedSecrets)
    assert VALUE not in answer.to_wire().decode()
    with pytest.raises(NotForUs):
        Reader().open("A", answer.items[0].sealed)
    with pytest.raises(Invalid, match="X25519"):
        await catalogue.ask(
            asked.model_copy(update={"public_key": "short"}), service("executor", project.team_id), m.RevealedSecrets
        )


@pytest.mark.parametrize("asking", ["user", "attempt", "gateway"])
async def test_nobody_but_a_node_may_ask_for_values(
    catalogue: Catalogue, owner: m.Principal, project: m.Project, asking: str
) -> None:
    await put(catalogue, owner, "A", VALUE)
    attempt_with(catalogue, project, "nbla_1", "A")
    who = {"user": owner, "attempt": attempt_of(job_in(project)), "gateway": service("gateway", project.team_id)}
    asked = m.RevealSecrets(token_hash=secret_hash("nbla_1"), names=("A",), public_key=Reader().public_key)
    with pytest.raises(Forbidden):
        await catalogue.ask(asked, who[asking], m.RevealedSecrets)


async def test_members_write_viewers_list_and_jobs_do_neither(catalogue: Catalogue, project: m.Project) -> None:
    viewer = await catalogue.member("main", "viewer")
    job = attempt_of(job_in(project))
    for who in (viewer, job):
        with pytest.raises(Forbidden):
            await put(catalogue, who, "A", VALUE)
        with pytest.raises(Forbidden):
            await catalogue.ask(m.DeleteSecret(name="A"), who, m.Secret)
    assert (await catalogue.ask(m.ListSecrets(), viewer, m.SecretPage)).items == ()
    with pytest.raises(Forbidden):
        await catalogue.ask(m.ListSecrets(), job, m.SecretPage)


async def test_another_team_sees_and_changes_nothing(
    catalogue: Catalogue, owner: m.Principal, stranger: m.Principal, project: m.Project
) -> None:
    await put(catalogue, owner, "A", VALUE, project)
    await put(catalogue, owner, "B", VALUE)
    assert (await catalogue.ask(m.ListSecrets(), stranger, m.SecretPage)).items == ()
    for message in (
        m.ListSecrets(project_id=project.id),
        m.SetSecret(project_id=project.id, name="A", value="mine now"),
        m.DeleteSecret(project_id=project.id, name="A"),
        m.DeleteSecret(name="B"),
        m.CheckSecrets(names=("B",)),
    ):
        reply = m.Secret if isinstance(message, m.SetSecret | m.DeleteSecret) else m.SecretPage
        with pytest.raises(NotFound):
            await catalogue.ask(message, stranger, reply)
    assert len(await stored(catalogue)) == 2


@pytest.mark.parametrize("name", ["", ".", "..", "a b", "a/b", "a:b", "A=B", "ä", "x" * 101, "a\n"])
async def test_a_name_that_could_not_be_written_in_a_job_is_refused(
    catalogue: Catalogue, member: m.Principal, name: str
) -> None:
    with pytest.raises(Invalid, match="letters"):
        await put(catalogue, member, name, VALUE)


@pytest.mark.parametrize(
    ("value", "error"),
    [("", Invalid), ("hidden\0part", Invalid), ("hidden\udc80", Invalid), ("hidden" * 11_000, TooLarge)],
)
async def test_a_value_that_no_job_could_get_is_refused_without_repeating_it(
    catalogue: Catalogue, member: m.Principal, value: str, error: type[Exception]
) -> None:
    route = catalogue.routes.find(m.SetSecret.ROUTE.kind, m.SetSecret.ROUTE.type)
    assert route
    with pytest.raises(error) as told:
        await put(catalogue, member, "A", value)
    assert "hidden" not in str(told.value)


async def test_the_longest_value_comes_back_whole(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    value = "é\n" * 21_845
    await put(catalogue, member, "A", value)
    attempt_with(catalogue, project, "nbla_1", "A")
    assert await reveal(catalogue, "nbla_1", "A") == {"A": value}


async def test_deleted_is_gone_for_whoever_starts_later(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    await put(catalogue, member, "A", VALUE)
    attempt_with(catalogue, project, "nbla_1", "A")
    deleted = await catalogue.ask(m.DeleteSecret(name="A"), member, m.Secret)
    assert deleted.name == "A"
    with pytest.raises(NotFound) as told:
        await reveal(catalogue, "nbla_1", "A")
    assert told.value.remedy == "`nabla secrets set A` makes it."
    with pytest.raises(NotFound):
        await catalogue.ask(m.DeleteSecret(name="A"), member, m.Secret)
    anew = await put(catalogue, member, "A", VALUE)
    assert anew.id != deleted.id


async def test_submit_is_told_of_every_name_that_is_not_there(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    await put(catalogue, member, "A", VALUE)
    with pytest.raises(NotFound, match="no secret B, C in this"):
        await catalogue.ask(m.CheckSecrets(project_id=project.id, names=("A", "B", "C")), member, m.SecretPage)


async def test_an_archived_project_takes_no_secret(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    await catalogue.ask(m.ArchiveProject(project_id=project.id), owner, m.Project)
    with pytest.raises(Conflict, match="archived"):
        await put(catalogue, owner, "A", VALUE, project)


async def test_secrets_go_with_their_project_and_end_with_it(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    await put(catalogue, owner, "A", VALUE, project)
    await catalogue.member("second", "owner", owner.id)
    second = m.Principal(**{**owner.model_dump(), "team_id": await _team(catalogue, "second")})
    moved = await catalogue.ask(m.MoveProject(project_id=project.id, team_id=second.team_id), owner, m.Project)
    attempt_with(catalogue, moved, "nbla_1", "A")
    assert await reveal(catalogue, "nbla_1", "A") == {"A": VALUE}
    await catalogue.ask(m.DeleteProject(project_id=project.id), second, m.Project)
    catalogue.time.pass_(days=31)
    await Upkeep(catalogue.store, catalogue.runs, RegistrySettings()).forget()
    assert await stored(catalogue) == []


async def _team(catalogue: Catalogue, name: str) -> str:
    async with catalogue.store.view() as view:
        found = await view.accounts.team_named(name)
    assert found
    return found


async def test_a_new_key_wraps_every_secret_and_no_value_changes(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    for number in range(5):
        await put(catalogue, owner, f"A{number}", f"{VALUE} {number}")
    before = {row.id: row for row in await stored(catalogue)}
    newest = add_key(catalogue.vault._file)
    turn = KeyTurn(catalogue.store, catalogue.vault, 1.0)
    assert [await turn.turn(), await turn.turn()] == [5, 0]
    for row in await stored(catalogue):
        assert (row.key_id, row.sealed) == (newest, before[row.id].sealed)
        assert row.wrapped_key != before[row.id].wrapped_key
    attempt_with(catalogue, project, "nbla_1", "A3")
    assert await reveal(catalogue, "nbla_1", "A3") == {"A3": f"{VALUE} 3"}


async def test_a_row_exchanged_in_the_database_is_refused_and_can_be_set_anew(
    catalogue: Catalogue, owner: m.Principal, project: m.Project, caplog: pytest.LogCaptureFixture
) -> None:
    await put(catalogue, owner, "A", "harmless value")
    await put(catalogue, owner, "B", VALUE)
    rows = {row.name: row for row in await stored(catalogue)}
    async with catalogue.store.begin() as unit:
        taken = {"sealed": rows["B"].sealed, "wrapped_key": rows["B"].wrapped_key}
        await unit.execute(SECRETS.update().where(SECRETS.c.name == "A").values(**taken))
    attempt_with(catalogue, project, "nbla_1", "A")
    with pytest.raises(BrokenSeal, match="The secret A"):
        await reveal(catalogue, "nbla_1", "A")
    assert "a secret cannot be opened" in caplog.text
    add_key(catalogue.vault._file)
    assert await KeyTurn(catalogue.store, catalogue.vault, 1.0).turn() == 1, "one broken row stops no other"
    await put(catalogue, owner, "A", "harmless again")
    assert await reveal(catalogue, "nbla_1", "A") == {"A": "harmless again"}
