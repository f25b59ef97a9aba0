"""What storage needs to know beyond what every service does."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

from libs.common.errors import Unavailable
from libs.common.settings import Settings


class StorageSettings(Settings):
    # host:port where this service itself reaches S3; clients reach it through the front door.
    s3_address: str = "127.0.0.1:8333"
    s3_secure: bool = False
    s3_region: str = "us-east-1"
    # One bucket, with versioning: a sealed file names the version that was checked, so a late PUT changes nothing.
    s3_bucket: str = "nabla"
    # JSON file {"access_key", "secret_key"}; `home/keys/s3.json` when not set.
    s3_keys: Path | None = None
    # How long a presigned URL lives.
    url_lifetime_s: int = 600
    # How long a file set may stay open after it was last asked for.
    open_lifetime_s: float = 86_400.0
    # How long a frame that came too early waits for the lines before it, until those are marked as lost. Longer than
    # the bus takes to deliver again what a killed process had in its hands (30 s).
    gap_patience_s: float = 60.0
    # How long the log of an ended job waits for the last frames of its attempts. Only time in which all that the bus
    # held for us was settled counts.
    last_frame_patience_s: float = 60.0

    # How long lines stay in the database after the object store has acknowledged them: by then it has them on disk.
    durable_horizon_s: float = 600.0

    @property
    def front_address(self) -> str:
        """The front door's host:port, for which URLs are signed when the client names none."""
        return urlsplit(self.front_door).netloc

    @property
    def front_secure(self) -> bool:
        return self.front_door.startswith("https:")

    def s3_credentials(self) -> tuple[str, str]:
        """Access key and secret key.

        Raises:
            Unavailable: the file is not there or not readable.
        """
        path = self.s3_keys or self.home / "keys" / "s3.json"
        try:
            pair = json.loads(path.read_text())
            return pair["access_key"], pair["secret_key"]
        except (OSError, ValueError, KeyError) as error:
            raise Unavailable(
                "object_store_keys",
                f"The keys of the object store cannot be read from {path}: {error}.",
                "Run `nabla up`, which makes them, or set NABLA_S3_KEYS.",
            ) from None
