"""many nodes: what is known of each, drains, tickets for new ones, demand for more"""

import sqlalchemy as sa
import sqlmodel.sql.sqltypes
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    text = sqlmodel.sql.sqltypes.AutoString
    with op.batch_alter_table("nodes", schema=None) as nodes:
        nodes.add_column(sa.Column("gpu_memory_bytes", sa.BigInteger(), nullable=False, server_default="0"))
        nodes.add_column(sa.Column("address", text(length=255), nullable=False, server_default=""))
        nodes.add_column(sa.Column("runtimes", sa.JSON(), nullable=False, server_default="[]"))
        nodes.add_column(sa.Column("network", text(length=16), nullable=False, server_default=""))
        nodes.add_column(sa.Column("draining", sa.Boolean(), nullable=False, server_default=sa.false()))
        nodes.add_column(sa.Column("is_head", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "drains",
        sa.Column("node_id", text(length=64), nullable=False),
        sa.Column("since_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node_id"),
    )
    op.create_table(
        "node_tokens",
        sa.Column("token_hash", text(length=64), nullable=False),
        sa.Column("expires_us", sa.BigInteger(), nullable=False),
        sa.Column("used_us", sa.BigInteger(), nullable=True),
        sa.Column("hostname", text(length=255), nullable=False),
        sa.PrimaryKeyConstraint("token_hash"),
    )
    op.create_table(
        "demand",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("shapes", sa.JSON(), nullable=False),
        sa.Column("told_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def downgrade() -> None:
    for table in ("demand", "node_tokens", "drains"):
        op.drop_table(table)
    with op.batch_alter_table("nodes", schema=None) as nodes:
        for column in ("is_head", "draining", "network", "runtimes", "address", "gpu_memory_bytes"):
            nodes.drop_column(column)
