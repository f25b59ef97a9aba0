"""Where a job's files and packages come from: what may be said of it, and how to run exactly the same again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from libs.common.contracts.messages import Environment, JobTemplate, Source
from libs.common.errors import Invalid

ENVIRONMENTS = ("", "default", "venv", "requirements", "workspace", "recorded")
SOURCES = {"git": ("https://", "git+https://", "http://", "git+http://"), "s3": ("s3://",)}
MAX_LENGTH = 2000


def check_origins(template: JobTemplate) -> None:
    """Raises Invalid. Which servers may be asked is the node's to judge, by its settings."""
    _check_environment(template.environment)
    _check_source(template.source)
    if template.source.kind and template.workspace_id:
        detail = "workspace_id and source both say where the workspace comes from."
        raise _invalid("source", detail, "Send one of the two.")


def exact(template: JobTemplate, origin: Mapping[str, str]) -> JobTemplate:
    """The template with what a node found in place of what was asked for: the commit in place of a branch, the list
    of what an environment became in place of what it was made from, the image that was built beside its Dockerfile.
    """
    changes: dict[str, object] = {}
    if template.source.kind == "git" and "commit" in origin:
        changes["source"] = template.source.model_copy(update={"ref": origin["commit"]})
    if "environment" in origin:
        changes["environment"] = Environment(kind="recorded", path=origin["environment"])
    if template.container.dockerfile and "image" in origin:
        changes["container"] = template.container.model_copy(update={"built": origin["image"]})
    return template.model_copy(update=changes)


def _check_environment(environment: Environment) -> None:
    if environment.kind not in ENVIRONMENTS:
        detail = f"environment.kind is {environment.kind[:40]!r}."
        raise _invalid("environment.kind", detail, f"Use one of {', '.join(filter(None, ENVIRONMENTS))}.")
    if environment.kind == "workspace":
        parts = PurePosixPath(environment.path).parts
        if not parts or environment.path.startswith("/") or ".." in parts or "\0" in environment.path:
            detail = f"environment.path {environment.path[:80]!r} is not a file of the workspace."
            raise _invalid("environment.path", detail, "Use a relative path without '..', such as requirements.txt.")
    if environment.kind == "recorded" and not environment.path.isalnum():
        detail = f"environment.path {environment.path[:80]!r} is not the id of a file set."
        raise _invalid("environment.path", detail, "Use the id in the `origin` of an attempt.")
    if len(environment.python) > 20 or not environment.python.isascii() or not environment.python.isprintable():
        raise _invalid("environment.python", "That is no version of Python.", 'Use a version such as "3.12".')


def _check_source(source: Source) -> None:
    if not source.kind:
        if any(getattr(source, name) for name in ("url", "ref", "username", "password", "endpoint")):
            raise _invalid("source.kind", "The source has no kind.", "Use git or s3.")
        return
    if source.kind not in SOURCES:
        raise _invalid("source.kind", f"source.kind is {source.kind[:40]!r}.", "Use git or s3.")
    for name in ("url", "ref", "username", "password", "endpoint"):
        value = getattr(source, name)
        if len(value) > MAX_LENGTH or "\0" in value or "\n" in value:
            raise _invalid(f"source.{name}", f"source.{name} is too long, or has a line break.", "Shorten it.")
    if not source.url.startswith(SOURCES[source.kind]):
        shown = source.url[:80].rpartition("@")[2]
        example = "https://host/repository.git" if source.kind == "git" else "s3://bucket/key"
        raise _invalid("source.url", f"{shown!r} is not a place of kind {source.kind}.", f"Use {example}.")
    if source.kind == "git" and "@" in source.url.partition("://")[2].partition("/")[0]:
        detail = "source.url has a user or password in it, and URLs are shown in logs."
        raise _invalid("source.url", detail, "Send username and password apart; each may be secret:NAME.")
    if source.ref.startswith("-"):
        raise _invalid("source.ref", "A ref does not begin with '-'.", "Name a commit, a tag or a branch.")


def _invalid(field: str, detail: str, remedy: str) -> Invalid:
    return Invalid("bad_template", detail, remedy, field=f"template.{field}")
