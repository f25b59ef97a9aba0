"""An existing PostgreSQL: every database of the platform is met once, before a service stumbles over it."""

from __future__ import annotations

import asyncio
import time

from sqlalchemy.engine import make_url

from infra.local.installation import InstallationError

# Each service's own, and what runs log. The gateway has none.
DATABASES = ("registry", "registry_runs", "scheduler", "executor", "storage", "serving")
CONNECT_S = 5.0
AGAIN_S = 0.5


async def meet_all(template: str, patience_s: float = 20.0) -> None:
    """Returns when every database can be used; a server that is still starting is waited for.

    Args:
        template: URL in which `{service}` stands for a name out of DATABASES.

    Raises:
        InstallationError: one is not there, does not let us in, or does not answer in time.
    """
    deadline = time.monotonic() + patience_s
    await asyncio.gather(*(_meet(template.format(service=name), deadline) for name in DATABASES))


async def _meet(url: str, deadline: float) -> None:
    try:
        import asyncpg
    except ImportError:
        remedy = "`python3 infra/setup.py up` installs it."
        raise _refused(url, "the driver for PostgreSQL is not installed here", remedy) from None
    while True:
        try:
            connection = await asyncpg.connect(url, timeout=CONNECT_S)
        except (OSError, TimeoutError, asyncpg.CannotConnectNowError) as error:
            if time.monotonic() > deadline:
                raise _refused(url, str(error) or "no answer", "Start it, or mend database_url.") from None
            await asyncio.sleep(AGAIN_S)
        except asyncpg.InvalidCatalogNameError as error:
            name = make_url(url).database
            raise _refused(url, str(error), f"`createdb {name}` as its user makes it.") from None
        except asyncpg.PostgresError as error:
            raise _refused(url, str(error), "Mend database_url, or the server's rights.") from None
        else:
            await connection.close()
            return


def _refused(url: str, reason: str, remedy: str) -> InstallationError:
    return InstallationError(f"The database {_public(url)} cannot be used: {reason}. {remedy}")


def _public(url: str) -> str:
    return make_url(url).render_as_string(hide_password=True)
