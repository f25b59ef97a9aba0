"""What a client may ask of a job. Everything else is refused before it is stored, with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

from libs.common import secret_refs
from libs.common.contracts.messages import JobTemplate, Resources, Retry
from libs.common.errors import Invalid, TooLarge
from libs.common.ids import is_id
from services.scheduler.domain.containers import check_containers
from services.scheduler.domain.gangs import checked_gang
from services.scheduler.domain.machine_types import MachineTypes, filled_template
from services.scheduler.domain.origins import check_origins

MAX_COMMAND_BYTES = 128 * 1024
# Every event of a job carries its template, and a message on the bus holds 256 KB.
MAX_TEMPLATE_BYTES = 192 * 1024
MAX_TIMEOUT_S = 365 * 86_400
MAX_RETRIES = 100
MAX_NAME_LENGTH = 200
MAX_PORTS = 16
NETWORKS = ("none", "platform", "internet")
PEOPLE = frozenset({"command"})
SERVICES = frozenset({"build", "replica"})

# The scheduler counts in thousandths: less would count as nothing, and fit on a full machine without an end.
LEAST_CPUS = 0.001
# Beyond what any machine has, and within what a database's integers hold.
MOST = {"cpu_count": 1e6, "memory_bytes": 2**60, "gpu_count": 1e6, "gpu_memory_bytes": 2**60}
LEAST_GPUS = 0.001
MAX_PRIORITY = 100
MAX_DELAY_S = 86_400
CAUSES = ("failure", "out_of_memory", "node_lost", "start_failure", "timed_out")

_CAUSE = re.compile("|".join([*CAUSES, r"exit:([1-9]|[1-9]\d|1\d\d|2[0-4]\d|25[0-5])"]))
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def checked_template(
    template: JobTemplate, kinds: Collection[str] = PEOPLE, types: MachineTypes | None = None
) -> JobTemplate:
    """The template with its defaults filled in: what its machine type has, one CPU, kind command.

    Raises:
        Invalid, TooLarge: naming the field, why it cannot be, and what to write.
    """
    filled = filled_template(checked_gang(template), types or {}).model_copy(
        update={"kind": template.kind or "command"}
    )
    _check_kind(filled.kind, kinds)
    _check_name(filled.name)
    _check_command(filled.command)
    _check_env(filled.env)
    _check_secrets(filled)
    _check_resources(filled.resources)
    for role in filled.gang.roles:
        if role.command:
            _check_command(role.command)
        _check_env(role.env)
        _check_resources(role.resources)
    _check_limits(filled)
    _check_retry(filled.retry)
    _check_ports(filled.ports)
    check_origins(filled)
    check_containers(filled)
    _check_network(filled.network)
    _check_filesets("workspace_id", [filled.workspace_id] if filled.workspace_id else [])
    _check_filesets("inputs", (item.fileset_id for item in filled.inputs))
    _check_paths("inputs", (item.path for item in filled.inputs))
    _check_paths("models", (item.path for item in filled.models))
    if len(filled.to_wire()) > MAX_TEMPLATE_BYTES:
        detail = f"The job's template is larger than {MAX_TEMPLATE_BYTES // 1024} KiB."
        raise TooLarge("template_too_large", detail, "Put large texts into files of the workspace.")
    return filled


def _check_kind(kind: str, kinds: Collection[str]) -> None:
    if kind not in kinds:
        raise _invalid("kind", f"A job of kind {kind[:40]!r} cannot be asked for here.", "Leave kind out.")


def _check_network(network: str) -> None:
    if network and network not in NETWORKS:
        remedy = f"Use one of {', '.join(NETWORKS)}, or leave it out for what this installation allows."
        raise _invalid("network", f"There is no network {network[:40]!r}.", remedy)


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        remedy = f"Use at most {MAX_NAME_LENGTH} printable characters."
        raise _invalid("name", "The name is too long, or has characters that cannot be shown.", remedy)


def _check_command(command: tuple[str, ...]) -> None:
    if not command or not command[0].strip():
        raise _invalid("command", "The command is empty.", 'Say what to run, for example ["python train.py"].')
    if any("\0" in part for part in command):
        raise _invalid("command", "The command has a NUL character, which no program can take.", "Remove it.")
    if sum(len(part.encode()) + 1 for part in command) > MAX_COMMAND_BYTES:
        detail = f"The command is longer than {MAX_COMMAND_BYTES // 1024} KiB."
        raise _invalid("command", detail, "Put it into a script in the workspace and run that.")


def _check_env(env: dict[str, str]) -> None:
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name):
            detail = f"{name[:40]!r} cannot be the name of an environment variable."
            raise _invalid("env", detail, "Use letters, digits and _, not beginning with a digit.")
        if "\0" in value:
            raise _invalid("env", f"The value of {name} has a NUL character.", "Remove it.")


def _check_secrets(template: JobTemplate) -> None:
    """That what names a secret can be the name of one, and that a password is not kept for everybody to read."""
    for field, value in secret_refs.places_in(template):
        name = secret_refs.name_in(value)
        if name is not None and not secret_refs.is_name(name):
            detail = f"The value of {field[:80]} begins with 'secret:' and goes on with what no secret is called."
            remedy = f"A secret's name has {secret_refs.NAME_RULE}; a plain text is written secret::TEXT."
            raise _invalid(field, detail, remedy)
        if name is None and value and field.endswith("password"):
            detail = f"{field} is a plain text, which everybody in the team could read with the job."
            raise _invalid(field, detail, "`nabla secrets set NAME` keeps it; write secret:NAME here.")


def _check_resources(resources: Resources) -> None:
    for name, most in MOST.items():
        value = getattr(resources, name)
        if not 0 <= value <= most:
            detail = f"resources.{name} is {value}; it is between 0 (no wish) and {most:g}."
            raise _invalid(f"resources.{name}", detail, "Give a number within these bounds.")
    if 0 < resources.cpu_count < LEAST_CPUS:
        detail = f"resources.cpu_count is {resources.cpu_count:g}; the least is {LEAST_CPUS:g}."
        raise _invalid("resources.cpu_count", detail, "Leave it out for one CPU, or give a larger share.")
    if resources.gpu_count > 1 and resources.gpu_count != int(resources.gpu_count):
        detail = f"resources.gpu_count is {resources.gpu_count:g}; only less than one GPU can be shared."
        raise _invalid("resources.gpu_count", detail, "Use a share below 1, or 1, 2 and so on.")
    if 0 < resources.gpu_count < LEAST_GPUS:
        detail = f"resources.gpu_count is {resources.gpu_count:g}; the least share is {LEAST_GPUS:g}."
        raise _invalid("resources.gpu_count", detail, "Give a larger share.")
    if len(resources.gpu_model) > MAX_NAME_LENGTH or not resources.gpu_model.isprintable():
        detail = "The model is too long, or has characters that cannot be shown."
        raise _invalid("resources.gpu_model", detail, "Name it as `nabla nodes list` does.")


def _check_limits(template: JobTemplate) -> None:
    timeout_s = template.timeout_s
    if not 0 <= timeout_s <= MAX_TIMEOUT_S:
        detail = f"timeout_s is {timeout_s:g}; it is between 0 (none) and {MAX_TIMEOUT_S} (a year)."
        raise _invalid("timeout_s", detail, "Give seconds within these bounds.")
    if not 0 <= template.max_wait_s <= MAX_TIMEOUT_S:
        detail = f"max_wait_s is {template.max_wait_s:g}; it is between 0 (for ever) and {MAX_TIMEOUT_S} (a year)."
        raise _invalid("max_wait_s", detail, "Give seconds within these bounds.")
    if template.priority is not None and not 0 <= template.priority <= MAX_PRIORITY:
        detail = f"priority is {template.priority}; it is between 0 (last) and {MAX_PRIORITY} (first)."
        raise _invalid("priority", detail, "Give a number within these bounds; 50 is what jobs have without one.")
    if not 0 <= template.max_retries <= MAX_RETRIES:
        detail = f"max_retries is {template.max_retries}; it is between 0 and {MAX_RETRIES}."
        raise _invalid("max_retries", detail, "Give a number within these bounds.")


def _check_retry(retry: Retry) -> None:
    wrong = [cause for cause in retry.on if not _CAUSE.fullmatch(cause)]
    if wrong:
        remedy = f"Use {', '.join(CAUSES)} or exit:N with N from 1 to 255."
        raise _invalid("retry.on", f"{wrong[0][:40]!r} is no cause to try again for.", remedy)
    for name in ("delay_s", "longest_s"):
        value = getattr(retry, name)
        if not 0 <= value <= MAX_DELAY_S:
            detail = f"retry.{name} is {value:g}; it is between 0 (the default) and {MAX_DELAY_S} (a day)."
            raise _invalid(f"retry.{name}", detail, "Give seconds within these bounds.")
    if retry.longest_s and retry.longest_s < retry.delay_s:
        detail = f"retry.longest_s is {retry.longest_s:g}, less than the first delay of {retry.delay_s:g} s."
        raise _invalid("retry.longest_s", detail, "Give at least delay_s, or leave it out.")


def _check_ports(ports: tuple[int, ...]) -> None:
    wrong = [port for port in ports if not 1 <= port <= 65_535]
    if wrong:
        raise _invalid("ports", f"{wrong[0]} is not a port.", "Use 1 to 65535.")
    if len(set(ports)) < len(ports) or len(ports) > MAX_PORTS:
        detail = f"A port is named twice, or there are more than {MAX_PORTS}."
        raise _invalid("ports", detail, "Name each port that the job listens on once.")


def _check_filesets(field: str, fileset_ids: Iterable[str]) -> None:
    for fileset_id in fileset_ids:
        if not is_id("fileset", fileset_id):
            detail = f"{fileset_id[:60]!r} in {field} is not the id of a file set."
            raise _invalid(field, detail, "Use the id that storage gave when the files were uploaded.")


def _check_paths(field: str, paths: Iterable[str]) -> None:
    for path in paths:
        parts = PurePosixPath(path).parts
        if path.startswith("/") or ".." in parts or "\0" in path or "\\" in path:
            detail = f"A path in {field} leaves its folder: {path[:80]!r}."
            raise _invalid(field, detail, "Use a relative path without '..'.")


def _invalid(field: str, detail: str, remedy: str) -> Invalid:
    return Invalid("bad_template", detail, remedy, field=f"template.{field}")
