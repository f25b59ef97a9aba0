"""Which places a workspace may come from, judged before anybody is asked."""

from __future__ import annotations

import pytest

from services.executor.adapters.networks.reach import is_public
from services.executor.domain.sources import BadSource, checked_object, checked_ref, checked_repository, commit_of

pytestmark = pytest.mark.unit

A, B, C = "a" * 40, "b" * 40, "c" * 40


@pytest.mark.parametrize(
    "url",
    [
        "http://host/x.git",
        "ext::sh -c id",
        "file:///etc",
        "ssh://host/x",
        "git@host:x.git",
        "--upload-pack=id",
        "https://user:secret@host/x.git",
        "https://token@host/x.git",
        "https:///x.git",
        "https://host:port/x",
        "https://host/\nx",
        "https://host\\@other/x",
        "",
    ],
)
def test_only_plain_https_repositories_are_taken(url: str) -> None:
    with pytest.raises(BadSource) as refused:
        checked_repository(url, ())
    assert "secret" not in str(refused.value)


def test_http_is_enough_for_a_host_of_the_settings() -> None:
    assert checked_repository("git+http://host:3000/x.git", ("host:3000",)) == "http://host:3000/x.git"
    with pytest.raises(BadSource):
        checked_repository("http://host:3001/x.git", ("host:3000",))


@pytest.mark.parametrize(
    "ref", ["--upload-pack=id", "-x", "a..b", "a b", "a\n", "a:b", "x~1", "x^", "a//b", "b.lock", "x/"]
)
def test_a_ref_is_nothing_else(ref: str) -> None:
    with pytest.raises(BadSource):
        checked_ref(ref)


@pytest.mark.parametrize("ref", ["", "main", "feature/x-1", "v1.0", "refs/pull/1/head", A])
def test_refs_as_people_write_them_are_taken(ref: str) -> None:
    assert checked_ref(ref) == ref


def test_a_ref_means_what_git_takes_it_for() -> None:
    listing = f"{A}\tHEAD\n{A}\trefs/heads/main\n{B}\trefs/heads/both\n{B}\trefs/tags/both\n{C}\trefs/tags/both^{{}}\n"
    assert commit_of(listing, "") == A
    assert commit_of(listing, "main") == A
    assert commit_of(listing, "both") == C
    assert commit_of(listing, "refs/heads/both") == B
    assert commit_of(listing, "ain") == commit_of("", "") == ""


@pytest.mark.parametrize("url", ["s3://", "s3://bucket", "s3://bucket/", "https://b/k", "s3://a b/k", "s3://u:p@b/k"])
def test_an_object_has_a_bucket_and_a_key(url: str) -> None:
    with pytest.raises(BadSource):
        checked_object(url, "", ())


def test_an_object_lies_at_amazon_unless_an_endpoint_is_named() -> None:
    assert checked_object("s3://b/deep/k.zip", "", ()).endpoint.scheme == "https"
    found = checked_object("s3://b/deep/k.zip", "http://127.0.0.1:9000", ("127.0.0.1:9000",))
    assert (found.endpoint.port, found.bucket, found.key) == (9000, "b", "deep/k.zip")
    with pytest.raises(BadSource, match="https"):
        checked_object("s3://b/k", "http://127.0.0.1:9000", ())


INSIDE = (
    *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"),
    *("::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "", "host"),
)


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_inside_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_internet_are_public() -> None:
    assert is_public("9.9.9.9")
    assert is_public("2620:fe::fe")
