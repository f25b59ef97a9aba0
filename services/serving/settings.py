"""What serving needs to know beyond what every service does."""

from __future__ import annotations

import json
from pathlib import Path

from libs.common.settings import Settings
from services.serving.domain.front import Base


class ServingSettings(Settings):
    # The object store, as storage has it: Traefik carries presigned transfers to it.
    s3_address: str = "127.0.0.1:8333"
    s3_secure: bool = False
    s3_bucket: str = "nabla"
    # The folder that Traefik's file provider watches; `home/traefik/dynamic` when not set.
    traefik_dynamic: Path | None = None
    # Where Traefik's API shows what is live.
    traefik_api: str = "http://127.0.0.1:8081"
    # Key of the endpoint tokens, 32 bytes, made at first start; `home/keys/serving.key` when not set.
    serving_key: Path | None = None

    @property
    def dynamic_folder(self) -> Path:
        return self.traefik_dynamic or self.home / "traefik" / "dynamic"

    @property
    def key_file(self) -> Path:
        return self.serving_key or self.home / "keys" / "serving.key"

    @property
    def front_key_file(self) -> Path:
        """The front door's key, by which nodes on other machines know it."""
        return self.home / "keys" / "front.key"

    def base(self) -> Base:
        """The platform's own addresses as they are now; the gateway tells its own in a file."""
        return Base(
            front_door=self.front_door,
            apps_domain=self.apps_domain,
            gateway=_gateway_address(self.home / "run" / "gateway.json"),
            objects=f"{'https' if self.s3_secure else 'http'}://{self.s3_address}",
            bucket=self.s3_bucket,
            node_address=self.node_address,
        )


def _gateway_address(file: Path) -> str:
    try:
        address = json.loads(file.read_text())["http"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return str(address).rstrip("/") if "://" in str(address) else f"http://{address}"
