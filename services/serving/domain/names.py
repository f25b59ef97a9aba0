"""Names of deployments: they become host names and parts of paths, so they are DNS labels."""

from __future__ import annotations

import re

from libs.common.errors import Invalid
from libs.common.ids import is_id
from services.serving.domain.front import OBJECTS_LABEL

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def checked_name(name: str) -> str:
    """The name itself.

    Raises:
        Invalid: saying which names can be, with one made of what was given.
    """
    if name == OBJECTS_LABEL:
        raise Invalid("bad_name", f"{name!r} is the name of the object store.", "Choose another name.")
    if _LABEL.fullmatch(name) and not is_id("deployment", name):
        return name
    proposal = re.sub(r"[^a-z0-9]+", "-", name.lower())[:63].strip("-")
    remedy = f"Use up to 63 of a-z, 0-9 and '-'{f', for example {proposal!r}' if proposal else ''}."
    raise Invalid("bad_name", f"{name[:80]!r} cannot be a host name, which a deployment's name becomes.", remedy)
