"""${message}"""

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


# batch_alter_table rebuilds a table from what can be read of it: indexes come back without DESC (make ix_runs_claim
# and ix_runs_claim_pack anew), intakes and runs without AUTOINCREMENT (table_kwargs). tests/migrations compares with tables.py.
def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    raise NotImplementedError("a study is never downgraded: restore the backup")
