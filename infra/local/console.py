"""What people see of the launcher: progress with times, one clear sentence when something is wrong."""

from __future__ import annotations

import json
import sys
import time
import tomllib

from pydantic import ValidationError

from infra.local import control, secret_keys
from infra.local.installation import Installation, InstallationError
from infra.local.servers import ServerMissingError
from infra.local.settings import LocalSettings
from services.executor.adapters.runtimes import isolation
from services.executor.domain.isolation import BWRAP


def main(what: str, as_json: bool = False) -> int:
    """Does `what` and answers the exit code; whatever is wrong is told in sentences."""
    try:
        return _do(what, LocalSettings(), as_json)
    except ValidationError as error:
        for wrong in error.errors():
            name, reason = ".".join(map(str, wrong["loc"])), wrong["msg"].removeprefix("Value error, ")
            refuse(f"{name} {reason}".strip())
        print("These settings are in nabla.toml, or in the environment as NABLA_...", file=sys.stderr)
    except tomllib.TOMLDecodeError as error:
        refuse(f"nabla.toml cannot be read: {error}")
    except (InstallationError, ServerMissingError, OSError) as error:
        refuse(error)
    return 1


def _do(what: str, settings: LocalSettings, as_json: bool) -> int:
    match what:
        case "up" if as_json:
            installation = control.up(settings, lambda line: print(line, file=sys.stderr))
            print(json.dumps({"url": installation.front_door, "ui": installation.ui, "home": str(installation.home)}))
        case "up":
            show_up(settings)
        case "down":
            control.down(settings, (lambda _line: None) if as_json else say)
            if as_json:
                print(json.dumps({"state": "stopped"}))
        case "supervise":
            control.supervise(settings)
        case "rotate-secrets-key":
            secret_keys.rotate(settings, say)
        case "demo":
            import infra.local.demo

            return infra.local.demo.main(settings)
    return 0


def refuse(reason: object) -> None:
    print(f"{control.SAID}{reason}", file=sys.stderr)


def say(line: str) -> None:
    print(line, flush=True)


def show_up(settings: LocalSettings) -> Installation:
    """Starts the installation and says where it is."""
    started = time.monotonic()
    installation = control.up(settings, say)
    say(f"Nabla answers at {installation.ui} ({time.monotonic() - started:.1f} s)")
    say(f"  data       {installation.home}")
    say(f"  isolation  {isolation_line(settings)}")
    say("  sign in    nabla open")
    return installation


def isolation_line(settings: LocalSettings) -> str:
    """The class that jobs get on this machine, and what restores a lost one."""
    found = isolation.probe(settings.isolation)
    return (
        "bwrap: each job in a sandbox of its own"
        if found.isolation == BWRAP and not found.remedy
        else (f"{found.isolation}: {isolation.in_words(found)}")
    )
