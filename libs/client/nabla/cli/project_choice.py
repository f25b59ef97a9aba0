"""Which project a command in a folder means: named, the job's own, remembered, or one named after the folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nabla.cli.output import note
from nabla.errors import BadConfig, NablaError, NotFound
from nabla.objects import Project
from nabla.paths import NoHome
from nabla.remembered import Folders, project_name

if TYPE_CHECKING:
    from nabla.client import Client


def choose_project(client: Client, named: str, folder: Path, folders: Folders | None = None) -> str:
    """The project's id or name. Whatever was not asked for outright is said.

    Raises:
        NablaError: this folder's is archived. The server would say so too, but only once everything is packed.
    """
    if named or os.environ.get("NABLA_PROJECT_ID"):
        return named or os.environ["NABLA_PROJECT_ID"]
    folders = folders or Folders()
    return _remembered(client, folder, folders) or _from_folder(client, folder, folders)


def _remembered(client: Client, folder: Path, folders: Folders) -> str:
    """Asked for, since it may have been deleted or archived meanwhile; one that is gone is followed by a new one."""
    project_id = ""
    with contextlib.suppress(NoHome):
        project_id = folders.project(client.context.url, folder)
    if not project_id:
        return ""
    try:
        project = client.projects.get(project_id)
    except NotFound:
        note("The project of last time in this folder is gone.")
        return ""
    if project.state == "deleted":
        note(
            f"Project {project.name}, the last one in this folder, is deleted (`nabla projects restore {project.id}`)."
        )
        return ""
    _refuse_closed(project)
    note(f"Project {project.name} (as last time in this folder; --project chooses another).")
    return project.id


def _from_folder(client: Client, folder: Path, folders: Folders) -> str:
    project, made = client.projects.ensure(project_name(folder))
    _refuse_closed(project)
    try:
        folders.remember(client.context.url, folder, project.id)
    except BadConfig as error:
        note(f"{error} The project is not remembered for this folder.")
    how = "created, named after this folder" if made else "existing, named like this folder"
    note(f"Project {project.name} ({how}; --project chooses another).")
    return project.id


def _refuse_closed(project: Project) -> None:
    """Somebody closed it on purpose, and its name is taken: neither opening it nor another name is ours to choose."""
    if project.state not in ("", "active"):
        raise NablaError(
            f"This folder's project {project.name} is {project.state}, so nothing can be added to it.",
            f"Restore it with `nabla projects restore {project.id}`, or choose another with --project.",
        )
