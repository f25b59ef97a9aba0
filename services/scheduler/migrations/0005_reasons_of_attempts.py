"""how an attempt's process ended, in one word"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    column = sa.Column("reason", sa.String(), nullable=False, server_default="")
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.add_column(column)
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.alter_column("reason", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.drop_column("reason")
