"""Streams and consumers on a real server become what the code says, whatever they were before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import APIError

from infra.local.nats import PROVISIONER, Grant, grant_for
from libs.common.contracts.message import Kind
from libs.common.contracts.subjects import MAX_MESSAGE_BYTES
from libs.common.provision import consumers, provision_consumers, provision_streams, streams
from libs.common.routing import routes_of
from services import SERVICES
from tests.support.nats import running_nats

pytestmark = pytest.mark.integration

ROUTES = routes_of("registry")


@pytest.fixture
async def jetstream(tmp_path: Path) -> AsyncIterator[JetStreamContext]:
    speaks = Grant(PROVISIONER, publish=("nabla.cmd.>", "nabla.dlq.>", "nabla.log.>", "$JS.ACK.>"))
    with running_nats(tmp_path / "nats", [grant_for(ROUTES), speaks]) as server:
        await server.provision()
        connection = await nats.connect(server.url, nkeys_seed_str=server.seed(PROVISIONER))
        yield connection.jetstream(timeout=5)
        await connection.close()


async def test_a_full_stream_refuses_and_never_forgets(jetstream: JetStreamContext) -> None:
    found = {}
    for config in streams():
        assert config.name
        found[config.name] = (await jetstream.stream_info(config.name)).config
    assert {name: config.discard for name, config in found.items()} == {
        "EVT": DiscardPolicy.NEW,
        "CMD": DiscardPolicy.NEW,
        "DEADLETTER": DiscardPolicy.NEW,
        "LOG": DiscardPolicy.NEW,
    }
    assert found["CMD"].retention == found["LOG"].retention == RetentionPolicy.WORK_QUEUE
    assert found["LOG"].max_age in (0, None)
    assert all(config.storage == StorageType.FILE for config in found.values())
    assert all(config.duplicate_window == 600 for config in found.values())
    assert all(config.max_bytes and config.max_bytes > 0 for config in found.values())
    assert found["CMD"].max_age in (0, None)
    assert found["EVT"].max_msg_size == MAX_MESSAGE_BYTES


async def test_a_stream_that_was_changed_is_put_right_and_keeps_its_messages(jetstream: JetStreamContext) -> None:
    config = (await jetstream.stream_info("EVT")).config
    config.max_bytes, config.max_age, config.discard = 1 << 20, 900.0, DiscardPolicy.OLD
    await jetstream.update_stream(config)
    await provision_streams(jetstream)
    right = next(each for each in streams() if each.name == "EVT")
    found = (await jetstream.stream_info("EVT")).config
    assert (found.max_bytes, found.max_age, found.discard) == (right.max_bytes, right.max_age, right.discard)


async def test_the_log_stream_of_an_older_release_is_made_anew_once_storage_has_all_of_it(
    jetstream: JetStreamContext,
) -> None:
    await jetstream.delete_stream("LOG")
    old = StreamConfig(name="LOG", subjects=["nabla.log.*.*"], max_age=86_400.0, discard=DiscardPolicy.OLD)
    await jetstream.add_stream(old)
    await provision_consumers(jetstream, routes_of("storage"))
    await jetstream.publish("nabla.log.t1.js1", b"{}")
    await provision_streams(jetstream)
    assert (await jetstream.stream_info("LOG")).state.messages == 1
    reading = await jetstream.pull_subscribe("nabla.log.*.*", durable="test", stream="LOG")
    for message in await reading.fetch(1):
        await message.ack_sync()
    await jetstream.delete_consumer("LOG", "storage")
    await provision_streams(jetstream)
    found = (await jetstream.stream_info("LOG")).config
    assert (found.retention, found.discard) == (RetentionPolicy.WORK_QUEUE, DiscardPolicy.NEW)


async def test_a_consumer_that_drifted_is_put_right(jetstream: JetStreamContext) -> None:
    await provision_consumers(jetstream, ROUTES)
    [wanted] = consumers(ROUTES)
    drifted = (await jetstream.consumer_info(wanted.stream, "registry")).config
    drifted.max_ack_pending, drifted.ack_wait, drifted.max_deliver = 7, 3.0, 3
    drifted.filter_subjects = drifted.filter_subjects[:1] if drifted.filter_subjects else None
    await jetstream.add_consumer(wanted.stream, drifted)
    assert (await jetstream.consumer_info(wanted.stream, "registry")).config.max_ack_pending == 7
    await provision_consumers(jetstream, ROUTES)
    found = (await jetstream.consumer_info(wanted.stream, "registry")).config
    assert (found.max_ack_pending, found.ack_wait, found.max_deliver) == (256, 30.0, -1)
    assert found.filter_subjects == wanted.config.filter_subjects


async def test_a_consumer_that_is_there_keeps_its_place(jetstream: JetStreamContext) -> None:
    await provision_consumers(jetstream, ROUTES)
    before = await jetstream.consumer_info("EVT", "registry")
    await provision_consumers(jetstream, ROUTES)
    assert (await jetstream.consumer_info("EVT", "registry")).created == before.created


async def test_the_largest_message_with_what_is_said_of_it_fits_the_dead_letters(jetstream: JetStreamContext) -> None:
    largest = b"x" * (MAX_MESSAGE_BYTES - 2048)
    await jetstream.publish("nabla.cmd.registry.0.x", largest, headers={"a": "b" * 1500})
    await jetstream.publish("nabla.dlq.registry", largest, headers={"a": "b" * 1500, "nabla-error": "c" * 1000})
    with pytest.raises(APIError, match="maximum"):
        await jetstream.publish("nabla.cmd.registry.0.x", b"x" * (MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_a_consumer_for_each_stream_it_listens_to(service: str) -> None:
    routes = routes_of(service)
    kinds = {"EVT": Kind.EVENT, "CMD": Kind.COMMAND, "LOG": Kind.FRAME}
    assert {each.stream for each in consumers(routes)} == {name for name, kind in kinds.items() if routes.of_kind(kind)}
    for each in consumers(routes):
        assert (each.config.durable_name, each.config.deliver_group) == (service, service)
