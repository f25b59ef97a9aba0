"""How a shim and podman's OCI runtime meet over one container: pipes in the attempt's folder.

Only the platform can reach them. The container's configuration lies in memory (a tmpfs) while it is read, where it has
values of secrets in it: on a disk they could be found after the container's end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.runtimes.stand_in import ANSWER, ASKED, BUNDLE

_SETUP_LIMIT_S = 120.0
_F_SETPIPE_SZ, _SECRETS_BYTES = 1031, 1024 * 1024
_HELD, _GO = "held", "go"
_HOLD = f'read -r state; printf %s "$state" > "$1/{_HELD}" && read -r go < "$1/{_GO}"'
NO_HOOKS = "no-hooks"
_PODMANS = "podmans-bundle"
MEMORY = Path("/dev/shm")


class NoAnswer(Exception):
    """podman has ended, or takes too long."""


class Hold:
    """The shim's side."""

    def __init__(self, folder: AttemptFolder) -> None:
        self._folder = folder
        self.path = hold_folder(folder)
        (self.path / NO_HOOKS).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._heard = {name: self._pipe(name, os.O_RDONLY | os.O_NONBLOCK) for name in (ASKED, _HELD)}
        # Open for reading too, so that a word waits here for whoever has not come so far.
        self._said = {name: self._pipe(name, os.O_RDWR) for name in (ANSWER, _GO)}

    def hear_config(self, guard: int) -> dict[str, Any]:
        """What podman would have its runtime make. Raises NoAnswer when the guardian's end comes first."""
        bundle = os.fsdecode(self._hear(ASKED, guard))
        # As long as that is there, podman has not forgotten the container.
        (self.path / _PODMANS).write_text(bundle)
        config = json.loads(Path(bundle, "config.json").read_bytes())
        return dict(config)

    def hear_root(self, guard: int) -> int:
        """The first process of the container, which is held. Raises NoAnswer when the guardian's end comes first."""
        state = json.loads(self._hear(_HELD, guard))
        _remove_bundle(self._folder)  # the runtime has read it
        return int(state["pid"])

    def hand_over(self, values: Mapping[str, str], uid: int) -> str:
        """Have the job's shell find these in a pipe; the line that ends them. Raises OSError when they do not fit."""
        last = f"# {secrets.token_hex(16)}"
        lines = [*(f"export {name}={shlex.quote(value)}" for name, value in values.items()), last, ""]
        content = "\n".join(lines).encode("utf-8", "surrogateescape")
        self._said["secrets"] = pipe = self._pipe("secrets", os.O_RDWR | os.O_NONBLOCK)
        if os.geteuid() == 0:
            os.fchown(pipe, uid, uid)
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, _SECRETS_BYTES)
        if os.write(pipe, content) < len(content):
            raise OSError("the job's secrets are too large")
        return last

    def answer(self, config: Mapping[str, Any], memory: Path | None) -> None:
        """Args:
        memory: below it the configuration lies, when it has values in it that are for no disk.
        """
        bundle = self.path / BUNDLE
        _remove_bundle(self._folder)
        if memory:
            place = memory / f"nabla-{self._folder.path.name}"
            shutil.rmtree(place, ignore_errors=True)
            bundle.symlink_to(place)  # first: whoever cleans up finds it by this
            place.mkdir(mode=0o700)
        else:
            bundle.mkdir(mode=0o700)
        descriptor = os.open(bundle / "config.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(_holding(config, self.path), file)
        os.write(self._said[ANSWER], b"go\n")

    def let_go(self) -> None:
        os.write(self._said[_GO], b"go\n")

    def _hear(self, name: str, guard: int) -> bytes:
        pipe, end = self._heard.pop(name), os.pidfd_open(guard)
        heard, deadline = b"", time.monotonic() + _SETUP_LIMIT_S
        try:
            while time.monotonic() < deadline:
                ready, _, _ = select.select([pipe, end], [], [], max(0.0, deadline - time.monotonic()))
                piece = os.read(pipe, 65536) if pipe in ready else None
                if piece == b"" and heard:
                    return heard
                if piece:
                    heard += piece
                elif end in ready:
                    break
        finally:
            os.close(pipe)
            os.close(end)
        raise NoAnswer

    def _pipe(self, name: str, flags: int) -> int:
        path = self.path / name
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        return os.open(path, flags | os.O_CLOEXEC)


def hold_folder(folder: AttemptFolder) -> Path:
    return folder.path / "podman"


def is_forgotten(folder: AttemptFolder) -> bool:
    """Has podman no container of this attempt any more?"""
    path = hold_folder(folder)
    _remove_bundle(folder)
    with contextlib.suppress(FileNotFoundError):
        return not Path((path / _PODMANS).read_text()).parent.exists()
    return not path.exists()


def forget(folder: AttemptFolder) -> None:
    """podman has answered that there is no such container."""
    shutil.rmtree(hold_folder(folder), ignore_errors=True)


def is_memory(path: Path) -> bool:
    """Does what is written here lie in memory alone? Of a path that is not there yet, the next above it is asked."""
    while not path.exists():
        path = path.parent
    device = os.stat(path).st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    lines = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return any(words[2] == numbers and words[words.index("-") + 1] in ("tmpfs", "ramfs") for words in lines)


def why_not_in_memory(runtime: str, memory: Path) -> str:
    """Why a container's configuration would get onto a disk here; "" when it would not.

    runc keeps no copy of what it was told to run; others may, where they keep their records.
    """
    records = Path("/run" if os.geteuid() == 0 else f"/run/user/{os.geteuid()}")
    wanted = [memory] if os.path.basename(runtime) == "runc" else [memory, records]
    return next((f"{path} is not in memory on this node" for path in wanted if not is_memory(path)), "")


def _holding(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    hooks = dict(config.get("hooks") or {})
    hook = {"path": "/bin/sh", "args": ["sh", "-c", _HOLD, "sh", str(path)]}
    return {**config, "hooks": {**hooks, "createRuntime": [*(hooks.get("createRuntime") or []), hook]}}


def _remove_bundle(folder: AttemptFolder) -> None:
    bundle = hold_folder(folder) / BUNDLE
    if bundle.is_symlink():
        shutil.rmtree(bundle.readlink(), ignore_errors=True)
        bundle.unlink()
    else:
        shutil.rmtree(bundle, ignore_errors=True)
