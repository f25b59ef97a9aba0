"""Projects: their names and their lifecycle.

| from     | to       | driven by | event            |
|----------|----------|-----------|------------------|
| active   | active   | update    | project.updated  |
| active   | active   | move      | project.moved    |
| active   | archived | archive   | project.archived |
| active   | deleted  | delete    | project.deleted  |
| archived | deleted  | delete    | project.deleted  |
| archived | active   | restore   | project.restored |
| deleted  | active   | restore   | project.restored |

A project that stays deleted for 30 days is purged: its row goes, with its models.
"""

from __future__ import annotations

import re
import unicodedata

from libs.common.contracts.messages import Project
from libs.common.errors import Conflict, IllegalTransition, Invalid
from libs.common.ids import is_id
from libs.common.transitions import TransitionTable

LIFECYCLE = TransitionTable(
    aggregate="project",
    moves={
        ("active", "update"): "active",
        ("active", "move"): "active",
        ("active", "archive"): "archived",
        ("active", "delete"): "deleted",
        ("archived", "delete"): "deleted",
        ("archived", "restore"): "active",
        ("deleted", "restore"): "active",
    },
    terminal=frozenset(),
)
LISTED_STATES = {"": ("active",), "any": ("active", "archived", "deleted")} | {
    state: (state,) for state in ("active", "archived", "deleted")
}
LONGEST_NAME = 100
LONGEST_DESCRIPTION = 5_000

# Letters of any language: projects are often named after folders.
_NAME = re.compile(r"[\w .-]*\w[\w .-]*")


def state_after(project: Project, trigger: str) -> str:
    """The project's state after `trigger`.

    Raises:
        Conflict: the table has no such move, with the way out.
    """
    try:
        return LIFECYCLE.next_state(project.id, project.state, trigger)
    except IllegalTransition as error:
        raise Conflict("wrong_state", f"{error}.", "Restore the project first.") from None


def checked_name(name: str) -> str:
    """A project's name in one spelling (NFC).

    Raises:
        Invalid: not 1 to 100 letters, digits, spaces, `-`, `_` and `.`, or one that reads as a project's id.
    """
    name = unicodedata.normalize("NFC", name)
    if not can_be_name(name) or name != name.strip():
        detail = f"A project's name has 1 to {LONGEST_NAME} letters, digits, spaces, '-', '_' and '.'."
        raise Invalid("bad_name", detail, "Choose another name, such as `digits`.")
    if is_id("project", name):
        raise Invalid("bad_name", "This name reads as the id of a project.", "Choose another name.")
    return name


def can_be_name(text: str) -> bool:
    """Whether a project may have this name, so that looking for it makes sense."""
    return len(text) <= LONGEST_NAME and _NAME.fullmatch(text) is not None


def checked_description(text: str) -> str:
    if len(text) > LONGEST_DESCRIPTION or "\0" in text:
        detail = f"A description has at most {LONGEST_DESCRIPTION:,} characters, none of them NUL."
        raise Invalid("bad_description", detail, "Shorten it.")
    return text


def listed_states(asked: str) -> tuple[str, ...]:
    """The states that a list asks for; active when it does not say.

    Raises:
        Invalid: no such state.
    """
    try:
        return LISTED_STATES[asked]
    except KeyError:
        raise Invalid(
            "bad_state", f"{asked[:50]!r} is no state.", "Ask for active, archived, deleted or any."
        ) from None
