"""Models and their immutable versions."""

from __future__ import annotations

import asyncio

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    Fileset,
    GetModel,
    GetModelVersion,
    ListModels,
    Model,
    ModelDetail,
    ModelPage,
    ModelVersion,
    ModelVersionRegistered,
    Principal,
    Project,
    RegisterModel,
)
from libs.common.errors import Conflict, NotFound
from libs.common.ids import is_id, new_id
from libs.common.telemetry import meter
from services.registry.domain import models as rules
from services.registry.handlers.projects import visible_project
from services.registry.ports import Filesets, Jobs
from services.registry.store import RegistryUnit

_registered = meter().create_counter("nabla_model_versions_total", description="Model versions registered")


class Origins:
    """Asks the owners of what a version is made of, before the transaction opens."""

    def __init__(self, filesets: Filesets, jobs: Jobs) -> None:
        self._filesets = filesets
        self._jobs = jobs

    async def prepare_version(self, message: RegisterModel, call: Envelope) -> RegisterModel:
        """The version as it will be written: with its files' size and digest in their owner's words.

        Raises:
            NotFound: its files or its job are not there, or not for this asker.
            Conflict, Invalid: its files may still change, or are not those of a model.
        """
        message = _within_own(message, call.principal)
        rules.check_version(message)
        files, _ = await asyncio.gather(self._files(message, call.principal), self._check_job(message, call.principal))
        rules.check_files(files)
        return message.model_copy(update={"size_bytes": files.size_bytes, "digest": files.digest})

    async def _files(self, message: RegisterModel, principal: Principal) -> Fileset:
        found = await self._filesets.get(message.fileset_id, principal.team_id)
        if found is None or (principal.kind == "attempt" and found.project_id != principal.project_id):
            detail = f"There is no file set {message.fileset_id!r} in this team."
            raise NotFound("fileset_not_found", detail, "Upload and seal the files first.")
        return found

    async def _check_job(self, message: RegisterModel, principal: Principal) -> None:
        """What a running job or a service says of its own job is known; what a person says may be a slip."""
        if message.job_id and principal.kind == "user" and not await self._jobs.get(message.job_id, principal.team_id):
            detail = f"There is no job {message.job_id!r} in this team."
            raise NotFound("job_not_found", detail, "Leave job_id empty for a model that no job made.")


async def register_model(_message: RegisterModel, unit: RegistryUnit, call: Envelope) -> ModelVersion:
    """The next version of the named model, which is made when it is new; the same files again are the same version."""
    message = call.facts
    assert isinstance(message, RegisterModel)
    project = await _open_project(unit, call.principal, message.project_id)
    model = await _model_for(unit, project, message)
    known = await unit.models.version_of(model.id, message.fileset_id)
    if known:
        return known
    version = _next_version(message, model, call.principal, unit)
    await unit.models.add_version(version)
    await unit.models.set_latest(model, version.version)
    await unit.emit(
        ModelVersionRegistered(version=version),
        team_id=model.team_id,
        object_id=model.id,
        project_id=project.id,
        revision=model.revision + 1,
    )
    _registered.add(1, {"framework": version.framework})
    return version


async def get_model(message: GetModel, unit: RegistryUnit, call: Envelope) -> ModelDetail:
    """A model with its newest versions."""
    model = await _visible_model(unit, call.principal, message.model_id, message.project_id)
    versions = await unit.models.newest_versions(model.id, rules.VERSIONS_SHOWN)
    return ModelDetail(model=model.model_copy(update={"latest": versions[0]}), versions=versions)


async def get_model_version(message: GetModelVersion, unit: RegistryUnit, call: Envelope) -> ModelVersion:
    """One version; number 0 asks for the newest."""
    model = await _visible_model(unit, call.principal, message.model_id, message.project_id)
    version = await unit.models.version(model.id, message.version or model.latest_version)
    if version is None:
        detail = f"The model {model.name} has no version {message.version}; its newest is {model.latest_version}."
        raise NotFound("version_not_found", detail, f"See `nabla models get {model.name}`.")
    return version


async def list_models(message: ListModels, unit: RegistryUnit, call: Envelope) -> ModelPage:
    """The models of a project, or of the team; an attempt sees those of its own project."""
    principal = call.principal
    asked = message.project_id or principal.project_id
    project_id = (await visible_project(unit, principal, asked)).id if asked else ""
    return await unit.models.page(principal.team_id, project_id, message.cursor, message.limit)


def _within_own(message: RegisterModel, principal: Principal) -> RegisterModel:
    """Fills in an attempt's own project and job; those of others are as if they did not exist."""
    if principal.kind != "attempt":
        return message
    if message.job_id not in {"", principal.job_id}:
        raise NotFound("job_not_found", "There is no such job.", "Leave job_id empty inside a job.")
    project_id = message.project_id or principal.project_id
    return message.model_copy(update={"job_id": principal.job_id, "project_id": project_id})


async def _open_project(unit: RegistryUnit, principal: Principal, id_or_name: str) -> Project:
    """A project that takes new models. What a job that began earlier made is welcome in an archived one, too."""
    project = await visible_project(unit, principal, id_or_name)
    if project.state == "deleted" or (project.state == "archived" and principal.kind == "user"):
        detail = f"The project {project.name} is {project.state} and takes nothing new."
        raise Conflict("wrong_state", detail, "Restore the project first.")
    return project


async def _model_for(unit: RegistryUnit, project: Project, message: RegisterModel) -> Model:
    found = await unit.models.named(message.name, project.team_id, project.id)
    if found:
        return found[0]
    model = Model(
        id=new_id("model"),
        team_id=project.team_id,
        project_id=project.id,
        name=message.name,
        description=message.description,
        created_at=unit.now,
        revision=1,
    )
    await unit.models.add(model)
    return model


def _next_version(message: RegisterModel, model: Model, principal: Principal, unit: RegistryUnit) -> ModelVersion:
    return ModelVersion(
        id=new_id("model_version"),
        model_id=model.id,
        model_name=model.name,
        version=model.latest_version + 1,
        framework=message.framework,
        description=message.description,
        fileset_id=message.fileset_id,
        size_bytes=message.size_bytes,
        digest=message.digest,
        job_id=message.job_id,
        metrics=message.metrics,
        created_by=principal.id,
        created_at=unit.now,
        project_id=model.project_id,
    )


async def _visible_model(unit: RegistryUnit, principal: Principal, id_or_name: str, project: str) -> Model:
    """The model that the principal names: by id, or by a name that needs its project only where several have it.

    Raises:
        NotFound: there is none, or none that it may know of.
        Conflict: several projects of the team have a model of this name.
    """
    found = await _find(unit, principal, id_or_name, project or principal.project_id)
    if not found:
        detail = f"There is no model {id_or_name[:100]!r} in this {'project' if project else 'team'}."
        raise NotFound("model_not_found", detail, "See `nabla models list`.")
    if len(found) > 1:
        detail = f"Several projects of this team have a model named {id_or_name}."
        raise Conflict("model_ambiguous", detail, "Name the project as well, or use the model's id.")
    return found[0]


async def _find(unit: RegistryUnit, principal: Principal, id_or_name: str, project: str) -> list[Model]:
    project_id = (await visible_project(unit, principal, project)).id if project else ""
    if not is_id("model", id_or_name) and not rules.can_be_name(id_or_name):
        return []
    if not is_id("model", id_or_name):
        return await unit.models.named(id_or_name, principal.team_id, project_id)
    model = await unit.models.by_id(id_or_name, principal.team_id)
    return [model] if model and project_id in {"", model.project_id} else []
