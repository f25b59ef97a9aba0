"""A real service dies at every named point of its way from message to event; asked again, it did everything once."""

from __future__ import annotations

import ast
import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from libs.common.bus import Bus
from libs.common.contracts import messages as m
from libs.common.errors import Refusal, Unavailable
from libs.common.ids import new_id
from libs.common.migrations import migrate
from libs.common.store import Store
from services import SERVICES
from services.executor.loops import driver
from services.executor.settings import ExecutorSettings
from services.executor.store import SKELETON as EXECUTOR_SKELETON
from services.executor.store import ExecutorUnit
from services.storage.loops import filesets as storage_loops
from tests.integration.common.registry_process import GRANTS, ROOT, RegistryProcess, tell, until
from tests.integration.executor.test_crashes import POINTS
from tests.support.nats import NatsServer, running_nats
from tests.unit.executor.fake_cluster import NODE, FakeCluster
from tests.unit.executor.test_executor import Bench
from tests.unit.storage.world import VIEWER, running_world

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

# The points that every service has: proven here on the registry, as the code is the same.
COMMON = ("before_commit", "after_commit", "after_commit_before_ack", "after_publish")
# Passes that the service's own start makes stay below these; the death comes amid the requests.
PASSES = {"before_commit": 18, "after_commit": 18, "after_commit_before_ack": 6, "after_publish": 5}
MOST_REQUESTS = 120


def named_points() -> dict[str, set[str]]:
    """Every crash point in the code: the points common to all services by `{service}`, and each service's own."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder in ("libs", "services"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "crash_point":
                    service, point = _name(node.args[0], path).split(".", 1)
                    found[service].add(point)
    return found


def _name(argument: ast.expr, path: Path) -> str:
    if isinstance(argument, ast.Constant):
        return str(argument.value)
    assert isinstance(argument, ast.JoinedStr), f"{path}: a crash point has a name that can be read here"
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{service}" for part in argument.values)


def all_points() -> list[str]:
    """By the names that NABLA_FAULT takes."""
    points = named_points()
    common = [f"{service}.{point}" for service in SERVICES for point in sorted(points["{service}"])]
    own = [f"{service}.{point}" for service in SERVICES for point in sorted(points[service])]
    return common + own


def test_every_named_point_is_died_at_in_some_test() -> None:
    points = named_points()
    assert points["{service}"] == set(COMMON)
    assert set(points) <= {"{service}", *SERVICES}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    own = [point for point in all_points() if point.split(".")[1] not in COMMON]
    # Those of its steps the executor is killed at by tests that read them from its code.
    assert [point for point in own if f'"{point}' not in tests and point not in POINTS] == []


class Died(BaseException):
    """Stands for the death of a process: no handler of errors sees it."""


def die_at(point: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first pass of the point ends the work; answers with what was passed."""
    passed: list[str] = []

    def pass_(name: str) -> None:
        passed.append(name)
        if name == point and passed.count(name) == 1:
            raise Died

    monkeypatch.setattr(module, "crash_point", pass_)
    return passed


@pytest.mark.parametrize("point", ["executor.after_reserve", "executor.after_tell"])
async def test_an_executor_that_dies_between_its_steps_starts_the_attempt_once(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster outlives the executor; its successor finds what was reserved and told."""
    store = Store(f"sqlite:///{tmp_path}/test.db", ExecutorUnit, EXECUTOR_SKELETON, "executor")
    await migrate(store.writer, "executor")
    bench = Bench(store, FakeCluster(), ExecutorSettings(home=tmp_path, reconcile_s=0.0))
    await bench.watcher.look()
    passed = die_at(point, driver, monkeypatch)
    asked = m.StartExecution(
        attempt_id=new_id("attempt"),
        job_id=new_id("job"),
        number=1,
        project_id="pr0",
        node_id=NODE,
        template=m.JobTemplate(command=("true",)),
    )
    await bench.deliver(asked)
    with pytest.raises(Died):
        await bench.work()
    assert passed[-1] == point
    successor = Bench(store, bench.cluster, bench.settings)
    await successor.work()
    assert (await successor.row(asked.attempt_id)).state == "starting"
    assert [each.attempt_id for each in bench.cluster.orders] == [asked.attempt_id]
    assert list(bench.cluster.held) == [asked.attempt_id]
    await store.close()


async def test_a_storage_that_dies_after_removing_objects_forgets_their_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = die_at("storage.after_objects_removed", storage_loops, monkeypatch)
    async with running_world(f"sqlite:///{tmp_path}/test.db", tmp_path) as world:
        kept = await world.sealed(bodies={"a": b"kept"})
        grant = await world.open(bodies={"b": b"forgotten"})
        world.objects.upload(grant.uploads[0].url, b"forgotten")
        world.later(8 * 86_400)
        with pytest.raises(Died):
            await world.sweeper.sweep()
        assert passed == ["storage.after_objects_removed"]
        for _ in range(2):
            await world.sweeper.sweep()
        async with world.store.view() as view:
            assert await view.filesets.deleted("", 10) == []
        assert list(world.objects.kept.values()) == [b"kept"]
        assert (await world.ask(m.GetFileset(fileset_id=kept.id), VIEWER, m.Fileset)).state == "sealed"


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
def registry(server: NatsServer, tmp_path: Path) -> Iterator[RegistryProcess]:
    process = RegistryProcess(server, tmp_path / "home")
    yield process
    process.kill()


@pytest.mark.parametrize("point", COMMON)
async def test_a_death_at_any_point_leaves_one_effect_and_every_event(
    point: str, asker: Bus, registry: RegistryProcess
) -> None:
    process = registry.start(f"registry.{point}:{PASSES[point]}")
    ada = await registry.signed_in(asker)
    answers: dict[str, m.Project] = {}
    asked: list[str] = []
    jobs: dict[str, str] = {}

    async def ask(name: str) -> None:
        answers[name] = await asker.ask(m.CreateProject(name=name), m.Project, ada, key=f"key-{name}", timeout_s=30)

    for number in range(MOST_REQUESTS):
        if process.poll() is not None:
            break
        names = [f"p{number}-{each}" for each in range(3)]
        asked += names
        # An event that the death leaves without its ack comes again only after 30 s: one point is enough for that.
        if number < 2 or point == "after_commit_before_ack":
            event_id = new_id("event")
            jobs[event_id] = new_id("job")
            await tell(asker, _queued(jobs[event_id], ada), event_id)
        done = asyncio.gather(*map(ask, names), return_exceptions=True)
        gone = asyncio.create_task(asyncio.to_thread(process.wait, 30))
        await asyncio.wait({asyncio.ensure_future(done), gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            done.cancel()
    assert process.poll() == 137, f"{point} was never passed: {registry.said[-2000:]}"
    await asyncio.gather(gone, return_exceptions=True)
    before = dict(answers)

    registry.start()
    assert await registry.signed_in(asker) == ada
    for name in asked:
        await ask(name)
    assert before.items() <= answers.items()
    assert len({project.id for project in answers.values()}) == len(asked)
    for name in asked:
        await ask(name)

    found = await asker.ask(m.ListProjects(limit=500), m.ProjectPage, ada)
    assert sorted(project.name for project in found.items) == sorted(asked)
    # What was delivered and not acknowledged comes again after 30 s.
    await until(lambda: _all_runs(asker, ada, jobs.values()), 60)
    await until(lambda: _told_all(asker, set(answers)), 60)
    told = await _created(asker)
    # At least once in the stream, and by its id exactly once.
    assert {object_id for _, object_id in told} == {project.id for project in answers.values()}
    assert Counter(object_id for _, object_id in set(told)).most_common(1)[0][1] == 1
    stream = await asker.jetstream.stream_info("DEADLETTER")
    assert stream.state.messages == 0


def _queued(job_id: str, ada: m.Principal) -> m.JobQueued:
    return m.JobQueued(job=m.Job(id=job_id, team_id=ada.team_id, project_id="pr0", state="queued", revision=1))


async def _all_runs(asker: Bus, ada: m.Principal, jobs: Iterable[str]) -> bool:
    try:
        runs = [await asker.ask(m.GetRun(job_id=job_id), m.Run, ada) for job_id in jobs]
    except Unavailable:
        raise
    except Refusal:
        return False
    return all(run.state == "queued" for run in runs)


async def _created(asker: Bus) -> list[tuple[str, str]]:
    """Event and object id of all `project.created` in the stream, in its order."""
    info = await asker.jetstream.stream_info("EVT")
    found = []
    for sequence in range(info.state.first_seq, info.state.last_seq + 1):
        message = await asker.jetstream.get_msg("EVT", seq=sequence)
        headers = message.headers or {}
        if headers["ce-type"] == m.ProjectCreated.ROUTE.type:
            found.append((headers["ce-id"], headers["ce-subject"]))
    return found


async def _told_all(asker: Bus, names: set[str]) -> bool:
    return len({object_id for _, object_id in await _created(asker)}) >= len(names)
