"""Who gets in: tokens, cookies, hosts, and that no route forgot to ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from libs.common.contracts.messages import (
    AuthenticateToken,
    GetProject,
    JobPage,
    ListJobs,
    ListModels,
    ListProjects,
    Model,
    ModelPage,
    Principal,
    Project,
    ProjectPage,
    RedeemSignIn,
    SignOut,
    Token,
)
from libs.common.errors import NotFound, Unauthenticated, Unavailable
from libs.common.ids import secret_hash
from services.gateway.http.nodes import joiner_of
from services.gateway.http.parts import principal_of
from services.gateway.web.pages import visitor_of
from tests.unit.gateway.fakes import ATTEMPT_TOKEN, BEARER, MEMBER_TOKEN, World

pytestmark = pytest.mark.unit

PUBLIC = {"/api/v1/health", "/api/v1/asyncapi.json", "/api/docs", "/sign-in", "/sign-out"}
COOKIE = "nabla_session_8080"
UI = {"host": "localhost:8080"}
OWN = UI | {"sec-fetch-site": "same-origin"}


def all_routes(routes: Any) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):
            yield from all_routes(route.original_router.routes)


def calls(dependant: Dependant) -> Iterator[Any]:
    yield dependant.call
    for inner in dependant.dependencies:
        yield from calls(inner)


def test_every_route_asks_who_is_there_unless_it_is_listed_as_public(world: World) -> None:
    routes = list(all_routes(world.app.routes))
    assert len(routes) > 45
    unasked = {
        route.path for route in routes if not {principal_of, visitor_of, joiner_of} & set(calls(route.dependant))
    }
    assert unasked == PUBLIC


async def test_without_a_token_there_is_a_problem_that_says_what_to_do(client: httpx.AsyncClient) -> None:
    answer = await client.get("/api/v1/whoami")
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["remedy"]


@pytest.mark.parametrize("token", ["nbl_wrong", "nbla_wrong", "something", "nbl_", "x" * 5000])
async def test_a_wrong_token_is_refused(client: httpx.AsyncClient, token: str) -> None:
    answer = await client.get("/api/v1/whoami", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 401
    assert token not in answer.text


async def test_a_persons_token_and_a_jobs_token_say_who_they_are(client: httpx.AsyncClient) -> None:
    ada = (await client.get("/api/v1/whoami", headers=BEARER)).json()
    job = (await client.get("/api/v1/whoami", headers={"Authorization": f"Bearer {ATTEMPT_TOKEN}"})).json()
    assert (ada["kind"], ada["id"]) == ("user", "u1")
    assert (job["kind"], job["id"], job["job_id"], job["attempt"]) == ("attempt", "at1", "js1", 2)


async def test_a_token_is_asked_about_once_a_minute(client: httpx.AsyncClient, world: World) -> None:
    for _ in range(5):
        await client.get("/api/v1/whoami", headers=BEARER)
    assert len(world.owners.of(AuthenticateToken)) == 1
    world.clock.now += 61
    await client.get("/api/v1/whoami", headers=BEARER)
    assert len(world.owners.of(AuthenticateToken)) == 2


async def test_a_known_token_works_while_the_registry_is_away(client: httpx.AsyncClient, world: World) -> None:
    await client.get("/api/v1/whoami", headers=BEARER)
    del world.owners.answers[AuthenticateToken]
    world.clock.now += 120
    assert (await client.get("/api/v1/whoami", headers=BEARER)).status_code == 200
    world.clock.now += 600
    answer = await client.get("/api/v1/whoami", headers=BEARER)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


async def test_the_token_itself_never_travels_on_the_bus(client: httpx.AsyncClient, world: World) -> None:
    await client.get("/api/v1/whoami", headers=BEARER)
    assert MEMBER_TOKEN not in repr(world.owners.asked)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (OWN, 200),
        (UI | {"sec-fetch-site": "cross-site"}, 401),
        (UI | {"sec-fetch-site": "same-site"}, 401),
        (UI | {"sec-fetch-site": "none"}, 401),
        (UI, 401),
        ({"host": "127.0.0.1:8080", "sec-fetch-site": "same-origin"}, 401),
    ],
)
async def test_the_cookie_opens_the_api_only_for_our_own_pages(
    client: httpx.AsyncClient, world: World, headers: dict[str, str], status: int
) -> None:
    world.owners.answers[ListJobs] = lambda _: JobPage()
    cookie = {"cookie": f"{COOKIE}={MEMBER_TOKEN}"}
    assert (await client.get("/api/v1/jobs", headers=headers | cookie)).status_code == status


async def test_a_bearer_token_goes_before_a_cookie(client: httpx.AsyncClient) -> None:
    headers = OWN | {"cookie": f"{COOKIE}={MEMBER_TOKEN}", "Authorization": "Bearer nbl_wrong"}
    assert (await client.get("/api/v1/whoami", headers=headers)).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "digits.apps.localhost:8080", "127.0.0.1.nip.io"])
@pytest.mark.parametrize("path", ["/api/v1/health", "/api/v1/whoami", "/sign-in", "/static/nabla.css"])
async def test_a_foreign_host_name_gets_nothing(client: httpx.AsyncClient, host: str, path: str) -> None:
    answer = await client.get(path, headers=BEARER | {"host": host})
    assert answer.status_code == 421
    assert answer.json()["code"] == "host_not_allowed"


async def test_a_page_sends_a_stranger_to_sign_in(client: httpx.AsyncClient) -> None:
    answer = await client.get("/projects", headers=UI)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/sign-in"


async def test_a_page_takes_no_bearer_token_and_no_other_host(client: httpx.AsyncClient) -> None:
    assert (await client.get("/projects", headers=UI | BEARER)).headers["location"] == "/sign-in"
    there = await client.get("/projects?state=any", headers={"cookie": f"{COOKIE}={MEMBER_TOKEN}"})
    assert there.headers["location"] == "http://localhost:8080/projects?state=any"


async def test_a_signed_in_person_sees_pages_that_run_only_our_own_scripts(
    client: httpx.AsyncClient, world: World
) -> None:
    world.owners.answers |= {ListProjects: lambda _: ProjectPage(), ListJobs: lambda _: JobPage()}
    answer = await client.get("/projects", headers=UI | {"cookie": f"{COOKIE}={MEMBER_TOKEN}"})
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


async def test_archived_projects_have_a_list_whose_next_page_is_of_the_same_state(
    client: httpx.AsyncClient, world: World
) -> None:
    page = ProjectPage(items=(Project(id="pr1", name="my old one"),), next_cursor="abc")
    world.owners.answers |= {ListProjects: lambda _: page, ListJobs: lambda _: JobPage(next_cursor="more")}
    cookie = UI | {"cookie": f"{COOKIE}={MEMBER_TOKEN}"}
    assert 'href="/projects?state=archived"' in (await client.get("/projects", headers=cookie)).text
    answer = await client.get("/projects?state=archived", headers=cookie)
    assert world.owners.of(ListProjects)[-1].state == "archived"
    assert 'href="?cursor=abc&amp;state=archived"' in answer.text
    # A deleted project has given up its name.
    assert 'href="/projects/pr1"' in answer.text
    assert "none lately" in answer.text


async def test_a_command_to_paste_quotes_a_projects_name(client: httpx.AsyncClient, world: World) -> None:
    project = Project(id="pr1", name="my project", state="active")
    world.owners.answers |= {GetProject: lambda _: project, ListJobs: lambda _: JobPage()}
    answer = await client.get("/projects/pr1", headers=UI | {"cookie": f"{COOKIE}={MEMBER_TOKEN}"})
    assert "nabla run --project &#39;my project&#39; -- python train.py" in answer.text


async def test_models_of_one_name_in_two_projects_are_each_led_to(client: httpx.AsyncClient, world: World) -> None:
    models = tuple(Model(id=f"mo{n}", name="digits", project_id=f"pr{n}") for n in (1, 2))
    world.owners.answers |= {ListProjects: lambda _: ProjectPage(), ListModels: lambda _: ModelPage(items=models)}
    answer = await client.get("/models", headers=UI | {"cookie": f"{COOKIE}={MEMBER_TOKEN}"})
    assert [f'href="/models/mo{n}"' in answer.text for n in (1, 2)] == [True, True]


async def test_a_one_time_code_becomes_a_session_cookie(client: httpx.AsyncClient, world: World) -> None:
    spent: list[RedeemSignIn] = []

    def redeem(message: RedeemSignIn) -> Token:
        if spent:
            raise NotFound("sign_in_spent", "used")
        spent.append(message)
        return Token(id="tk1")

    world.owners.answers[RedeemSignIn] = redeem
    answer = await client.get("/sign-in?code=abc", headers=UI)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert spent[0].code_hash == secret_hash("abc")
    assert spent[0].token_hash == secret_hash(answer.cookies[COOKIE])
    again = await client.get("/sign-in?code=abc", headers=UI)
    assert again.status_code == 401
    assert "set-cookie" not in again.headers
    keys = {each.key for each in world.owners.asked if isinstance(each.message, RedeemSignIn)}
    assert len(keys) == 2


async def test_installations_on_one_host_keep_their_sessions_apart(client: httpx.AsyncClient, world: World) -> None:
    world.owners.answers |= {ListJobs: lambda _: JobPage(), RedeemSignIn: lambda _: Token(id="tk1")}
    signed_in = await client.get("/sign-in?code=abc", headers={"host": "localhost:9090"})
    assert list(signed_in.cookies) == ["nabla_session_9090"]
    client.cookies.clear()
    both = {"cookie": f"nabla_session_9090=nbl_other; {COOKIE}={MEMBER_TOKEN}"}
    assert (await client.get("/api/v1/jobs", headers=OWN | both)).status_code == 200
    there = {"host": "localhost:9090", "sec-fetch-site": "same-origin"}
    assert (await client.get("/api/v1/jobs", headers=there | both)).status_code == 401
    sent_away = await client.get("/projects", headers={"host": "localhost:9090"} | both)
    assert sent_away.headers["location"] == "/sign-in"
    assert COOKIE not in sent_away.headers["set-cookie"]


async def test_only_our_own_page_signs_a_browser_out(client: httpx.AsyncClient) -> None:
    assert (await client.post("/sign-out", headers=UI | {"sec-fetch-site": "cross-site"})).status_code == 401
    answer = await client.post("/sign-out", headers=OWN)
    assert answer.status_code == 303
    assert COOKIE in answer.headers["set-cookie"]


async def test_signing_out_ends_the_session_and_not_only_its_cookie(client: httpx.AsyncClient, world: World) -> None:
    world.owners.answers |= {ListJobs: lambda _: JobPage(), SignOut: lambda _: Token(id="tk1")}
    cookie = {"cookie": f"{COOKIE}={MEMBER_TOKEN}"}
    assert (await client.get("/api/v1/jobs", headers=OWN | cookie)).status_code == 200

    def over(_: AuthenticateToken) -> Principal:
        raise Unauthenticated("token_not_valid", "Over.", "Sign in.")

    world.owners.answers[AuthenticateToken] = over
    answer = await client.post("/sign-out", headers=OWN | cookie)
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
    assert world.owners.of(SignOut) == [SignOut(token_hash=secret_hash(MEMBER_TOKEN))]
    assert (await client.get("/api/v1/jobs", headers=OWN | cookie)).status_code == 401


async def test_a_session_that_cannot_be_ended_now_keeps_its_cookie(client: httpx.AsyncClient, world: World) -> None:
    headers = OWN | {"cookie": f"{COOKIE}={MEMBER_TOKEN}"}
    answer = await client.post("/sign-out", headers=headers)
    assert answer.status_code == 503
    assert "set-cookie" not in answer.headers

    def over(_: SignOut) -> Token:
        raise Unauthenticated("token_not_valid", "Over already.", "")

    world.owners.answers[SignOut] = over
    answer = await client.post("/sign-out", headers=headers)
    assert (answer.status_code, COOKIE in answer.headers["set-cookie"]) == (303, True)


async def test_a_silent_registry_is_a_problem_worth_repeating(client: httpx.AsyncClient, world: World) -> None:
    def silent(_: ListJobs) -> JobPage:
        raise Unavailable("service_silent", "The scheduler did not answer.", "Repeat it.")

    world.owners.answers[ListJobs] = silent
    answer = await client.get("/api/v1/jobs", headers=BEARER)
    assert (answer.status_code, answer.json()["code"]) == (503, "service_silent")
