from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator

import pytest

from nabla.client import Client
from nabla.http import BrokenConnection, Http

from .stub import Reply, Seen, StubServer

pytestmark = pytest.mark.unit


@pytest.fixture
def http() -> Iterator[Http]:
    http = Http()
    yield http
    http.close()


def test_a_connection_is_kept_for_the_next_request(stub: StubServer, client: Client) -> None:
    stub.on("GET", "/whoami", Reply(200, {"id": "us1"}), Reply(404, {"title": "No"}), Reply(200, {}))
    client.whoami()
    with pytest.raises(Exception, match="No"):
        client.whoami()
    client.whoami()
    assert len({seen.port for seen in stub.seen}) == 1


def test_a_kept_connection_that_the_server_closed_is_not_used_again(stub: StubServer, client: Client) -> None:
    stub.on("GET", "/whoami", Reply(200, {"id": "us1"}, {"Connection": "close"}))
    for _ in range(3):
        client.whoami()
    assert len(stub.seen) == len({seen.port for seen in stub.seen}) == 3


def test_threads_do_not_share_a_connection(stub: StubServer, client: Client) -> None:
    together = threading.Barrier(4, timeout=10)

    def answer(seen: Seen) -> Reply:
        together.wait()
        return Reply(200, {"id": "us1"})

    stub.on("GET", "/whoami", answer)
    threads = [threading.Thread(target=client.whoami) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len({seen.port for seen in stub.seen}) == 4


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not http at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
    ],
)
def test_half_an_answer_is_a_broken_connection(http: Http, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_once, args=(server, answer))
        thread.start()
        with pytest.raises(BrokenConnection), http.send("GET", url_of(server), {}) as response:
            response.read()
        thread.join(10)


def test_silence_is_a_broken_connection_after_the_timeout(http: Http) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(BrokenConnection):
        http.send("GET", url_of(server), {}, timeout_s=0.1)


@pytest.mark.parametrize("url", ["ftp://x/", "nonsense", "http://", "http://no-such-host.invalid/"])
def test_an_address_that_leads_nowhere_is_a_broken_connection(http: Http, url: str) -> None:
    with pytest.raises(BrokenConnection):
        http.send("GET", url, {})


def test_the_proxy_of_the_environment_is_used_unless_excepted(
    http: Http, stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", stub.url)
    with http.send("GET", "http://far.invalid/x?sig=a%2Fb", {}) as response:
        response.read()
    assert (stub.seen[0].headers["host"], stub.seen[0].query) == ("far.invalid", {"sig": "a/b"})
    monkeypatch.setenv("no_proxy", "other.invalid")
    with pytest.raises(BrokenConnection):
        http.send("GET", "http://other.invalid/x", {})
    assert len(stub.seen) == 1


def test_no_proxy_stands_between_this_machine_and_itself(
    http: Http, stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    with http.send("GET", f"{stub.url}/direct", {}) as response:
        response.read()
    assert stub.seen[0].path == "/direct"


def test_a_proxy_is_given_the_credentials_of_its_address(
    http: Http, stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", stub.url.replace("://", "://ada:p%40ss@"))
    with http.send("GET", "http://far.invalid/x", {}) as response:
        response.read()
    assert stub.seen[0].headers["proxy-authorization"] == f"Basic {base64.b64encode(b'ada:p@ss').decode()}"


def test_what_waits_for_a_silent_peer_can_be_broken_off(http: Http) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reached = threading.Event()

        def breaks_off() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                http.abort()
                reached.wait(60)

        thread = threading.Thread(target=breaks_off)
        thread.start()
        with pytest.raises(BrokenConnection):
            http.send("GET", url_of(server), {}, timeout_s=60)
        reached.set()
        thread.join(60)
        with pytest.raises(BrokenConnection):
            http.send("GET", url_of(server), {}, timeout_s=60)


def answer_once(server: socket.socket, answer: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(answer)


def url_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}/"
