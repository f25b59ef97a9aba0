"""A server whose certificate is signed by nobody the system knows, as inside a company."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nabla.client import Client
from nabla.contexts import resolve
from nabla.errors import NablaError, TransferError
from nabla.manifest import describe

from .conftest import Nabla
from .stub import Reply, StubServer

pytestmark = pytest.mark.unit


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that vouches for itself, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nabla.test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "ca.pem"
    plain = serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def secure(stub: StubServer, ca: Path) -> StubServer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca)
    stub._server.socket = context.wrap_socket(stub._server.socket, server_side=True)
    stub.url = stub.url.replace("http:", "https:")
    stub.on("GET", "/whoami", Reply(200, {"id": "us1", "name": "ada"}))
    return stub


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once_with_what_to_do(secure: StubServer) -> None:
    waits: list[float] = []
    with (
        Client(secure.url, "t", sleep=waits.append) as client,
        pytest.raises(NablaError, match="not trusted") as error,
    ):
        client.whoami()
    assert "self" in str(error.value)
    assert "SSL_CERT_FILE" in error.value.remedy
    assert "--ca" in error.value.remedy
    assert waits == []


def test_the_file_of_the_environment_is_trusted(secure: StubServer, ca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    with Client(secure.url, "t") as client:
        assert client.whoami().name == "ada"


def test_login_keeps_what_to_trust_for_requests_and_uploads(
    nabla: Nabla, secure: StubServer, ca: Path, tmp_path: Path
) -> None:
    assert nabla("login", secure.url, "--token", "t", "--name", "here").code == 1
    assert nabla("login", secure.url, "--token", "t", "--name", "here", "--ca", str(ca)).code == 0
    assert "ada" in nabla("whoami", "--context", "here").out
    assert resolve("here").ca == str(ca)
    (tmp_path / "model").write_text("weights")
    grant = {"fileset": {"id": "fs1", "state": "open"}, "uploads": [{"path": "model", "url": f"{secure.url}/s3/m"}]}
    secure.on("POST", "/filesets", Reply(201, grant))
    secure.on("PUT", "/s3/m", Reply(200))
    secure.on("POST", "/filesets/fs1/seal", Reply(200, {"id": "fs1", "state": "sealed"}))
    with Client(context="here") as client:
        assert client.filesets.upload("model", "p", describe(tmp_path / "model")).state == "sealed"


def test_a_store_with_a_strange_certificate_is_not_tried_again(
    secure: StubServer, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "model").write_text("weights")
    transfers = client.filesets.transfers
    with pytest.raises(TransferError, match="not trusted") as caught:
        transfers.put(f"{secure.url}/s3/m", describe(tmp_path / "model").files[0])
    assert "SSL_CERT_FILE" in caught.value.remedy


def test_a_file_without_certificates_is_named(secure: StubServer, tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("no certificate")
    with (
        Client(secure.url, "t", ca=str(tmp_path / "ca")) as client,
        pytest.raises(NablaError, match="cannot be used as --ca"),
    ):
        client.whoami()
