"""The registry's settings."""

from __future__ import annotations

from pathlib import Path

from libs.common.settings import Settings


class RegistrySettings(Settings):
    """What the registry needs to know beside what every service does."""

    # File, mode 0600, with the installation's first token in plain text; the first account is made for it.
    bootstrap_token_file: Path | None = None
    # The keys of all secrets, mode 0600, made when it is not there: without it they are lost. Keep a copy elsewhere.
    secret_keys_file: Path | None = None
    # Days that a deleted project can be restored.
    deleted_project_days: int = 30
    # Days that audit rows are kept.
    audit_days: int = 400
    # Seconds between passes that purge what is over.
    upkeep_s: float = 600.0
    # Seconds between looks for a new key, with which all secrets are wrapped then.
    key_turn_s: float = 60.0

    @property
    def secret_keys(self) -> Path:
        return self.secret_keys_file or self.home / "keys" / "secrets.keys"
