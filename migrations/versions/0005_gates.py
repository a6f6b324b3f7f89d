"""A run may wait behind a gate and start from another run's weights; a stage may belong to a phase of a plan."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # written out: added by Alembic a column would have no foreign key on SQLite
    number = "INTEGER" if op.get_bind().dialect.name == "sqlite" else "BIGINT"
    op.execute(f"ALTER TABLE runs ADD COLUMN gate {number} REFERENCES gates (id)")
    op.add_column("runs", sa.Column("start_from", sa.Text(), nullable=True))
    op.add_column("stages", sa.Column("phase", sa.Text(), nullable=True))
    behind, shut = sa.text("gate IS NOT NULL"), sa.text("decision IS NULL")
    op.create_index("ix_runs_gate", "runs", ["gate"], sqlite_where=behind, postgresql_where=behind)
    op.create_index("ix_gates_undecided", "gates", ["stage"], sqlite_where=shut, postgresql_where=shut)
    op.create_index("ix_gates_stage_condition", "gates", ["stage", "condition"], unique=True)
    starting = sa.text("start_from IS NOT NULL")
    op.create_index("ix_runs_start_from", "runs", ["state"], sqlite_where=starting, postgresql_where=starting)


def downgrade() -> None:
    raise NotImplementedError("a study is never downgraded: restore the backup")
