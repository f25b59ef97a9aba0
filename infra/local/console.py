"""What people see of the launcher: progress with times, one clear sentence when something is wrong."""

from __future__ import annotations

import json
import sys
import time

from infra.local import control
from infra.local.installation import Installation
from infra.local.servers import ServerMissingError
from infra.local.settings import LocalSettings


def main(what: str, as_json: bool = False) -> int:
    settings = LocalSettings()
    try:
        match what:
            case "up" if as_json:
                installation = control.up(settings, lambda line: print(line, file=sys.stderr))
                print(
                    json.dumps({"url": installation.front_door, "ui": installation.ui, "home": str(installation.home)})
                )
            case "up":
                show_up(settings)
            case "down":
                control.down(settings, (lambda _line: None) if as_json else say)
                if as_json:
                    print(json.dumps({"state": "stopped"}))
            case "supervise":
                control.supervise(settings)
            case "demo":
                import infra.local.demo

                return infra.local.demo.main(settings)
    except (control.InstallationError, ServerMissingError, OSError) as error:
        print(f"nabla: {error}", file=sys.stderr)
        return 1
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def show_up(settings: LocalSettings) -> Installation:
    """Starts the installation and says where it is."""
    started = time.monotonic()
    installation = control.up(settings, say)
    say(f"Nabla answers at {installation.ui} ({time.monotonic() - started:.1f} s)")
    say(f"  data       {installation.home}")
    say(f"  isolation  {isolation_line(installation)}")
    say("  sign in    nabla open")
    return installation


def isolation_line(installation: Installation) -> str:
    """The class of the sandbox that jobs get here, and what restores a lost one."""
    file = installation.run / "isolation.json"
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return "known when the first node is ready: `nabla status`"
    return f"{known['isolation']} {known.get('detail', '')}".strip()
