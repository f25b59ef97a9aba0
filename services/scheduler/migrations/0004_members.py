"""what was heard of each process of an attempt"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.add_column(sa.Column("seen", sa.Text(), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("decided_by", sa.Integer(), nullable=True))
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.alter_column("seen", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.drop_column("decided_by")
        batch_op.drop_column("seen")
