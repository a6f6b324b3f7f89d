"""The schema. Invariants live here as CHECKs, so that no code, ours or a user's SQL, can break them.

Times are seconds since 1970 in UTC, by the database's clock. JSON columns hold canonical JSON text.
There is no ON DELETE CASCADE: rebuilding a table in a migration would empty its children.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, Integer, MetaData, Table, Text, UniqueConstraint

SCHEMA = "0005"  # the Alembic revision that these tables are

STATES = ("waiting", "pending", "running", "done", "failed", "cancelled", "skipped")
OPEN = ("waiting", "pending", "running")
FINAL = ("done", "failed", "cancelled", "skipped")

metadata = MetaData(
    naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s", "ck": "ck_%(table_name)s_%(constraint_name)s"}
)

# SQLite gives a rowid only to a column that says INTEGER; other databases need 64 bits
Id = sa.BigInteger().with_variant(Integer, "sqlite")


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


study = Table(
    "study",
    metadata,
    Column("id", Text, primary_key=True),  # a UUID; checkpoints carry it, so two databases never share one
    Column("created_at", sa.Double, nullable=False),
    Column("lease_s", sa.Double, nullable=False),  # how long a claim holds without a heartbeat
    Column("root", Text),  # where relative paths start; null: the folder of the database file
)

stages = Table(
    "stages",
    metadata,
    Column("name", Text, primary_key=True),
    Column("family", Text, nullable=False),
    Column("version", Integer, nullable=False),  # the family's, when the stage was made
    Column("family_in_source", sa.Boolean, nullable=False),  # the family is code of the definition file
    Column("has_rule", sa.Boolean, nullable=False),  # the definition file has a refine rule for this stage
    Column("source", Text),  # the definition file, relative to the definitions' folder
    Column("source_sha256", Text),
    Column("command_line", Text, nullable=False),
    Column("fields", Text, nullable=False),  # JSON {config field: type, alias: "=" and its field}
    Column("metrics", Text, nullable=False),  # JSON [{name, unit, better, primary}]
    Column("seed_fields", Text, nullable=False),  # JSON [name]
    Column("data", Text, nullable=False),  # JSON {corpus: sha256}
    Column("paused", sa.Boolean, nullable=False, server_default=sa.false()),
    Column("created_at", sa.Double, nullable=False),
    Column("defined_as", Text),  # its name in the definition file, where `rnnq rename` gave it another
    Column("keep", Text),  # which checkpoints of its finished runs `rnnq gc` keeps; null: the default of retention.py
    Column("phase", Text),  # the part of a plan that it belongs to
)

intakes = Table(
    "intakes",
    metadata,
    Column("id", Id, primary_key=True),
    Column("stage", Text, ForeignKey("stages.name"), nullable=False),
    Column("complete", sa.Boolean, nullable=False, server_default=sa.false()),
    Column("host", Text, nullable=False),  # who fills it: an open intake of a dead process is removed
    Column("pid", Integer, nullable=False),
    Column("pid_start", Text),
    Column("beat_at", sa.Double, nullable=False),
    # all intakes of a stage that is being deleted are open at once: so it is gone for every reader before its rows are
    Column("removing", sa.Boolean, nullable=False, server_default=sa.false()),
    # one open intake a stage: a second init waits for the first
    Index(
        "ix_intakes_open",
        "stage",
        unique=True,
        sqlite_where=sa.text("NOT complete AND NOT removing"),
        postgresql_where=sa.text("NOT complete AND NOT removing"),
    ),
    Index("ix_intakes_stage", "stage", "complete"),
    # no id is given twice: an init that others took for dead must not write into the intake of its successor
    sqlite_autoincrement=True,
)

runs = Table(
    "runs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("stage", Text, ForeignKey("stages.name"), nullable=False),
    Column("intake", Id, ForeignKey("intakes.id"), nullable=False),
    Column("family", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("config", Text, nullable=False),  # never changes
    Column("fingerprint", Text, nullable=False),  # never changes
    Column("group_key", Text, nullable=False),
    Column("seed", sa.BigInteger),
    Column("state", Text, nullable=False),
    Column("wish", Text),  # what the owner shall do: it checkpoints, then obeys
    Column("wake_at", sa.Double),  # a waiting run becomes pending then
    Column("priority", Integer, nullable=False, server_default=sa.text("0")),
    Column("pack_key", Text),
    Column("attempt", Integer, nullable=False, server_default=sa.text("0")),  # only ever grows: the fencing token
    # since the last new checkpoint, or the last retry by a person
    Column("failures", Integer, nullable=False, server_default=sa.text("0")),
    Column("lost", Integer, nullable=False, server_default=sa.text("0")),  # attempts lost since the last new checkpoint
    Column("worker", Text, ForeignKey("workers.id")),
    Column("lease_until", sa.Double),
    Column("budget", sa.BigInteger),  # steps; null when only the family's code knows
    Column("steps_done", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    Column("summary", Text),
    Column("loss", sa.Double),  # the family's primary metric
    Column("checkpoint", Text),  # JSON {path, step, sha256, bytes}
    Column("checkpoint_prev", Text),
    Column("checkpoint_best", Text),
    Column("cause", Text),
    Column("message", Text),
    Column("source", Text),
    Column("source_sha256", Text),
    Column("created_at", sa.Double, nullable=False),
    Column("started_at", sa.Double),
    Column("ended_at", sa.Double),
    Column("note", Text),  # what a person says of it
    Column("gate", Id, ForeignKey("gates.id")),  # what it waits for, or waited for
    Column("start_from", Text),  # JSON: the run whose weights it starts from; null: its own
    UniqueConstraint("stage", "fingerprint"),
    CheckConstraint(_one_of("state", STATES), name="state"),
    CheckConstraint("wish IS NULL OR wish IN ('cancel', 'pause')", name="wish"),
    CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="leased"),
    CheckConstraint("(state = 'running') = (worker IS NOT NULL)", name="owned"),
    CheckConstraint(f"({_one_of('state', FINAL)}) = (ended_at IS NOT NULL)", name="ended"),
    CheckConstraint("attempt >= 0 AND failures >= 0 AND lost >= 0", name="counters"),
    CheckConstraint("steps_done >= 0", name="steps"),
    # claim and count begin with the intake: rows of an unfinished init are never visited
    Index(
        "ix_runs_claim",
        "intake",
        "stage",
        sa.text("priority DESC"),
        "id",
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    ),
    Index(
        "ix_runs_claim_pack",
        "intake",
        "stage",
        "pack_key",
        sa.text("priority DESC"),
        "id",
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    ),
    Index(
        "ix_runs_lease",
        "lease_until",
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    ),
    Index(
        "ix_runs_wake",
        "wake_at",
        sqlite_where=sa.text("state = 'waiting'"),
        postgresql_where=sa.text("state = 'waiting'"),
    ),
    Index(
        "ix_runs_worker",
        "worker",
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    ),
    Index("ix_runs_count", "intake", "stage", "state"),
    Index("ix_runs_loss", "stage", "loss"),
    Index("ix_runs_group", "stage", "group_key"),
    Index("ix_runs_ended", "stage", "ended_at"),
    Index(
        "ix_runs_gate",
        "gate",
        sqlite_where=sa.text("gate IS NOT NULL"),
        postgresql_where=sa.text("gate IS NOT NULL"),
    ),
    Index(
        "ix_runs_start_from",
        "state",
        sqlite_where=sa.text("start_from IS NOT NULL"),
        postgresql_where=sa.text("start_from IS NOT NULL"),
    ),
    # no id is given twice: one that stands in a note, or in a file's name, never means another run
    sqlite_autoincrement=True,
)

tags = Table(
    "tags",
    metadata,
    Column("run_id", Id, ForeignKey("runs.id"), primary_key=True),
    Column("tag", Text, primary_key=True),
    Index("ix_tags_tag", "tag"),
    sqlite_with_rowid=False,
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),  # host name, boot and process namespace: where a pid means something
    Column("pid", Integer, nullable=False),
    Column("pid_start", Text),  # with the pid it names a process for good; null where the system does not tell
    Column("device", Text, nullable=False),
    Column("scope", Text),  # JSON of what it may claim
    Column("command_line", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("message", Text),
    Column("started_at", sa.Double, nullable=False),
    Column("beat_at", sa.Double, nullable=False),
    Column("left_at", sa.Double),
    Column("wish", Text),  # stop: checkpoint, give back, leave; drain: leave after the run at hand
    CheckConstraint("state IN ('live', 'left', 'lost')", name="state"),
    CheckConstraint("(state = 'live') = (left_at IS NULL)", name="left"),
    Index(
        "ix_workers_live", "host", sqlite_where=sa.text("state = 'live'"), postgresql_where=sa.text("state = 'live'")
    ),
)

attempts = Table(
    "attempts",
    metadata,
    Column("run_id", Id, ForeignKey("runs.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("worker", Text, ForeignKey("workers.id"), nullable=False),
    Column("host", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("started_at", sa.Double, nullable=False),
    Column("ended_at", sa.Double),
    Column("ended", Text),  # done, failed, released, lost, cancelled
    Column("cause", Text),
    Column("message", Text),
    Column("traceback", Text),
    Column("step_from", sa.BigInteger),
    Column("step_to", sa.BigInteger),
    Column("git_commit", Text),
    Column("git_dirty", sa.Boolean),
    Column("command_line", Text, nullable=False),
    Column("versions", Text),  # JSON
    Column("numerics", Text),  # JSON: what the bits depend on
    Column("exact", sa.Boolean),  # false: resumed under other numerics, so not to the bit
    Column("source_sha256", Text),
    Column("summary", Text),  # JSON: what it ended with; a run that is extended ends several times
    CheckConstraint("(ended IS NULL) = (ended_at IS NULL)", name="ended"),
    CheckConstraint("ended IS NULL OR ended IN ('done', 'failed', 'released', 'lost', 'cancelled')", name="how"),
    sqlite_with_rowid=False,
)

metrics = Table(
    "metrics",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
)

point = Table(
    "point",
    metadata,
    Column("run_id", Id, ForeignKey("runs.id"), primary_key=True),
    Column("metric_id", Id, ForeignKey("metrics.id"), primary_key=True),
    Column("step", sa.BigInteger, primary_key=True),
    Column("value", sa.Double),  # null: it was not finite
    sqlite_with_rowid=False,
)

lineage = Table(
    "lineage",
    metadata,
    Column("child", Id, ForeignKey("runs.id"), primary_key=True),
    Column("parent", Id, ForeignKey("runs.id"), primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("detail", Text),
    CheckConstraint("kind IN ('promote', 'extend', 'retry', 'continue', 'probe')", name="kind"),
    Index("ix_lineage_parent", "parent"),
    sqlite_with_rowid=False,
)

gates = Table(
    "gates",
    metadata,
    Column("id", Id, primary_key=True),
    Column("stage", Text, ForeignKey("stages.name"), nullable=False),
    Column("condition", Text, nullable=False),  # JSON: what it waits for, and what then
    Column("decision", Text),  # open, shut; null while undecided
    Column("seen", Text),  # JSON: the values that it was decided on, and why
    Column("decided_at", sa.Double),
    Index("ix_gates_stage_condition", "stage", "condition", unique=True),
    Index(
        "ix_gates_undecided",
        "stage",
        sqlite_where=sa.text("decision IS NULL"),
        postgresql_where=sa.text("decision IS NULL"),
    ),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("run_id", Id, ForeignKey("runs.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("step", sa.BigInteger),
    Column("path", Text, nullable=False),
    Column("bytes", sa.BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Index("ix_artifacts_run", "run_id"),
)

packs = Table(
    "packs",
    metadata,
    Column("shape", Text, primary_key=True),  # JSON: family, version, pack key, and all that the bits depend on
    Column("members", Integer, primary_key=True),
    Column("equal", sa.Boolean),  # each member has the bits that it has alone; null: not tried
    Column("rate", sa.Double),  # member-steps per second; null: not timed
    Column("fits", sa.Boolean, nullable=False),  # false: memory was out
    Column("found_at", sa.Double, nullable=False),
    sqlite_with_rowid=False,
)

changes = Table(
    "changes",
    metadata,
    Column("id", Id, primary_key=True),
    Column("at", sa.Double, nullable=False),
    Column("verb", Text, nullable=False),  # retry, cancel, extend, delete, ...
    Column("detail", Text, nullable=False),  # JSON: which runs, or which stage, and how
    Column("host", Text, nullable=False),
    Column("command_line", Text, nullable=False),
)

POINTS_VIEW = """
CREATE VIEW points AS
SELECT point.run_id AS run_id, metrics.name AS name, point.step AS step, point.value AS value
FROM point JOIN metrics ON metrics.id = point.metric_id
"""
