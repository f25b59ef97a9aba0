"""Settings: one frozen model per service, read once from the environment and the installation's settings file.

Every name is also an environment variable: `NABLA_` plus the field in capitals. The file (`NABLA_SETTINGS`, TOML)
holds the same names in lower case. The environment wins.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)


class Settings(BaseSettings):
    """What every service needs to know."""

    model_config = SettingsConfigDict(env_prefix="NABLA_", frozen=True, extra="ignore")

    # The installation's folder: databases, keys, logs. Nothing is written outside of it.
    home: Path = Path(".nabla")
    # Whole URL of this service's database; empty for SQLite in `home`. `{service}` stands for the service's name.
    database_url: str = ""
    nats_url: str = "nats://127.0.0.1:4222"
    # Folder of `<service>.nk` seeds, mode 0600.
    nats_keys: Path | None = None
    # Where /metrics, /livez and /readyz of this process listen; port 0 picks a free one, written to `home/run/`.
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    log_level: str = "INFO"
    traces: bool = True
    # The front door as people and jobs reach it.
    front_door: str = "http://127.0.0.1:8080"
    # The address of this machine by which nodes on other machines reach it; empty: there are none.
    node_address: str = ""
    # Browsers reach tenant content on NAME.<apps_domain>.
    apps_domain: str = "apps.localhost"
    # Seconds between reconciliation passes.
    reconcile_s: float = 5.0

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get("NABLA_SETTINGS", "")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file or None)

    def database_for(self, service: str) -> str:
        if self.database_url:
            return self.database_url.format(service=service)
        folder = self.home.absolute() / "data"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return f"sqlite:///{folder}/{service}.db"

    def nats_seed(self, service: str) -> str:
        """The nkey seed with which this service signs in to NATS."""
        folder = self.nats_keys or self.home / "keys" / "nats"
        return (folder / f"{service}.nk").read_text().strip()
