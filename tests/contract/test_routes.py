"""Every message has one owner that listens, every sender is allowed to send, and nobody listens to what is not sent."""

from __future__ import annotations

from itertools import zip_longest

import pytest

from infra.local.nats import all_grants, events_of
from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import MESSAGES
from libs.common.contracts.subjects import filter_for
from libs.common.provision import consumers
from libs.common.routing import INTERNAL, routes_of
from services import SERVICES

pytestmark = pytest.mark.contract

ROUTED = tuple(message for message in MESSAGES if hasattr(message, "ROUTE"))
ORDERS = tuple(message for message in ROUTED if message.ROUTE.kind is not Kind.EVENT and message.ROUTE.owner != "each")


ALL = {service: routes_of(service) for service in SERVICES}


@pytest.mark.parametrize("message", ORDERS, ids=lambda message: message.ROUTE.type)
def test_the_owner_of_a_message_has_a_route_for_it(message: type[Message]) -> None:
    listening = [service for service, routes in ALL.items() if any(r.message is message for r in routes.routes)]
    assert listening == [message.ROUTE.owner]


@pytest.mark.parametrize("service", SERVICES)
def test_each_request_and_query_has_a_rule_of_its_own(service: str) -> None:
    for route in ALL[service].of_kind(Kind.REQUEST, Kind.QUERY):
        assert route.rule is not INTERNAL, f"{route.message.__name__} may be sent by people or services: say by whom"


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_service_sends_has_an_owner_that_listens(service: str) -> None:
    for message in ALL[service].sends:
        assert message.ROUTE.kind is not Kind.EVENT, "a service publishes its own events, and no others"
        assert message.ROUTE.owner in (*SERVICES, "each")


@pytest.mark.parametrize("service", SERVICES)
def test_events_are_listened_to_by_others_or_for_another_database(service: str) -> None:
    for route in ALL[service].of_kind(Kind.EVENT):
        assert route.message.ROUTE.owner != service or route.database
        assert route.message in events_of(route.message.ROUTE.owner)


def test_only_the_owner_of_an_event_may_publish_it() -> None:
    for message in ROUTED:
        if message.ROUTE.kind is Kind.EVENT:
            allowed = {grant.user for grant in all_grants() if filter_for(message) in grant.publish}
            assert allowed == {message.ROUTE.owner}


# By these a consumer is made, changed, deleted and acknowledged for, in both forms of an acknowledgement.
MEDDLING = (
    "$JS.API.CONSUMER.CREATE.{0}.{1}",
    "$JS.API.CONSUMER.CREATE.{0}.{1}.nabla.evt.t1.job.queued.v1",
    "$JS.API.CONSUMER.DURABLE.CREATE.{0}.{1}",
    "$JS.API.CONSUMER.DELETE.{0}.{1}",
    "$JS.ACK.{0}.{1}.1.2.3.4.5",
    "$JS.ACK._.hash.{0}.{1}.1.2.3.4.5",
)


@pytest.mark.parametrize("other", SERVICES)
def test_nobody_may_change_delete_or_acknowledge_for_the_consumer_of_another(other: str) -> None:
    theirs = {form.format(each.stream, other) for each in consumers(ALL[other]) for form in MEDDLING}
    for grant in all_grants():
        if grant.user not in (other, "provisioner"):
            allowed = [right for right in grant.publish for subject in theirs if covers(right, subject)]
            assert allowed == [], f"{grant.user} could meddle with the consumer of {other}"


def covers(right: str, subject: str) -> bool:
    """Whether `right`, with its wildcards, allows the subject."""
    for mine, asked in zip_longest(right.split("."), subject.split(".")):
        if mine == ">":
            return asked is not None
        if asked is None or mine not in ("*", asked):
            return False
    return True


def test_nobody_but_the_provisioner_may_change_streams() -> None:
    for grant in all_grants():
        if grant.user != "provisioner":
            assert not any("STREAM" in s and "STREAM.INFO" not in s for s in grant.publish), grant.user
            assert "$JS.API.>" not in grant.publish
            assert ">" not in grant.subscribe
