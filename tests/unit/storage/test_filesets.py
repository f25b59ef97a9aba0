from __future__ import annotations

import pytest

from libs.common.contracts.messages import (
    File,
    FilePage,
    Fileset,
    FilesetGrant,
    GetFileset,
    JobStarting,
    ListFiles,
    OpenFileset,
    Principal,
    SealFileset,
)
from libs.common.errors import Conflict, Forbidden, Invalid, NotFound, Refusal, TooLarge, Unavailable
from libs.common.pages import encode_cursor
from services.storage.domain import filesets as domain
from services.storage.domain.filesets import FILESET, checked_digest, digest_of, entries_of
from tests.unit.storage.world import ATTEMPT, EXECUTOR, MEMBER, STRANGER, VIEWER, World, file_of, job

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("state", "trigger", "after"),
    [
        ("open", "seal", "sealed"),
        ("open", "expire", "deleted"),
        ("sealed", "seal", "sealed"),
        ("sealed", "expire", "sealed"),
        ("deleted", "seal", "deleted"),
        ("deleted", "expire", "deleted"),
    ],
)
def test_each_trigger_in_each_state(state: str, trigger: str, after: str) -> None:
    assert FILESET.next_state("fs1", state, trigger) == after


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a//b",
        "a/",
        "./a",
        "a\0b",
        "a\\..\\b",
        "C:\\x",
        "a\nb",
        "x" * 1025,
        "ü" * 513,
    ],
)
def test_a_path_that_could_leave_the_set_is_refused(path: str) -> None:
    with pytest.raises(Invalid, match="cannot be in a file set"):
        entries_of([file_of(path, b"")])


@pytest.mark.parametrize("path", ["a", "a/b", "...", "..a", "a b", "%2e%2e/x", "x" * 1024, "日本/ü"])
def test_an_ordinary_path_is_taken(path: str) -> None:
    assert entries_of([file_of(path, b"")])[0].path == path


def test_a_path_twice_or_as_file_and_folder_is_refused() -> None:
    with pytest.raises(Invalid, match="twice"):
        entries_of([file_of("a", b"1"), file_of("a", b"2")])
    with pytest.raises(Invalid, match="also the folder"):
        entries_of([file_of("a/b/c", b"1"), file_of("a/b", b"2")])


def test_too_many_or_too_large_files_and_bad_hashes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TooLarge):
        entries_of([file_of("a", b"").model_copy(update={"size_bytes": 6 << 30})])
    with pytest.raises(Invalid):
        entries_of([File(path="a", size_bytes=1, md5="X", sha256="0" * 64)])
    with pytest.raises(TooLarge):
        entries_of([file_of("a", b"")] * (domain.MAX_FILES + 1))


def test_the_digest_follows_from_paths_and_hashes_in_any_order() -> None:
    one, two = file_of("a", b"1"), file_of("b", b"2")
    digest = digest_of(entries_of([one, two]))
    assert digest == digest_of(entries_of([two, one]))
    with pytest.raises(Invalid, match="not that of the files"):
        checked_digest("model", "0" * 64, entries_of([one]))
    assert checked_digest("workspace", "0" * 64, entries_of([one])) == "0" * 64


async def test_a_set_is_opened_uploaded_sealed_and_read(world: World) -> None:
    grant = await world.open(bodies={"b": b"two", "a": b"one"}, endpoint="door:80")
    assert [(upload.path, upload.url.startswith("put://door:80/model/fs")) for upload in grant.uploads] == [
        ("a", True),
        ("b", True),
    ]
    for upload, body in zip(grant.uploads, (b"one", b"two"), strict=True):
        world.objects.upload(upload.url, body)
    sealed = await world.ask(SealFileset(fileset_id=grant.fileset.id), MEMBER, Fileset)
    assert (sealed.state, sealed.file_count, sealed.size_bytes, sealed.revision) == ("sealed", 2, 6, 2)
    page = await world.ask(ListFiles(fileset_id=sealed.id, limit=1, endpoint="d"), VIEWER, FilePage)
    rest = await world.ask(ListFiles(fileset_id=sealed.id, cursor=page.next_cursor), VIEWER, FilePage)
    assert [item.path for item in (*page.items, *rest.items)] == ["a", "b"]
    assert page.items[0].url.startswith(f"get://d/model/{sealed.id}/0?v")
    assert rest.next_cursor == ""
    for wrong in ("x", "-1", "9" * 30, str(2**63)):
        with pytest.raises(Invalid):
            await world.ask(ListFiles(fileset_id=sealed.id, cursor=encode_cursor(wrong)), VIEWER, FilePage)
    assert await world.events() == ["nabla.evt.t1.fileset.sealed.v1"]


async def test_sealing_twice_emits_once_and_answers_the_same(world: World) -> None:
    sealed = await world.sealed()
    assert await world.ask(SealFileset(fileset_id=sealed.id), MEMBER, Fileset) == sealed
    assert len(await world.events()) == 1


async def test_a_missing_and_a_wrong_file_are_named_and_may_be_put_right(world: World) -> None:
    grant = await world.open(bodies={"a": b"one", "b": b"two"})
    seal = SealFileset(fileset_id=grant.fileset.id)
    world.objects.upload(grant.uploads[0].url, b"one")
    with pytest.raises(Conflict, match="'b' has not arrived"):
        await world.ask(seal, MEMBER, Fileset)
    world.objects.upload(grant.uploads[1].url, b"oops")
    with pytest.raises(Invalid, match="'b' was uploaded with 4 bytes"):
        await world.ask(seal, MEMBER, Fileset)
    again = await world.open(bodies={"a": b"one", "b": b"two"})
    assert (again.fileset.id, [upload.path for upload in again.uploads]) == (grant.fileset.id, ["b"])
    world.objects.upload(again.uploads[0].url, b"two")
    assert (await world.ask(seal, MEMBER, Fileset)).state == "sealed"


async def test_a_late_put_changes_nothing_and_is_swept(world: World) -> None:
    grant = await world.open(bodies={"a": b"one"})
    world.objects.upload(grant.uploads[0].url, b"one")
    sealed = await world.ask(SealFileset(fileset_id=grant.fileset.id), MEMBER, Fileset)
    page = await world.ask(ListFiles(fileset_id=sealed.id), VIEWER, FilePage)
    world.objects.upload(grant.uploads[0].url, b"evil")
    assert (await world.ask(ListFiles(fileset_id=sealed.id), VIEWER, FilePage)).items == page.items
    world.later(3600)
    await world.sweeper.sweep()
    await world.sweeper.sweep()
    assert list(world.objects.kept.values()) == [b"one"]


async def test_a_known_workspace_is_answered_without_uploads_whoever_packed_it(world: World) -> None:
    digest = "d" * 64
    first = await world.sealed(kind="workspace", digest=digest, bodies={"workspace.tar.gz": b"packed"})
    again = await world.open(kind="workspace", digest=digest, project_id="p2", bodies={"workspace.tar.gz": b"other"})
    assert (again.fileset, again.uploads) == (first, ())
    stranger = await world.open(STRANGER, kind="workspace", digest=digest, bodies={"workspace.tar.gz": b"packed"})
    assert stranger.fileset.id != first.id


async def test_the_same_key_gives_the_same_set_and_another_body_is_refused(world: World) -> None:
    request = OpenFileset(kind="model", project_id="p1", files=(file_of("a", b"1"),))
    one = await world.ask(request, MEMBER, FilesetGrant, key="k")
    assert await world.ask(request, MEMBER, FilesetGrant, key="k") == one
    with pytest.raises(Conflict, match="used before"):
        await world.ask(request.model_copy(update={"project_id": "p9"}), MEMBER, FilesetGrant, key="k")


async def test_nothing_is_opened_while_the_object_store_is_away(world: World) -> None:
    grant = await world.open()
    world.objects.problem = "no answer"
    with pytest.raises(Unavailable, match="no answer"):
        await world.open()
    with pytest.raises(Unavailable):
        await world.ask(SealFileset(fileset_id=grant.fileset.id), MEMBER, Fileset)
    assert (await world.ask(GetFileset(fileset_id=grant.fileset.id), VIEWER, Fileset)).state == "open"


@pytest.mark.parametrize("asker", [STRANGER, ATTEMPT.model_copy(update={"project_id": "p9"})])
async def test_others_find_nothing(world: World, asker: Principal) -> None:
    sealed = await world.sealed()
    for message, reply in (
        (GetFileset(fileset_id=sealed.id), Fileset),
        (ListFiles(fileset_id=sealed.id), FilePage),
        (SealFileset(fileset_id=sealed.id), Fileset),
    ):
        with pytest.raises(NotFound):
            await world.ask(message, asker, reply)


async def test_an_attempt_writes_artifacts_and_models_of_its_own_job_only(world: World) -> None:
    sealed = await world.sealed(ATTEMPT, kind="artifacts", project_id="")
    assert (sealed.job_id, sealed.attempt, sealed.project_id) == ("js1", 1, "p1")
    for asked in ({"kind": "workspace"}, {"kind": "artifacts", "job_id": "js2"}, {"kind": "model", "attempt": 2}):
        with pytest.raises(Forbidden):
            await world.open(ATTEMPT, **asked)
    other = ATTEMPT.model_copy(update={"job_id": "js2"})
    mine = await world.open(ATTEMPT, kind="model")
    with pytest.raises(NotFound):
        await world.ask(SealFileset(fileset_id=mine.fileset.id), other, Fileset)


@pytest.mark.parametrize(
    ("asker", "asked"),
    [
        (VIEWER, {}),
        (MEMBER, {"kind": "artifacts", "job_id": "js1", "attempt": 1}),
        (EXECUTOR, {"kind": "artifacts"}),
        (MEMBER, {"kind": "notes"}),
        (MEMBER, {"project_id": ""}),
    ],
)
async def test_what_may_not_be_opened_is_refused(world: World, asker: Principal, asked: dict[str, object]) -> None:
    with pytest.raises(Refusal):
        await world.open(asker, **asked)


async def test_the_newest_attempt_shows_and_an_older_one_can_no_longer_write(world: World) -> None:
    for number in (1, 2):
        await world.deliver(JobStarting(job=job(number, number)))
        await world.sealed(EXECUTOR, kind="artifacts", job_id="js1", attempt=number, bodies={"n": b"%d" % number})
    page = await world.ask(ListFiles(job_id="js1"), VIEWER, FilePage)
    assert page.fileset.attempt == 2
    assert (await world.ask(ListFiles(job_id="js1"), STRANGER, FilePage)) == FilePage()
    with pytest.raises(Conflict, match="Attempt 1"):
        await world.open(EXECUTOR, kind="artifacts", job_id="js1", attempt=1, bodies={"late": b"1"})


async def test_an_empty_set_is_whole_at_once(world: World) -> None:
    grant = await world.ask(
        OpenFileset(kind="artifacts", project_id="p1", job_id="js1", attempt=1), EXECUTOR, FilesetGrant
    )
    assert (await world.ask(SealFileset(fileset_id=grant.fileset.id), EXECUTOR, Fileset)).file_count == 0


async def test_a_forgotten_set_goes_with_its_objects(world: World) -> None:
    grant = await world.open()
    world.objects.upload(grant.uploads[0].url, b"half")
    kept = await world.sealed(bodies={"x": b"y"})
    world.later(23 * 3600)
    await world.sweeper.sweep()
    assert (await world.ask(GetFileset(fileset_id=grant.fileset.id), VIEWER, Fileset)).state == "open"
    world.later(2 * 3600)
    await world.sweeper.sweep()
    with pytest.raises(NotFound):
        await world.ask(GetFileset(fileset_id=grant.fileset.id), VIEWER, Fileset)
    assert list(world.objects.kept.values()) == [b"y"]
    assert (await world.ask(GetFileset(fileset_id=kept.id), VIEWER, Fileset)).state == "sealed"


@pytest.mark.parametrize("a_pass", [1, 20])
async def test_a_set_that_cannot_be_swept_holds_up_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, a_pass: int
) -> None:
    monkeypatch.setattr("services.storage.loops.filesets.ROWS_A_PASS", a_pass)
    forgotten = [await world.open(bodies={name: b"half"}) for name in "abc"]
    for grant in forgotten:
        world.objects.upload(grant.uploads[0].url, b"half")
    kept = await world.sealed(bodies={"x": b"y"})
    world.objects.upload(f"put:///model/{kept.id}/0", b"late")
    world.later(25 * 3600)
    world.objects.refused.add(f"model/{forgotten[0].fileset.id}/")
    for _ in range(8):
        await world.sweeper.sweep()
    assert sorted(world.objects.kept.values()) == [b"half", b"y"]
    world.objects.refused.clear()
    for _ in range(4):
        await world.sweeper.sweep()
    assert list(world.objects.kept.values()) == [b"y"]


async def test_more_files_than_fit_an_answer_are_granted_in_turns(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.storage.handlers.GRANT_BYTES", 700)
    bodies = {f"f{number}": b"%d" % number for number in range(5)}
    seen: list[str] = []
    while uploads := (await world.open(bodies=bodies)).uploads:
        seen += [upload.path for upload in uploads]
        for upload in uploads:
            world.objects.upload(upload.url, bodies[upload.path])
    assert seen == sorted(bodies)
