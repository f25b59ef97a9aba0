"""executions by attempt and rank"""

import sqlalchemy as sa
import sqlmodel.sql.sqltypes
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    text = sqlmodel.sql.sqltypes.AutoString
    with op.batch_alter_table("executions", schema=None) as executions:
        executions.add_column(sa.Column("attempt_id", text(length=40), nullable=False, server_default=""))
        executions.add_column(sa.Column("rank", sa.Integer(), nullable=False, server_default="0"))
        executions.add_column(sa.Column("gang", sa.JSON(), nullable=False, server_default="{}"))
    op.execute("UPDATE executions SET attempt_id = id")
    with op.batch_alter_table("executions", schema=None) as executions:
        for column in ("attempt_id", "rank", "gang"):
            executions.alter_column(column, server_default=None)
        executions.create_index("executions_attempt", ["attempt_id", "rank"], unique=True)


def downgrade() -> None:
    with op.batch_alter_table("executions", schema=None) as executions:
        executions.drop_index("executions_attempt")
        executions.drop_column("gang")
        executions.drop_column("rank")
        executions.drop_column("attempt_id")
