"""The S3 adapter does on a real S3 what its ports promise, and the S3 refuses what URLs do not allow."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
import urllib3

from libs.common.errors import Invalid, Unavailable
from services.storage.adapters.s3 import S3
from services.storage.settings import StorageSettings
from tests.support.ports import free_port
from tests.support.seaweed import Seaweed

pytestmark = pytest.mark.integration
BIG = b"x" * 20_000_000


@pytest.fixture
async def s3(seaweed: Seaweed, tmp_path: Path) -> S3:
    settings = StorageSettings(
        home=tmp_path, s3_address=seaweed.address, s3_keys=seaweed.keys_file, s3_bucket=f"b{uuid4().hex[:8]}"
    )
    s3 = S3(settings)
    assert s3.problem
    await s3.prepare()
    await s3.prepare()
    assert s3.problem == ""
    return s3


def send(method: str, url: str, body: bytes | None = None) -> urllib3.BaseHTTPResponse:
    return urllib3.request(method, url, body=body, retries=False, timeout=20)


@pytest.mark.parametrize("body", [b"one", b"", BIG], ids=["small", "empty", "20 MB"])
async def test_what_was_put_is_listed_with_size_and_md5_and_got_as_a_download(
    s3: S3, seaweed: Seaweed, body: bytes
) -> None:
    assert send("PUT", s3.put_url(seaweed.address, "model/fs1/0"), body).status == 200
    (stored,) = await s3.versions("model/fs1/")
    assert (stored.key, stored.size_bytes) == ("model/fs1/0", len(body))
    assert stored.etag == hashlib.md5(body).hexdigest()
    answer = send("GET", s3.get_url(seaweed.address, stored.key, stored.version, 'evil"\r\n<ü>.html'))
    assert (answer.status, answer.data) == (200, body)
    assert answer.headers["content-disposition"].startswith("attachment; filename*=UTF-8''evil%22%0D%0A%3C")
    assert answer.headers["content-type"] == "application/octet-stream"


async def test_a_put_replayed_after_the_check_does_not_change_what_was_checked(s3: S3, seaweed: Seaweed) -> None:
    url = s3.put_url(seaweed.address, "model/fs2/0")
    send("PUT", url, b"good")
    (checked,) = await s3.versions("model/fs2/")
    assert send("PUT", url, b"evil").status == 200
    got = send("GET", s3.get_url(seaweed.address, "model/fs2/0", checked.version, "f"))
    assert got.data == b"good"
    late = [item for item in await s3.versions("model/fs2/") if item.version != checked.version]
    await s3.remove(late)
    await s3.remove(late)
    assert await s3.versions("model/fs2/") == [checked]
    assert send("GET", s3.get_url(seaweed.address, "model/fs2/0", checked.version, "f")).data == b"good"


async def test_a_url_is_good_for_its_method_key_and_time_only(seaweed: Seaweed, tmp_path: Path, s3: S3) -> None:
    put = s3.put_url(seaweed.address, "model/fs3/0")
    assert send("PUT", put, b"mine").status == 200
    (stored,) = await s3.versions("model/fs3/")
    get = s3.get_url(seaweed.address, stored.key, stored.version, "f")
    refused = [
        send("DELETE", put),
        send("GET", put),
        send("PUT", get, b"x"),
        send("PUT", put.replace("/fs3/0", "/fs4/0"), b"x"),
        send("PUT", put.replace("/fs3/0", "/fs3/../fs4/0"), b"x"),
        send("GET", get.replace(stored.version, "null")),
        send("GET", get.split("?")[0]),
        send("PUT", put.split("?")[0], b"x"),
        send("POST", put),
    ]
    assert {answer.status for answer in refused} <= {400, 403, 405}
    assert await s3.versions("model/fs4/") == []
    assert await s3.versions("model/fs3/") == [stored]


async def test_an_expired_url_is_refused(seaweed: Seaweed, tmp_path: Path) -> None:
    settings = StorageSettings(
        home=tmp_path,
        s3_address=seaweed.address,
        s3_keys=seaweed.keys_file,
        s3_bucket=f"b{uuid4().hex[:8]}",
        url_lifetime_s=1,
    )
    s3 = S3(settings)
    await s3.prepare()
    url = s3.put_url(seaweed.address, "model/fs5/0")
    await asyncio.sleep(2.1)
    assert send("PUT", url, b"late").status == 403


async def test_blocks_are_read_by_range(s3: S3) -> None:
    await s3.write("log/js1/1", b"0123456789")
    await s3.write("log/js1/1", b"0123456789")
    assert await s3.read("log/js1/1", 3, 4) == b"3456"


async def test_multiparts_left_behind_are_aborted(s3: S3) -> None:
    client = s3._client_for(s3._settings.s3_address, False)
    client._create_multipart_upload(s3._bucket, "log/half", {})
    assert await s3.abort_multiparts(datetime(2020, 1, 1, tzinfo=UTC)) == 0
    assert await s3.abort_multiparts(datetime(2100, 1, 1, tzinfo=UTC)) == 1
    assert client._list_multipart_uploads(s3._bucket).uploads == []


@pytest.mark.parametrize("endpoint", ["http://x", "a/b", "a b", "x@y", "h:port", "-", "a?b"])
def test_an_endpoint_that_is_not_a_host_is_refused(s3: S3, endpoint: str) -> None:
    with pytest.raises(Invalid):
        s3.put_url(endpoint, "k")


async def test_an_absent_server_or_key_file_is_unavailable_with_a_reason(seaweed: Seaweed, tmp_path: Path) -> None:
    away = S3(StorageSettings(home=tmp_path, s3_address=f"127.0.0.1:{free_port()}", s3_keys=seaweed.keys_file))
    await away.prepare()
    assert "127.0.0.1" in away.problem
    with pytest.raises(Unavailable):
        await away.versions("x")
    keyless = S3(StorageSettings(home=tmp_path))
    await keyless.prepare()
    assert "s3.json" in keyless.problem


async def test_an_object_is_found_whole_or_known_to_be_missing(s3: S3, seaweed: Seaweed) -> None:
    await s3.write("log/js1/1", BIG)
    assert await s3.find("log/js1/1") == BIG
    assert await s3.find("log/js1/2") is None
    await s3.remove(await s3.versions("log/js1/"))
    assert await s3.find("log/js1/1") is None
