"""What workers find out about packs: how fast they are, and whether they change no bit."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "packs",
        sa.Column("shape", sa.Text(), nullable=False),
        sa.Column("members", sa.Integer(), nullable=False),
        sa.Column("equal", sa.Boolean(), nullable=True),
        sa.Column("rate", sa.Double(), nullable=True),
        sa.Column("fits", sa.Boolean(), nullable=False),
        sa.Column("found_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("shape", "members"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    raise NotImplementedError("a study is never downgraded: restore the backup")
