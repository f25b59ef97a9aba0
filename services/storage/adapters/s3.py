"""S3 through the minio client: presigned URLs for clients, listing, log blocks.

The client is synchronous, so calls run in threads; everything that goes wrong on the way becomes Unavailable.
"""

from __future__ import annotations

import asyncio
import io
import re
import ssl
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TypeVar
from urllib.parse import quote
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED
from minio.datatypes import Object
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from minio.versioningconfig import VersioningConfig

from libs.common.errors import Invalid, Unavailable
from services.storage.domain.filesets import Stored
from services.storage.settings import StorageSettings

CONNECT_S, READ_S = 2, 20
_SAID = {
    "AccessDenied": "access denied: the keys are wrong or may not do this",
    "InvalidAccessKeyId": "access denied: it does not know the access key",
    "SignatureDoesNotMatch": "access denied: the secret key is wrong",
    "RequestTimeTooSkewed": "access denied: its clock and ours are more than 15 minutes apart",
    "NoSuchBucket": "the bucket is not there",
    "NoSuchKey": "the object is not there",
    "BucketAlreadyExists": "the bucket's name belongs to somebody else",
}
_ENDPOINT = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:[0-9]{1,5})?")

T = TypeVar("T")


class S3:
    """The Signer, ObjectStore and BlockStore of a real S3."""

    def __init__(self, settings: StorageSettings) -> None:
        self._settings = settings
        self._bucket = settings.s3_bucket
        self._lifetime = timedelta(seconds=settings.url_lifetime_s)
        self._client_for = lru_cache(maxsize=64)(self._new_client)
        self.problem = "The object store has not been asked yet."

    def put_url(self, endpoint: str, key: str) -> str:
        return self._signing(endpoint).get_presigned_url("PUT", self._bucket, key, self._lifetime)

    def get_url(self, endpoint: str, key: str, version: str, name: str) -> str:
        # Why: on the front door's own host a page or script from a job would run with the reader's rights.
        as_download: dict[str, str | list[str] | tuple[str]] = {
            "response-content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
            "response-content-type": "application/octet-stream",
        }
        return self._signing(endpoint).get_presigned_url(
            "GET", self._bucket, key, self._lifetime, response_headers=as_download, version_id=version or None
        )

    async def prepare(self) -> None:
        try:
            await self._call(self._make_bucket)
        except Unavailable as error:
            self.problem = error.detail
        else:
            self.problem = ""

    async def versions(self, prefix: str) -> list[Stored]:
        def listed(client: Minio) -> list[Stored]:
            found = client.list_objects(self._bucket, prefix, recursive=True, include_version=True)
            return [_stored(item) for item in found]

        return await self._call(listed)

    async def remove(self, objects: Iterable[Stored]) -> None:
        doomed = [DeleteObject(item.key, item.version or None) for item in objects]

        def removed(client: Minio) -> list[str]:
            return [f"{error.name}: {error.message}" for error in client.remove_objects(self._bucket, doomed)]

        if doomed and (errors := await self._call(removed)):
            raise self._unavailable(errors[0])

    async def abort_multiparts(self, before: datetime) -> int:
        def aborted(client: Minio) -> int:
            # Why: the client has these only as private methods.
            uploads = client._list_multipart_uploads(self._bucket).uploads
            old = [one for one in uploads if one.initiated_time and one.initiated_time < before]
            for one in old:
                client._abort_multipart_upload(self._bucket, one.object_name, one.upload_id or "")
            return len(old)

        return await self._call(aborted)

    async def write(self, key: str, body: bytes) -> None:
        await self._call(lambda client: client.put_object(self._bucket, key, io.BytesIO(body), len(body)))

    async def read(self, key: str, offset: int, length: int) -> bytes:
        def got(client: Minio) -> bytes:
            answer = client.get_object(self._bucket, key, offset, length)
            try:
                return answer.data
            finally:
                answer.close()
                answer.release_conn()

        return await self._call(got)

    async def find(self, key: str) -> bytes | None:
        def got(client: Minio) -> bytes | None:
            try:
                answer = client.get_object(self._bucket, key)
            except S3Error as error:
                if error.code == "NoSuchKey":
                    return None
                raise
            try:
                return answer.data
            finally:
                answer.close()
                answer.release_conn()

        return await self._call(got)

    def _make_bucket(self, client: Minio) -> None:
        if not client.bucket_exists(self._bucket):
            client.make_bucket(self._bucket)
        if client.get_bucket_versioning(self._bucket).status != ENABLED:
            client.set_bucket_versioning(self._bucket, VersioningConfig(ENABLED))

    def _signing(self, endpoint: str) -> Minio:
        address = endpoint or self._settings.front_address
        if not _ENDPOINT.fullmatch(address):
            raise Invalid("bad_endpoint", f"{address[:100]!r} is not host or host:port.", "Leave `endpoint` out.")
        return self._client_for(address, self._settings.front_secure)

    def _new_client(self, address: str, secure: bool) -> Minio:
        access_key, secret_key = self._settings.s3_credentials()
        retry = urllib3.Retry(total=2, backoff_factor=0.1, allowed_methods=None, redirect=False)
        http = urllib3.PoolManager(timeout=urllib3.Timeout(connect=CONNECT_S, read=READ_S), maxsize=8, retries=retry)
        # Why: without a region the client asks the server for it, even to sign.
        return Minio(
            address,
            access_key,
            secret_key,
            secure=secure,
            region=self._settings.s3_region,
            http_client=http,
        )

    async def _call(self, work: Callable[[Minio], T]) -> T:
        client = self._client_for(self._settings.s3_address, self._settings.s3_secure)
        try:
            return await asyncio.to_thread(work, client)
        except (MinioException, urllib3.exceptions.HTTPError, OSError, ValueError, ParseError) as error:
            raise self._unavailable(in_words(error)) from error

    def _unavailable(self, reason: str) -> Unavailable:
        return Unavailable(
            "object_store_unavailable",
            f"The object store at {self._settings.s3_address} does not do its work: {reason[:500]}.",
            "Try again; if it stays, see `nabla status`.",
        )


def in_words(error: BaseException) -> str:
    """What is wrong, for people: without addresses, paths and names of classes, of which libraries make a screenful."""
    match error:
        case S3Error():
            words = _SAID.get(error.code or "", f"it says {error.code}: {error.message}".removesuffix("."))
        case ServerError():
            words = f"it answers with HTTP status {error.status_code}"
        case InvalidResponseError() | ParseError():
            words = "what answers there is not S3"
        case ValueError():
            words = "what answers there is not S3" if "XML" in str(error) else str(error).removesuffix(".")
        case urllib3.exceptions.MaxRetryError() if error.reason:
            words = _network_in_words(error.reason)
        case _:
            words = _network_in_words(error)
    return words


def _network_in_words(error: BaseException) -> str:
    match error:
        case urllib3.exceptions.NameResolutionError():
            words = "its name is not found"
        case urllib3.exceptions.NewConnectionError():
            words = _system_in_words(error)
        case urllib3.exceptions.ReadTimeoutError():
            words = f"no answer in {READ_S} s"
        case urllib3.exceptions.ConnectTimeoutError():
            words = f"no connection in {CONNECT_S} s"
        case urllib3.exceptions.SSLError():
            words = _tls_in_words(error)
        case _:
            words = _system_in_words(error)
    return words


def _system_in_words(error: BaseException) -> str:
    """What the operating system said, which libraries keep as the cause."""
    while not isinstance(error, OSError) and (beneath := error.__cause__ or error.__context__):
        error = beneath
    strerror = error.strerror if isinstance(error, OSError) else None
    return (strerror or "the connection broke off").lower()


def _tls_in_words(error: BaseException) -> str:
    cause: object = error.args[0] if error.args else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {cause.verify_message}"
    return "it does not speak TLS as it should"


def _stored(item: Object) -> Stored:
    return Stored(
        key=item.object_name or "",
        version=item.version_id or "",
        size_bytes=item.size or 0,
        etag=(item.etag or "").strip('"'),
    )
