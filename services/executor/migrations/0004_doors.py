"""doors: where people enter the running jobs of a node"""

import sqlalchemy as sa
import sqlmodel.sql.sqltypes
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    text = sqlmodel.sql.sqltypes.AutoString
    with op.batch_alter_table("nodes", schema=None) as nodes:
        nodes.add_column(sa.Column("door", text(length=255), nullable=False, server_default=""))
    with op.batch_alter_table("nodes", schema=None) as nodes:
        nodes.alter_column("door", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("nodes", schema=None) as nodes:
        nodes.drop_column("door")
