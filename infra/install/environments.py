"""The environments of a checkout: which lock goes where, and whether it is already there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from infra.install.installers import LAYERS, Installer, find_installer
from infra.install.machine import (
    LOCKS,
    ROOT,
    SUPPORTED,
    SetupError,
    child_environment,
    machine,
    refuse_unsupported_machine,
    version_of,
)
from infra.install.terminal import say

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = LOCKS / "sizes.json"
DISK_PER_DOWNLOAD = 5  # unpacked and with its bytecode, a megabyte of wheels takes about four on disk
ENVIRONMENT_OF = {
    "platform": ".venv",
    "postgres": ".venv",
    "dev": ".venv",
    "serving": ".venv-serving",
    "notebook": ".venv-notebook",
}


def venv_of(name: str) -> Path:
    return ROOT / ENVIRONMENT_OF[name]


def venv_python(name: str) -> Path:
    return venv_of(name) / "bin" / "python"


def stamp_of(name: str) -> Path:
    return venv_of(name) / f"nabla-{name}.stamp"


def files_of(name: str) -> list[Path]:
    extra = [LOCKS / "source.txt"] if name == "platform" else []
    return [LOCKS / f"{name}.txt", *extra]


def fingerprint(venv: Path, files: list[Path]) -> str:
    """Changes with the locks, with the Python of the environment, and when the checkout is moved."""
    digest = hashlib.sha256(f"{venv}\n{python_version_of(venv)}\n".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def is_current(name: str) -> bool:
    try:
        present = stamp_of(name).read_text().strip()
    except OSError:
        return False
    return present == fingerprint(venv_of(name), files_of(name)) and venv_python(name).exists()


def python_version_of(venv: Path) -> tuple[int, ...]:
    """The version in pyvenv.cfg, read without starting anything; () when there is no such environment."""
    try:
        found = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)", (venv / "pyvenv.cfg").read_text(), re.M)
    except OSError:
        return ()
    return tuple(int(part) for part in found.groups()) if found else ()


def install(*names: str) -> None:
    """Bring the named environments up to their locks. Two callers at once take turns."""
    if all(is_current(name) for name in names):
        return
    refuse_unsupported_machine()
    with turn():
        missing = [name for name in names if not is_current(name)]
        if not missing:
            return
        installer = find_installer()
        announce(missing, installer)
        began = time.monotonic()
        for name in missing:
            install_one(name, installer)
        compile_own_code()
        say(f"Installed in {time.monotonic() - began:.0f} s.")


def install_one(name: str, installer: Installer) -> None:
    venv = venv_of(name)
    drop_stamps(venv, name)
    if not is_usable(venv) or not installer.can_fill(venv):
        shutil.rmtree(venv, ignore_errors=True)
        installer.make(venv)
    lock_file, *sources = files_of(name)
    installer.fill(venv, lock_file, name)
    for source in sources:
        installer.build(venv, source, f"{name}: {source.stem}")
    if name == "platform":
        link_checkout(venv)
    stamp_of(name).write_text(fingerprint(venv, files_of(name)) + "\n")


def drop_stamps(venv: Path, name: str) -> None:
    """A new platform also drops what was laid on top of it."""
    stamps = [stamp_of(name)] if name in LAYERS else sorted(venv.glob("nabla-*.stamp"))
    for stamp in stamps:
        stamp.unlink(missing_ok=True)


def is_usable(venv: Path) -> bool:
    """An environment whose Python was upgraded away or is unsupported has to be made again."""
    if python_version_of(venv) not in SUPPORTED:
        return False
    return version_of(str(venv / "bin" / "python")) == python_version_of(venv)


def link_checkout(venv: Path) -> None:
    """Make `services`, `libs` and the client importable from the checkout, and `nabla` a command.

    A .pth file and a four-line script do what an editable installation would, without a build backend.
    """
    major, minor = python_version_of(venv)
    site = venv / "lib" / f"python{major}.{minor}" / "site-packages"
    (site / "nabla-checkout.pth").write_text(f"{ROOT}\n{ROOT / 'libs' / 'client'}\n")
    script = venv / "bin" / "nabla"
    script.write_text(
        "#!/bin/sh\n"
        "# written by infra/setup.py; sh, because a #! line breaks on long paths and on spaces\n"
        f"exec '{venv_quoted(venv)}/bin/python' -c "
        '\'import sys; sys.argv[0] = "nabla"; from nabla.cli import main; sys.exit(main())\' "$@"\n'
    )
    script.chmod(0o755)


def venv_quoted(venv: Path) -> str:
    return str(venv).replace("'", "'\\''")


def compile_own_code() -> None:
    """Ray workers and services start in a third of the time when nothing has to be parsed."""
    tops = [str(ROOT / top) for top in ("services", "libs") if (ROOT / top).is_dir()]
    python = venv_python("platform")
    if tops and python.exists():
        subprocess.run([python, "-m", "compileall", "-q", *tops], env=child_environment(), check=False)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Windows has no fcntl, and must still be told why it is refused: so the import is here."""
    import fcntl

    with (ROOT / ".venv.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another setup is installing into this checkout: waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def announce(names: list[str], installer: Installer) -> None:
    """Say what comes over the wire before it does, and stop while the disk is still usable."""
    megabytes = sum(download_mb(name) for name in names)
    say(f"Installing {' + '.join(names)} with {installer.name} for Python {chosen_version(names)}.")
    say(f"To download: about {megabytes:.0f} MB, less what the package cache has.")
    free = shutil.disk_usage(ROOT).free / 1e6
    needed = megabytes * DISK_PER_DOWNLOAD
    if free < needed:
        raise SetupError(
            f"There are {free:.0f} MB free under {ROOT}, and the installation needs about {needed:.0f} MB.\n"
            "Free some space, or move the checkout to a larger disk, and call this again."
        )


def chosen_version(names: list[str]) -> str:
    kept = python_version_of(venv_of(names[0]))
    return ".".join(map(str, kept if kept in SUPPORTED else sys.version_info[:2]))


def download_mb(name: str) -> float:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return float(json.loads(SIZES.read_text())[name][machine()])
    return 0.0
