"""A stage may say which checkpoints of its finished runs it keeps."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("stages", sa.Column("keep", sa.Text(), nullable=True))


def downgrade() -> None:
    raise NotImplementedError("a study is never downgraded: restore the backup")
