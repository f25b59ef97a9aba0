"""What a client may ask of the image that a job runs in."""

from __future__ import annotations

import re

from libs.common.contracts.messages import Container, JobTemplate
from libs.common.errors import Invalid
from libs.common.image_names import name_problem

_USER = re.compile(r"(?:[a-z_][a-z0-9_-]{0,31}|[0-9]{1,9})(?::(?:[a-z_][a-z0-9_-]{0,31}|[0-9]{1,9}))?")
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
        detail = "Nodes do not build images from a Dockerfile."
        raise _invalid(f"{field}.dockerfile", detail, "Build it where you have an engine, push it, and name the image.")
    if not container.image:
        detail = "A user or credentials are given, and no image that they are for."
        raise _invalid(f"{field}.image", detail, "Name the image, such as python:3.12.")
    if problem := name_problem(container.image):
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


def _invalid(field: str, detail: str, remedy: str) -> Invalid:
    return Invalid("bad_template", detail, remedy, field=f"template.{field}")
