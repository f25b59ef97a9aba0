"""Every database of every service: its chain of migrations makes the tables that the code has, and runs once."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, text

from libs.common.migrations import ROOT, STEPS_TABLE, chain_folder, metadata_of, migrate
from libs.common.store import async_url, writer_engine

pytestmark = pytest.mark.integration


def databases() -> list[str]:
    """`registry`, `registry/runs`, ...: each folder that has a chain."""
    folders = {version.parent for version in ROOT.glob("services/*/migrations/**/[0-9]*.py")}
    return sorted(str(folder.relative_to(ROOT / "services")).replace("/migrations", "") for folder in folders)


def differences(connection: Connection, name: str) -> list[object]:
    options = {"compare_type": True, "compare_server_default": True}
    found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata_of(name))
    return [each for each in found if not (each[0] == "remove_table" and each[1].name == STEPS_TABLE)]


def test_every_service_that_stores_has_a_chain() -> None:
    assert {"registry", "registry/runs", "scheduler", "executor", "storage", "serving"} <= set(databases())
    for name in databases():
        assert chain_folder(name).is_dir()


@pytest.mark.parametrize("name", databases())
async def test_the_chain_makes_the_tables_of_the_code_and_is_run_once(name: str, database_url: str) -> None:
    engine = writer_engine(async_url(database_url))
    try:
        await migrate(engine, name)
        async with engine.connect() as connection:
            assert await connection.run_sync(differences, name) == []
            version = (await connection.execute(text(f"SELECT version_num FROM {STEPS_TABLE}"))).scalar()
        assert version == max(path.name[:4] for path in chain_folder(name).glob("[0-9]*.py"))
        said: list[str] = []

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def note(_c: object, _cursor: object, statement: str, _p: object, _x: object, _many: bool) -> None:
            said.append(statement.split(maxsplit=1)[0].upper())

        await migrate(engine, name)
        assert set(said) <= {"SELECT", "PRAGMA", "BEGIN"}
    finally:
        await engine.dispose()


def test_versions_are_numbered_without_a_gap_and_follow_each_other() -> None:
    for name in databases():
        files = sorted(chain_folder(name).glob("[0-9]*.py"))
        assert [path.name[:4] for path in files] == [f"{number:04d}" for number in range(1, len(files) + 1)]


async def test_a_database_of_a_later_release_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    engine = writer_engine(async_url(f"sqlite:///{tmp_path}/test.db"))
    try:
        await migrate(engine, "registry")
        async with engine.begin() as connection:
            await connection.execute(text(f"UPDATE {STEPS_TABLE} SET version_num = '9999'"))
        with pytest.raises(Exception, match="9999"):
            await migrate(engine, "registry")
        async with engine.connect() as connection:
            version = (await connection.execute(text(f"SELECT version_num FROM {STEPS_TABLE}"))).scalar()
        assert version == "9999"
    finally:
        await engine.dispose()
