"""A NATS that can be kept away: the supervisor starts it again at once, and this one waits to be let go."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from infra.local.servers import BIN
from tests.support.platform import Platform


@dataclass(frozen=True)
class HeldNats:
    """What the setting `nats_server` names: the real server, which does not begin while the file `held` is there."""

    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / "nats-server"

    @property
    def held(self) -> Path:
        return self.folder / "held"

    def take_away(self, platform: Platform) -> None:
        self.held.touch()
        platform.kill("nats")

    def give_back(self) -> None:
        self.held.unlink(missing_ok=True)


def held_nats(folder: Path) -> HeldNats:
    real = shutil.which("nats-server") or str(BIN / "nats-server")
    made = HeldNats(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made.program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || while [ -e {shlex.quote(str(made.held))} ]; do sleep 0.1; done\n'
        f'exec {shlex.quote(real)} "$@"\n'
    )
    made.program.chmod(0o755)
    return made
