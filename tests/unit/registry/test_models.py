from __future__ import annotations

import asyncio

import pytest

from libs.common.contracts import messages as m
from libs.common.errors import Conflict, Invalid, NotFound, Refusal
from libs.common.ids import new_id
from services.registry.domain import models as rules
from tests.unit.registry.harness import Catalogue, attempt_of, job_in, service, version_of

pytestmark = pytest.mark.unit


async def register(catalogue: Catalogue, who: m.Principal, project: m.Project, **more: object) -> m.ModelVersion:
    return await catalogue.ask(version_of(project, **more), who, m.ModelVersion)


async def test_first_version_makes_the_model_and_later_ones_count_on(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    one = await register(catalogue, member, project, metrics={"accuracy": 0.97}, description="first", size_bytes=5)
    two = await register(catalogue, member, project, framework="onnx")
    assert (one.version, two.version, one.model_id == two.model_id) == (1, 2, True)
    assert (one.created_by, one.metrics, one.size_bytes) == (member.id, {"accuracy": 0.97}, 5)
    detail = await catalogue.ask(m.GetModel(model_id="digits"), member, m.ModelDetail)
    assert detail.versions == (two, one)
    assert (detail.model.latest, detail.model.latest_version, detail.model.revision) == (two, 2, 3)
    events = [event for event in await catalogue.emitted() if event[0] == "model.registered.v1"]
    assert [m.ModelVersion.model_validate(body["version"]) for _, body, _ in events] == [one, two]
    assert [headers["ce-revision"] for _, _, headers in events] == ["2", "3"]


async def test_version_is_found_by_model_id_and_name_and_zero_is_the_newest(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    one = await register(catalogue, member, project)
    two = await register(catalogue, member, project)
    for model_id in ("digits", one.model_id):
        for number, expected in ((0, two), (1, one), (2, two)):
            asked = m.GetModelVersion(model_id=model_id, version=number)
            assert await catalogue.ask(asked, member, m.ModelVersion) == expected
    for number in (3, -1):
        asked = m.GetModelVersion(model_id="digits", version=number)
        with pytest.raises(NotFound):
            await catalogue.ask(asked, member, m.ModelVersion)


async def test_same_files_again_are_the_same_version(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    message = version_of(project)
    first = await catalogue.ask(message, member, m.ModelVersion)
    changed = message.model_copy(update={"framework": "onnx", "description": "rewritten?"})
    assert await catalogue.ask(changed, member, m.ModelVersion) == first
    assert (await catalogue.emitted_types()).count("model.registered.v1") == 1
    other = await catalogue.ask(message.model_copy(update={"name": "other"}), member, m.ModelVersion)
    assert (other.version, other.model_id != first.model_id) == (1, True)


async def test_versions_registered_at_once_get_numbers_without_gaps_and_stay_as_they_are(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    messages = [version_of(project) for _ in range(25)]
    answers = await asyncio.gather(*(catalogue.send(message, member, "") for message in (*messages, *messages)))
    versions = [m.ModelVersion.from_wire(answer.body) for answer in answers]
    assert versions[:25] == versions[25:]
    assert sorted(version.version for version in versions[:25]) == list(range(1, 26))
    for message, version in zip(messages, versions, strict=False):
        asked = m.GetModelVersion(model_id="digits", version=version.version)
        kept = await catalogue.ask(asked, member, m.ModelVersion)
        assert kept == version
        assert kept.fileset_id == message.fileset_id


def files_of(member: m.Principal, **more: object) -> m.Fileset:
    values = {"id": new_id("fileset"), "team_id": member.team_id, "kind": "model", "state": "sealed"} | more
    return m.Fileset.model_validate(values)


async def test_size_and_digest_are_those_that_the_files_owner_names(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    files = files_of(member, kind="artifacts", size_bytes=7, digest="d")
    catalogue.outside.filesets.known[files.id] = files
    made = await register(catalogue, member, project, fileset_id=files.id, size_bytes=1, digest="claimed")
    assert (made.size_bytes, made.digest) == (7, "d")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"team_id": "t-elsewhere"}, (NotFound, "fileset_not_found")),
        ({"state": "open"}, (Conflict, "fileset_not_sealed")),
        ({"state": "deleted"}, (Conflict, "fileset_not_sealed")),
        ({"kind": "workspace"}, (Invalid, "not_a_model")),
        ({"kind": "bento"}, (Invalid, "not_a_model")),
    ],
)
async def test_a_version_needs_sealed_files_of_a_model_in_the_team(
    catalogue: Catalogue,
    member: m.Principal,
    project: m.Project,
    files: dict[str, str],
    expected: tuple[type[Refusal], str],
) -> None:
    kept = files_of(member, **files)
    catalogue.outside.filesets.known[kept.id] = kept
    refused, code = expected
    with pytest.raises(refused) as refusal:
        await register(catalogue, member, project, fileset_id=kept.id)
    assert refusal.value.code == code
    assert not (await catalogue.ask(m.ListModels(), member, m.ModelPage)).items


async def test_a_person_cannot_name_a_job_that_is_not_the_teams(
    catalogue: Catalogue, member: m.Principal, stranger: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    foreign = job_in(project, team_id=stranger.team_id)
    catalogue.outside.jobs.known |= {each.id: each for each in (job, foreign)}
    assert (await register(catalogue, member, project, job_id=job.id)).job_id == job.id
    for job_id in (foreign.id, new_id("job")):
        with pytest.raises(NotFound) as refusal:
            await register(catalogue, member, project, job_id=job_id)
        assert refusal.value.code == "job_not_found"


async def test_a_job_cannot_register_files_of_another_project(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    files = files_of(member, project_id=new_id("project"))
    catalogue.outside.filesets.known[files.id] = files
    with pytest.raises(NotFound) as refusal:
        await register(catalogue, attempt_of(job_in(project)), project, fileset_id=files.id)
    assert refusal.value.code == "fileset_not_found"


async def test_one_name_in_two_projects_is_two_models_and_needs_the_project(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    other = await catalogue.ask(m.CreateProject(name="other"), member, m.Project)
    here = await register(catalogue, member, project)
    there = await register(catalogue, member, other)
    assert (here.version, there.version) == (1, 1)
    with pytest.raises(Conflict) as refusal:
        await catalogue.ask(m.GetModel(model_id="digits"), member, m.ModelDetail)
    assert refusal.value.code == "model_ambiguous"
    for where, expected in ((project.id, here), ("digits", here), ("other", there)):
        asked = m.GetModel(model_id="digits", project_id=where)
        assert (await catalogue.ask(asked, member, m.ModelDetail)).versions == (expected,)
    elsewhere = m.GetModel(model_id=here.model_id, project_id=other.id)
    with pytest.raises(NotFound):
        await catalogue.ask(elsewhere, member, m.ModelDetail)


async def test_list_shows_models_with_their_newest_version_in_pages(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    other = await catalogue.ask(m.CreateProject(name="other"), member, m.Project)
    newest = {}
    for name in ("a", "b", "c"):
        await register(catalogue, member, project, name=name)
        newest[name] = await register(catalogue, member, project, name=name)
    newest["d"] = await register(catalogue, member, other, name="d")
    seen, cursor = [], ""
    while True:
        page = await catalogue.ask(m.ListModels(limit=3, cursor=cursor), member, m.ModelPage)
        seen += [(model.name, model.latest) for model in page.items]
        cursor = page.next_cursor
        if not cursor:
            break
    assert seen == [(name, newest[name]) for name in "dcba"]
    within = await catalogue.ask(m.ListModels(project_id="other"), member, m.ModelPage)
    assert [model.name for model in within.items] == ["d"]


async def test_attempt_registers_for_its_own_project_and_job_only(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    other = await catalogue.ask(m.CreateProject(name="other"), member, m.Project)
    job = job_in(project)
    attempt = attempt_of(job)
    made = await register(catalogue, attempt, project)
    assert (made.job_id, made.project_id, made.created_by) == (job.id, project.id, attempt.id)
    assert (await register(catalogue, attempt, project, project_id="")).version == 2
    with pytest.raises(NotFound):
        await register(catalogue, attempt, other)
    with pytest.raises(NotFound):
        await register(catalogue, attempt, project, job_id=new_id("job"))


async def test_attempt_sees_models_of_its_own_project_only(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    other = await catalogue.ask(m.CreateProject(name="other"), member, m.Project)
    mine = await register(catalogue, member, project)
    theirs = await register(catalogue, member, other)
    attempt = attempt_of(job_in(project))
    assert (await catalogue.ask(m.GetModel(model_id="digits"), attempt, m.ModelDetail)).versions == (mine,)
    assert len((await catalogue.ask(m.ListModels(), attempt, m.ModelPage)).items) == 1
    with pytest.raises(NotFound):
        await catalogue.ask(m.GetModelVersion(model_id=theirs.model_id), attempt, m.ModelVersion)
    with pytest.raises(NotFound):
        await catalogue.ask(m.ListModels(project_id=other.id), attempt, m.ModelPage)


async def test_services_register_for_the_team_they_name(
    catalogue: Catalogue, project: m.Project, stranger: m.Principal
) -> None:
    job = job_in(project)
    executor = service("executor", project.team_id)
    assert (await register(catalogue, executor, project, job_id=job.id)).job_id == job.id
    with pytest.raises(NotFound):
        await register(catalogue, service("executor", stranger.team_id), project)


async def test_archived_project_takes_models_of_jobs_but_not_of_people_and_a_deleted_one_none(
    catalogue: Catalogue, owner: m.Principal, project: m.Project
) -> None:
    await catalogue.ask(m.ArchiveProject(project_id=project.id), owner, m.Project)
    attempt = attempt_of(job_in(project))
    await register(catalogue, attempt, project)
    with pytest.raises(Conflict):
        await register(catalogue, owner, project)
    await catalogue.ask(m.DeleteProject(project_id=project.id), owner, m.Project)
    for who in (owner, attempt):
        with pytest.raises(Conflict):
            await register(catalogue, who, project)
    with pytest.raises(NotFound):
        await catalogue.ask(m.GetModel(model_id="digits"), owner, m.ModelDetail)
    assert not (await catalogue.ask(m.ListModels(), owner, m.ModelPage)).items
    await catalogue.ask(m.RestoreProject(project_id=project.id), owner, m.Project)
    await catalogue.ask(m.GetModel(model_id="digits"), owner, m.ModelDetail)


BAD = [
    ({"name": "Digits"}, "bad_name"),
    ({"name": ""}, "bad_name"),
    ({"name": "-x"}, "bad_name"),
    ({"name": "a/b"}, "bad_name"),
    ({"name": "a" * 101}, "bad_name"),
    ({"name": "x\n"}, "bad_name"),
    ({"name": new_id("model")}, "bad_name"),
    ({"framework": "prolog"}, "unknown_framework"),
    ({"framework": ""}, "unknown_framework"),
    ({"fileset_id": ""}, "bad_fileset"),
    ({"fileset_id": "fs/../../x"}, "bad_fileset"),
    ({"job_id": "job"}, "bad_job"),
    ({"description": "x" * 5001}, "bad_description"),
    ({"description": "\0"}, "bad_description"),
    ({"size_bytes": -1}, "bad_files"),
    ({"size_bytes": 2**63}, "bad_files"),
    ({"digest": "x" * 201}, "bad_files"),
    ({"metrics": {str(n): 0.0 for n in range(101)}}, "too_many_metrics"),
    ({"metrics": {"x" * 251: 0.0}}, "too_many_metrics"),
    ({"metrics": {"loss": float("nan")}}, "not_finite"),
    ({"metrics": {"loss": float("inf")}}, "not_finite"),
]


@pytest.mark.parametrize(("wrong", "code"), BAD)
def test_version_that_cannot_be_is_refused_with_its_reason(wrong: dict[str, object], code: str) -> None:
    project = m.Project(id=new_id("project"))
    with pytest.raises(Invalid) as refusal:
        rules.check_version(version_of(project, **wrong))
    assert refusal.value.code == code


@pytest.mark.parametrize("framework", rules.FRAMEWORKS)
@pytest.mark.parametrize("name", ["a", "0", "resnet-50.v1_final", "a" * 100])
def test_ordinary_versions_are_taken(name: str, framework: str) -> None:
    rules.check_version(version_of(m.Project(id=new_id("project")), name=name, framework=framework))


def test_unknown_framework_names_the_ones_there_are() -> None:
    with pytest.raises(Invalid) as refusal:
        rules.check_version(version_of(m.Project(id=new_id("project")), framework="torch"))
    assert all(framework in refusal.value.remedy for framework in rules.FRAMEWORKS)
