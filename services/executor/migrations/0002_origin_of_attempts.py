"""what a node found of a source and an environment"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    column = sa.Column("origin", sa.JSON(), nullable=False, server_default=sa.text("'{}'"))
    with op.batch_alter_table("executions", schema=None) as batch_op:
        batch_op.add_column(column)
    with op.batch_alter_table("executions", schema=None) as batch_op:
        batch_op.alter_column("origin", server_default=None)  # PostgreSQL cannot compare defaults of this type


def downgrade() -> None:
    with op.batch_alter_table("executions", schema=None) as batch_op:
        batch_op.drop_column("origin")
