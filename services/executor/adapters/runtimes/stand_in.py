"""What podman runs in the place of its OCI runtime, for containers of the platform's.

podman tells it which container by a flag (`runtime_flag`); whatever comes without that flag goes to the runtime as it
is, so that `podman ps` and `podman rm` of anybody find these containers like all others. Of one of ours it hands on
where podman's configuration is, waits for the shim's own, and then makes and starts the container in one step
(`run --detach`): the start that podman orders afterwards, in a process of its own, was done by then. The time of it is
the shim's: a hook in that configuration holds the container until limits and ways through the walls stand.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

ASKED, ANSWER, BUNDLE = "asked", "answer", "bundle"
RUNTIME_OPTION = "--runtime="
_FLAG = "nabla"
# `$at/bundle` may be missing, as when an engine is tried: then podman's own configuration is taken.
_SCRIPT = """#!/bin/sh
# podman's OCI runtime for the containers of Nabla: see services/executor/adapters/runtimes/stand_in.py
case $1 in
  --{flag}=*) at=${{1#--{flag}=}}; shift ;;
  *) exec {runtime} "$@" ;;
esac
previous=
for word do
  shift
  case $previous in
    --bundle | -b)
      printf %s "$word" > "$at/{asked}" && read -r go < "$at/{answer}" || exit 1
      [ ! -e "$at/{bundle}" ] || word=$at/{bundle} ;;
  esac
  previous=$word
  case $word in
    create) set -- "$@" run --detach ;;
    start) exit 0 ;;
    *) set -- "$@" "$word" ;;
  esac
done
exec {runtime} "$@"
"""


def runtime_of(engine: Sequence[str]) -> str:
    """The OCI runtime that an engine's command names; "" when it names none."""
    return next((word.removeprefix(RUNTIME_OPTION) for word in engine if word.startswith(RUNTIME_OPTION)), "")


def with_stand_in(engine: Sequence[str], place: Path, hold: Path) -> list[str]:
    """The engine's command for one container.

    Args:
        place: where stand-ins are kept. podman remembers the path with the container, so it is not the container's own.
        hold: the folder in which the shim and the stand-in meet.
    """
    stand_in = _written(runtime_of(engine), place)
    others = [word for word in engine if not word.startswith(RUNTIME_OPTION)]
    return [*others, f"{RUNTIME_OPTION}{stand_in}", f"--runtime-flag={_FLAG}={hold}"]


def _written(runtime: str, place: Path) -> Path:
    """Of the same name as the runtime: by that podman knows what a runtime can do."""
    names = {"asked": ASKED, "answer": ANSWER, "bundle": BUNDLE}
    text = _SCRIPT.format(flag=_FLAG, runtime=shlex.quote(runtime), **names)
    path = place / os.path.basename(runtime)
    if not path.exists() or path.read_text() != text:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = place / f".{path.name}-{os.getpid()}"
        new.write_text(text)
        new.chmod(0o700)
        new.replace(path)
    return path
