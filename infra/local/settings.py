"""What a person may say about an installation: in `<home>/nabla.toml`, or as NABLA_* variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

CHECKOUT = Path(__file__).resolve().parents[2]


class LocalSettings(BaseSettings):
    """The one settings file. Services take their own further names from the same file."""

    model_config = SettingsConfigDict(env_prefix="NABLA_", frozen=True, extra="ignore")

    home: Path = CHECKOUT / ".nabla"
    # What listens listens here; anything but loopback needs TLS in front.
    host: str = "127.0.0.1"
    port: int = 8080
    # Existing servers to use instead of our own.
    nats_url: str = ""
    database_url: str = ""
    s3_endpoint: str = ""
    s3_access_key: str = ""
    s3_secret_key: str = ""
    ray_address: str = ""
    # That cluster's token; empty: what Ray itself finds, in its own variables or in ~/.ray/auth_token.
    ray_token: str = ""
    # Programs: a path, else what PATH has, else the wheel's.
    nats_server: str = ""
    weed: str = ""
    traefik: str = ""
    # What Ray may give to jobs; by default all that the machine has.
    cpus: int = 0
    gpus: int = -1
    # "always" survives a power cut at a twentieth of the bus's throughput.
    nats_sync: str = ""
    log_level: str = "INFO"
    # What jobs get; auto takes bwrap where the kernel allows it.
    isolation: Literal["auto", "bwrap", "process"] = "auto"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        home = Path(os.environ.get("NABLA_HOME", CHECKOUT / ".nabla"))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=home / "nabla.toml")
