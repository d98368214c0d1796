"""Magnitude pruning: `prune` in one shot, `GradualPruner` while training; both say what they did."""

from .gradual import GradualPruner
from .oneshot import prune
from .record import LayerRecord, PruneRecord

__all__ = ["GradualPruner", "LayerRecord", "PruneRecord", "prune"]
