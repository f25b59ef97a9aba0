"""The jobs that serving orders: one that builds a bento, and one that serves it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from libs.common.contracts.messages import Environment, Input, JobTemplate, Resources
from services.serving.domain.plan import BUILD_TIMEOUT_S

# Below the ports that Linux hands out by itself (32768 up) and above Ray's workers (10002-19999).
FIRST_PORT, LAST_PORT = 20_000, 29_999
DEFAULT_CPU_COUNT = 0.5
BUILD_CPU_COUNT = 1.0


@dataclass(frozen=True, slots=True)
class Programs:
    """The texts of runtime/: they travel in the command, so that a node needs nothing of ours installed."""

    build: str
    replica: str
    endpoint: str


def build_template(
    programs: Programs, *, name: str, framework: str, model: str, version: int, fileset_id: str
) -> JobTemplate:
    wanted = json.dumps({"framework": framework, "name": model, "version": version})
    return JobTemplate(
        name=f"build of {name}",
        kind="build",
        command=("python", "-c", programs.build, wanted, programs.endpoint),
        resources=Resources(cpu_count=BUILD_CPU_COUNT),
        environment=Environment(kind="default"),
        inputs=(Input(fileset_id=fileset_id, path="model"),),
        timeout_s=BUILD_TIMEOUT_S,
    )


def replica_template(
    programs: Programs, *, name: str, bento_fileset_id: str, token_hash: str, port: int, resources: Resources
) -> JobTemplate:
    """Without a timeout: it serves until it is halted."""
    return JobTemplate(
        name=f"replica of {name}",
        kind="replica",
        command=("python", "-c", programs.replica, str(port)),
        env={"NABLA_ENDPOINT_HASHES": token_hash},
        resources=resources.model_copy(update={"cpu_count": resources.cpu_count or DEFAULT_CPU_COUNT}),
        environment=Environment(kind="default"),
        inputs=(Input(fileset_id=bento_fileset_id, path="bento"),),
        ports=(port,),
    )
