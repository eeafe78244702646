"""Each ledger has an identity, by which its messages and its queue are known."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "v0_2_0"
down_revision = "v0_1_0"


def upgrade() -> None:
    ledger = op.create_table(
        "ledger", sa.Column("id", sa.String(), nullable=False), sa.PrimaryKeyConstraint("id")
    )
    op.bulk_insert(ledger, [{"id": secrets.token_hex(16)}])


def downgrade() -> None:
    op.execute(
        "UPDATE runs SET queue = 'clips' WHERE queue = 'clips-' || (SELECT substr(id, 1, 8) FROM ledger)"
    )
    op.drop_table("ledger")
