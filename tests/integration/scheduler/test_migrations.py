"""Tables that are what the code says."""

from __future__ import annotations

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from libs.common.migrations import config_for
from services.scheduler.domain.shapes import shape_of
from services.scheduler.rows import read_parts
from services.scheduler.store import Base
from tests.unit.scheduler.world import World

pytestmark = pytest.mark.integration


async def test_the_migrations_make_the_tables_of_the_code(world: World):
    def differences(connection: Connection) -> list[object]:
        found = compare_metadata(MigrationContext.configure(connection), Base.metadata)
        return [item for item in found if "alembic_version" not in str(item)]

    async with world.store.writer.connect() as connection:
        assert await connection.run_sync(differences) == []


JOB = """INSERT INTO jobs (id, team_id, project_id, experiment_id, kind, template, milli_cpus, memory_bytes, milli_gpus,
    created_by, state, detail, desired_state, revision, created_us, ready_us, checked_us, attempt_count, retries_used,
    infra_retries_used, preemptions_used, traceparent)
    VALUES ('js1', 't', 'p', '', 'command', '{}', 1500, 1024, 2000, 'u', 'running', '', 'running', 1, 1, 0, 0, 1, 0, 0,
    0, '')"""
ATTEMPT = """INSERT INTO attempts (id, job_id, number, node_id, state, detail, created_us, checked_us, isolation,
    peak_memory_bytes, addresses, gpu_indices, execution_revision, forgotten)
    VALUES ('at1', 'js1', 1, 'node1', 'running', '', 1, 0, '', 0, '{}', '[]', 0, false)"""


async def test_what_was_queued_and_ran_before_an_upgrade_is_there_after_it(world: World):
    def there_and_back(connection: Connection) -> tuple[str, str, int]:
        config = config_for("scheduler")
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
        for statement in (JOB, ATTEMPT):
            connection.execute(text(statement))
        command.upgrade(config, "head")
        job = connection.execute(text("SELECT parts, priority FROM jobs")).one()
        node_ids = connection.execute(text("SELECT node_ids FROM attempts")).scalar_one()
        return job.parts, node_ids, job.priority

    async with world.store.writer.connect() as connection:
        parts, node_ids, priority = await connection.run_sync(there_and_back)
    assert read_parts(parts) == (shape_of(1.5, 1024, 2),)
    assert (node_ids, priority) == ('["node1"]', 50)
