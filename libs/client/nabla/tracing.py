"""W3C trace context: the name under which the server's spans of one action are found together."""

from __future__ import annotations

import os
import re

# As other tools name it: a shell or a job that is part of a trace hands it to what it starts.
VARIABLE = "TRACEPARENT"
_FORM = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def traceparent() -> str:
    """The environment's, so that its trace goes on, else a new one."""
    given = os.environ.get(VARIABLE, "")
    return given if _FORM.fullmatch(given) else f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
