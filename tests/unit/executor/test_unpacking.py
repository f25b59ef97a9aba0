"""Archives that lie, and honest ones."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from services.executor.adapters.unpacking import BadArchive, inner_path, unpack

pytestmark = pytest.mark.unit


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as out:
        for member, content in members:
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    packed.seek(0)
    return packed


def file(name: str, mode: int = 0o644) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mode = mode
    return member


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_files_folders_and_inner_links_are_unpacked_with_their_executable_bit(tmp_path: Path) -> None:
    packed = archive(
        (file("run.sh", 0o4755), b"#!"),
        (file("a/b.txt", 0o666), b"b"),
        (special("a/link", tarfile.SYMTYPE, "../run.sh"), b""),
        (special("empty", tarfile.DIRTYPE), b""),
    )
    assert unpack(packed, tmp_path / "w") == 4
    assert (tmp_path / "w/run.sh").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "w/a/b.txt").stat().st_mode & 0o7777 == 0o644
    assert (tmp_path / "w/a/link").read_bytes() == b"#!"
    assert (tmp_path / "w/empty").is_dir()


@pytest.mark.parametrize(
    "member",
    [
        file("/etc/passwd"),
        file("../out"),
        file("a/../../out"),
        special("link", tarfile.SYMTYPE, "/etc"),
        special("link", tarfile.SYMTYPE, "../out"),
        special("a/link", tarfile.SYMTYPE, "../../out"),
        special("hard", tarfile.LNKTYPE, "/etc/passwd"),
        special("device", tarfile.CHRTYPE),
        special("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name} {member.linkname}",
)
def test_what_leaves_the_folder_or_is_no_file_is_refused(member: tarfile.TarInfo, tmp_path: Path) -> None:
    with pytest.raises(BadArchive):
        unpack(archive((member, b"")), tmp_path / "w")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    members = ((special("d", tarfile.SYMTYPE, "real"), b""), (file("d/x"), b"x"))
    with pytest.raises(BadArchive, match="twice"):
        unpack(archive(*members), tmp_path / "w")
    assert not any(outside.iterdir())


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match="twice"):
        unpack(archive((file("a"), b"1"), (file("a"), b"2")), tmp_path / "w")


def test_bounds_of_count_and_size_hold(tmp_path: Path) -> None:
    many = archive(*((file(str(number)), b"") for number in range(5)))
    with pytest.raises(BadArchive, match="more than 4 files"):
        unpack(many, tmp_path / "many", max_files=4)
    with pytest.raises(BadArchive, match="more than 10 bytes"):
        unpack(archive((file("big"), b"0" * 11)), tmp_path / "big", max_bytes=10)


def test_a_torn_archive_says_so(tmp_path: Path) -> None:
    whole = archive((file("a"), b"x" * 100_000)).getvalue()
    for torn in (whole[: len(whole) // 2], b"no archive"):
        with pytest.raises(BadArchive, match="broken"):
            unpack(io.BytesIO(torn), tmp_path / str(len(torn)))


@pytest.mark.parametrize("name", ["", "/a", "..", "a/../b", "a\0b"])
def test_paths_of_others_stay_inside(name: str) -> None:
    with pytest.raises(BadArchive):
        inner_path(name)
