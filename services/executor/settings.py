"""What the executor needs to know beyond what every service does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from libs.common.settings import Settings

_ROOT = Path(__file__).resolve().parents[2]


class ExecutorSettings(Settings):
    # GCS of the Ray cluster as `host:port`. Empty: read from `home/run/ray.json`, which the launcher writes when
    # Ray is up; until then there is no cluster.
    ray_address: str = ""
    # Ray's namespace for what is ours on it: two installations on one cluster need two.
    ray_namespace: str = Field(default="nabla", min_length=1)
    # On every node: attempts, caches and built environments. Empty: `home/node`.
    node_dir: Path | None = None
    # The virtual environment that a job gets when it asks for none.
    default_environment: Path = _ROOT / ".venv-serving"
    # The folder that holds the in-job `nabla` package.
    client_folder: Path = _ROOT / "libs" / "client"
    # Persistent storage: a folder per team below it is /storage in its jobs. Empty: `home/storage`.
    storage_root: Path | None = None
    # NATS and the front door as nodes on other machines reach them, where that differs from how this machine does.
    node_nats_url: str = ""
    node_front_door: str = ""
    # auto takes bwrap where the kernel allows it; process is for an installation with one user.
    isolation: Literal["auto", "bwrap", "process"] = "auto"
    # How far jobs reach that do not say: none, platform (the front door and a gang's peers), or internet as well.
    job_network: Literal["none", "platform", "internet"] = "internet"
    # Networks that jobs reach like public ones, as IPv4 with a length: a package mirror of your own, say.
    job_network_allowed: tuple[str, ...] = ()
    # What sandboxes have for addresses towards their node. No machine that jobs are to reach may be in it.
    sandbox_subnet: str = "100.96.0.0/16"
    # What runs images: auto takes podman where it works, else bwrap over images that an administrator unpacked into
    # `node_dir`/images/NAME/rootfs.
    container_runtime: Literal["auto", "podman", "bwrap"] = "auto"
    # Where the front door listens: class `process` is for loopback alone.
    host: str = "127.0.0.1"
    # A node this long out of contact ends its attempts by itself; LOST_MARGIN_S later they are reported lost.
    node_fence_s: float = 120.0
    # How long Ray may take to reserve what the scheduler believes to be free.
    reserve_patience_s: float = 60.0
    # An attempt's folder stays on its node this long after its end, for a storage that lost its newest seconds.
    keep_folder_s: float = 600.0
    # What was not told, such as that a log is sealed, is asked for after so long, and again each time.
    revisit_s: float = 3600.0
    # Environments built from requirements are kept on their node up to this size together; the longest unused go.
    environments_bytes: int = 20_000_000_000
    # The most that a workspace may unpack to, and that fetching a repository may take.
    workspace_bytes: int = 20_000_000_000
    # Where packages come from is what pip's and uv's own settings on the node say. Hosts that their index refers to
    # and does not name, such as one that only has the files, are named here: `host` or `host:port`.
    package_hosts: tuple[str, ...] = ()
    # Git and S3 servers of people's own: `host` or `host:port`. Others need https and a public address.
    source_hosts: tuple[str, ...] = ()
    # Builds environments; auto: uv where the node has it, else pip.
    installer: Literal["auto", "uv", "pip"] = "auto"
    # The most that the log of one attempt may have; past it the log says so and ends, and the job goes on.
    log_limit_bytes: int = Field(default=10_000_000_000, ge=0)
    # So much of a node's disk (at most a tenth of it) logs leave free; below it they pause, and say so.
    disk_reserve_bytes: int = Field(default=1_000_000_000, ge=0)
    # What the platform failed to keep of a job stays on its node so long, and up to this size together.
    unkept_bytes: int = 10_000_000_000
    unkept_s: float = 30 * 86_400.0
    # Most machines' worth of queued jobs that Ray's autoscaler is asked for at once; 0: it is not asked at all.
    autoscale_limit: int = Field(default=0, ge=0)
    # With an autoscaler: a node without work for so long loses its agent, so that it can be taken away.
    autoscale_idle_s: float = 300.0
    # Images that jobs had a node fetch are kept there up to this size together; the longest unused go.
    images_bytes: int = 50_000_000_000
    # Where the platform is root, team n runs as uid_base + n.
    uid_base: int = 61000
    # Seconds between looks at the nodes.
    look_s: float = 2.0

    @property
    def node_folder(self) -> Path:
        return (self.node_dir or self.home / "node").absolute()

    @property
    def storage_folder(self) -> Path:
        return (self.storage_root or self.home / "storage").absolute()

    def find_ray_address(self) -> str:
        """`host:port`, or an empty string as long as Ray has not been started. Read anew each time."""
        if self.ray_address:
            return self.ray_address
        try:
            return str(json.loads((self.home / "run" / "ray.json").read_text())["address"])
        except (OSError, ValueError, KeyError):
            return ""
