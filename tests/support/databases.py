"""Databases for store suites: SQLite files always, PostgreSQL from Debian's package where it can run.

PostgreSQL refuses to run as root, so as root it is started as the user `postgres` that the package makes; an
ordinary user starts it as itself.

Going through a chain of migrations takes a tenth of a second, and hundreds of tests begin with it: on SQLite the
first test of a worker does, and the others get its empty database. The chains have suites of their own.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from libs.common.migrations import migrate
from libs.common.store import Store
from tests.support.ports import free_port

HINT = "apt-get install -y postgresql"
# Chain of migrations -> an empty SQLite database that has gone through it.
_migrated: dict[str, bytes] = {}


def postgres_binaries() -> Path | None:
    """The folder with initdb and postgres of the newest installed version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


@contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """A fresh server's URL, without a database name: `postgresql://nabla@127.0.0.1:PORT`."""
    binaries = postgres_binaries()
    assert binaries, HINT
    run_as = _other_user(folder)
    data, port = folder / "data", free_port()
    _run([*run_as, str(binaries / "initdb"), "-D", str(data), "-U", "nabla", "--auth=trust", "-N"], folder)
    options = [
        "-p",
        str(port),
        "-k",
        str(folder),
        "-h",
        "127.0.0.1",
        "-c",
        "fsync=off",
        "-c",
        "max_connections=60",
    ]
    log = (folder / "postgres.log").open("ab")
    command = [*run_as, str(binaries / "postgres"), "-D", str(data), *options]
    process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_until_ready(binaries, port)
        yield f"postgresql://nabla@127.0.0.1:{port}"
    finally:
        # SIGQUIT is PostgreSQL's immediate shutdown; its children follow.
        process.send_signal(signal.SIGQUIT)
        process.wait(20)


def _wait_until_ready(binaries: Path, port: int, timeout_s: float = 30.0) -> None:
    """The port opens before the server takes connections."""
    ask = [str(binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]
    deadline = time.monotonic() + timeout_s
    while subprocess.run(ask, check=False, timeout=10).returncode != 0:
        if time.monotonic() > deadline:
            raise TimeoutError(f"PostgreSQL did not come up in {timeout_s:.0f} s")
        time.sleep(0.05)


def new_database(server_url: str) -> str:
    """Creates an empty database and answers its URL."""
    binaries = postgres_binaries()
    assert binaries
    name = f"t{uuid4().hex[:12]}"
    port = server_url.rsplit(":", 1)[1]
    _run([str(binaries / "createdb"), "-h", "127.0.0.1", "-p", port, "-U", "nabla", name], Path("/"))
    return f"{server_url}/{name}"


async def migrate_new(store: Store[Any], chain: str) -> None:
    """Brings a database that nobody has used yet to the newest version."""
    if store.url.get_backend_name() != "sqlite":
        await migrate(store.writer, chain)
        return
    file = Path(store.url.database or "")
    if chain in _migrated and not file.exists():
        file.write_bytes(_migrated[chain])
        return
    await migrate(store.writer, chain)
    with closing(sqlite3.connect(file)) as connection:
        _migrated[chain] = connection.serialize()


def _other_user(folder: Path) -> list[str]:
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam("postgres")
    os.chown(folder, user.pw_uid, user.pw_gid)
    for parent in (folder, *folder.parents):
        if parent.owner() == "root" and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
