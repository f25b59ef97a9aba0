"""Our configuration in a real Traefik: who is reached, with which headers, and when a change is live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from libs.common.errors import Unavailable
from services.serving.adapters.traefik import TraefikFiles
from services.serving.domain.front import MAX_BODY_BYTES, Base, Endpoint, front_config
from tests.support.ports import free_port
from tests.support.traefik import Traefik, running_traefik

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def traefik(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traefik]:
    with running_traefik(tmp_path_factory.mktemp("traefik")) as proxy:
        yield proxy


@pytest.fixture
async def files(traefik: Traefik) -> AsyncIterator[TraefikFiles]:
    adapter = TraefikFiles(traefik.dynamic, traefik.api, timeout_s=60)
    yield adapter
    await adapter.close()


@asynccontextmanager
async def echo(name: str) -> AsyncIterator[str]:
    """A server that answers what reached it; yields "host:port"."""

    async def answer(request: Request) -> JSONResponse:
        body = len(await request.body())
        seen = {"server": name, "path": request.url.path, "headers": dict(request.headers), "body": body}
        return JSONResponse(seen, headers={"Set-Cookie": "session=stolen"})

    methods = ["GET", "POST", "PUT", "OPTIONS"]
    async with serving(Starlette(routes=[Route("/{rest:path}", answer, methods=methods)])) as address:
        yield address


@asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[str]:
    """Runs the application; yields "host:port"."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"127.0.0.1:{port}"
    server.should_exit = True
    await task


@asynccontextmanager
async def world(traefik: Traefik) -> AsyncIterator[tuple[Base, Endpoint, httpx.AsyncClient]]:
    async with (
        echo("gateway") as gateway,
        echo("objects") as objects,
        echo("replica") as replica,
        httpx.AsyncClient(base_url=traefik.url, trust_env=False) as client,
    ):
        base = Base(traefik.url, "apps.localhost", f"http://{gateway}", f"http://{objects}", "nabla")
        yield base, Endpoint("digits", replica), client


async def test_each_name_reaches_its_own_server(traefik: Traefik, files: TraefikFiles) -> None:
    async with world(traefik) as (base, endpoint, client):
        await files.publish(front_config(base, [endpoint]))

        async def reached(host: str, path: str) -> tuple[str, str]:
            answer = await client.get(path, headers={"Host": f"{host}:{traefik.port}"})
            if answer.status_code != 200:
                return str(answer.status_code), answer.headers.get("location", "")
            return answer.json()["server"], answer.json()["path"]

        assert await reached("digits.apps.localhost", "/predict") == ("replica", "/predict")
        assert await reached("127.0.0.1", "/d/digits/predict") == ("replica", "/predict")
        assert await reached("127.0.0.1", "/d/digits") == ("replica", "/")
        assert await reached("localhost", "/d/digits/predict") == ("gateway", "/d/digits/predict")
        assert await reached("localhost", "/runs") == ("gateway", "/runs")
        assert await reached("127.0.0.1", "/api/v1/health") == ("gateway", "/api/v1/health")
        assert await reached("127.0.0.1", "/nabla/fs1/file") == ("objects", "/nabla/fs1/file")
        assert await reached("127.0.0.1", "/") == ("302", f"http://localhost:{traefik.port}/")
        assert (await reached("evil.example", "/api/v1/health"))[0] == "404"


async def test_the_object_store_sees_the_host_that_was_signed(traefik: Traefik, files: TraefikFiles) -> None:
    async with world(traefik) as (base, endpoint, client):
        await files.publish(front_config(base, [endpoint]))
        answer = await client.put("/nabla/fs1/f?X-Amz-Signature=a%2Fb", content=b"x" * (20 << 20))
        assert answer.json()["headers"]["host"] == f"127.0.0.1:{traefik.port}"
        assert answer.json()["body"] == 20 << 20


async def test_a_page_of_the_ui_may_call_an_endpoint_and_another_may_not(traefik: Traefik, files: TraefikFiles) -> None:
    async with world(traefik) as (base, endpoint, client):
        await files.publish(front_config(base, [endpoint]))

        async def preflight(origin: str) -> httpx.Response:
            asked = {
                "Host": f"digits.apps.localhost:{traefik.port}",
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            }
            return await client.options("/predict", headers=asked)

        ours = f"http://localhost:{traefik.port}"
        answer = await preflight(ours)
        assert answer.headers["access-control-allow-origin"] == ours
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-origin" not in (await preflight("http://evil.example")).headers


async def test_cookies_are_dropped_in_both_directions(traefik: Traefik, files: TraefikFiles) -> None:
    async with world(traefik) as (base, endpoint, client):
        await files.publish(front_config(base, [endpoint]))
        headers = {"Cookie": "session=1", "Authorization": "Bearer t"}
        answer = await client.post("/d/digits/predict", headers=headers, json={})
        assert "cookie" not in answer.json()["headers"]
        assert answer.json()["headers"]["authorization"] == "Bearer t"
        assert "set-cookie" not in answer.headers


async def test_a_body_that_is_too_large_is_refused_before_it_reaches_the_replica(
    traefik: Traefik, files: TraefikFiles
) -> None:
    async with world(traefik) as (base, endpoint, client):
        await files.publish(front_config(base, [endpoint]))
        reader, writer = await asyncio.open_connection("127.0.0.1", traefik.port)
        head = f"POST /d/digits/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {MAX_BODY_BYTES + 1}\r\n\r\n"
        writer.write(head.encode())
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 60)
        writer.close()
        assert (await client.post("/d/digits/predict", content=b"x" * 1_000_000)).json()["body"] == 1_000_000


async def test_a_published_change_is_live_when_publishing_returns(traefik: Traefik, files: TraefikFiles) -> None:
    async with world(traefik) as (base, endpoint, client):
        for target, status in ((endpoint.target, 200), ("", 503)) * 5:
            await files.publish(front_config(base, [Endpoint("digits", target)]))
            assert (await client.get("/d/digits/predict")).status_code == status
        await files.publish(front_config(base, []))
        assert (await client.get("/d/digits/predict")).status_code == 404


async def test_a_proxy_that_shows_nothing_is_said_to_be_behind(traefik: Traefik, tmp_path: Path) -> None:
    base = Base(traefik.url, "apps.localhost", "", "http://127.0.0.1:1", "nabla")
    elsewhere = TraefikFiles(tmp_path / "traefik" / "dynamic", traefik.api, timeout_s=0.3)
    with pytest.raises(Unavailable, match="configuration before"):
        await elsewhere.publish(front_config(base, [Endpoint("never-shown", "127.0.0.1:1")]))
    gone = TraefikFiles(tmp_path / "traefik" / "dynamic", f"http://127.0.0.1:{free_port()}", timeout_s=0.3)
    with pytest.raises(Unavailable, match="does not answer"):
        await gone.publish(front_config(base, []))


@asynccontextmanager
async def going_down() -> AsyncIterator[str]:
    """An API that still shows the stamp, and by the next question breaks; yields its address."""

    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("on my way out", 200 if "middlewares" in request.url.path else 502)

    async with serving(Starlette(routes=[Route("/{rest:path}", answer)])) as address:
        yield f"http://{address}"


async def test_a_proxy_that_goes_down_between_two_answers_is_said_to_be_behind(tmp_path: Path) -> None:
    """Any other error would end the loop that publishes, and with it the service."""
    base = Base("http://127.0.0.1:1", "apps.localhost", "", "http://127.0.0.1:1", "nabla")
    async with going_down() as api:
        with pytest.raises(Unavailable, match="answers 502"):
            await TraefikFiles(tmp_path / "dynamic", api).publish(front_config(base, []))


async def test_a_file_that_cannot_be_written_is_said_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "dynamic").touch()
    base = Base("http://127.0.0.1:1", "apps.localhost", "", "http://127.0.0.1:1", "nabla")
    with pytest.raises(Unavailable, match=r"cannot be written .*Not a directory"):
        await TraefikFiles(tmp_path / "dynamic", "http://127.0.0.1:1").publish(front_config(base, []))


async def test_a_route_that_traefik_refuses_is_not_taken_for_live(traefik: Traefik, files: TraefikFiles) -> None:
    base = Base(traefik.url, "apps.localhost", "http://127.0.0.1:1", "http://127.0.0.1:1", "nabla")
    config = front_config(base, [])
    config["http"]["routers"]["ui"]["middlewares"] = ["no-such-middleware"]
    with pytest.raises(Unavailable, match="does not accept the route ui"):
        await files.publish(config)
