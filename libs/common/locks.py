"""One writer per database: two processes on one would each keep their own picture of it in memory."""

from __future__ import annotations

import asyncio
import fcntl
import os
from zlib import crc32

from sqlalchemy import text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from libs.common.errors import NablaError

PULSE_S = 10.0


class AlreadyHeld(NablaError):
    def __init__(self, name: str, url: URL) -> None:
        super().__init__(f"Another process runs {name} on {url.render_as_string(hide_password=True)}.")


class LockLost(NablaError):
    def __init__(self, name: str, url: URL) -> None:
        where = url.render_as_string(hide_password=True)
        super().__init__(f"The session by which this process alone runs {name} on {where} is gone.")


class SoleWriter:
    """Holds the right to be the one process of a service on a database.

    Args:
        url: the database; a file is locked by flock beside it, PostgreSQL by an advisory lock of one session.
        name: the service, as several may share one PostgreSQL database.
    """

    def __init__(self, url: URL, name: str) -> None:
        self._url = url
        self._name = name
        self.held = asyncio.Event()

    async def run(self) -> None:
        """Takes the lock, sets `held`, and keeps it until cancelled.

        Raises:
            AlreadyHeld: another process has it.
            LockLost: the session that held it is gone; another process may have it by now.
        """
        if self._url.get_backend_name() == "sqlite":
            await self._hold_file()
        else:
            await self._hold_session()

    async def _hold_file(self) -> None:
        descriptor = os.open(f"{self._url.database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held.set()
            await asyncio.Event().wait()
        except BlockingIOError:
            raise AlreadyHeld(self._name, self._url) from None
        finally:
            os.close(descriptor)

    async def _hold_session(self) -> None:
        engine = create_async_engine(self._url, pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT")
        try:
            async with engine.connect() as session:
                question = text("SELECT pg_try_advisory_lock(:key)")
                if not (await session.execute(question, {"key": crc32(self._name.encode())})).scalar():
                    raise AlreadyHeld(self._name, self._url)
                self.held.set()
                while True:
                    await asyncio.sleep(PULSE_S)
                    await session.execute(text("SELECT 1"))
        except DBAPIError as error:
            if self.held.is_set():
                raise LockLost(self._name, self._url) from error
            raise
        finally:
            await engine.dispose()
