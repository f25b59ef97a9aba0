"""Fetches a workspace's archive from an S3 bucket of the user's own."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from libs.common.contracts.messages import Source
from services.executor.adapters.networks.reach import OutOfReach, Place, connect, port_of
from services.executor.domain.beginnings import sounds_passing
from services.executor.domain.sources import BadSource, S3Place, checked_object

CHUNK_BYTES = 1 << 20
TRIES = 3
_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed")
_MISSING = ("NoSuchKey", "NoSuchBucket", "NoSuchObject")


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object as it is now; `etag` changes with its content."""

    place: S3Place
    etag: str
    size_bytes: int


class S3Source:
    """Fetches for a node. Everything here blocks.

    Args:
        hosts: of the settings, `host` or `host:port`: may have a private address, and http is enough.
    """

    def __init__(self, hosts: Collection[str], limit_bytes: int) -> None:
        self._hosts = hosts
        self._limit_bytes = limit_bytes

    def find(self, source: Source) -> FoundObject:
        """Raises BadSource."""
        place = checked_object(source.url, source.endpoint, self._hosts)
        with _told(source):
            found = self._client(source, place).stat_object(place.bucket, place.key)
        size_bytes = found.size or 0
        if size_bytes > self._limit_bytes:
            detail = f"{source.url} has {size_bytes} bytes; {self._limit_bytes} is the most for a workspace"
            raise BadSource(detail)
        return FoundObject(place, (found.etag or "").strip('"'), size_bytes)

    def fetch(self, source: Source, found: FoundObject, target: Path) -> None:
        """Writes the object to `target`. Raises BadSource, OSError."""
        place, left = found.place, found.size_bytes
        with _told(source), target.open("xb") as out:
            answer = self._client(source, place).get_object(place.bucket, place.key)
            try:
                for chunk in answer.stream(CHUNK_BYTES):
                    left -= len(chunk)
                    if left < 0:
                        break
                    out.write(chunk)
                if left or answer.headers.get("etag", "").strip('"') != found.etag:
                    raise BadSource(f"{source.url} changed while it was fetched; try again")
            finally:
                answer.close()

    def _client(self, source: Source, place: S3Place) -> Minio:
        host, port = place.endpoint.hostname or "", port_of(place.endpoint)
        trusted = host in self._hosts or f"{host}:{port}" in self._hosts
        return Minio(
            endpoint=f"{host}:{port}",
            access_key=source.username or None,
            secret_key=source.password or None,
            secure=place.endpoint.scheme == "https",
            http_client=_pools(trusted),
        )


def _pools(trusted: bool) -> urllib3.PoolManager:
    """Whatever a server redirects to is judged as the server itself was."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> Any:
            return connect(Place(self.host, self.port or 80, trusted))

    class Encrypted(HTTPSConnection):
        def _new_conn(self) -> Any:
            return connect(Place(self.host, self.port or 443, trusted))

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class EncryptedPool(HTTPSConnectionPool):
        ConnectionCls = Encrypted

    timeout, retries = urllib3.Timeout(connect=20, read=60), urllib3.Retry(TRIES, redirect=2, backoff_factor=0.2)
    pools = urllib3.PoolManager(timeout=timeout, retries=retries)
    pools.pool_classes_by_scheme = {"http": PlainPool, "https": EncryptedPool}
    return pools


@contextlib.contextmanager
def _told(source: Source) -> Any:
    try:
        yield
    except S3Error as error:
        if error.code in _MISSING:
            raise BadSource(f"there is no {source.url}") from error
        if error.code in _DENIED:
            detail = f"{source.url} is not given out for these credentials ({error.code}); check user name and password"
            raise BadSource(detail) from error
        said = f"{error.code}: {error.message}"
        raise BadSource(f"{source.url} cannot be fetched: {said}", may_pass=sounds_passing(said)) from error
    except (MinioException, HTTPError, OutOfReach, ValueError) as error:
        passing = isinstance(error, HTTPError) or sounds_passing(str(error))
        raise BadSource(f"{source.url} cannot be fetched: {error}", may_pass=passing) from error
