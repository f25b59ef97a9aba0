"""What a client may ask of the image that a job runs in."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from libs.common.contracts.messages import Container, JobTemplate
from libs.common.errors import Invalid
from libs.common.image_names import name_problem

_USER = re.compile(r"(?:[a-z_][a-z0-9_-]{0,31}|[0-9]{1,9})(?::(?:[a-z_][a-z0-9_-]{0,31}|[0-9]{1,9}))?")
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")
_ARGUMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_OF_THE_NODE = frozenset({"", "default"})


def check_containers(template: JobTemplate) -> None:
    """Of a job, and of the roles of a gang.

    Raises:
        Invalid: naming the field, why it cannot be, and what to write.
    """
    _check(template, template.container, "container")
    for number, role in enumerate(template.gang.roles):
        _check(template, role.container, f"gang.roles[{number}].container")


def _check(template: JobTemplate, container: Container, field: str) -> None:
    if container == Container():
        return
    if container.dockerfile:
        _check_dockerfile(template, container, f"{field}.dockerfile")
    elif container.build_args or container.built:
        raise _invalid(f"{field}.dockerfile", "Build arguments are given, and no Dockerfile.", "Name the Dockerfile.")
    elif not container.image:
        detail = "A user or credentials are given, and no image that they are for."
        raise _invalid(f"{field}.image", detail, "Name the image, such as python:3.12.")
    elif problem := name_problem(container.image):
        raise _invalid(f"{field}.image", f"The image cannot be: {problem}.", "Name an image of a registry.")
    if container.user and not _USER.fullmatch(container.user):
        detail = f"{container.user[:40]!r} is no user of an image."
        raise _invalid(f"{field}.user", detail, "Give a name or a number, and after a colon a group if need be.")
    if bool(container.registry_username) != bool(container.registry_password):
        detail = "Of the registry's credentials one is missing: the user's name or the password."
        raise _invalid(f"{field}.registry_password", detail, "Give both, or neither for a public image.")
    if template.environment.kind not in _OF_THE_NODE:
        detail = "An image brings its own Python; an environment of the node's cannot be put into it."
        raise _invalid("environment", detail, "Install the packages into the image, or leave the image out.")


def _check_dockerfile(template: JobTemplate, container: Container, field: str) -> None:
    path = PurePosixPath(container.dockerfile)
    if path.is_absolute() or ".." in path.parts or not path.parts or not container.dockerfile.isprintable():
        detail = f"{container.dockerfile[:80]!r} is not a file of the workspace."
        raise _invalid(field, detail, "Use a relative path without '..', such as Dockerfile.")
    if container.image:
        raise _invalid(field, "An image and a Dockerfile are named, and a job has one image.", "Leave one of them out.")
    if not template.workspace_id and not template.source.kind:
        detail = "The Dockerfile is a file of the workspace, and the job has none."
        raise _invalid(field, detail, "Send the workspace, or name its source.")
    if container.built and not _IMAGE_ID.fullmatch(container.built):
        detail = "The image that was built is not the id of one."
        raise _invalid(field, detail, "Use the one in the `origin` of an attempt, or leave it out.")
    if not all(_ARGUMENT.fullmatch(name) and "\0" not in value for name, value in container.build_args.items()):
        raise _invalid(field, "A build argument has no name that a Dockerfile can use.", "Use letters, digits and '_'.")


def _invalid(field: str, detail: str, remedy: str) -> Invalid:
    return Invalid("bad_template", detail, remedy, field=f"template.{field}")
