"""What the bus does with errors: repeats what may pass, gives up on what will not, and says either plainly."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import nats.errors
import pytest
from nats.js.errors import APIError, NoStreamResponseError
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as NoFreeConnection

from libs.common import bus as bus_module
from libs.common.bus import LONGEST_DELAY_S, MAX_DELIVERIES, MAX_DELIVERIES_IN_OUTAGE, OUTAGE_DELAY_S, Bus
from libs.common.contracts.problem import problem_of
from libs.common.errors import DiskFull, IllegalTransition, MalformedMessage, NotFound, StaleRevision, Unavailable
from libs.common.routing import Routes

pytestmark = pytest.mark.unit


class _Sqlite(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.sqlite_errorname = name


class _Postgres(Exception):
    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.sqlstate = state


def of_database(cause: Exception) -> OperationalError:
    return OperationalError("SELECT 1", {}, cause)


OUTAGES = {
    "full": DiskFull("/srv"),
    "busy": of_database(_Sqlite("SQLITE_BUSY_SNAPSHOT")),
    "unreadable": of_database(_Sqlite("SQLITE_IOERR_WRITE")),
    "starting": of_database(_Postgres("57P03")),
    "lock": of_database(_Postgres("55P03")),
    "gone": ConnectionRefusedError(),
    "no free connection": NoFreeConnection(),
}
ELSEWHERE = {
    "unavailable": Unavailable("not_yet", "Not yet."),
    "timeout": TimeoutError(),
    "bus": nats.errors.NoRespondersError(),
}
PASSING = {
    "stale": StaleRevision("note", "n", 1),
    "constraint": IntegrityError("INSERT", {}, _Postgres("23505")),
}
LASTING = {
    "malformed": MalformedMessage("HaltJob", ("job_id",)),
    "refused": NotFound("gone", "It is gone."),
    "illegal": IllegalTransition("job", "js1", "queued", "finish"),
    "bug": ValueError("nbl_0123456789abcdef\r\nX: y"),
}


@dataclass
class Raw:
    """A delivered message that notes what becomes of it."""

    deliveries: int
    headers: dict[str, str] = field(default_factory=lambda: {"ce-id": "ev1", "ce-type": "job.halt.v1"})
    subject: str = "nabla.cmd.registry.0.job.halt.v1"
    data: bytes = b"{}"
    stream: str = "CMD"
    delays: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def metadata(self) -> Any:
        sequence = SimpleNamespace(stream=7)
        return SimpleNamespace(num_delivered=self.deliveries, stream=self.stream, sequence=sequence)

    async def nak(self, delay: float) -> None:
        self.delays.append(delay)

    async def term(self) -> None:
        self.ended = True


@dataclass
class Letters:
    service: str = "registry"
    kept: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    refusal: Exception | None = None

    async def publish_stored(self, stream: str, subject: str, headers: dict[str, str], _body: bytes) -> None:
        if self.refusal:
            raise self.refusal
        self.kept.append((stream, subject, headers))


async def put_off(error: Exception, deliveries: int) -> tuple[Raw, Letters]:
    raw, letters = Raw(deliveries), Letters()
    await receive(raw, letters, error)
    return raw, letters


async def receive(raw: Raw, letters: Letters, error: Exception) -> None:
    receiver = bus_module._Receiver(cast("Bus", letters), Routes("registry", ()), {})
    await receiver._put_off(cast("Any", raw), error)


@pytest.mark.parametrize("name", [*OUTAGES, *ELSEWHERE])
@pytest.mark.parametrize("deliveries", [1, MAX_DELIVERIES, MAX_DELIVERIES_IN_OUTAGE - 1])
async def test_an_outage_is_waited_for_however_often_the_message_came(name: str, deliveries: int) -> None:
    raw, letters = await put_off((OUTAGES | ELSEWHERE)[name], deliveries)
    assert not letters.kept
    assert not raw.ended
    [delay] = raw.delays
    assert 0.05 <= delay <= OUTAGE_DELAY_S + 0.1


@pytest.mark.parametrize("name", OUTAGES)
async def test_for_the_database_it_waits_without_an_end(name: str) -> None:
    raw, letters = await put_off(OUTAGES[name], 10 * MAX_DELIVERIES_IN_OUTAGE)
    assert (raw.ended, len(raw.delays), letters.kept) == (False, 1, [])


@pytest.mark.parametrize("name", ELSEWHERE)
async def test_what_a_handler_alone_calls_an_outage_is_judged_by_a_person_after_days(name: str) -> None:
    raw, letters = await put_off(ELSEWHERE[name], MAX_DELIVERIES_IN_OUTAGE)
    assert (raw.ended, len(letters.kept)) == (True, 1)


@pytest.mark.parametrize("name", PASSING)
async def test_what_may_pass_is_repeated_ever_more_slowly_and_then_given_up(name: str) -> None:
    delays = [(await put_off(PASSING[name], deliveries))[0].delays[0] for deliveries in range(1, MAX_DELIVERIES)]
    assert delays[0] < 0.3
    assert LONGEST_DELAY_S <= delays[-1] <= LONGEST_DELAY_S + 0.1
    raw, letters = await put_off(PASSING[name], MAX_DELIVERIES)
    assert (raw.ended, len(letters.kept)) == (True, 1)


@pytest.mark.parametrize("name", LASTING)
async def test_what_will_not_pass_goes_to_the_dead_letters_at_once(name: str) -> None:
    raw, letters = await put_off(LASTING[name], 1)
    assert raw.ended
    [(stream, subject, headers)] = letters.kept
    assert (stream, subject) == ("DEADLETTER", "nabla.dlq.registry")
    assert headers["Nats-Msg-Id"] == "registry-ev1"
    assert headers["nabla-original-subject"] == raw.subject
    assert not {"\r", "\n"} & set(headers["nabla-error"])
    assert "0123456789abcdef" not in headers["nabla-error"]


@pytest.mark.parametrize("refusal", [nats.errors.TimeoutError(), NoStreamResponseError(), APIError(code=503)])
async def test_a_message_is_not_ended_before_the_dead_letters_have_it(refusal: Exception) -> None:
    raw = Raw(1)
    await receive(raw, Letters(refusal=refusal), LASTING["bug"])
    assert not raw.ended
    letters = Letters()
    await receive(raw, letters, LASTING["bug"])
    assert (raw.ended, len(letters.kept)) == (True, 1)


async def test_messages_without_an_id_are_told_apart_by_their_place_in_their_stream() -> None:
    letters = Letters()
    for stream in ("EVT", "CMD", "CMD"):
        await receive(Raw(1, headers={}, stream=stream), letters, LASTING["malformed"])
    assert [headers["Nats-Msg-Id"] for _, _, headers in letters.kept] == [
        "registry-EVT-7",
        "registry-CMD-7",
        "registry-CMD-7",
    ]


@pytest.mark.parametrize("name", [*OUTAGES, "stale"])
def test_a_caller_is_told_to_repeat_what_may_pass(name: str) -> None:
    problem = problem_of(bus_module._for_the_caller((OUTAGES | PASSING)[name]))
    assert problem.status == 503
    assert problem.code == ("disk_full" if name == "full" else "database_busy")
    assert "Idempotency-Key" in problem.remedy


@pytest.mark.parametrize("name", LASTING)
def test_other_errors_reach_the_caller_as_they_are(name: str) -> None:
    assert bus_module._for_the_caller(LASTING[name]) is LASTING[name]
