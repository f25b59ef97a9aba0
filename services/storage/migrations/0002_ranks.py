"""how many ranks an attempt has, and which of them left artifacts"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("log_attempt", schema=None) as attempts:
        attempts.add_column(sa.Column("rank_count", sa.Integer(), nullable=False, server_default="1"))
    with op.batch_alter_table("log_attempt", schema=None) as attempts:
        attempts.alter_column("rank_count", server_default=None)

    with op.batch_alter_table("fileset", schema=None) as filesets:
        filesets.add_column(sa.Column("rank", sa.Integer(), nullable=False, server_default="0"))
    with op.batch_alter_table("fileset", schema=None) as filesets:
        filesets.alter_column("rank", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("fileset", schema=None) as filesets:
        filesets.drop_column("rank")
    with op.batch_alter_table("log_attempt", schema=None) as attempts:
        attempts.drop_column("rank_count")
