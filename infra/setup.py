#!/usr/bin/env python3
"""Set up, check and start this checkout: everything that the Makefile's targets do.

It needs no package and no root, only Python 3.11 to 3.13. It makes environments from locks in which every file is
named by its hash, each when it is first needed:

    .venv           the platform (services, `nabla`), and on top of it the tools for tests and checks
    .venv-serving   bentoml and scikit-learn: what bento builds and, by default, jobs run in
    .venv-notebook  JupyterLab: what notebooks run in

A finished installation leaves a stamp with the hash of its lock, so that the next call costs milliseconds.
One that was broken off has no stamp: the next call takes it up again, with what the package cache has.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infra.install.checks import checks, run_checks
from infra.install.environments import ENVIRONMENT_OF, install, venv_python
from infra.install.installers import need_uv
from infra.install.locks import write_locks
from infra.install.machine import ROOT, SetupError, child_environment
from infra.install.pythons import move_to_supported_python
from infra.install.terminal import say


def demo(args: list[str]) -> int:
    """install what is missing, start everything, run one job from code to a served model"""
    install("platform", "serving")
    return become(venv_python("platform"), "-m", "services", "demo", *args)


def up(args: list[str]) -> int:
    """start Nabla on this machine"""
    install("platform", "serving", *(["postgres"] if wants_postgres() else []))
    return become(ROOT / ".venv/bin/nabla", "up", *args)


def down(args: list[str]) -> int:
    """stop Nabla; its data stay"""
    return ask_running("down", args)


def status(args: list[str]) -> int:
    """show what runs, where, and whether it is well"""
    return ask_running("status", args)


def test(args: list[str]) -> int:
    """run the tests"""
    install("platform", "serving", "dev")
    return become(venv_python("platform"), "-m", "tests.run", *args)


def test_full(args: list[str]) -> int:
    """run the tests, the slow ones and the chaos ones too"""
    return test(["--full", *args])


def test_gpu(args: list[str]) -> int:
    """run the tests that need a GPU"""
    return test(["--gpu", *args])


def check(args: list[str]) -> int:
    """lint, types, architecture, contracts, fast tests"""
    install("platform", "dev")
    return run_checks([known for known in checks() if not args or known.name in args])


def bench(args: list[str]) -> int:
    """measure, and compare with the committed results"""
    install("platform", "serving", "dev")
    return become(venv_python("platform"), "-m", "tests.bench", *args)


def lock(args: list[str]) -> int:
    """resolve the newest versions again and write the locks (needs uv)"""
    del args
    write_locks(need_uv())
    return 0


def clean(args: list[str]) -> int:
    """remove the environments and caches; data in .nabla stay"""
    del args
    caches = (".pytest_cache", ".mypy_cache", ".ruff_cache", ".import_linter_cache")
    for name in (*ENVIRONMENT_OF.values(), *caches):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    for top in ("services", "libs", "tests", "infra"):
        for cache in sorted((ROOT / top).rglob("__pycache__")):
            shutil.rmtree(cache, ignore_errors=True)
    say("Removed the environments and caches. Your data stay in .nabla.")
    return 0


def help_(args: list[str]) -> int:
    """list the commands"""
    del args
    say("usage: make TARGET, or: python3 infra/setup.py COMMAND [ARGUMENTS]\n")
    for name, command in COMMANDS.items():
        say(f"  {name:<10} {command.__doc__}")
    return 0


COMMANDS = {
    "demo": demo,
    "test": test,
    "up": up,
    "down": down,
    "status": status,
    "check": check,
    "test-full": test_full,
    "test-gpu": test_gpu,
    "bench": bench,
    "lock": lock,
    "clean": clean,
    "help": help_,
}


def wants_postgres() -> bool:
    """Whether the settings name a PostgreSQL, whose driver the default installation does not need."""
    home = Path(os.environ.get("NABLA_HOME") or ROOT / ".nabla")
    try:
        text = (home / "nabla.toml").read_text()
    except OSError:
        text = ""
    return "postgresql://" in text + os.environ.get("NABLA_DATABASE_URL", "")


def ask_running(command: str, args: list[str]) -> int:
    """Asking whether something runs must not download 200 MB first."""
    nabla = ROOT / ".venv/bin/nabla"
    if not nabla.exists():
        say("Nabla is not installed in this checkout, so nothing runs. `make up` installs and starts it.")
        return 0 if command == "down" else 1
    return become(nabla, command, *args)


def become(program: Path, *args: str) -> NoReturn:
    """Hand this process over, so that Ctrl-C and the exit code belong to the program itself."""
    os.chdir(ROOT)
    sys.stdout.flush()
    os.execve(program, [str(program), *args], child_environment())


def main(argv: list[str]) -> int:
    command, *args = argv or ["help"]
    if command not in COMMANDS:
        say(f"There is no command `{command}` here. These are:\n")
        help_([])
        return 2
    try:
        if command != "help":
            move_to_supported_python()
        return COMMANDS[command](args)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. What was downloaded is kept: call this again to go on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
