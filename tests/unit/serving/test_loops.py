"""From model to endpoint and back, look by look, on a real store with the world faked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from libs.common.clock import to_us
from libs.common.contracts.messages import (
    Attempt,
    DeleteDeployment,
    Job,
    JobCancelled,
    JobFailed,
    JobQueued,
    JobRunning,
    JobSucceeded,
    Node,
    NodesReported,
)
from libs.common.waiting import end
from tests.support.serving import CREATE, Serving, serving_on

pytestmark = pytest.mark.unit
ADDRESS = "127.0.0.1:31001"


@pytest.fixture
async def serving(tmp_path: Path, database_url: str) -> AsyncIterator[Serving]:
    async with serving_on(database_url, tmp_path) as service:
        yield service


async def built(serving: Serving) -> None:
    """A deployment whose bento is built and whose first replica is ordered."""
    created = await serving.send(CREATE)
    job_id = created.revision.build_job_id
    serving.peers.bentos[job_id] = "fs-bento"
    await serving.job_is(JobSucceeded, job_id, "succeeded")
    await serving.look(2)


async def ready(serving: Serving, address: str = ADDRESS) -> str:
    """A deployment that serves at `address`; answers its replica job's id."""
    await built(serving)
    return await again_ready(serving, address)


async def again_ready(serving: Serving, address: str) -> str:
    serving.health.healthy.add(address)
    job_id = await serving.replica_runs(address)
    await serving.look(2)
    assert (await serving.deployment()).state == "ready"
    return job_id


async def test_a_model_becomes_an_endpoint(serving: Serving) -> None:
    await built(serving)
    starting = await serving.deployment()
    assert (starting.state, starting.revision.bento_fileset_id) == ("starting", "fs-bento")
    await serving.replica_runs(ADDRESS)
    await serving.look()
    assert (await serving.deployment()).detail == "The replica loads the model."
    assert serving.proxy.servers("digits") is None
    serving.health.healthy.add(ADDRESS)
    serving.pass_time(0.5)
    await serving.look()
    now = await serving.deployment()
    assert (now.state, now.revision.state, now.detail) == ("ready", "ready", "")
    assert now.ready_at == serving.now[0]
    assert serving.proxy.servers("digits") == [f"http://{ADDRESS}"]
    events = [kind for kind in await serving.types() if kind.startswith("deployment")]
    assert events == ["deployment.created", "deployment.starting", "deployment.ready"]


async def test_a_replica_gets_the_bento_a_port_and_the_hash_of_the_token(serving: Serving) -> None:
    await built(serving)
    order = [body for kind, body in await serving.emitted() if kind == "job.order.v1"][-1]
    template = order["template"]
    assert template["inputs"] == [{"fileset_id": "fs-bento", "path": "bento"}]
    assert template["command"] == ["python", "-c", "replica", str(template["ports"][0])]
    token = (await serving.deployment()).endpoint_token
    assert token not in str(order)
    assert len(template["env"]["NABLA_ENDPOINT_HASHES"]) == 64
    assert template["timeout_s"] == 0


async def test_it_is_not_ready_before_the_proxy_shows_the_route(serving: Serving) -> None:
    await built(serving)
    serving.health.healthy.add(ADDRESS)
    serving.proxy.behind = True
    await serving.replica_runs(ADDRESS)
    await serving.look()
    assert (await serving.deployment()).state == "starting"
    assert serving.front.problem
    serving.proxy.behind = False
    serving.pass_time(1.1)
    await serving.look()
    assert (await serving.deployment()).state == "ready"
    assert not serving.front.problem


def far_servers(serving: Serving) -> object:
    return serving.proxy.config["http"]["services"]["n-ab12"]["loadBalancer"]["servers"]


async def test_a_node_on_another_machine_is_reached_as_soon_as_the_executor_gives_a_pass(serving: Serving) -> None:
    serving.passes.away = True
    node = Node(id="ab12", state="ready", door="10.0.0.2:4000")
    await serving.send(NodesReported(nodes=(node,)))
    await serving.front.publish()
    assert far_servers(serving) == []
    assert not await serving.front.is_behind()
    serving.passes.away = False
    assert await serving.front.is_behind()
    await serving.front.publish()
    assert far_servers(serving) == [{"url": "https://10.0.0.2:4000"}]
    serving.passes.away = True
    await serving.front.publish()
    assert far_servers(serving) == [{"url": "https://10.0.0.2:4000"}], "the pass is good without the executor"


async def test_a_failed_build_tells_the_reason_and_the_end_of_the_log(serving: Serving) -> None:
    created = await serving.send(CREATE)
    serving.peers.lines = ["loading model.joblib", "The model file model.joblib cannot be loaded: bad pickle"]
    await serving.job_is(JobFailed, created.revision.build_job_id, "failed", detail="exit code 1")
    await serving.look()
    failed = await serving.deployment()
    assert (failed.state, failed.revision.state) == ("failed", "failed")
    assert "exit code 1" in failed.detail
    assert failed.detail.endswith("cannot be loaded: bad pickle")
    assert (await serving.types())[-1] == "deployment.failed"


async def test_a_failure_is_told_even_when_the_log_cannot_be_read(serving: Serving) -> None:
    created = await serving.send(CREATE)
    await serving.job_is(JobFailed, created.revision.build_job_id, "failed")
    serving.peers.silent = True
    await serving.look()
    assert (await serving.deployment()).state == "building"
    serving.pass_time(6)
    await serving.look()
    assert (await serving.deployment()).state == "failed"


async def test_a_build_without_a_bento_fails_after_a_while(serving: Serving) -> None:
    created = await serving.send(CREATE)
    await serving.job_is(JobSucceeded, created.revision.build_job_id, "succeeded")
    await serving.look()
    assert (await serving.deployment()).state == "building"
    serving.pass_time(61)
    await serving.look()
    assert "left no bento" in (await serving.deployment()).detail


async def test_a_dead_replica_is_replaced_and_the_endpoint_answers_503_meanwhile(serving: Serving) -> None:
    first = await ready(serving)
    serving.pass_time(3600)
    await serving.job_is(JobFailed, first, "failed", detail="killed")
    await serving.look()
    assert (await serving.deployment()).state == "starting"
    assert serving.proxy.servers("digits") == []
    serving.pass_time(1.1)
    await serving.look(2)
    second = await again_ready(serving, "127.0.0.1:31002")
    assert second != first
    assert serving.proxy.servers("digits") == ["http://127.0.0.1:31002"]


async def test_a_replica_that_keeps_dying_fails_after_five_starts(serving: Serving) -> None:
    await built(serving)
    starts = 0
    while (now := await serving.deployment()).state == "starting":
        if now.revision.replica_job_id:
            starts += 1
            await serving.job_is(JobFailed, now.revision.replica_job_id, "failed", detail="exit code 98")
        serving.pass_time(31)
        await serving.look()
        assert starts < 10
    assert starts == 5
    assert (now.state, "exit code 98" in now.detail) == ("failed", True)


async def test_a_deployment_that_is_given_up_loses_its_route_at_once(serving: Serving) -> None:
    for death in range(5):
        job_id = await (again_ready(serving, ADDRESS) if death else ready(serving))
        await serving.job_is(JobFailed, job_id, "failed", detail="killed")
        await serving.look()
        serving.pass_time(31)
        if death < 4:
            await serving.look(2)
    assert (await serving.deployment()).state == "failed"
    assert serving.proxy.servers("digits") is None


async def test_a_replica_started_on_another_node_gets_the_traffic_there(serving: Serving) -> None:
    job_id = await ready(serving)
    await serving.job_is(JobQueued, job_id, "queued", detail="its node is gone")
    await serving.look()
    assert (await serving.deployment()).detail == "its node is gone"
    assert serving.proxy.servers("digits") == []
    assert await again_ready(serving, "127.0.0.1:31003") == job_id
    assert serving.proxy.servers("digits") == ["http://127.0.0.1:31003"]


async def test_a_first_replica_that_never_answers_fails_and_is_halted(serving: Serving) -> None:
    await built(serving)
    job_id = await serving.replica_runs(ADDRESS)
    serving.pass_time(121)
    await serving.look(2)
    assert (await serving.deployment()).state == "failed"
    assert ("job.halt.v1", {"job_id": job_id}) in await serving.emitted()


async def test_a_deleted_deployment_loses_its_route_first_then_its_jobs_then_its_name(serving: Serving) -> None:
    job_id = await ready(serving)
    serving.proxy.behind = True
    await serving.send(DeleteDeployment(deployment_id="digits"))
    await serving.look()
    assert (await serving.deployment()).state == "deleting"
    assert serving.proxy.servers("digits") is None
    serving.proxy.behind = False
    serving.pass_time(2)
    await serving.look()
    assert ("job.halt.v1", {"job_id": job_id}) in await serving.emitted()
    await serving.job_is(JobCancelled, job_id, "cancelled")
    await serving.look()
    assert (await serving.types())[-1] == "deployment.deleted"
    await serving.send(CREATE)


async def test_an_order_that_overtakes_its_halt_is_halted_again(serving: Serving) -> None:
    created = await serving.send(CREATE)
    job_id = created.revision.build_job_id
    await serving.send(DeleteDeployment(deployment_id="digits"))
    for _ in range(8):
        serving.pass_time(20)
        await serving.look()
    assert (await serving.deployment(created.id)).state == "deleted"
    halts = (await serving.types()).count("job.halt")
    await serving.send(JobRunning(job=Job(id=job_id, state="running", revision=3)))
    assert (await serving.types()).count("job.halt") == halts + 1


async def test_it_converges_with_every_event_lost(serving: Serving) -> None:
    created = await serving.send(CREATE)
    build = created.revision.build_job_id
    serving.peers.bentos[build] = "fs-bento"
    serving.peers.jobs[build] = Job(id=build, state="succeeded", revision=7)
    serving.pass_time(16)
    await serving.look(3)
    replica = (await serving.deployment()).revision.replica_job_id
    port = str((await serving.ordered(replica)).port)
    serving.health.healthy.add(ADDRESS)
    attempt = Attempt(addresses={port: ADDRESS})
    serving.peers.jobs[replica] = Job(id=replica, state="running", revision=7, attempt=attempt)
    serving.pass_time(16)
    await serving.look(3)
    assert (await serving.deployment()).state == "ready"


async def test_what_a_killed_process_was_looking_at_is_looked_at_again_at_once(serving: Serving) -> None:
    created = await serving.send(CREATE)
    leased_us = to_us(serving.now[0]) + 120_000_000
    await serving.store.run(lambda unit: unit.set_due(created.id, leased_us))
    serving.pass_time(16)
    await serving.look()
    assert serving.peers.asked == []
    looking = asyncio.create_task(serving.reconciler.run())
    try:
        async with asyncio.timeout(60):
            while not serving.peers.asked:
                await asyncio.sleep(0.01)
    finally:
        await end([looking], again_s=1.0)


async def test_an_order_the_scheduler_never_got_is_repeated_under_the_same_id(serving: Serving) -> None:
    created = await serving.send(CREATE)
    serving.pass_time(16)
    await serving.look()
    orders = [body["job_id"] for kind, body in await serving.emitted() if kind == "job.order.v1"]
    assert orders == [created.revision.build_job_id] * 2


async def test_an_order_the_scheduler_refuses_fails_the_deployment_after_a_while(serving: Serving) -> None:
    await serving.send(CREATE)
    for _ in range(10):
        serving.pass_time(16)
        await serving.look(2)
    failed = await serving.deployment()
    assert (failed.state, "project is not active" in failed.detail) == ("failed", True)
    assert (await serving.types()).count("job.order") <= 9


async def test_nothing_is_lost_while_the_scheduler_is_silent(serving: Serving) -> None:
    await serving.send(CREATE)
    serving.peers.silent = True
    for _ in range(5):
        serving.pass_time(6)
        await serving.look()
    assert (await serving.deployment()).state == "building"
    serving.peers.silent = False
    await built_after_silence(serving)


async def test_a_silent_scheduler_keeps_no_replica_from_serving_and_no_route_from_going(serving: Serving) -> None:
    await built(serving)
    await serving.replica_runs(ADDRESS)
    serving.health.healthy.add(ADDRESS)
    serving.peers.silent = True
    serving.pass_time(60)
    await serving.look(2)
    assert (await serving.deployment()).state == "ready"
    await serving.send(DeleteDeployment(deployment_id="digits"))
    serving.pass_time(60)
    await serving.look()
    assert serving.proxy.servers("digits") is None


async def built_after_silence(serving: Serving) -> None:
    job_id = (await serving.deployment()).revision.build_job_id
    serving.peers.bentos[job_id] = "fs-bento"
    await serving.job_is(JobSucceeded, job_id, "succeeded")
    await serving.look(2)
    assert (await serving.deployment()).state == "starting"
