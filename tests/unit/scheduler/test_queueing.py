"""What people see of the queue: machine types, reasons, limits, and jobs made from others."""

from __future__ import annotations

import pytest

from libs.common.contracts.messages import (
    CloneJob,
    Container,
    ExecutionEnded,
    ExecutionRunning,
    ExplainJob,
    Gang,
    ListMachines,
    NodesReported,
    OrderJob,
    Principal,
    Project,
    ProjectArchived,
    ProjectRestored,
    Resources,
    RetryJob,
    Role,
    StartExperiment,
    StopJob,
)
from libs.common.errors import Conflict, Forbidden, Invalid, NotFound, Unavailable
from libs.common.ids import new_id
from services.scheduler.adapters.machine_file import MachineFile
from services.scheduler.store import SchedulerStore
from tests.unit.scheduler.cases import PROJECT, TEAM, said, template
from tests.unit.scheduler.world import USER, World, node

pytestmark = pytest.mark.unit

STRANGER = Principal(kind="user", id="u2", name="bob", team_id="t" + "1" * 26, role="owner")
GIB = 1 << 30


async def ends(world: World, job_id: str, **facts) -> None:
    async with world.store.view() as view:
        case = await view.find(job_id)
    await world.deliver(ExecutionEnded(execution=said(case, "ended", 9, **facts)))


async def test_a_gang_is_told_its_seats_and_frees_all_of_them(world):
    gang = Gang(type="torch", roles=(Role(name="worker", count=3),))
    await world.report_nodes(node(), node("node2"))
    job_id = await world.submit(gang=gang, resources=Resources(cpu_count=2))
    assert await world.place() == 1
    command = (await world.outbox())[-1][1]
    assert [seat.get("node_id") for seat in command["seats"]] == ["node1", "node1", "node2"]
    assert command["node_id"] == "node1"
    waiting = await world.submit(resources=Resources(cpu_count=4))
    await world.restart()
    assert await world.place() == 0
    for rank in range(3):
        assert await world.place() == 0
        await ends(world, job_id, rank=rank, reason="exited", exit_code=0)
    assert await world.place() == 1
    assert (await world.job(waiting)).state == "starting"


async def test_a_gang_that_is_tried_again_goes_where_it_was(world):
    gang = Gang(type="torch", roles=(Role(name="worker", count=2),))
    await world.report_nodes(node("node3"), node("node4"))
    job_id = await world.submit(gang=gang, resources=Resources(cpu_count=4), max_retries=1)
    await world.place()
    await ends(world, job_id, rank=1, reason="exited", exit_code=1)
    await ends(world, job_id, rank=0, reason="stopped")
    await world.report_nodes(node("node1"), node("node2"), node("node3"), node("node4"))
    world.wait(2)
    assert await world.place() == 1
    command = (await world.outbox())[-1][1]
    assert [seat["node_id"] for seat in command["seats"]] == ["node3", "node4"]


async def test_a_model_that_no_node_has_fails_at_once_with_the_reason(world):
    await world.report_nodes(node(gpu_count=1, gpu_model="NVIDIA H100"))
    job_id = await world.submit(resources=Resources(gpu_model="H200"))
    await world.place()
    detail = await world.detail(job_id)
    assert (detail.job.state, detail.timeline[-1].cause) == ("failed", "no_such_machine")
    reason = "needs 1 H200 GPU, 1 CPU, and no node has such a GPU; the GPUs here are NVIDIA H100"
    assert detail.job.detail == reason
    assert (await world.query(ExplainJob(job_id=job_id))).summary == f"It has failed: {reason}"


async def test_a_model_of_an_executor_that_is_away_is_waited_for(world):
    """A restart of the one cluster that has it must not fail the jobs that queue for it."""
    elsewhere = NodesReported(nodes=(node("node2", gpu_count=1, gpu_model="H100"),))
    await world.deliver(elsewhere, source="executor.far")
    world.wait(31)
    await world.report_nodes(node(gpu_count=1, gpu_model="A100"))
    job_id = await world.submit(resources=Resources(gpu_model="H100"))
    assert await world.place() == 0
    job = await world.job(job_id)
    assert (job.state, job.detail) == ("queued", "needs 1 H100 GPU, and no node that takes work has such a GPU")
    away = {each.node_id: each.obstacle for each in (await world.query(ExplainJob(job_id=job_id))).nodes}
    assert away["node2"] == "the executor is silent"
    await world.deliver(elsewhere, source="executor.far")
    assert await world.place() == 1


async def test_a_job_that_waited_when_the_last_such_gpu_left_fails_too(world):
    await world.report_nodes(node(), node("node2", gpu_count=1, gpu_model="H100"))
    await world.submit(resources=Resources(gpu_model="H100"))
    await world.place()
    job_id = await world.submit(resources=Resources(gpu_model="H100"))
    await world.place()
    await world.report_nodes(node(), node("node2", gpu_count=1, gpu_model="H100", state="silent"))
    await world.place()
    await world.reconciler.reconcile()
    assert (await world.job(job_id)).state == "queued"
    await world.report_nodes(node())
    await world.place()
    await world.reconciler.reconcile()
    assert (await world.job(job_id)).state == "failed"


async def test_a_job_is_given_up_when_it_has_waited_as_long_as_it_may(world):
    await world.report_nodes(node())
    job_id = await world.submit(resources=Resources(cpu_count=5), max_wait_s=10)
    patient = await world.submit(resources=Resources(cpu_count=5))
    await world.place()
    world.wait(9)
    await world.report_nodes(node())
    await world.place()
    assert (await world.job(job_id)).state == "queued"
    world.wait(2)
    await world.restart()
    await world.place()
    detail = await world.detail(job_id)
    assert (detail.job.state, detail.timeline[-1].cause) == ("failed", "waited_too_long")
    assert detail.job.detail == "waited as long as it may: needs 5 CPUs, the largest node has 4 CPUs"
    assert (await world.job(patient)).state == "queued"


async def test_a_queued_job_of_an_archived_project_is_held_until_the_project_is_back(world):
    project = Project(id=PROJECT, team_id=TEAM, state="active", revision=1)
    job_id = await world.submit()
    archived = project.model_copy(update={"state": "archived", "revision": 2})
    await world.deliver(ProjectArchived(project=archived), source="registry")
    await world.report_nodes(node())
    assert await world.place() == 0
    assert (await world.job(job_id)).detail == "its project is archived"
    await world.restart()
    assert await world.place() == 0
    restored = project.model_copy(update={"revision": 3})
    await world.deliver(ProjectRestored(project=restored), source="registry")
    assert await world.place() == 1


async def test_a_project_that_closes_between_decision_and_commit_holds_its_job(world):
    await world.report_nodes(node())
    job_id = await world.submit()
    await world.placer._catch_up()
    archived = Project(id=PROJECT, team_id=TEAM, state="archived", revision=2)
    decide = world.placer.policy.decide
    assert [placement.job_id for placement in decide(10**18)] == [job_id]
    world.placer.policy.forget(job_id)
    world.store.changes.note([job_id])
    await world.placer._catch_up()
    await world.deliver(ProjectArchived(project=archived), source="registry")
    world.store.changes.take()
    await world.place()
    assert (await world.job(job_id)).state == "queued"
    await world.place()
    assert (await world.job(job_id)).detail == "its project is archived"


async def test_a_draining_node_takes_nothing_new_and_what_runs_there_is_in_contact(world):
    job_id = await world.running_job()
    await world.report_nodes(node(draining=True))
    waiting = await world.submit()
    assert await world.place() == 0
    await world.reconciler.reconcile()
    assert (await world.job(job_id)).state == "starting"
    assert (await world.job(waiting)).detail == "no node is ready: all nodes are being drained"


async def test_machine_types_are_those_of_the_nodes_unless_a_file_names_others(world, tmp_path):
    await world.report_nodes(
        node(hostname="a"), node("node2", hostname="b", gpu_count=2, gpu_model="NVIDIA H100 80GB HBM3")
    )
    await world.submit(resources=Resources(cpu_count=3))
    await world.place()
    page = await world.query(ListMachines())
    shown = [(item.name, item.resources.cpu_count, item.startable, item.hostnames) for item in page.items]
    assert shown == [
        ("cpu-1", 1, 5, ("a", "b")),
        ("cpu-2", 2, 2, ("a", "b")),
        ("cpu-4", 4, 1, ("a", "b")),
        ("gpu-h100-1", 2, 2, ("b",)),
        ("gpu-h100-2", 4, 1, ("b",)),
    ]
    assert page.source == "nodes"
    (tmp_path / "machines.toml").write_text('[small]\ncpus = 2\nmemory = "4G"\n')
    world.store._machine_types = MachineFile(tmp_path / "machines.toml")
    page = await world.query(ListMachines())
    assert [(item.name, item.resources.memory_bytes) for item in page.items] == [("small", 4 * GIB)]
    assert page.source == "file"


async def test_a_machine_type_fills_in_what_the_job_leaves_open(world):
    await world.report_nodes(node(gpu_count=2, gpu_model="H100"))
    await world.place()
    job_id = await world.submit(machine_type="gpu-h100-1", resources=Resources(memory_bytes=GIB))
    asked = (await world.job(job_id)).template.resources
    assert (asked.cpu_count, asked.memory_bytes, asked.gpu_count, asked.gpu_model) == (2, GIB, 1, "H100")
    with pytest.raises(Invalid, match=r"there are cpu-1, cpu-2, cpu-4, gpu-h100-1, gpu-h100-2\.") as refusal:
        await world.submit(machine_type="gpu-h200-1", resources=Resources())
    assert refusal.value.facts["field"] == "template.machine_type"


async def test_before_any_node_has_reported_a_machine_type_is_asked_for_again_later(world):
    with pytest.raises(Unavailable, match="no node has reported"):
        await world.submit(machine_type="cpu-1")


async def test_a_waiting_job_is_explained_with_what_is_free_and_who_holds_it(world):
    await world.report_nodes(node(hostname="a"), node("node2", hostname="b", draining=True))
    holder = await world.submit(name="mine", resources=Resources(cpu_count=2))
    await world.submit(STRANGER, resources=Resources(cpu_count=1))
    await world.place()
    first = await world.submit(resources=Resources(cpu_count=3), priority=60)
    job_id = await world.submit(resources=Resources(cpu_count=3))
    await world.place()
    told = await world.query(ExplainJob(job_id=job_id))
    assert (told.state, told.before, told.waiting, told.priority) == ("queued", 1, 2, 50)
    assert told.summary == "It needs 3 CPUs. Waits for 3 CPUs to become free on one node; 1 job waits before it."
    assert [(room.hostname, room.free.cpu_count, room.obstacle) for room in told.nodes] == [
        ("a", 1, "is in use"),
        ("b", 4, "is being drained"),
    ]
    assert [(each.job_id, each.name, each.holds.cpu_count) for each in told.holders] == [(holder, "mine", 2)]
    assert told.held_by_others.cpu_count == 1
    assert (await world.query(ExplainJob(job_id=first))).before == 0
    with pytest.raises(NotFound):
        await world.query(ExplainJob(job_id=job_id), STRANGER)


async def test_a_job_in_an_image_is_explained_by_who_has_no_podman(world):
    await world.report_nodes(node(hostname="a"), node("node2", hostname="b", draining=True, runtimes=("podman",)))
    job_id = await world.submit(container=Container(image="python:3.12"))
    await world.place()
    told = await world.query(ExplainJob(job_id=job_id))
    assert "runs in a container image, and no node has podman" in told.summary.replace("Runs", "runs")
    assert [(room.hostname, room.obstacle) for room in told.nodes] == [
        ("a", "has no podman"),
        ("b", "is being drained"),
    ]
    await world.report_nodes(node(hostname="a"), node("node2", hostname="b", runtimes=("podman",)))
    await world.place()
    assert (await world.job(job_id)).state == "starting"


async def test_a_gang_that_only_nodes_with_loopback_could_hold_ends_with_the_reason(world):
    await world.report_nodes(*(node(f"node{n}", network="loopback") for n in (1, 2)))
    gang = Gang(type="torch", roles=(Role(name="worker", count=2),))
    job_id = await world.submit(gang=gang, resources=Resources(cpu_count=3))
    await world.place()
    ended = await world.job(job_id)
    assert ended.state == "failed"
    assert "its ranks could not reach each other" in ended.detail


async def test_jobs_in_every_other_state_are_explained_by_what_happened(world):
    job_id = await world.running_job(max_retries=1)
    assert "being started" in (await world.query(ExplainJob(job_id=job_id))).summary
    async with world.store.view() as view:
        case = await view.find(job_id)
    await world.deliver(ExecutionRunning(execution=said(case, "running", 1)))
    assert (await world.query(ExplainJob(job_id=job_id))).summary == "It runs."
    await ends(world, job_id, reason="exited", exit_code=3)
    await world.place()
    told = await world.query(ExplainJob(job_id=job_id))
    assert told.summary.startswith("It is tried again soon: exit code 3; tried again in ")
    assert (told.cause, told.not_before is not None) == ("failure", True)
    await world.request(StopJob(job_id=job_id))
    told = await world.query(ExplainJob(job_id=job_id))
    assert (told.summary, told.cause) == ("It was cancelled: stopped before it ran", "stop_asked")


async def test_the_history_says_who_moved_a_job_and_why(world):
    job_id = await world.running_job()
    async with world.store.view() as view:
        case = await view.find(job_id)
    await world.deliver(ExecutionRunning(execution=said(case, "running", 1)))
    await world.request(StopJob(job_id=job_id))
    await ends(world, job_id, reason="stopped")
    entries = (await world.detail(job_id)).timeline
    assert [(entry.state, entry.actor, entry.cause) for entry in entries] == [
        ("submitted", "ada", "submitted"),
        ("queued", "scheduler", "admitted"),
        ("starting", "scheduler", "placed"),
        ("running", "executor", "started"),
        ("running", "ada", "stop_asked"),
        ("cancelled", "executor", "stopped"),
    ]


async def test_an_ended_job_is_run_again_as_a_new_one(world):
    experiment = await world.request(
        StartExperiment(project_id=PROJECT, template=template(env={"A": "1"}, workspace_id=new_id("fileset")))
    )
    job_id = experiment["jobs"][0]["id"]
    with pytest.raises(Conflict, match="is queued"):
        await world.request(RetryJob(job_id=job_id))
    await world.request(StopJob(job_id=job_id))
    first, again = [await world.request(RetryJob(job_id=job_id), key="k") for _ in range(2)]
    assert first == again
    new, old = await world.job(first["id"]), await world.job(job_id)
    assert (new.state, new.experiment_id, old.state) == ("queued", experiment["id"], "cancelled")
    assert new.template == old.template.model_copy(update={"origin": {"retry_of": job_id}})
    with pytest.raises(NotFound):
        await world.request(RetryJob(job_id=job_id), STRANGER)
    with pytest.raises(Forbidden):
        await world.request(RetryJob(job_id=job_id), USER.model_copy(update={"role": "viewer"}))


async def test_a_clone_differs_in_what_was_said_and_in_nothing_else(world):
    await world.report_nodes(node())
    await world.place()
    job_id = await world.submit(env={"A": "1", "B": "2"}, max_retries=3, resources=Resources(memory_bytes=GIB))
    changes = CloneJob(
        job_id=job_id, name="again", command=("a", "b"), env={"B": "3"}, resources=Resources(cpu_count=2), priority=0
    )
    made = (await world.job((await world.request(changes))["id"])).template
    assert (made.name, made.command, made.env, made.priority) == ("again", ("a", "b"), {"A": "1", "B": "3"}, 0)
    assert (made.resources, made.max_retries) == (Resources(cpu_count=2, memory_bytes=GIB), 3)
    smaller = await world.request(CloneJob(job_id=job_id, machine_type="cpu-4", max_retries=0))
    made = (await world.job(smaller["id"])).template
    assert (made.resources, made.max_retries) == (Resources(cpu_count=4, memory_bytes=8 * GIB), 0)
    with pytest.raises(Invalid):
        await world.request(CloneJob(job_id=job_id, priority=101))


async def test_a_deployments_jobs_are_its_own(world):
    job_id = new_id("job")
    order = OrderJob(job_id=job_id, project_id=PROJECT, template=template(kind="replica"))
    await world.deliver(order, source="serving")
    for message in (RetryJob(job_id=job_id), CloneJob(job_id=job_id)):
        with pytest.raises(Conflict, match="replica of a deployment"):
            await world.request(message)


def test_a_store_without_a_file_names_no_machine_types(tmp_path):
    assert SchedulerStore(f"sqlite:///{tmp_path}/x.db")._machine_types.types() is None
    assert MachineFile(tmp_path / "none.toml").types() is None


@pytest.mark.parametrize(
    "text",
    ["x", "a = 1", "[A]\ncpus = 1", "[a]\ncpu = 1", '[a]\ncpus = "1"', "[a]\ngpus = 1.5", '[a]\nmemory = "much"'],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, text):
    (tmp_path / "machines.toml").write_text(text)
    with pytest.raises(Conflict, match=r"machines.toml cannot be read"):
        MachineFile(tmp_path / "machines.toml").types()


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "machines.toml"
    path.write_text('[big]\ncpus = 8\ngpus = 0.5\ngpu_model = "H100"\ngpu_memory = "80G"\n')
    file = MachineFile(path)
    assert file.types()["big"] == (500, 8000, 0, "H100", 80 * GIB, False)
    path.write_text("[small]\ncpus = 0.5\n")
    assert list(file.types()) == ["small"]
