"""The real registry on a disk that becomes full: it says so, loses nothing, and goes on when there is room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from libs.common.bus import Bus
from libs.common.contracts import messages as m
from libs.common.errors import NotFound, Unavailable
from libs.common.ids import new_id
from tests.integration.common.registry_process import GRANTS, RegistryProcess, tell, until
from tests.support.disks import fill, free
from tests.support.nats import NatsServer, running_nats

pytestmark = [pytest.mark.integration, pytest.mark.chaos]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with running_nats(tmp_path / "nats", GRANTS) as server:
        yield server


@pytest.fixture
async def asker(server: NatsServer) -> AsyncIterator[Bus]:
    await server.provision()
    bus = server.bus("gateway")
    await bus.start()
    yield bus
    await bus.stop()


@pytest.fixture
def registry(server: NatsServer, small_disk: Path) -> Iterator[RegistryProcess]:
    process = RegistryProcess(server, small_disk / "home")
    yield process
    process.kill()


async def test_a_full_disk_is_answered_with_its_remedy_and_nothing_is_lost(
    asker: Bus, registry: RegistryProcess, small_disk: Path
) -> None:
    process = registry.start()
    ada = await registry.signed_in(asker)
    made = [await create(asker, ada, "before")]
    fill(small_disk)
    refused = ""
    for number in range(400):
        # What the database has on the disk already may still take a few.
        try:
            made.append(await create(asker, ada, f"p{number}"))
        except Unavailable as error:
            refused, said = f"p{number}", error
            break
    assert refused, "the disk never became full"
    assert said.code == "disk_full"
    assert str(small_disk / "home" / "data") in said.remedy
    assert "nothing that was is lost" in said.detail
    fill(small_disk)

    # Reading goes on, and what others tell is put off, however often it came.
    assert await asker.ask(m.GetProject(project_id="before"), m.Project, ada) == made[0]
    jobs = [new_id("job") for _ in range(60)]
    for job_id in jobs:
        job = m.Job(id=job_id, team_id=ada.team_id, project_id=made[0].id, state="queued", revision=1)
        await tell(asker, m.JobQueued(job=job), new_id("event"))
    await until(lambda: said_in_log(registry, "message put off"))
    await asyncio.sleep(2)
    with pytest.raises(Unavailable) as again:
        await create(asker, ada, refused)
    assert again.value.code == "disk_full"
    with pytest.raises(NotFound):
        await asker.ask(m.GetProject(project_id=refused), m.Project, ada)

    free(small_disk)
    made.append(await create(asker, ada, refused))
    assert await create(asker, ada, refused) == made[-1]
    await until(lambda: all_runs(asker, ada, jobs), 60)
    await until(lambda: all_told(asker, made), 60)
    assert process.poll() is None
    assert (await asker.jetstream.stream_info("DEADLETTER")).state.messages == 0


async def test_a_service_starts_on_a_full_disk_answers_what_it_can_and_waits(
    asker: Bus, registry: RegistryProcess, small_disk: Path
) -> None:
    registry.start()
    ada = await registry.signed_in(asker)
    before = await create(asker, ada, "before")
    fill(small_disk)
    registry.kill()
    process = registry.start()
    assert await registry.signed_in(asker) == ada
    assert await asker.ask(m.GetProject(project_id="before"), m.Project, ada) == before
    await until(lambda: said_in_log(registry, "outbox waits"))
    free(small_disk)
    made = [before, await create(asker, ada, "after")]
    await until(lambda: all_told(asker, made))
    assert process.poll() is None


async def create(asker: Bus, ada: m.Principal, name: str) -> m.Project:
    return await asker.ask(m.CreateProject(name=name), m.Project, ada, key=f"key-{name}", timeout_s=30)


async def said_in_log(registry: RegistryProcess, words: str) -> bool:
    return words in registry.said


async def all_runs(asker: Bus, ada: m.Principal, jobs: list[str]) -> bool:
    try:
        for job_id in jobs:
            await asker.ask(m.GetRun(job_id=job_id), m.Run, ada)
    except NotFound:
        return False
    return True


async def all_told(asker: Bus, made: list[m.Project]) -> bool:
    info = await asker.jetstream.stream_info("EVT")
    told = set()
    for sequence in range(info.state.first_seq, info.state.last_seq + 1):
        told.add(((await asker.jetstream.get_msg("EVT", seq=sequence)).headers or {}).get("ce-subject"))
    return told >= {project.id for project in made}
