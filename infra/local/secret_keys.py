"""The keys of all secrets: a new one on request, taken up by the running registry."""

from __future__ import annotations

import os
from collections.abc import Callable

from infra.local.installation import InstallationError
from infra.local.settings import LocalSettings


def rotate(settings: LocalSettings, say: Callable[[str], None]) -> None:
    """Adds a newest key to the registry's file.

    Raises:
        InstallationError: the file is not one of keys, or others may read it.
    """
    from services.registry.adapters.vault import add_key
    from services.registry.ports import UnusableKeys
    from services.registry.settings import RegistrySettings

    own = settings.home / "nabla.toml"
    if own.exists():
        os.environ.setdefault("NABLA_SETTINGS", str(own))
    file = RegistrySettings(home=settings.home.absolute()).secret_keys
    try:
        key = add_key(file)
    except UnusableKeys as error:
        raise InstallationError(str(error)) from None
    say(f"New key {key} in {file}.")
    say("The registry takes it up within a minute, and logs when all secrets are under it. The older keys stay in the")
    say("file for backups of before: take their lines out once no such backup is needed. Keep a copy of the file.")
