"""What was compiled, and where.

Revision ID: 0001
Revises: nothing
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables of kernels and targets."""
    op.create_table(
        "flashgen_kernels",
        sa.Column("id", _Id, nullable=False),
        sa.Column("op", sa.String(), nullable=False),
        sa.Column("spec_key", sa.String(), nullable=False),
        sa.Column("variant", sa.String(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_flashgen_kernels"),
        sa.UniqueConstraint("spec_key", "variant", "digest", "op", name="uq_flashgen_kernels_spec_key"),
    )
    op.create_table(
        "flashgen_targets",
        sa.Column("id", _Id, nullable=False),
        sa.Column("gpu", sa.String(), nullable=False),
        sa.Column("arch", sa.String(), nullable=False),
        sa.Column("hardware", sa.JSON(), nullable=False),
        sa.Column("hardware_sha", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_flashgen_targets"),
        sa.UniqueConstraint("gpu", "arch", "hardware_sha", name="uq_flashgen_targets_gpu"),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table("flashgen_targets")
    op.drop_table("flashgen_kernels")
