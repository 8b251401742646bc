"""What was tried, and what came of it.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the table of trials."""
    op.create_table(
        "flashgen_trials",
        sa.Column("id", _Id, nullable=False),
        sa.Column("content_sha", sa.String(64), nullable=False),
        sa.Column("kernel_id", _Id, nullable=False),
        sa.Column("target_id", _Id, nullable=False),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("seqlen_q", sa.BigInteger(), nullable=False),
        sa.Column("seqlen_k", sa.BigInteger(), nullable=False),
        sa.Column("num_heads_q", sa.BigInteger(), nullable=False),
        sa.Column("num_heads_kv", sa.BigInteger(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("config_sha", sa.String(64), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("latency_ms", sa.Double()),
        sa.Column("latency_p10_ms", sa.Double()),
        sa.Column("latency_p90_ms", sa.Double()),
        sa.Column("max_abs_error", sa.Double()),
        sa.Column("error_ratio", sa.Double()),
        sa.Column("facts", sa.JSON()),
        sa.Column("rank", sa.BigInteger()),
        sa.Column("bound_by", sa.Text()),
        sa.Column("predicted_ms", sa.Double()),
        sa.Column("model", sa.Text()),
        sa.Column("message", sa.Text()),
        sa.Column("quality", sa.String(), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.Column("protocol", sa.Text(), nullable=False),
        sa.Column("session", sa.String(), nullable=False),
        sa.Column("created", sa.String(), nullable=False),
        sa.Column("origin", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_flashgen_trials"),
        sa.UniqueConstraint("content_sha", name="uq_flashgen_trials_content_sha"),
        sa.ForeignKeyConstraint(["kernel_id"], ["flashgen_kernels.id"], name="fk_flashgen_trials_kernel_id"),
        sa.ForeignKeyConstraint(["target_id"], ["flashgen_targets.id"], name="fk_flashgen_trials_target_id"),
        sa.CheckConstraint(
            "status <> 'predicted' OR latency_ms IS NULL", name=op.f("ck_flashgen_trials_predicted_is_not_timed")
        ),
    )
    op.create_index("ix_flashgen_trials_kernel_id_target_id", "flashgen_trials", ["kernel_id", "target_id"])
    op.create_index("ix_flashgen_trials_session", "flashgen_trials", ["session"])


def downgrade() -> None:
    """Drop it, with every trial."""
    op.drop_table("flashgen_trials")
