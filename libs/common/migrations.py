"""Schema migrations: alembic, one chain of versions per database, in `services/<name>/migrations/`.

A further database of a service is named `<service>/<database>`: its chain is in `migrations/<database>/`, its
tables are in `store/<database>.py`.

`python -m libs.common.migrations new scheduler "add a column"` writes the next version from the difference between
the tables in the code and the chain so far.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import tempfile
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.common.store import async_url, writer_engine

ROOT = Path(__file__).resolve().parents[2]
STEPS_TABLE = "alembic_version"


def config_for(name: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations_env"))
    config.set_main_option("version_locations", str(chain_folder(name)))
    config.set_main_option("path_separator", "os")
    return config


def chain_folder(name: str) -> Path:
    service, _, database = name.partition("/")
    return ROOT / "services" / service / "migrations" / database


async def migrate(engine: AsyncEngine, service: str) -> None:
    """Brings the service's database to the newest version; nothing happens when it is there."""
    async with engine.connect() as connection:
        await connection.run_sync(_upgrade, service)
        await connection.commit()


def _upgrade(connection: Connection, service: str) -> None:
    config = config_for(service)
    if _present(connection) == ScriptDirectory.from_config(config).get_current_head():
        return
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _present(connection: Connection) -> str | None:
    if not inspect(connection).has_table(STEPS_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {STEPS_TABLE}")).scalar()  # noqa: S608 - a constant


def metadata_of(service: str) -> MetaData:
    name, _, database = service.partition("/")
    store: Any = importlib.import_module(f"services.{name}.store" + (f".{database}" if database else ""))
    metadata: MetaData = store.Base.metadata
    return metadata


async def write_version(service: str, message: str) -> None:
    """Writes the next migration, comparing the code with an SQLite database brought to the present version."""
    with tempfile.TemporaryDirectory() as folder:
        engine = writer_engine(async_url(f"sqlite:///{folder}/new.db"))
        await migrate(engine, service)
        async with engine.connect() as connection:
            await connection.run_sync(_revision, service, message)
        await engine.dispose()


def _revision(connection: Connection, service: str, message: str) -> None:
    config = config_for(service)
    config.attributes |= {"connection": connection, "metadata": metadata_of(service)}
    number = len(list(chain_folder(service).glob("[0-9]*.py"))) + 1
    command.revision(config, message=message, autogenerate=True, rev_id=f"{number:04d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["new"])
    parser.add_argument("service")
    parser.add_argument("message")
    arguments = parser.parse_args()
    asyncio.run(write_version(arguments.service, arguments.message))


if __name__ == "__main__":
    main()
