"""One process per database: a second one would apply, publish and remember beside the first.

A file is locked by flock, which the kernel lets go with the process: whoever finds it taken meets a living process, a
mistake that waiting does not mend, and is told so. PostgreSQL has an advisory lock of one session: whoever finds it
taken waits, as the session of a process just killed may outlive it for a moment, and a standby is there to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from zlib import crc32

from sqlalchemy import text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from libs.common.errors import NablaError

# Two pulses end before the server gives up a silent machine's session: who has lost it stops before another begins.
PULSE_S = 5.0
SERVER_PATIENCE = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}
LOOK_S = 0.5

log = logging.getLogger(__name__)
# Files and sockets that hold a lock: a forked child would keep it beyond this process's end.
_held_by: set[int] = set()


class AlreadyHeld(NablaError):
    def __init__(self, name: str, url: URL) -> None:
        where = url.render_as_string(hide_password=True)
        super().__init__(
            f"Another process runs {name} on {where}. Two would spoil each other's work: end that one first."
        )


class LockLost(NablaError):
    def __init__(self, name: str, url: URL) -> None:
        where = url.render_as_string(hide_password=True)
        super().__init__(f"The session by which this process alone runs {name} on {where} is gone.")


class SoleWriter:
    """The right to be the one process of a service on a database: `take`, `keep` beside the work, `release`.

    Args:
        url: the database; a file is locked by flock beside it, PostgreSQL by an advisory lock of one session.
        name: the service, as several may share one PostgreSQL database.
    """

    def __init__(self, url: URL, name: str) -> None:
        self._url = url
        self._name = name
        self._engine = create_async_engine(url, isolation_level="AUTOCOMMIT", connect_args=_patience(url))
        self._session: AsyncConnection | None = None
        self._descriptor = -1
        # Whether another process was found to have it.
        self.waits = False

    async def take(self) -> None:
        """Returns with the lock; on PostgreSQL after a wait for whoever has it.

        Raises:
            AlreadyHeld: another process has the file.
        """
        _forget_in_children()
        if self._is_file:
            self._take_file()
        else:
            await self._take_session()

    async def keep(self) -> None:
        """Runs while the lock is held.

        Raises:
            LockLost: the session that held it is gone; another process may have it by now.
        """
        while True:
            await asyncio.sleep(PULSE_S)
            if self._session:
                await self._pulse(self._session)

    async def release(self) -> None:
        """Lets it go; nothing happens when it is not held."""
        _held_by.discard(self._descriptor)
        if self._is_file and self._descriptor >= 0:
            os.close(self._descriptor)
        if self._session:
            # A session that is gone does not answer, and who has lost it must end.
            with contextlib.suppress(DBAPIError, OSError):
                async with asyncio.timeout(PULSE_S):
                    await self._session.close()
        self._descriptor, self._session = -1, None
        await self._engine.dispose()

    @property
    def _is_file(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    def _take_file(self) -> None:
        descriptor = os.open(f"{self._url.database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise AlreadyHeld(self._name, self._url) from None
        self._descriptor = descriptor
        _held_by.add(descriptor)

    async def _take_session(self) -> None:
        self._session = session = await self._engine.connect()
        self._descriptor = await _socket_of(session)
        _held_by.add(self._descriptor)
        question, key = text("SELECT pg_try_advisory_lock(:key)"), {"key": crc32(self._name.encode())}
        while not (await session.execute(question, key)).scalar():
            if not self.waits:
                log.warning("waits for the process that has this database", extra={"database": self._name})
            self.waits = True
            await asyncio.sleep(LOOK_S)

    async def _pulse(self, session: AsyncConnection) -> None:
        try:
            async with asyncio.timeout(PULSE_S):
                await session.execute(text("SELECT 1"))
        except (DBAPIError, OSError) as error:
            raise LockLost(self._name, self._url) from error


def _patience(url: URL) -> dict[str, dict[str, str]]:
    return {} if url.get_backend_name() == "sqlite" else {"server_settings": SERVER_PATIENCE}


async def _socket_of(session: AsyncConnection) -> int:
    driver = (await session.get_raw_connection()).driver_connection
    assert driver is not None
    return int(driver._transport.get_extra_info("socket").fileno())


def _forget_in_children() -> None:
    global _children_told  # noqa: PLW0603 - a process has one list of what to do after a fork
    if not _children_told:
        os.register_at_fork(after_in_child=_close_held)
        _children_told = True


_children_told = False


def _close_held() -> None:
    for descriptor in _held_by:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held_by.clear()
