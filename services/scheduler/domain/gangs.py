"""Which gangs can be asked for."""

from __future__ import annotations

from libs.common.contracts.gangs import HELPERS, ROLES
from libs.common.contracts.messages import Gang, JobTemplate
from libs.common.errors import Invalid

MAX_RANKS = 256
# The one that starts the others' work; there is no gang of these types without it, nor with two.
LEADERS = {"mpi": "master", "ray": "head"}


def checked_gang(template: JobTemplate) -> JobTemplate:
    """The template; a gang whose roles say all the commands has the first of them as its own.

    Raises:
        Invalid: naming the field.
    """
    gang = template.gang
    if gang == Gang():
        return template
    if gang.type not in ROLES:
        raise _invalid("type", f"{gang.type[:40]!r} is not a type of gang.", f"Use one of {', '.join(ROLES)}.")
    _check_roles(gang)
    _check_count(gang)
    first = next((role.command for role in gang.roles if role.command), ())
    filled = template.model_copy(update={"command": template.command or first})
    for role in gang.roles:
        if not (role.command or filled.command or (gang.type, role.name) in HELPERS):
            raise _invalid("roles", f"The role {role.name} has no command.", "Say what it is to run.")
    return filled


def _check_roles(gang: Gang) -> None:
    known = ROLES[gang.type]
    names = [role.name for role in gang.roles]
    if not names or names != [name for name in known if name in names]:
        detail = f"The roles of a gang of type {gang.type} are {', '.join(known)}, each at most once and in this order."
        raise _invalid("roles", detail, "Name the roles so.")
    leader = LEADERS.get(gang.type)
    if leader and leader not in names:
        raise _invalid("roles", f"A gang of type {gang.type} has a {leader}.", f"Add the role {leader}.")


def _check_count(gang: Gang) -> None:
    for role in gang.roles:
        if role.count < 1:
            raise _invalid("roles", f"The role {role.name} has the count {role.count}.", "Give 1 or more.")
        if role.count > 1 and role.name in {"master", "head"}:
            raise _invalid("roles", f"There are {role.count} of the role {role.name}.", "Give it the count 1.")
    total = sum(role.count for role in gang.roles)
    if total > MAX_RANKS:
        raise _invalid("roles", f"{total} ranks are asked for; a gang has {MAX_RANKS} at most.", "Ask for fewer.")


def _invalid(field: str, detail: str, remedy: str) -> Invalid:
    return Invalid("bad_template", detail, remedy, field=f"template.gang.{field}")
