from __future__ import annotations

import pytest

from libs.common.contracts.messages import Principal
from services.gateway.domain.event_filter import EventFilter, limited_to, parse_types
from services.gateway.domain.origins import host_name, origins_of, port_suffix
from services.gateway.domain.tokens import Limits, TokenCache

pytestmark = pytest.mark.unit

LOCAL = origins_of("127.0.0.1", (), "", "apps.localhost")
DOMAIN = origins_of("nabla.example.org", ("10.0.0.7",), "", "apps.example.org")
ADA = Principal(kind="user", id="u1", team_id="t1")
JOB = Principal(kind="attempt", id="at1", team_id="t1", project_id="pr1", job_id="js1")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:9", "[::1]:8080", "[::1]"])
def test_loopback_names_are_ours(host: str) -> None:
    assert LOCAL.admits(host)


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8080", "digits.apps.localhost"]
)
def test_other_names_are_not(host: str) -> None:
    assert not LOCAL.admits(host)


def test_the_front_door_and_named_hosts_are_ours() -> None:
    assert DOMAIN.admits("nabla.example.org")
    assert DOMAIN.admits("10.0.0.7:8080")


@pytest.mark.parametrize(
    ("host", "fetch_site", "counts"),
    [
        ("localhost:8080", "same-origin", True),
        ("localhost:8080", "same-site", False),
        ("localhost:8080", "cross-site", False),
        ("localhost:8080", "none", False),
        ("localhost:8080", "", False),
        ("127.0.0.1:8080", "same-origin", False),
    ],
)
def test_a_cookie_counts_only_for_the_interfaces_own_scripts(host: str, fetch_site: str, counts: bool) -> None:
    assert LOCAL.cookie_counts(host, fetch_site) is counts


def test_stored_files_never_come_from_the_interfaces_own_origin() -> None:
    assert LOCAL.content_address("localhost:8080") == "127.0.0.1:8080"
    assert LOCAL.content_address("127.0.0.1:8080") == "127.0.0.1:8080"
    assert DOMAIN.content_address("nabla.example.org") == "s3.apps.example.org"
    assert DOMAIN.content_address("10.0.0.7:80") == "10.0.0.7:80"


def test_a_browser_is_sent_to_the_interface_by_the_port_it_came_by() -> None:
    assert LOCAL.interface_address("127.0.0.1:9000") == "localhost:9000"
    assert LOCAL.program_address("localhost:9000") == "127.0.0.1:9000"


def test_host_headers_are_taken_apart() -> None:
    assert host_name("[::1]:80") == "[::1]"
    assert port_suffix("[::1]:80") == ":80"
    assert port_suffix("localhost:evil") == ""


def test_a_token_counts_for_its_minute_and_longer_only_while_its_owner_is_silent() -> None:
    cache = TokenCache(Limits())
    cache.keep("h", ADA, 0)
    assert cache.fresh("h", 59) == ADA
    assert cache.fresh("h", 60) is None
    assert cache.while_silent("h", 599) == ADA
    assert cache.while_silent("h", 600) is None


def test_a_running_jobs_token_counts_for_fifteen_seconds() -> None:
    cache = TokenCache(Limits())
    cache.keep("h", JOB, 0)
    assert cache.fresh("h", 14) == JOB
    assert cache.fresh("h", 15) is None


def test_a_revoked_token_is_gone_at_once() -> None:
    cache = TokenCache(Limits())
    cache.keep("h", ADA, 0)
    cache.forget("h")
    assert cache.fresh("h", 0) is None
    assert cache.while_silent("h", 0) is None


def test_the_cache_is_bounded() -> None:
    cache = TokenCache(Limits(entries=2))
    for name in "abc":
        cache.keep(name, ADA, 0)
    assert [cache.fresh(name, 0) is not None for name in "abc"] == [False, True, True]


@pytest.mark.parametrize("event_type", ["token.revoked", "execution.running", "node.reported", "nonsense", ""])
def test_the_platforms_inner_events_are_never_shown(event_type: str) -> None:
    assert not EventFilter().admits(event_type, "x", "pr1")


def test_events_are_filtered_by_project_object_and_beginning_of_type() -> None:
    wish = EventFilter("pr1", "js1", parse_types("job., model.registered"))
    assert wish.admits("job.queued", "js1", "pr1")
    assert not wish.admits("job.queued", "js2", "pr1")
    assert not wish.admits("job.queued", "js1", "pr2")
    assert not wish.admits("model.deleted", "js1", "pr1")


def test_a_running_job_sees_events_about_itself_only() -> None:
    assert limited_to(JOB, EventFilter(project_id="pr2")) == EventFilter("pr1", "js1")
    assert limited_to(ADA, EventFilter(project_id="pr2")) == EventFilter(project_id="pr2")
