"""Contrastive learning on the global objective, with batches of any size."""

from emc2.contrastive.estimator import (
    PLAIN_VIEW,
    Batch,
    EmbedFn,
    Estimator,
    Info,
    State,
    Views,
    algorithm,
    check_batch,
    draw_views,
    embed_batch,
    shard_surrogate,
)
