"""A registry of images on loopback, with a certificate of its own and a password: what an office would have."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
USER, PASSWORD = "reader", "canary-of-the-registry"
# Where engines look for the authorities of one registry.
CERTIFICATES = Path("/etc/containers/certs.d")


@dataclass
class Registry:
    """Gives out images to those who know the password, and counts what it was asked for."""

    host: str
    manifests: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    is_open: bool = False

    def put(self, engine: Sequence[str], image: str, name: str) -> str:
        """An image of the engine's store under another name here: how to ask for it."""
        with tempfile.TemporaryDirectory(prefix="nabla-push-") as folder:
            command = [*engine, "push", "--quiet", image, f"dir:{folder}"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            for path in Path(folder).iterdir():
                content = path.read_bytes()
                self.blobs[f"sha256:{hashlib.sha256(content).hexdigest()}"] = content
            manifest = Path(folder, "manifest.json").read_bytes()
        repository, _, tag = name.partition(":")
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        self.manifests |= {f"{repository}/{tag}": manifest, f"{repository}/{digest}": manifest}
        return f"{self.host}/{name}"


@contextlib.contextmanager
def running_registry() -> Iterator[Registry]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    registry = Registry(f"127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = _handler(registry)
    trusted = CERTIFICATES / registry.host
    trusted.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(prefix="nabla-registry-") as folder:
            server.socket = _secured(Path(folder), trusted).wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
    finally:
        shutil.rmtree(trusted)


def _secured(folder: Path, trusted: Path) -> ssl.SSLContext:
    key, certificate = folder / "key.pem", folder / "cert.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "1", "-subj", "/CN=registry", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*words, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60)
    shutil.copy(certificate, trusted / "ca.crt")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def _handler(registry: Registry) -> type[BaseHTTPRequestHandler]:
    expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            registry.asked.append(self.path)
            if not registry.is_open and self.headers.get("Authorization") != expected:
                self._answer(401, _error("UNAUTHORIZED"), {"WWW-Authenticate": 'Basic realm="registry"'})
            elif self.path.rstrip("/") == "/v2":
                self._answer(200, b"{}", {})
            else:
                self._give(self.path.removeprefix("/v2/"))

        def _give(self, path: str) -> None:
            name, _, reference = path.rpartition("/")
            repository, _, kind = name.rpartition("/")
            content = (
                registry.manifests.get(f"{repository}/{reference}")
                if kind == "manifests"
                else registry.blobs.get(reference)
            )
            if content is None:
                self._answer(404, _error("MANIFEST_UNKNOWN"), {})
                return
            kind = (
                json.loads(content).get("mediaType", OCI_MANIFEST)
                if kind == "manifests"
                else "application/octet-stream"
            )
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            self._answer(200, content, {"Content-Type": kind, "Docker-Content-Digest": digest})

        def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    return Handler


def _error(code: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": code.lower().replace("_", " ")}]}).encode()
