"""What a person may say about an installation: in `<home>/nabla.toml`, or as NABLA_* variables."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

CHECKOUT = Path(__file__).resolve().parents[2]


class LocalSettings(BaseSettings):
    """The one settings file. Services take their own further names from the same file."""

    model_config = SettingsConfigDict(env_prefix="NABLA_", frozen=True, extra="ignore")

    home: Path = CHECKOUT / ".nabla"
    # The front door listens here; 0.0.0.0 is for everybody, and needs TLS in front.
    host: str = "127.0.0.1"
    port: int = 8080
    # Existing servers to use instead of our own.
    nats_url: str = ""
    database_url: str = ""
    s3_endpoint: str = ""
    s3_access_key: str = ""
    s3_secret_key: str = ""
    # Or a JSON file with both, as storage reads it.
    s3_keys: Path | None = None
    ray_address: str = ""
    # What our agents there are named under: two installations on one cluster need two.
    ray_namespace: str = Field(default="nabla", min_length=1)
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
    # An address of this machine by which other machines reach it: they can become nodes then (`nabla node token`). Ray
    # and the bus listen there, and nothing on that network is encrypted: it is for one that you trust.
    node_address: str = ""
    # What jobs get; auto takes bwrap where the kernel allows it.
    isolation: Literal["auto", "bwrap", "process"] = "auto"

    @field_validator("host")
    @classmethod
    def _reached_from_here(cls, host: str) -> str:
        if host not in ("127.0.0.1", "localhost", "0.0.0.0"):
            raise ValueError("is 127.0.0.1, or 0.0.0.0 for all addresses: jobs and services use 127.0.0.1")
        return host

    @field_validator("s3_endpoint", "ray_address")
    @classmethod
    def _host_and_port(cls, address: str) -> str:
        if address and not re.fullmatch(r"[^/\s]+:\d+", address):
            raise ValueError("is host:port, without http:// or ray://")
        return address

    @field_validator("database_url")
    @classmethod
    def _one_for_each_service(cls, url: str) -> str:
        if url and "{service}" not in url:
            raise ValueError("needs {service} where the name of the database goes: each service has its own")
        return url

    @model_validator(mode="after")
    def _a_door_for_nodes(self) -> LocalSettings:
        if self.node_address and self.host != "0.0.0.0":
            raise ValueError('node_address needs host = "0.0.0.0" beside it: nodes reach the front door too')
        return self

    @model_validator(mode="after")
    def _keys_for_their_store(self) -> LocalSettings:
        if self.s3_endpoint and not (self.s3_keys or (self.s3_access_key and self.s3_secret_key)):
            raise ValueError("s3_endpoint needs s3_access_key and s3_secret_key beside it")
        return self

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
