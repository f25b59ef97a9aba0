"""Every runtime of this machine with what it needs, for the suite that all of them pass."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.executor.adapters.attempts.attempt_folder import Image
from services.executor.adapters.runtimes.engine import Engine, NoEngine, find_podman
from tests.integration.executor.attempts import why_no_bwrap
from tests.support.images import podman_image, unpacked_image, why_no_image

RUNTIMES = ("bwrap", "bwrap over an image", "podman", "process")


@dataclass(frozen=True)
class Kit:
    """A runtime, and the fields of a spec that choose it."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def isolation(self) -> str:
        return str(self.fields["isolation"])

    @property
    def is_walled(self) -> bool:
        return self.isolation != "process"


@functools.cache
def podman() -> Engine | NoEngine:
    return find_podman()


def why_no_podman() -> str:
    found = podman()
    return f"no podman here: {found.reason}; {found.remedy}" if isinstance(found, NoEngine) else why_no_image()


def why_not(name: str) -> str:
    """Why this machine cannot run this runtime, or ""."""
    if name == "podman":
        return why_no_podman()
    if name == "process":
        return ""
    return why_no_bwrap() or (why_no_image() if "image" in name else "")


@contextlib.contextmanager
def kit(name: str) -> Iterator[Kit]:
    if name == "podman":
        with podman_kit() as made:
            yield made
    elif name == "bwrap over an image":
        folder = Path(tempfile.mkdtemp(prefix="nabla-root-"))
        try:
            yield Kit(name, {"isolation": "bwrap", "image": Image(image=str(unpacked_image(folder)), name="tiny")})
        finally:
            shutil.rmtree(folder)
    else:
        yield Kit(name, {"isolation": name})


@contextlib.contextmanager
def podman_kit(**fields: Any) -> Iterator[Kit]:
    engine = podman()
    assert isinstance(engine, Engine)
    with podman_image(engine.command) as image:
        made = Image(image=image, name=image, engine=list(engine.command), options=list(engine.options), **fields)
        yield Kit("podman", {"isolation": "podman", "image": made})
