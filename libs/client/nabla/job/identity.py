"""Which job this process belongs to, as the platform told it through the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Mapping, Optional

from nabla.address import front_door
from nabla.errors import NotInJob

_NEEDED = ("NABLA_API_URL", "NABLA_TOKEN", "NABLA_JOB_ID")


@dataclass(frozen=True)
class JobIdentity:
    """The job, and how to speak for its running attempt."""

    api_url: str
    token: str = field(repr=False)
    job_id: str
    project_id: str
    attempt: int
    rank: int

    @classmethod
    def from_environment(cls, environment: Optional[Mapping[str, str]] = None) -> JobIdentity:
        env = os.environ if environment is None else environment
        if not all(env.get(name) for name in _NEEDED):
            raise NotInJob(
                "This process does not run inside a Nabla job: "
                + " and ".join(name for name in _NEEDED if not env.get(name))
                + " not set.",
                "Start it with `nabla run -- python YOUR_SCRIPT.py`, or leave the call out when it runs elsewhere.",
            )
        return cls(
            api_url=front_door(env["NABLA_API_URL"]),
            token=env["NABLA_TOKEN"],
            job_id=env["NABLA_JOB_ID"],
            project_id=env.get("NABLA_PROJECT_ID", ""),
            attempt=int(env.get("NABLA_ATTEMPT") or 1),
            rank=int(env.get("NABLA_RANK") or 0),
        )


def workspace() -> Path:
    """The submitted folder, unpacked; what is written here goes when the attempt ends."""
    return _folder("NABLA_WORKSPACE")


def artifacts() -> Path:
    """What is written here is kept with the job when the attempt ends."""
    return _folder("NABLA_ARTIFACTS")


def storage() -> Path:
    """Persistent storage, shared by the jobs of the team and written through at once."""
    return _folder("NABLA_STORAGE")


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        raise NotInJob(
            f"This process does not run inside a Nabla job: {variable} is not set.",
            f"Start it with `nabla run`, or set {variable} to a folder to try it out here.",
        )
    return Path(value)
