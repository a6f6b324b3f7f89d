"""Notes and tags, workers that can be asked to leave, stages that can be renamed and deleted, a log of changes.

On SQLite `runs` is rebuilt, so that no id is ever given twice; on PostgreSQL that never happens.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

COLUMNS = """
    id, stage, intake, family, label, config, fingerprint, group_key, seed, state, wish, wake_at,
    priority, pack_key, attempt, failures, lost, worker, lease_until, budget, steps_done, summary, loss,
    checkpoint, checkpoint_prev, checkpoint_best, cause, message, source, source_sha256, created_at,
    started_at, ended_at
"""


def upgrade() -> None:
    op.add_column("stages", sa.Column("defined_as", sa.Text(), nullable=True))
    op.add_column("workers", sa.Column("wish", sa.Text(), nullable=True))
    op.add_column("attempts", sa.Column("summary", sa.Text(), nullable=True))
    _intakes()
    if op.get_bind().dialect.name == "sqlite":
        _runs()
    else:
        op.add_column("runs", sa.Column("note", sa.Text(), nullable=True))
        _wake_index()
    op.create_table(
        "tags",
        sa.Column("run_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run_id", "tag"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_tags_tag", "tags", ["tag"], unique=False)
    op.create_table(
        "changes",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("verb", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("command_line", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def _intakes() -> None:
    op.add_column("intakes", sa.Column("removing", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.drop_index("ix_intakes_open", "intakes")
    op.create_index(
        "ix_intakes_open",
        "intakes",
        ["stage"],
        unique=True,
        sqlite_where=sa.text("NOT complete AND NOT removing"),
        postgresql_where=sa.text("NOT complete AND NOT removing"),
    )


def _runs() -> None:
    op.create_table(
        "runs_new",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("intake", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("family", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("group_key", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("wish", sa.Text(), nullable=True),
        sa.Column("wake_at", sa.Double(), nullable=True),
        sa.Column("priority", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("pack_key", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lost", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("budget", sa.BigInteger(), nullable=True),
        sa.Column("steps_done", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("summary", sa.Text(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("checkpoint", sa.Text(), nullable=True),
        sa.Column("checkpoint_prev", sa.Text(), nullable=True),
        sa.Column("checkpoint_best", sa.Text(), nullable=True),
        sa.Column("cause", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("source_sha256", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name=op.f("ck_runs_leased")),
        sa.CheckConstraint("(state = 'running') = (worker IS NOT NULL)", name=op.f("ck_runs_owned")),
        sa.CheckConstraint(
            "(state IN ('done', 'failed', 'cancelled', 'skipped')) = (ended_at IS NOT NULL)", name=op.f("ck_runs_ended")
        ),
        sa.CheckConstraint(
            "state IN ('waiting', 'pending', 'running', 'done', 'failed', 'cancelled', 'skipped')",
            name=op.f("ck_runs_state"),
        ),
        sa.CheckConstraint("wish IS NULL OR wish IN ('cancel', 'pause')", name=op.f("ck_runs_wish")),
        sa.CheckConstraint("attempt >= 0 AND failures >= 0 AND lost >= 0", name=op.f("ck_runs_counters")),
        sa.CheckConstraint("steps_done >= 0", name=op.f("ck_runs_steps")),
        sa.ForeignKeyConstraint(
            ["intake"],
            ["intakes.id"],
        ),
        sa.ForeignKeyConstraint(
            ["stage"],
            ["stages.name"],
        ),
        sa.ForeignKeyConstraint(
            ["worker"],
            ["workers.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("stage", "fingerprint"),
        sqlite_autoincrement=True,
    )
    op.execute(f"INSERT INTO runs_new ({COLUMNS}) SELECT {COLUMNS} FROM runs")
    op.drop_table("runs")
    op.rename_table("runs_new", "runs")
    op.create_index(
        "ix_runs_claim",
        "runs",
        ["intake", "stage", sa.text("priority DESC"), "id"],
        unique=False,
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index(
        "ix_runs_claim_pack",
        "runs",
        ["intake", "stage", "pack_key", sa.text("priority DESC"), "id"],
        unique=False,
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index("ix_runs_count", "runs", ["intake", "stage", "state"], unique=False)
    op.create_index("ix_runs_ended", "runs", ["stage", "ended_at"], unique=False)
    op.create_index("ix_runs_group", "runs", ["stage", "group_key"], unique=False)
    op.create_index(
        "ix_runs_lease",
        "runs",
        ["lease_until"],
        unique=False,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index("ix_runs_loss", "runs", ["stage", "loss"], unique=False)
    _wake_index()
    op.create_index(
        "ix_runs_worker",
        "runs",
        ["worker"],
        unique=False,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )


def _wake_index() -> None:
    op.create_index(
        "ix_runs_wake",
        "runs",
        ["wake_at"],
        unique=False,
        sqlite_where=sa.text("state = 'waiting'"),
        postgresql_where=sa.text("state = 'waiting'"),
    )


def downgrade() -> None:
    raise NotImplementedError("a study is never downgraded: restore the backup")
