from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from nabla.cli.progress import Lines, progress
from nabla.client import Client
from nabla.errors import TransferError, WorkspaceError
from nabla.manifest import Manifest, describe
from nabla.packing import archive, pack
from nabla.packing.hashes import HashCache
from nabla.packing.origin import parse_status
from nabla.packing.tree import scan
from nabla.progress import Progress
from nabla.transfer import inside
from tests.support.users import ordinary_user

from .stub import Reply, Seen, StubServer

pytestmark = pytest.mark.unit

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no symbolic links or modes for ordinary users")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    write(root, {"train.py": "print(1)", "pkg/__init__.py": "", "pkg/model.py": "x = 1", "data/a.csv": "1,2"})
    return root


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def age(root: Path) -> None:
    """Makes every file old enough to be remembered."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 60, time.time() - 60), follow_symlinks=False)


def paths(root: Path) -> list[str]:
    return sorted(entry.path for entry in scan(root).entries)


def test_a_plain_tree_goes_along_whole(folder: Path) -> None:
    assert paths(folder) == ["data/a.csv", "pkg/__init__.py", "pkg/model.py", "train.py"]


SECRETS = (
    ".env", ".env.local", ".envrc", ".ENV", "server.pem", "tls.key", "cert.p12", "id_rsa", "id_ed25519.pub", ".netrc",
    ".ssh/config", ".aws/credentials", ".git-credentials", ".pypirc",
)  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_stay_here_and_are_listed(folder: Path, secret: str) -> None:
    write(folder, {secret: "s3cret", f"pkg/deep/{secret}": "s3cret"})
    tree = scan(folder)
    kept = [entry.path for entry in tree.entries if entry.mode != "040000"]
    assert sorted(kept) == ["data/a.csv", "pkg/__init__.py", "pkg/model.py", "train.py"]
    assert len(tree.secrets) == 2
    assert tree.secrets[0].rstrip("/").endswith(secret.split("/", maxsplit=1)[0])


def test_a_secret_cannot_be_taken_along_by_an_ignore_file(folder: Path) -> None:
    write(folder, {".env": "KEY=1", ".nablaignore": "!.env\n"})
    assert ".env" not in paths(folder)


@pytest.mark.parametrize("name", [".venv", "venv", "node_modules", "__pycache__", ".git", ".nabla"])
def test_what_belongs_to_this_machine_is_left_out_and_listed(folder: Path, name: str) -> None:
    write(folder, {f"{name}/file": "x", f"pkg/{name}/file": "x"})
    tree = scan(folder)
    assert tree.machine == [f"{name}/", f"pkg/{name}/"] or tree.machine == [f"pkg/{name}/", f"{name}/"]


def test_an_environment_under_another_name_is_recognised(folder: Path) -> None:
    write(folder, {"myenv/pyvenv.cfg": "", "myenv/lib/x.py": ""})
    assert scan(folder).machine == ["myenv/"]


def test_ignore_files_hold_in_their_folder_and_below(folder: Path) -> None:
    write(
        folder, {".gitignore": "*.csv\n/out/\n", "out/x": "1", "pkg/out/y": "1", "pkg/.gitignore": "model.py\n!z.csv\n"}
    )
    write(folder, {"pkg/z.csv": "1", "model.py": "kept"})
    found = paths(folder)
    assert "data/a.csv" not in found
    assert "out/x" not in found
    assert {"pkg/out/y", "pkg/z.csv", "model.py"} <= set(found)
    assert "pkg/model.py" not in found


def test_nablaignore_overrules_gitignore(folder: Path) -> None:
    write(folder, {".gitignore": "data/\n", ".nablaignore": "!data/\ntrain.py\n", "pkg/.gitignore": "*\n"})
    assert "data/a.csv" in paths(folder)
    assert "train.py" not in paths(folder)


def test_ignore_files_above_count_within_the_repository(folder: Path) -> None:
    (folder / ".git").mkdir()
    write(folder, {".gitignore": "/pkg/model.py\n*.ckpt\n", "pkg/best.ckpt": "1"})
    assert paths(folder / "pkg") == ["__init__.py"]
    (folder / ".git").rmdir()
    assert paths(folder / "pkg") == ["__init__.py", "best.ckpt", "model.py"]


@posix
def test_links_within_the_tree_are_kept_and_others_told(folder: Path, tmp_path: Path) -> None:
    (folder / "inside").symlink_to("pkg/model.py")
    (folder / "absolute").symlink_to(folder / "data")
    (folder / "outside").symlink_to("/etc/passwd")
    (folder / "upwards").symlink_to("../")
    tree = scan(folder)
    targets = {entry.path: entry.target for entry in tree.entries if entry.target}
    assert targets == {"inside": "pkg/model.py", "absolute": "data"}
    assert tree.links_outside == ["outside", "upwards"]


@posix
def test_what_is_no_file_is_left_out_and_told(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert scan(folder).special == ["pipe"]


def test_the_same_tree_packs_into_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    first = archived(folder, tmp_path / "1.tar.gz")
    age(folder)
    twin = tmp_path / "elsewhere" / "twin"
    for path in sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True):
        write(twin, {path.relative_to(folder).as_posix(): path.read_text()})
    assert archived(twin, tmp_path / "2.tar.gz") == first
    write(twin, {"train.py": "print(2)"})
    assert archived(twin, tmp_path / "3.tar.gz")[0] != first[0]


def archived(root: Path, target: Path) -> tuple[str, bytes]:
    workspace = pack(root)
    archive.write(target, workspace.tree.root, workspace.tree.entries, workspace.hashes)
    return workspace.digest, target.read_bytes()


@posix
def test_the_archive_holds_content_modes_links_and_empty_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "run.sh").write_text("echo hi")
    (folder / "run.sh").chmod(0o700)
    (folder / "link").symlink_to("train.py")
    (folder / "out" / "empty").mkdir(parents=True)
    archived(folder, tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        members = {member.name: member for member in tar}
        assert tar.extractfile("pkg/model.py").read() == b"x = 1"  # type: ignore[union-attr]
    assert members["run.sh"].mode == 0o755
    assert members["train.py"].mode == 0o644
    assert members["link"].linkname == "train.py"
    assert members["out/empty"].isdir()
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members.values()} == {(0, 0, 0, "")}


def test_the_digest_is_that_of_the_contract(folder: Path) -> None:
    names = ["data/a.csv", "pkg/__init__.py", "pkg/model.py", "train.py"]
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = "".join(f"{name}\x00100644\x00{sums[name]}\n" for name in names)
    assert pack(folder).digest == hashlib.sha256(lines.encode()).hexdigest()


def test_a_file_that_changes_while_it_is_packed_is_noticed(folder: Path, tmp_path: Path) -> None:
    workspace = pack(folder)
    hashes = dict(workspace.hashes)
    write(folder, {"train.py": "print(3)"})
    with pytest.raises(archive.ChangedMeanwhile, match=r"train\.py"):
        archive.write(tmp_path / "a.tar.gz", folder, workspace.tree.entries, hashes)


def test_an_unchanged_file_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    age(folder)
    cache = HashCache(folder, tmp_path / "hashes")
    entry = next(entry for entry in scan(folder).entries if entry.path == "train.py")
    sha256 = cache.sha256(entry)
    cache.save("digest", archive.ArchiveFacts(1, "m", "s"))
    again = HashCache(folder, tmp_path / "hashes")
    assert again.known(entry) == sha256
    assert again.archive("digest") == archive.ArchiveFacts(1, "m", "s")
    assert again.archive("other") is None
    write(folder, {"train.py": "print(9) "})
    changed = next(entry for entry in scan(folder).entries if entry.path == "train.py")
    assert again.known(changed) is None


def test_a_file_changed_just_now_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    entry = next(iter(scan(folder).entries))
    cache = HashCache(folder, tmp_path / "hashes")
    cache.sha256(entry)
    cache.save("digest", archive.ArchiveFacts(1, "m", "s"))
    assert HashCache(folder, tmp_path / "hashes").known(entry) is None


def test_a_damaged_cache_costs_nothing_but_time(folder: Path, tmp_path: Path) -> None:
    cache = HashCache(folder, tmp_path / "hashes")
    cache.save("digest", archive.ArchiveFacts(1, "m", "s"))
    next((tmp_path / "hashes").iterdir()).write_text("{broken")
    assert HashCache(folder, tmp_path / "hashes").archive("digest") is None


def test_new_files_are_counted_before_anything_is_read(folder: Path) -> None:
    workspace = pack(folder)
    assert workspace.new_file_count == 4
    assert workspace.new_size_bytes == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


class Steps:
    """The stages that began: title, bytes to come, and the bytes that went by."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int | None, list[int]]] = []

    def begin(self, title: str, total_bytes: int | None) -> Progress:
        self.begun.append((title, total_bytes, []))
        return self.begun[-1][2].append


def storing(stub: StubServer) -> dict[str, bytes]:
    """The stub as a file set store; answers what has been stored."""
    stored: dict[str, bytes] = {}
    digests: set[str] = set()

    def open_(seen: Seen) -> Reply:
        known = seen.json["digest"] in digests
        uploads = [{"path": f["path"], "url": f"{stub.url}/s3/x"} for f in seen.json["files"]]  # type: ignore[attr-defined]
        digests.add(str(seen.json["digest"]))
        fileset = {"id": "fs1", "state": "sealed" if known else "open", "digest": seen.json["digest"]}
        return Reply(201, {"fileset": fileset, "uploads": [] if known else uploads})

    def put(seen: Seen) -> Reply:
        assert "authorization" not in seen.headers
        assert int(seen.headers["content-length"]) == len(seen.body)
        stored[seen.path] = seen.body
        return Reply(200)

    stub.on("POST", "/filesets", open_)
    stub.on("PUT", "/s3/x", Reply(503), put)
    stub.on("POST", "/filesets/fs1/seal", Reply(200, {"id": "fs1", "state": "sealed"}))
    return stored


def test_a_workspace_is_uploaded_once(stub: StubServer, client: Client, folder: Path) -> None:
    stored = storing(stub)
    age(folder)
    steps = Steps()
    assert pack(folder).upload(client.filesets, "digits", steps.begin).id == "fs1"
    assert [title for title, *_ in steps.begun] == ["Reading", "Packing", "Uploading"]
    assert all(total == sum(done) for _, total, done in steps.begun)
    announced = stub.calls("POST", "/filesets")[0].json
    file = announced["files"][0]  # type: ignore[index]
    assert (announced["kind"], announced["project_id"], file["path"]) == ("workspace", "digits", "workspace.tar.gz")
    assert file["sha256"] == hashlib.sha256(stored["/s3/x"]).hexdigest()
    assert file["size_bytes"] == len(stored["/s3/x"])
    puts = len([seen for seen in stub.seen if seen.method == "PUT"])
    again = pack(folder)
    assert again.new_file_count == 0
    steps = Steps()
    again.upload(client.filesets, "digits", steps.begin)
    assert steps.begun == [("Reading", 0, [])]
    assert len([seen for seen in stub.seen if seen.method == "PUT"]) == puts
    assert len(stub.calls("POST", "/filesets/fs1/seal")) == 1


def test_a_model_folder_is_described_as_the_contract_says(tmp_path: Path) -> None:
    write(tmp_path / "m", {"b.txt": "b", "a/x.bin": "x"})
    manifest = describe(tmp_path / "m")
    assert isinstance(manifest, Manifest)
    assert sorted(file.path for file in manifest.files) == ["a/x.bin", "b.txt"]
    lines = "".join(f"{n}\x00{hashlib.sha256(c).hexdigest()}\n" for n, c in (("a/x.bin", b"x"), ("b.txt", b"b")))
    assert manifest.digest == hashlib.sha256(lines.encode()).hexdigest()
    assert describe(tmp_path / "m" / "b.txt").files[0].path == "b.txt"
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(TransferError):
            describe(path)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "C:/x", "a\\..\\x", ""])
def test_a_file_set_cannot_write_outside_the_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(TransferError, match="outside"):
        inside(tmp_path, path)


def test_a_download_is_checked_and_kept(stub: StubServer, client: Client, tmp_path: Path) -> None:
    content = '"hello"'
    good = {"path": "a/b.json", "size_bytes": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}
    stub.on("GET", "/jobs/js1/artifacts", Reply(200, {"items": [{**good, "url": f"{stub.url}/s3/b"}]}))
    stub.on("GET", "/s3/b", Reply(cut=True), Reply(200, "hello"))
    assert [p.read_text() for p in client.jobs.download_artifacts("js1", tmp_path)] == [content]
    before = len(stub.seen)
    client.jobs.download_artifacts("js1", tmp_path)
    assert len(stub.seen) == before + 1
    stub.on("GET", "/s3/b", Reply(200, "hallo"))
    with pytest.raises(TransferError, match="damaged"):
        client.jobs.download_artifacts("js1", tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.*"))


def test_git_tells_commit_branch_and_dirt() -> None:
    clean = "# branch.oid 0123abc\n# branch.head main\n# branch.ab +0 -0\n"
    assert parse_status(clean) == {"commit": "0123abc", "branch": "main", "dirty": "false"}
    assert parse_status(clean + "? new.py\n")["dirty"] == "true"
    assert parse_status("# branch.oid (initial)\n# branch.head (detached)\n") == {"dirty": "false"}


def test_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError):
        pack(tmp_path / "nowhere")


@posix
def test_an_unreadable_folder_is_named() -> None:
    with ordinary_user() as folder:
        (folder / "train.py").touch()
        (folder / "pkg").mkdir(mode=0)
        with pytest.raises(WorkspaceError, match="pkg"):
            pack(folder)


@posix
def test_a_link_that_goes_out_and_comes_back_in_still_works_elsewhere(folder: Path) -> None:
    (folder / "round").symlink_to(f"../{folder.name}/train.py")
    (folder / "pkg" / "round").symlink_to(f"../../{folder.name}/train.py")
    targets = {entry.path: entry.target for entry in scan(folder).entries if entry.target}
    assert targets == {"round": "train.py", "pkg/round": "../train.py"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no disk that is always full")
def test_a_full_disk_is_not_taken_for_a_file_that_changed(folder: Path) -> None:
    (folder / "big").write_bytes(os.urandom(1 << 20))
    workspace = pack(folder)
    with pytest.raises(OSError, match="No space left"):
        archive.write(Path("/dev/full"), folder, workspace.tree.entries, workspace.hashes)


def test_a_file_that_became_shorter_while_it_is_packed_is_noticed(folder: Path, tmp_path: Path) -> None:
    workspace = pack(folder)
    hashes = dict(workspace.hashes)
    write(folder, {"train.py": ""})
    with pytest.raises(archive.ChangedMeanwhile, match=r"train\.py"):
        archive.write(tmp_path / "a.tar.gz", folder, workspace.tree.entries, hashes)


@posix
def test_what_cannot_be_sent_as_it_is_is_refused_and_not_left_out(tmp_path: Path) -> None:
    write(tmp_path / "m", {"a.bin": "a"})
    os.mkfifo(tmp_path / "m" / "pipe")
    with pytest.raises(TransferError, match="neither a file nor a folder"):
        describe(tmp_path / "m")
    (tmp_path / "m" / "pipe").unlink()
    Path(os.fsdecode(os.fsencode(tmp_path / "m") + b"/\xff")).touch()
    with pytest.raises(TransferError, match="not UTF-8"):
        describe(tmp_path / "m")


def uploads_of(stub: StubServer, *names: str) -> list[dict[str, str]]:
    return [{"path": name, "url": f"{stub.url}/s3/{name}"} for name in names]


def open_set(stub: StubServer, *grants: list[dict[str, str]]) -> None:
    fileset = {"id": "fs1", "state": "open"}
    stub.on("POST", "/filesets", *[Reply(201, {"fileset": fileset, "uploads": uploads}) for uploads in grants])
    stub.on("POST", "/filesets/fs1/seal", Reply(200, {"id": "fs1", "state": "sealed"}))


def test_urls_that_grow_old_are_asked_for_again_as_long_as_files_arrive(
    stub: StubServer, client: Client, tmp_path: Path
) -> None:
    write(tmp_path / "m", {"a": "a", "b": "b", "c": "c"})
    open_set(stub, uploads_of(stub, "a", "b", "c"), uploads_of(stub, "b", "c"), uploads_of(stub, "c"))
    stub.on("PUT", "/s3/a", Reply(200))
    stub.on("PUT", "/s3/b", Reply(403), Reply(200))
    stub.on("PUT", "/s3/c", Reply(403), Reply(403), Reply(200))
    assert client.filesets.upload("model", "p", describe(tmp_path / "m")).state == "sealed"
    stub.on("PUT", "/s3/c", Reply(403))
    open_set(stub, uploads_of(stub, "c"))
    with pytest.raises(TransferError, match="refused"):
        client.filesets.upload("model", "p", describe(tmp_path / "m"))


def test_the_first_failure_ends_an_upload_without_sending_the_rest(
    stub: StubServer, client: Client, tmp_path: Path
) -> None:
    names = [f"f{n:03}" for n in range(200)]
    write(tmp_path / "m", dict.fromkeys(names, "x"))
    open_set(stub, uploads_of(stub, *names))
    stub.on("PUT", "/s3/f000", Reply(400))
    silent = threading.Event()
    for name in names[1:]:
        stub.on("PUT", f"/s3/{name}", lambda seen: Reply(200, silent.wait(60), cut=True))
    with pytest.raises(TransferError, match="refused 'f000'"):
        client.filesets.upload("model", "p", describe(tmp_path / "m"))
    assert not silent.is_set()
    silent.set()
    # Four at a time, and one that took the place of the first.
    assert len({seen.path for seen in stub.seen if seen.method == "PUT"}) <= 5


def test_progress_adds_up_whatever_had_to_be_sent_again(stub: StubServer, client: Client, tmp_path: Path) -> None:
    write(tmp_path / "m", {"a": "abc"})
    open_set(stub, uploads_of(stub, "a"))
    stub.on("PUT", "/s3/a", Reply(503), Reply(cut=True), Reply(200))
    steps = Steps()
    client.filesets.upload("model", "p", describe(tmp_path / "m", steps.begin), steps.begin)
    assert [(title, total, sum(done)) for title, total, done in steps.begun] == [("Reading", 3, 3), ("Uploading", 3, 3)]


def test_where_nobody_looks_progress_is_a_line_now_and_then() -> None:
    said: list[str] = []
    now = 0.0
    told = Lines(said.append, lambda: now).begin("Reading", 3 << 20)
    told(1 << 20)
    assert said == []
    now = 10.0
    told(1 << 20)
    told(1 << 20)
    assert said == ["Reading: 2.0 MiB of 3.0 MiB"]


def test_where_somebody_looks_progress_is_a_bar_with_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress() as stages:
        stages("Reading", 3000)(3000)
        stages("Uploading", 2000)(1000)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "Uploading" in shown
    assert "1.0/2.0 kB" in shown


def test_a_file_that_became_shorter_since_it_was_described_is_named(
    stub: StubServer, client: Client, tmp_path: Path
) -> None:
    write(tmp_path / "m", {"a": "abc"})
    manifest = describe(tmp_path / "m")
    write(tmp_path / "m", {"a": "a"})
    open_set(stub, uploads_of(stub, "a"))
    with pytest.raises(TransferError, match="shorter"):
        client.filesets.upload("model", "p", manifest)


def test_a_download_goes_on_when_its_urls_grow_old(stub: StubServer, client: Client, tmp_path: Path) -> None:
    files = [{"path": name, "url": f"{stub.url}/s3/{name}"} for name in ("a", "b")]
    stub.on("GET", "/jobs/js1/artifacts", Reply(200, {"items": files}))
    stub.on("GET", "/s3/a", Reply(200, 1))
    stub.on("GET", "/s3/b", Reply(403), Reply(200, 2))
    assert [path.read_text() for path in client.jobs.download_artifacts("js1", tmp_path)] == ["1", "2"]
    assert len([seen for seen in stub.seen if seen.path == "/s3/a"]) == 1


def test_a_place_that_cannot_be_written_is_an_error_of_ours(stub: StubServer, client: Client, tmp_path: Path) -> None:
    stub.on("GET", "/jobs/js1/artifacts", Reply(200, {"items": [{"path": "a/b", "url": f"{stub.url}/s3/a"}]}))
    (tmp_path / "a").write_text("a file where a folder must be")
    with pytest.raises(TransferError, match="Cannot write") as caught:
        client.jobs.download_artifacts("js1", tmp_path)
    assert "--to" in caught.value.remedy
