"""What a new machine needs to join the Ray cluster, as this process knows it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.routing import Prepare
from services.executor.ports import Ticket


def ticket(find_address: Callable[[], str], environment: Mapping[str, str]) -> Ticket:
    """Read anew each time: Ray may have been started, or given another token, meanwhile."""
    python = ".".join(platform.python_version_tuple()[:2])
    return Ticket(find_address(), _token(environment), python, importlib.metadata.version("ray"))


def preparing(find_address: Callable[[], str], environment: Mapping[str, str]) -> Prepare:
    """For routes: the ticket as a handler finds it in its facts."""

    async def prepare(message: Message, call: Envelope) -> object:
        return ticket(find_address, environment)

    return prepare


def _token(environment: Mapping[str, str]) -> str:
    """As Ray itself finds it."""
    if environment.get("RAY_AUTH_MODE") != "token":
        return ""
    if given := environment.get("RAY_AUTH_TOKEN"):
        return given
    path = environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
