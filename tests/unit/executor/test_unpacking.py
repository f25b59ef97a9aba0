"""Archives that lie, and honest ones."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from services.executor.adapters.runtimes.unpacking import BadArchive, inner_path, unpack

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


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    claimed = file("x")
    claimed.size = 1 << 40
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        claimed.type = kind
        packed = io.BytesIO(gzip.compress(claimed.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))
        with pytest.raises(BadArchive, match=f"claims {1 << 40} bytes"):
            unpack(packed, tmp_path / "w")


def test_a_path_deeper_than_any_tool_expects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match="nested deeper"):
        unpack(archive((file("d/" * 1500 + "x"), b"")), tmp_path / "w")


def test_whatever_is_wrong_with_an_archive_is_told_as_that(tmp_path: Path) -> None:
    """Anything else would be taken for a fault of the node, and tried again for ever."""
    whole = archive((file("a"), b"x" * 700), (special("l", tarfile.SYMTYPE, "a"), b""), (file("n" * 300), b"y"))
    plain, randomness = gzip.decompress(whole.getvalue()), random.Random(7)
    for turn in range(200):
        torn = bytearray(plain)
        for _ in range(randomness.randrange(1, 6)):
            start = randomness.randrange(0, len(torn) - 8) // 512 * 512 + randomness.randrange(0, 345)
            torn[start : start + 3] = randomness.randbytes(3)
            torn[start // 512 * 512 : start // 512 * 512 + 512] = with_checksum(torn[start // 512 * 512 :][:512])
        with contextlib.suppress(BadArchive, OSError):
            unpack(io.BytesIO(gzip.compress(bytes(torn), 1)), tmp_path / str(turn))


def test_a_sparse_map_that_never_ends_is_told_as_broken(tmp_path: Path) -> None:
    member = file("sparse")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", format=tarfile.PAX_FORMAT) as out:
        content = b"no number\n".ljust(512, b"\0")
        member.size = len(content)
        out.addfile(member, io.BytesIO(content))
    packed.seek(0)
    with pytest.raises(BadArchive, match="broken"):
        unpack(packed, tmp_path / "w")


def with_checksum(header: bytes | bytearray) -> bytes:
    total = sum(header[:148]) + 256 + sum(header[156:])
    return bytes(header[:148]) + b"%06o\0 " % total + bytes(header[156:])


@pytest.mark.parametrize("name", ["", "/a", "..", "a/../b", "a\0b"])
def test_paths_of_others_stay_inside(name: str) -> None:
    with pytest.raises(BadArchive):
        inner_path(name)
