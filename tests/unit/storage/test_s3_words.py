"""What people read when the object store does not answer, over real sockets."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from services.storage.adapters import s3 as adapter
from services.storage.adapters.s3 import S3
from services.storage.settings import StorageSettings
from tests.support.ports import free_port

pytestmark = pytest.mark.unit


async def problem_at(folder: Path, address: str, *, secure: bool = False) -> str:
    keys = folder / "s3.json"
    keys.write_text(json.dumps({"access_key": "a", "secret_key": "b"}))
    s3 = S3(StorageSettings(home=folder, s3_address=address, s3_secure=secure, s3_keys=keys))
    await s3.prepare()
    start = f"The object store at {address} does not do its work: "
    assert s3.problem.startswith(start)
    assert s3.problem.count(address.partition(":")[0]) == 1
    return s3.problem.removeprefix(start)


@contextmanager
def answering(status: int, body: bytes, kind: str = "application/xml", *, tls: Path | None = None) -> Iterator[str]:
    """A server that gives everybody the same answer; with a folder in `tls` under a certificate nobody trusts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = _with_tls(server.socket, tls)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _with_tls(plain: socket.socket, folder: Path) -> socket.socket:
    key, certificate = folder / "key.pem", folder / "cert.pem"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "1"]
    subprocess.run(["openssl", "req", "-x509", *made, *names], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context.wrap_socket(plain, server_side=True)


def said(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>Told so.</Message></Error>".encode()


async def test_nobody_listens(tmp_path: Path) -> None:
    assert await problem_at(tmp_path, f"127.0.0.1:{free_port()}") == "connection refused."


async def test_the_name_is_unknown(tmp_path: Path) -> None:
    assert await problem_at(tmp_path, "s3.nowhere.invalid:80") == "its name is not found."


async def test_somebody_listens_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "READ_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert await problem_at(tmp_path, f"127.0.0.1:{silent.getsockname()[1]}") == "no answer in 1 s."


async def test_somebody_hangs_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.recv(65536)
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        words = await problem_at(tmp_path, f"127.0.0.1:{server.getsockname()[1]}")
        server.shutdown(socket.SHUT_RDWR)
    assert words == "the connection broke off."


async def test_nobody_trusts_the_certificate(tmp_path: Path) -> None:
    with answering(200, b"", tls=tmp_path) as address:
        words = await problem_at(tmp_path, address, secure=True)
    assert words.startswith("its certificate is not trusted: self")


async def test_it_speaks_no_tls(tmp_path: Path) -> None:
    with answering(200, b"") as address:
        assert await problem_at(tmp_path, address, secure=True) == "it does not speak TLS as it should."


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        # The first question has no body in its answer, so only the status tells.
        (403, b"", "application/xml", "access denied: the keys are wrong or may not do this."),
        (503, b"", "application/xml", "it answers with HTTP status 503."),
        (500, b"<html>Bad Gateway</html>", "text/html", "it answers with HTTP status 500."),
    ],
)
async def test_it_refuses(tmp_path: Path, status: int, body: bytes, kind: str, words: str) -> None:
    with answering(status, body, kind) as address:
        assert await problem_at(tmp_path, address) == words


@pytest.mark.parametrize(
    ("work", "status", "body", "kind", "words"),
    [
        (S3.versions, 403, said("InvalidAccessKeyId"), "application/xml", "it does not know the access key"),
        (S3.versions, 403, said("SignatureDoesNotMatch"), "application/xml", "the secret key is wrong"),
        (S3.versions, 403, said("RequestTimeTooSkewed"), "application/xml", "more than 15 minutes apart"),
        (S3.versions, 404, said("NoSuchBucket"), "application/xml", "the bucket is not there"),
        (S3.versions, 400, said("Odd"), "application/xml", "it says Odd: Told so"),
        (S3.versions, 200, b"a router's page", "text/html", "what answers there is not S3"),
        (S3.versions, 200, b"<html>a router's page</html>", "text/html", "what answers there is not S3"),
    ],
)
async def test_it_says_why(
    tmp_path: Path, work: Callable[[S3, str], object], status: int, body: bytes, kind: str, words: str
) -> None:
    with answering(status, body, kind) as address:
        keys = tmp_path / "s3.json"
        keys.write_text(json.dumps({"access_key": "a", "secret_key": "b"}))
        s3 = S3(StorageSettings(home=tmp_path, s3_address=address, s3_keys=keys))
        with pytest.raises(Exception, match=f"does not do its work: .*{words}\\.$"):
            await work(s3, "log/")  # type: ignore[misc]
