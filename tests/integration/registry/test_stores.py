"""What the registry promises of its databases, on each kind of them, also with two writers at once."""

from __future__ import annotations

import asyncio
from itertools import chain

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData

from libs.common.contracts import messages as m
from libs.common.errors import Conflict, NotFound, Unauthenticated
from libs.common.ids import secret_hash
from libs.common.migrations import metadata_of, migrate
from libs.common.secret_transfer import Reader
from services.registry.adapters.vault import add_key
from services.registry.handlers.accounts import bootstrap
from services.registry.loops import KeyTurn, Upkeep
from services.registry.settings import RegistrySettings
from tests.unit.registry.harness import Catalogue, attempt_of, gateway, job_in, service, version_of

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", ["registry", "registry/runs"])
async def test_migrations_make_the_tables_that_the_code_has(catalogue: Catalogue, name: str) -> None:
    store = catalogue.runs if name.endswith("runs") else catalogue.store
    await migrate(store.writer, name)
    async with store.writer.connect() as connection:
        assert await connection.run_sync(differences, metadata_of(name)) == []


def differences(connection: Connection, metadata: MetaData) -> list[object]:
    found = compare_metadata(MigrationContext.configure(connection), metadata)
    return [each for each in found if not (each[0] == "remove_table" and each[1].name == "alembic_version")]


async def test_life_of_an_account_a_project_a_model_and_a_run(catalogue: Catalogue) -> None:
    await bootstrap(catalogue.store, secret_hash("first"))
    asked = m.AuthenticateToken(token_hash=secret_hash("first"))
    owner = await catalogue.ask(asked, gateway(), m.Principal)
    project = await catalogue.ask(m.CreateProject(name="Größe", description="ü\n"), owner, m.Project)
    job = job_in(project, state="running", revision=3)
    attempt = attempt_of(job)
    points = tuple(m.Point(name="loss", value=1 / (step + 1), step=step) for step in range(3000))
    for _ in range(2):
        await catalogue.ask(m.LogRun(points=points, params={"lr": "1e-3"}), attempt, m.Run)
    await catalogue.tell(m.JobRunning(job=job))
    page = await catalogue.ask(m.GetMetrics(job_id=job.id, max_points=100), owner, m.MetricPage)
    [series] = page.items
    assert (len(series.points), series.point_count, series.max, series.last) == (100, 3000, 1, 1 / 3000)
    run = await catalogue.ask(m.GetRun(job_id=job.id), owner, m.Run)
    assert (run.metrics, run.params, run.state) == ({"loss": 1 / 3000}, {"lr": "1e-3"}, "running")
    version = await catalogue.ask(version_of(project, metrics={"a": 0.1}), attempt, m.ModelVersion)
    detail = await catalogue.ask(m.GetModel(model_id="digits"), owner, m.ModelDetail)
    assert detail.versions == (version,)
    deleted = await catalogue.ask(m.DeleteProject(project_id=project.id), owner, m.Project)
    catalogue.time.pass_(days=31)
    await Upkeep(catalogue.store, catalogue.runs, RegistrySettings()).forget()
    await catalogue.tell(m.ProjectPurged(project=deleted))
    with pytest.raises(NotFound):
        await catalogue.ask(m.GetRun(job_id=job.id), owner, m.Run)


async def test_later_attempt_replaces_the_last_value_and_an_earlier_step_does_not(catalogue: Catalogue) -> None:
    owner = await catalogue.member("main", "owner")
    project = await catalogue.ask(m.CreateProject(name="p"), owner, m.Project)
    job = job_in(project)
    for number, step, value, last in ((1, 5, 1.0, 1.0), (1, 3, 2.0, 1.0), (1, 5, 3.0, 3.0), (2, 0, 4.0, 4.0)):
        logged = m.LogRun(points=(m.Point(name="loss", value=value, step=step),))
        await catalogue.ask(logged, attempt_of(job, number), m.Run)
        run = await catalogue.ask(m.GetRun(job_id=job.id), owner, m.Run)
        assert run.metrics == {"loss": last}


async def test_two_writers_give_every_version_its_own_number(catalogue: Catalogue, rival: Catalogue) -> None:
    owner = await catalogue.member("main", "owner")
    project = await catalogue.ask(m.CreateProject(name="p"), owner, m.Project)

    async def register(writer: Catalogue) -> list[m.ModelVersion]:
        made = []
        for _ in range(10):
            answer = await writer.send(version_of(project), owner, "")
            made.append(m.ModelVersion.from_wire(answer.body))
        return made

    made = list(chain(*await asyncio.gather(register(catalogue), register(rival))))
    assert sorted(version.version for version in made) == list(range(1, 21))
    for version in made:
        asked = m.GetModelVersion(model_id=version.model_id, version=version.version)
        assert await catalogue.ask(asked, owner, m.ModelVersion) == version


async def test_two_writers_make_one_project_of_one_name(catalogue: Catalogue, rival: Catalogue) -> None:
    owner = await catalogue.member("main", "owner")
    for number in range(10):
        wanted = m.CreateProject(name=f"p{number}")
        outcomes = await asyncio.gather(
            catalogue.send(wanted, owner, ""), rival.send(wanted, owner, ""), return_exceptions=True
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Answer", "Conflict"]
        [refusal] = [outcome for outcome in outcomes if isinstance(outcome, Conflict)]
        assert refusal.code == "project_exists"


async def test_two_writers_spend_a_code_once(catalogue: Catalogue, rival: Catalogue) -> None:
    owner = await catalogue.member("main", "owner")
    for number in range(10):
        code = secret_hash(f"code {number}")
        await catalogue.ask(m.CreateSignIn(code_hash=code), owner, m.SignIn)
        outcomes = await asyncio.gather(
            *(
                writer.send(m.RedeemSignIn(code_hash=code, token_hash=secret_hash(f"{number} {who}")), gateway(), "")
                for who, writer in enumerate((catalogue, rival, catalogue, rival))
            ),
            return_exceptions=True,
        )
        assert sum(isinstance(outcome, Unauthenticated) for outcome in outcomes) == 3


async def test_two_writers_of_one_run_lose_nothing(catalogue: Catalogue, rival: Catalogue) -> None:
    owner = await catalogue.member("main", "owner")
    project = await catalogue.ask(m.CreateProject(name="p"), owner, m.Project)
    job = job_in(project)

    async def log(writer: Catalogue, first: int) -> None:
        for step in range(first, 40, 2):
            await writer.send(m.LogRun(points=(m.Point(name="loss", value=step, step=step),)), attempt_of(job), "")

    await asyncio.gather(log(catalogue, 0), log(rival, 1))
    page = await catalogue.ask(m.GetMetrics(job_id=job.id), owner, m.MetricPage)
    assert [point.step for point in page.items[0].points] == list(range(40))


async def test_secrets_are_kept_sealed_and_turned_to_a_new_key(catalogue: Catalogue) -> None:
    owner = await catalogue.member("main", "owner")
    project = await catalogue.ask(m.CreateProject(name="p"), owner, m.Project)
    for project_id in (project.id, ""):
        await catalogue.ask(m.SetSecret(project_id=project_id, name="A", value="of " + project_id), owner, m.Secret)
    job = job_in(project, template=m.JobTemplate(env={"A": "secret:A"}))
    catalogue.outside.jobs.known[job.id] = job
    execution = m.Execution(attempt_id="at1", job_id=job.id, team_id=project.team_id, project_id=project.id)
    catalogue.outside.attempts.living[secret_hash("t")] = execution
    newest = add_key(catalogue.vault._file)
    assert await KeyTurn(catalogue.store, catalogue.vault, 1.0).turn() == 2
    async with catalogue.store.view() as view:
        assert await view.secrets.lost([newest]) == 0
    reader = Reader()
    asked = m.RevealSecrets(token_hash=secret_hash("t"), names=("A",), public_key=reader.public_key)
    answer = await catalogue.ask(asked, service("executor", owner.team_id), m.RevealedSecrets)
    assert reader.open("A", answer.items[0].sealed) == "of " + project.id


async def test_two_writers_who_set_one_secret_at_once_make_one_row(catalogue: Catalogue, rival: Catalogue) -> None:
    owner = await catalogue.member("main", "owner")
    sets = [m.SetSecret(name="A", value=f"value {number}") for number in range(6)]
    asked = (each.send(one, owner, "") for one in sets for each in (catalogue, rival))
    await asyncio.gather(*asked)
    page = await catalogue.ask(m.ListSecrets(), owner, m.SecretPage)
    assert len(page.items) == 1
