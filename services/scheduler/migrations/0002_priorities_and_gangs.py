"""priorities, parts of a gang, limits of waiting, and who moved a job and why"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SHAPE = ("milli_gpus", "milli_cpus", "memory_bytes")


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("parts", sa.Text(), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="50"))
        batch_op.add_column(sa.Column("max_wait_us", sa.BigInteger(), nullable=False, server_default="0"))
    amounts = " || ', ' || ".join(SHAPE)
    op.execute(f"UPDATE jobs SET parts = '[[1, ' || {amounts} || ', \"\", 0]]'")  # noqa: S608 - constants
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        for column in SHAPE:
            batch_op.drop_column(column)
        for column in ("parts", "priority", "max_wait_us"):
            batch_op.alter_column(column, server_default=None)

    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.add_column(sa.Column("node_ids", sa.Text(), nullable=False, server_default=""))
    op.execute("UPDATE attempts SET node_ids = '[\"' || node_id || '\"]'")
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.alter_column("node_ids", server_default=None)

    with op.batch_alter_table("timeline", schema=None) as batch_op:
        for column in ("actor", "cause", "trace_id"):
            batch_op.add_column(sa.Column(column, sa.String(), nullable=False, server_default=""))
    with op.batch_alter_table("timeline", schema=None) as batch_op:
        for column in ("actor", "cause", "trace_id"):
            batch_op.alter_column(column, server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("timeline", schema=None) as batch_op:
        for column in ("trace_id", "cause", "actor"):
            batch_op.drop_column(column)
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.drop_column("node_ids")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        for column in ("max_wait_us", "priority", "parts"):
            batch_op.drop_column(column)
        for column in SHAPE:
            batch_op.add_column(sa.Column(column, sa.BigInteger(), nullable=False, server_default="0"))
